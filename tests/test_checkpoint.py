"""support/checkpoint.py: what is there under its own name is complete, what is damaged is passed over, nothing is lost."""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import config, metrics, run

import train
from model import Llama
from support import checkpoint
from support.named import named
from support.ranks import INTERRUPTS, interrupt_once

ROOT = Path(__file__).parents[1]
EVERY = ("--checkpoint-every", 2)  # 3 steps an epoch, 6 in all
STOPPER = """
import os, pathlib, signal, sftgo
left = pathlib.Path(__file__).with_suffix(".left")
def stopping(nats, tokens, lam):
    n = int(left.read_text()) - 1
    left.write_text(str(n))
    if n == 0:
        raise KeyboardInterrupt
    return sftgo.sft_go(nats, tokens, lam)
"""


@pytest.fixture
def stopper(tmp_path):
    """An objective that ends a run, as by a crash, before so many steps and a half: stopper(steps) -> flags."""
    file = tmp_path / "stopper.py"
    file.write_text(STOPPER)

    def flags(steps: int | None) -> list[str]:
        file.with_suffix(".left").write_text(str(10**9 if steps is None else 2 * steps + 1))  # it is asked twice a step
        return ["--objective", f"{file}:stopping"]

    return flags


def stopped_after(steps, folder, rows, out, stopper, *flags):
    with pytest.raises(KeyboardInterrupt):
        run(folder, rows, "--out", out, *EVERY, *stopper(steps), *flags)
    assert len(metrics(out)) == steps


def test_ctrl_c_says_what_is_saved_also_where_torch_wraps_it(folder, rows, tmp_path, stopper, monkeypatch):
    out = tmp_path / "out"
    for steps, said in ((1, f"no checkpoint in {out} yet"), (3, f"saved: {out}/checkpoints/step-000002; resume with")):
        with pytest.raises(KeyboardInterrupt, match=said):
            run(folder, rows, "--out", out, *EVERY, *stopper(steps))

    monkeypatch.setattr(
        "torch.distributed.checkpoint.FileSystemWriter.write_data", lambda *_: signal.raise_signal(signal.SIGINT)
    )
    before = signal.signal(signal.SIGINT, interrupt_once)
    with pytest.raises(KeyboardInterrupt, match="saved: .*step-000002"):
        run(folder, rows, "--out", out, *EVERY, *stopper(None))
    signal.signal(signal.SIGINT, before)
    INTERRUPTS.clear()


def resumed(folder, rows, out, stopper, *flags) -> Path:
    return run(folder, rows, "--out", out, *EVERY, *stopper(None), *flags)


def same_run(a, b) -> bool:
    times = ("seconds", "tokens_per_second", "peak_memory_bytes")
    logs = [[{k: v for k, v in row.items() if k not in times} for row in metrics(out)] for out in (a, b)]
    ours, theirs = (dict(Llama.from_pretrained(out / "model").named_parameters()) for out in (a, b))
    return logs[0] == logs[1] and all(torch.equal(p, theirs[name]) for name, p in ours.items())


def saved(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("steps", [1, 2, 3, 5])  # before any checkpoint, on one, on the edge of an epoch, between two
@pytest.mark.parametrize("grouper", ["random", "loss"])
def test_a_stopped_run_resumes_bit_for_bit(folder, rows, tmp_path, stopper, capsys, steps, grouper):
    flags = ("--grouper", grouper, "--lam-min", 0.1, "--weight-decay", 0.3)
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY, *flags)
    stopped_after(steps, folder, rows, tmp_path / "out", stopper, *flags)
    capsys.readouterr()
    out = resumed(folder, rows, tmp_path / "out", stopper, *flags)
    said = capsys.readouterr().out
    assert (f"after step {steps - steps % 2}\n" in said) == (steps > 1) and same_run(out, whole)
    assert saved(out) == ["step-000004", "step-000006"], "the newest two"


def test_a_run_stopped_after_its_last_step_writes_its_model(folder, rows, tmp_path, capsys):
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    assert same_run(run(folder, rows, "--out", out, *EVERY), whole) and "after step 6\n" in capsys.readouterr().out


def test_what_does_not_change_the_result_may_differ_on_resume_and_nothing_else(folder, rows, tmp_path, stopper):
    stopped_after(3, folder, rows, tmp_path / "out", stopper)
    for flag, value in (("--lr", 0.5), ("--eta", 0.3), ("--batch-size", 5), ("--seed", 1)):
        name = flag.removeprefix("--").replace("-", "_")
        with pytest.raises(ValueError, match=rf"holds a run with another {name} \({name} .*, now .*\)"):
            resumed(folder, rows, tmp_path / "out", stopper, flag, value)
    how = ("--checkpoint-activations", "--keep", 1, "--micro-batch-tokens", 127, "--cache", tmp_path / "cache")
    out = resumed(folder, rows, tmp_path / "out", stopper, *how, "--checkpoint-every", 1)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6] and saved(out) == ["step-000006"]


