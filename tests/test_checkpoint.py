"""checkpoint.py: what is there under its own name is whole, what is not is passed over, and nothing is lost to a fault."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import config, metrics, run

import checkpoint
import train
from model import Llama

ROOT = Path(__file__).parents[1]


EVERY = ("--checkpoint-every", 2)  # 3 steps an epoch, 6 in all


def stopped_after(steps, folder, rows, out, monkeypatch, *flags):
    """A run that ends, as by a crash, before the next step."""
    update = train.update

    def crashing(*args):
        if args[4] == steps:
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "update", crashing)
        run(folder, rows, *(["--out", out] if out else []), *EVERY, *flags)


def weights(out):
    return {name: p.clone() for name, p in Llama.from_pretrained(out / "model").named_parameters()}


def same_run(a, b) -> bool:
    times = ("seconds", "tokens_per_second", "peak_memory_bytes")
    logs = [[{k: v for k, v in row.items() if k not in times} for row in metrics(out)] for out in (a, b)]
    return logs[0] == logs[1] and all(torch.equal(p, weights(b)[name]) for name, p in weights(a).items())


def saved(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])  # before any checkpoint, on one, between two, on the edge of an epoch
@pytest.mark.parametrize("grouper", ["random", "loss"])
def test_a_stopped_run_goes_on_bit_for_bit(folder, rows, tmp_path, monkeypatch, capsys, steps, grouper):
    flags = ("--grouper", grouper, "--lam-min", 0.1, "--weight-decay", 0.3)
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY, *flags)
    stopped_after(steps, folder, rows, tmp_path / "out", monkeypatch, *flags)
    capsys.readouterr()
    out = run(folder, rows, "--out", tmp_path / "out", *EVERY, *flags)
    said = capsys.readouterr().out
    assert (f"after step {steps - steps % 2}\n" in said) == (steps > 1) and same_run(out, whole)
    assert saved(out) == ["step-000004", "step-000006"], "the newest two"


def test_what_somebody_adds_may_draw_random_numbers(folder, rows, tmp_path, monkeypatch):
    update = train.update

    def noisy(model, *args):
        with torch.no_grad():
            model.lm_head.weight += 1e-3 * torch.randn(1)
        return update(model, *args)

    torch.manual_seed(5)
    monkeypatch.setattr(train, "update", noisy)
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    torch.manual_seed(5)
    stopped_after(4, folder, rows, tmp_path / "out", monkeypatch)
    torch.manual_seed(6)
    assert same_run(run(folder, rows, "--out", tmp_path / "out", *EVERY), whole)


def test_what_does_not_change_the_result_may_differ_on_resume_and_nothing_else(folder, rows, tmp_path, monkeypatch):
    stopped_after(3, folder, rows, tmp_path / "out", monkeypatch)
    for flag, name in ((("--lr", 0.5), "lr"), (("--eta", 0.3), "eta"), (("--batch-size", 5), "batch_size"), (("--seed", 1), "seed")):
        with pytest.raises(ValueError, match=rf"holds a run with another {name} \({name} .*, now .*\)"):
            run(folder, rows, "--out", tmp_path / "out", *EVERY, *flag)
    how = ("--checkpoint-activations", "full", "--keep", 1, "--micro-batch-tokens", 127, "--cache", tmp_path / "cache")
    out = run(folder, rows, "--out", tmp_path / "out", "--checkpoint-every", 1, *how)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6] and saved(out) == ["step-000006"]


def test_recomputing_activations_changes_no_bit(folder, rows, tmp_path):
    a = run(folder, rows, "--out", tmp_path / "a", "--checkpoint-every", 0)
    b = run(folder, rows, "--out", tmp_path / "b", "--checkpoint-every", 0, "--checkpoint-activations", "full")
    assert same_run(a, b) and not (a / "checkpoints").exists()


def damage_shard(path):
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-9])


def flip_bit(path):
    shard = next(path.glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 4
    shard.write_bytes(raw)


DAMAGE = {
    "a shard cut short": (damage_shard, r"__0_0\.distcp is missing or has changed"),
    "a bit changed in a shard": (flip_bit, r"__0_0\.distcp is missing or has changed"),
    "a shard missing": (lambda path: next(path.glob("*.distcp")).unlink(), r"__0_0\.distcp is missing or has changed"),
    "metadata missing": (lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
    "about.json missing": (lambda path: (path / "about.json").unlink(), r"not readable as JSON"),
    "about.json empty": (lambda path: (path / "about.json").write_text("{}"), "lacks files"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(folder, rows, tmp_path, monkeypatch, capsys, damage):
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    stopped_after(5, folder, rows, tmp_path / "out", monkeypatch)
    spoil, reason = DAMAGE[damage]
    spoil(tmp_path / "out" / "checkpoints" / "step-000004")
    capsys.readouterr()
    out = run(folder, rows, "--out", tmp_path / "out", *EVERY)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not whole" in line]
    assert line.startswith(f"{out / 'checkpoints' / 'step-000004'}: not whole (") and line.endswith("looking for one before it")
    assert re.search(reason, line) and same_run(out, whole)


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(folder, rows, tmp_path, monkeypatch):
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    stopped_after(5, folder, rows, tmp_path / "out", monkeypatch)
    folder_of = tmp_path / "out" / "checkpoints"
    (folder_of / "step-000004").rename(folder_of / "step-000004.part")  # all written, not yet renamed
    with open(tmp_path / "out" / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # nor the line finished
    out = run(folder, rows, "--out", tmp_path / "out", *EVERY)
    assert same_run(out, whole) and not list(folder_of.glob("*.part"))


def test_a_save_that_fails_leaves_the_one_before_and_says_so(folder, rows, tmp_path, monkeypatch):
    """A disk that is full at the second checkpoint."""
    out, saves = tmp_path / "out", []
    save = checkpoint.dcp.save

    def full(state, checkpoint_id, no_dist):
        saves.append(checkpoint_id)
        if len(saves) == 2:
            Path(checkpoint_id).mkdir(parents=True)
            (Path(checkpoint_id) / "__0_0.distcp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, checkpoint_id=checkpoint_id, no_dist=no_dist)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.dcp, "save", full)
        with pytest.raises(
            OSError, match=r"step-000004\.part: cannot be written \(.*No space left.*\); .*The last checkpoint: .*step-000002$"
        ):
            run(folder, rows, "--out", out, *EVERY)
    whole = run(folder, rows, "--out", tmp_path / "whole", *EVERY)
    assert same_run(run(folder, rows, "--out", out, *EVERY), whole)


def test_a_really_full_disk_is_one_line(folder, rows, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import train; train.main()"
    flags = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --max-steps 1 --out {tmp_path / 'out'}"
    done = subprocess.run(
        [sys.executable, "-c", limit, *flags.split(), "--cache", tmp_path / "cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "step-000001.part: cannot be written (" in done.stderr and "The last checkpoint: none" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_cannot_be_written_is_one_line(folder, rows, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OSError, match="Permission denied"):
        run(folder, rows, "--out", tmp_path / "out")


@pytest.mark.fast
def test_a_plan_that_the_disk_cannot_hold_is_refused(folder, rows, tmp_path, monkeypatch, capsys):
    parameters = sum(p.numel() for p in Llama.from_pretrained(folder).parameters())
    needed = 12 * parameters * 3
    for free, refused in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))  # noqa: B023
        if refused:
            with pytest.raises(
                ValueError, match=r"GB free, but 2 checkpoints and one being written take .* GB; choose an --out on a larger"
            ):
                run(folder, rows, "--dry-run", "--out", tmp_path / "out" / "deep")
        else:
            run(folder, rows, "--dry-run", "--out", tmp_path / "out" / "deep")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    run(folder, rows, "--dry-run", "--checkpoint-every", 0)
    held = tmp_path / "held" / "checkpoints" / "step-000002" / "__0_0.distcp"
    held.parent.mkdir(parents=True)
    held.write_bytes(bytes(needed))  # which newer ones will replace
    (tmp_path / "held" / "config.json").write_text("{}")
    assert checkpoint.disk_free(config(folder, rows, "--out", tmp_path / "held")) == needed


@pytest.mark.parametrize("name, count", [("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")])
def test_a_restart_overwrites_nothing_and_finds_its_folder_again(folder, rows, tmp_path, monkeypatch, capsys, name, count):
    monkeypatch.chdir(tmp_path)
    run(folder, rows, *EVERY)  # an earlier run of somebody's
    for job, flags in (("a", ["--out", "out", "--overwrite"]), ("b", [])):
        monkeypatch.setenv(name, job)
        monkeypatch.setenv(count, "0")
        stopped_after(3, folder, rows, None, monkeypatch, *flags)
        monkeypatch.setenv(count, "1")
        capsys.readouterr()
        out = run(folder, rows, *flags, *EVERY)
        assert "after step 2\n" in capsys.readouterr().out and len(metrics(out)) == 6
    assert out == Path("runs/run-2")
    monkeypatch.setenv(name, "c")  # another job: --overwrite means what it says
    capsys.readouterr()
    run(folder, rows, "--out", "out", "--overwrite", *EVERY)
    assert "after step" not in capsys.readouterr().out


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(folder, rows, tmp_path, monkeypatch, capsys):
    stopped_after(5, folder, rows, tmp_path / "out", monkeypatch, "--checkpoint-every", 1)
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        damage_shard(path)
    with pytest.raises(ValueError, match="checkpoints: none is whole; move them away to begin again from the first step, or --overwrite"):
        run(folder, rows, "--out", tmp_path / "out", *EVERY)
    assert saved(tmp_path / "out") == ["step-000004", "step-000005"] and len(metrics(tmp_path / "out")) == 5


def test_two_commands_of_one_slurm_job_or_of_unnamed_launches_are_no_restart(folder, rows, tmp_path, monkeypatch, capsys):
    for name, value in (("SLURM_JOB_ID", "7"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(name, value)
        seeds = [run(folder, rows, "--seed", seed, "--max-steps", 1) for seed in (0, 1)]
        assert seeds[0] != seeds[1]
        monkeypatch.delenv(name)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "lima")  # a name given to two launches: another seed is another run
        assert run(folder, rows, "--seed", 2, "--max-steps", 1) != run(folder, rows, "--seed", 3, "--max-steps", 1)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        monkeypatch.setenv(name, value)
        first = run(folder, rows, "--out", "out", "--overwrite", "--max-steps", 1)
        capsys.readouterr()
        assert run(folder, rows, "--out", "out", "--overwrite", "--max-steps", 1) == first
        assert "already finished" not in capsys.readouterr().out
        monkeypatch.delenv(name)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_never_outlives_a_new_one(folder, rows, tmp_path, monkeypatch, keep):
    flags = ("--checkpoint-every", 1)
    stopped_after(5, folder, rows, tmp_path / "out", monkeypatch, *flags, "--keep", 2)
    damage_shard(tmp_path / "out" / "checkpoints" / "step-000005")
    shutil.move(tmp_path / "out" / "checkpoints" / "step-000004", tmp_path / "out" / "checkpoints" / "step-000001")
    about = tmp_path / "out" / "checkpoints" / "step-000001" / "about.json"
    about.write_text(about.read_text().replace('"step": 4', '"step": 1'))
    stopped_after(2, folder, rows, tmp_path / "out", monkeypatch, *flags, "--keep", keep)
    assert saved(tmp_path / "out") == ["step-000001", "step-000002"][-keep:]


def test_sigterm_saves_and_says_so_and_exits_with_its_number(folder, rows, tmp_path, monkeypatch, capsys):
    update = train.update

    def terminated(*args):
        if args[4] == 2:
            os.kill(os.getpid(), 15)
        return update(*args)

    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 2".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *base, "--out", str(tmp_path / "out")])
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as e:
        patched.setattr(train, "update", terminated)
        train.main()
    assert e.value.code == 143 and saved(tmp_path / "out") == ["step-000003"]
    assert "stopped by SIGTERM after step 3 of 6; its checkpoint is saved, start it again to go on" in capsys.readouterr().out
    train.main()
    assert "after step 3\n" in capsys.readouterr().out and len(metrics(tmp_path / "out")) == 6


@pytest.mark.fast
def test_sharding_is_for_several_and_none_for_one(folder, rows):
    for shard in ("fsdp", "ddp"):
        with pytest.raises(ValueError, match=f"--shard {shard} with 1 process: fsdp and ddp are for several"):
            train.train(config(folder, rows, "--shard", shard))