def test_recomputing_activations_changes_no_bit(folder, rows, tmp_path):
    a = run(folder, rows, "--out", tmp_path / "a", "--checkpoint-every", 0)
    b = run(folder, rows, "--out", tmp_path / "b", "--checkpoint-every", 0, "--checkpoint-activations")
    assert same_run(a, b) and not (a / "checkpoints").exists()


# Damage.


def shard(path):
    return next(path.glob("*.distcp"))


def flip_bit(path):
    raw = bytearray(shard(path).read_bytes())
    raw[len(raw) // 2] ^= 4
    shard(path).write_bytes(raw)


CHANGED = "__0_0.distcp is missing or has changed"
DAMAGE = {
    "a shard cut short": (lambda path: shard(path).write_bytes(shard(path).read_bytes()[:-9]), CHANGED),
    "a bit changed in a shard": (flip_bit, CHANGED),
    "a shard missing": (lambda path: shard(path).unlink(), CHANGED),
    "metadata missing": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "no checksums": (lambda path: (path / "crc32.json").unlink(), "not readable as JSON"),
    "checksums of nothing": (lambda path: (path / "crc32.json").write_text("{}"), "lists no files"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_one_line_and_kept(folder, rows, tmp_path, stopper, capsys, damage):
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    stopped_after(5, folder, rows, tmp_path / "out", stopper)
    spoil, reason = DAMAGE[damage]
    spoil(tmp_path / "out" / "checkpoints" / "step-000004")
    capsys.readouterr()
    out = resumed(folder, rows, tmp_path / "out", stopper)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if ": damaged (" in line]
    assert line.startswith(f"{out / 'checkpoints' / 'step-000004'}: damaged (") and reason in line
    assert line.endswith("looking for an older one") and same_run(out, whole)
    assert saved(out) == ["step-000004", "step-000004.damaged", "step-000006"]


def test_where_no_checkpoint_is_intact_nothing_is_thrown_away(folder, rows, tmp_path, stopper):
    stopped_after(5, folder, rows, tmp_path / "out", stopper)
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        flip_bit(path)
    for _ in range(2):  # nor by the next start
        with pytest.raises(ValueError, match="checkpoints: no checkpoint is intact; move them away to begin again"):
            resumed(folder, rows, tmp_path / "out", stopper)
        assert saved(tmp_path / "out") == ["step-000002", "step-000004"] and len(metrics(tmp_path / "out")) == 5


def test_a_checkpoint_damaged_twice_is_kept_twice(folder, rows, tmp_path, stopper):
    out = tmp_path / "out"
    stopped_after(5, folder, rows, out, stopper)
    flip_bit(out / "checkpoints" / "step-000004")
    stopped = stopper(3)  # two more steps, to 4 again
    with pytest.raises(KeyboardInterrupt):
        run(folder, rows, "--out", out, *EVERY, *stopped)
    flip_bit(out / "checkpoints" / "step-000004")
    resumed(folder, rows, out, stopper)
    assert saved(out) == ["step-000004", "step-000004.damaged", "step-000004.damaged1", "step-000006"]


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(folder, rows, tmp_path, stopper):
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    stopped_after(5, folder, rows, tmp_path / "out", stopper)
    folder_of = tmp_path / "out" / "checkpoints"
    (folder_of / "step-000004").rename(folder_of / "step-000004.part")  # all written, not yet renamed
    with open(tmp_path / "out" / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # nor the line finished
    out = resumed(folder, rows, tmp_path / "out", stopper)
    assert same_run(out, whole) and not list(folder_of.glob("*.part"))


# A disk that is full, or somebody else's.


def test_a_save_that_fails_leaves_the_one_before_and_says_so(folder, rows, tmp_path, monkeypatch):
    """A disk that is full at the second checkpoint."""
    out, saves = tmp_path / "out", []
    save = checkpoint.dcp.save

    def full(state, checkpoint_id, **how):
        saves.append(checkpoint_id)
        if len(saves) == 2:
            Path(checkpoint_id).mkdir(parents=True)
            (Path(checkpoint_id) / "__0_0.distcp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, checkpoint_id=checkpoint_id, **how)

    kept = r"step-000004\.part: cannot be written \(.*No space left.*\); .*The last checkpoint: .*step-000002$"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.dcp, "save", full)
        with pytest.raises(OSError, match=kept):
            run(folder, rows, "--out", out, *EVERY)
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    assert same_run(run(folder, rows, "--out", out, *EVERY), whole)


def test_a_really_full_disk_is_one_line(folder, rows, tmp_path, shell, full_disk):
    flags = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --max-steps 1"
    code, said = shell(*flags.split(), "--out", tmp_path / "out")
    assert code == 1 and "\n" not in said
    assert "step-000001.part: cannot be written (" in said and "The last checkpoint: none" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_cannot_be_written_is_one_line(folder, rows, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OSError, match="Permission denied"):
        run(folder, rows, "--out", tmp_path / "out")


@pytest.mark.fast
def test_a_plan_that_the_disk_cannot_hold_is_refused(folder, rows, tmp_path, monkeypatch):
    needed = 3 * 12 * sum(p.numel() for p in Llama.from_pretrained(folder).parameters())
    flags, refusal = ("--dry-run", "--out", tmp_path / "out"), "GB free, but 2 checkpoints and one being written take"
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=refusal):
        run(folder, rows, *flags)
    run(folder, rows, *flags, "--checkpoint-every", 0)
    held = tmp_path / "out" / "checkpoints" / "step-000002" / "__0_0.distcp"
    held.parent.mkdir(parents=True)
    held.write_bytes(b"x")  # which newer ones will replace
    cfg = config(folder, rows, *flags)
    about = checkpoint.record(cfg, named(cfg.objective, "--objective"), named(cfg.grouper, "--grouper"))
    (tmp_path / "out" / "config.json").write_text(json.dumps(about | {"versions": {}, "git_commit": None}))
    run(folder, rows, *flags)
    held.parent.rename(held.parent.with_suffix(".damaged"))  # which stay
    with pytest.raises(ValueError, match=refusal):
        run(folder, rows, *flags)


# Who may write a folder.


def test_a_run_is_its_content_wherever_that_lies(folder, rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(folder, rows, "--out", out)
    digests = json.loads((out / "config.json").read_text())["digests"]
    assert digests["data"] == hashlib.sha256(Path(rows).read_bytes()).hexdigest() and len(digests["model"]) == 64
    copy, moved = shutil.copytree(folder, tmp_path / "copy"), shutil.copy(rows, tmp_path / "moved.jsonl")
    (tmp_path / "link").symlink_to(copy)
    monkeypatch.chdir(tmp_path)
    for model, data in ((copy, rows), ("link", "moved.jsonl"), (folder, moved)):
        capsys.readouterr()
        run(model, data, "--out", out)
        assert "already finished" in capsys.readouterr().out
    Path(moved).write_bytes(Path(moved).read_bytes() + b"\n")
    changed = r"holds a run with another data \(data content \w+, now content \w+: what --data .*moved.jsonl holds"
    with pytest.raises(ValueError, match=changed):
        run(copy, moved, "--out", out)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ValueError, match="holds a run with another model "):
        run("link", rows, "--out", out)
    about = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(about | {"digests": {}}))
    with pytest.raises(ValueError, match="did not record the content of its data and model"):
        run(folder, rows, "--out", out)


def test_weights_that_the_saved_type_cannot_hold_and_paths_that_json_cannot_are_refused_before_training(
    folder, rows, tmp_path
):
    model = Llama.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e30
    large = shutil.copytree(folder, tmp_path / "large")
    model.save_pretrained(large)
    with pytest.raises(
        ValueError, match="as loaded, .*model.norm.weight.* nothing trained. Choose a wider --save-dtype"
    ):
        run(large, rows, "--out", tmp_path / "out", "--save-dtype", "float16")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="--out: a path that is not UTF-8"):
        run(folder, rows, "--out", tmp_path / "d\udce4")


def test_without_out_each_run_takes_the_next_free_folder(folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [run(folder, rows, "--max-steps", 1, "--seed", seed) for seed in (0, 0, 1)] == [
        Path(f"runs/run-{n}") for n in (1, 2, 3)
    ]


def test_a_folder_at_work_is_refused_to_another(folder, rows, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out: another run is at work in it; choose another --out"):
            run(folder, rows, "--out", tmp_path / "out", "--max-steps", 1)
    run(folder, rows, "--out", tmp_path / "out", "--max-steps", 1)


@pytest.mark.fast
@pytest.mark.parametrize("content", ["", "{}", '{"config": {}, "versions": 0, "git_commit": 0}', '{"config": []}'])
def test_a_folder_of_somebody_else_is_refused_untouched(folder, rows, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json" if content else out / "notes.txt").write_text(content)
    with pytest.raises(ValueError, match="out: not empty, and not a run of this program; choose another --out"):
        run(folder, rows, "--out", out)
    assert len(list(out.iterdir())) == 1


def test_sigterm_saves_and_says_so_and_exits_with_its_number(folder, rows, tmp_path, monkeypatch, capsys):
    file = tmp_path / "terminated.py"
    file.write_text(
        "import os, sftgo\ncalls = []\n"
        "def objective(nats, tokens, lam):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"
        "        os.kill(os.getpid(), 15)\n"
        "    return sftgo.sft_go(nats, tokens, lam)\n"
    )
    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 2"
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["train.py", *base.split(), f"--objective={file}:objective", "--out", str(out)])
    with pytest.raises(SystemExit) as e:
        train.main()
    assert e.value.code == 143 and saved(out) == ["step-000003"]
    assert f"stopped by SIGTERM after step 3 of 6; resume with --out {out}" in capsys.readouterr().out
    train.main()
    assert "after step 3\n" in capsys.readouterr().out and len(metrics(out)) == 6
