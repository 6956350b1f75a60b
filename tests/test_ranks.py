"""Ranks, under real torchrun processes: they change nothing but the speed, and no fault of one is another's riddle.

As a program (`torchrun tests/test_ranks.py CASES.json OUT`) it trains each case on its ranks and leaves losses and weights in OUT.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import MBERT, classifier_folder
from tiny import TEXTS, tiny_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data
import train
from model import Llama, LlamaConfig

WORDS = (
    "water",
    "a long river",
    "the sun",
    "bread",
    "time",
    "a king",
    "glass",
    "the sea",
    "salt",
    "an owl",
    "iron",
    "rain",
    "an old shore",
)
ROWS = [{"prompt": f"What is {w}?", "completion": f"It is {w * (1 + n % 5)}, or so they say, {w} and {n}."} for n, w in enumerate(WORDS)]
STEPS = 20
BASE = "--context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 9 --lr 3e-3 --dtype float32 --eta 0.7 --seed 3 --eps 1e-5"
# eps: a gradient that is zero but for rounding is not to be blown up to a step of Adam's full size
CASES = {  # flags of each; the same cases on every number of ranks
    **{f"{grouper} {lam}": f"--grouper {grouper} --lam-max {lam}" for grouper in ("tfidf", "loss", "rho1") for lam in (0, 0.9, 1)},
    "many micro-batches": "--grouper loss --lam-max 0.9 --batch-size 12 --context 90 --micro-batch-tokens 89",
    "many, and no probe": "--grouper tfidf --lam-max 0 --batch-size 12 --context 90 --micro-batch-tokens 89",
    "rho1's own row": "--grouper rho1 --worst important --lam-max 1 --batch-size 12 --context 90 --micro-batch-tokens 89",
    "none, decaying, clipped": "--grouper none --clip 0.5 --lam-min 0.1",
    "recomputed": "--grouper tfidf --checkpoint-activations full",
    "one sample a step": "--grouper tfidf --batch-size 1",  # every other rank has only a blank row
}
CUT = "--grouper loss --lam-max 0.9 --scope micro_batch --micro-batch-tokens 63 --context 64"  # every sample fills a row: one cut for all


def arguments(folder: Path, rows: Path, flags: str) -> list[str]:
    reference = f" --reference {folder}" if "rho1" in flags else ""
    return f"--model {folder} --data {rows} {BASE} --max-steps {STEPS} --checkpoint-every 0 {flags}{reference}".split()


def run_cases(cases: dict[str, list[str]], out: Path) -> None:
    """Train each case on the ranks that there are; rank 0 leaves OUT/<n>/metrics.jsonl and OUT/<n>.pt."""
    world = train.World()
    world.open()
    for n, (name, flags) in enumerate(cases.items()):
        cfg = train.parse_args(flags)
        cfg = train.replace(cfg, shard=cfg.shard or ("fsdp" if world.size > 1 else "none"))
        folder, here = Path(cfg.model), out / str(n)
        here.mkdir(parents=True, exist_ok=True)
        tokenizer = data.Tokenizer(folder, LlamaConfig.from_folder(folder).vocab_size)
        corpus, known = train.prepare(cfg, tokenizer, None, world)
        if cfg.grouper == "rho1":
            known = train.corpus_nll(Llama.from_pretrained(folder, seed=9), corpus, 512)
        model = train.build(cfg, folder, world)
        assert all(type(p) is torch.nn.Parameter for p in model.parameters() if p.ndim == 1), "norms stay whole, and float32 in use"
        optimizer = train.adamw(model, cfg)
        per_epoch = math.ceil(len(corpus) / cfg.batch_size)
        assert train.loop(cfg, model, optimizer, corpus, known, here, 0, STEPS, per_epoch, world, [])
        weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
        if world.rank == 0:
            torch.save({name: p.detach() for name, p in weights.items()}, here / "weights.pt")
    world.close()


def torchrun(ranks: int, *command, **how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*torchrun_command(ranks), *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, **how
    )


def torchrun_command(ranks: int, *flags) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *flags]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model without weights (they are drawn from the seed), its rows, and what one process makes of every case."""
    here = tmp_path_factory.mktemp("ranks")
    folder, rows = tiny_folder(here / "model"), here / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    long = here / "long.jsonl"
    long.write_text("".join(json.dumps({**row, "completion": 9 * row["completion"]}) + "\n" for row in ROWS))
    cases = {name: arguments(folder, rows, flags) for name, flags in CASES.items()} | {"scope": arguments(folder, long, CUT)}
    untied = tiny_folder(here / "untied", tie_word_embeddings=not LlamaConfig.from_folder(folder).tie_word_embeddings)
    cases["the head tied, or not, as it is not above"] = arguments(untied, rows, "--grouper loss --lam-max 0.9")
    run_cases(cases, here / "one")
    return here, folder, rows, cases


def assert_same(one: Path, many: Path, cases, tolerance=1e-5):
    for n, name in enumerate(cases):
        a, b = losses(one / str(n)), losses(many / str(n))
        assert len(a) == len(b) == STEPS and np.abs(np.subtract(a, b)).max() <= tolerance, name
        ours, theirs = (torch.load(folder / str(n) / "weights.pt") for folder in (one, many))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert (ours[key] - theirs[key]).abs().max() <= tolerance, (name, key)


@pytest.mark.parametrize("ranks, shard", [(2, "fsdp"), (2, "ddp"), (4, "fsdp")])
def test_any_number_of_ranks_gives_the_single_process_run(place, tmp_path, ranks, shard):
    here, folder, rows, cases = place
    cases = {name: [*flags, "--shard", shard] for name, flags in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = torchrun(ranks, "tests/test_ranks.py", tmp_path / "cases.json", tmp_path / "many", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(here / "one", tmp_path / "many", cases)


# Whole runs.


def train_command(folder, rows, out, *flags) -> list[str]:
    return ["train.py", *arguments(folder, rows, "--grouper tfidf --lam-max 0.9"), "--out", out, "--checkpoint-every", 3, *flags]


def last_weights(out: Path) -> dict:
    return dict(Llama.from_pretrained(out / "model").named_parameters())


def assert_same_run(a: Path, b: Path, tolerance: float) -> None:
    """The same log, without a step missing or doubled, and the same model."""
    logs = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (a, b)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == [*range(1, STEPS + 1)]
    for one, other in zip(*logs):
        for name in ("loss", "ce", "important", "unimportant", "grad_norm", "lr", "lam", "tokens", "epoch"):
            assert one[name] == other[name] if tolerance == 0 else one[name] == pytest.approx(other[name], abs=tolerance), (
                one["step"],
                name,
            )
    ours, theirs = last_weights(a), last_weights(b)
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]) if tolerance == 0 else (p - theirs[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def uninterrupted(place):
    """One process from the first step to the last, over three epochs."""
    here, folder, rows, _ = place
    out = here / "uninterrupted"
    done = subprocess.run(
        [sys.executable, *map(str, train_command(folder, rows, out))], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_killed_anywhere_goes_on_as_if_nothing_had_been(place, uninterrupted, tmp_path):
    _, folder, rows, _ = place
    out, kills, rng = tmp_path / "out", 0, np.random.default_rng(0)
    command = [sys.executable, *map(str, train_command(folder, rows, out))]
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = 0
        while process.poll() is None and kills < 4:
            log = out / "metrics.jsonl"
            lines = len(log.read_bytes().splitlines()) if log.is_file() else 0
            if lines >= 4 * kills + 2 and lines < STEPS:  # somewhere in the next steps, perhaps in a save
                time.sleep(rng.uniform(0, 0.15))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        said, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0:
            break
    assert kills >= 3
    assert_same_run(out, uninterrupted, 0)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000018", "step-000020"]


def test_torchrun_brings_a_killed_worker_back_and_sigterm_saves_and_other_ranks_go_on(place, uninterrupted, tmp_path):
    """Two ranks, one of them killed and restarted by torchrun; ended by SIGTERM; continued by four, by one, by two."""
    _, folder, rows, _ = place
    out = tmp_path / "out"
    command = [*torchrun_command(2, "--max-restarts", "1"), *map(str, train_command(folder, rows, out))]

    def begin(command):
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return process

    def steps() -> int:
        return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").is_file() else 0

    def wait_for(n, process):
        limit = time.monotonic() + 120
        while steps() < n:
            assert process.poll() is None and time.monotonic() < limit, process.communicate()[1][-3000:]
            time.sleep(0.005)

    process = begin(command)
    wait_for(4, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    first = steps()
    while process.poll() is None and steps() >= first:  # until the restart has cut the log to its checkpoint
        time.sleep(0.005)
    wait_for(7, process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "after step 3" in said, errors[-3000:]
    assert "stopped by SIGTERM after step " in said and "its checkpoint is saved, start it again to go on" in said
    reached = steps()
    assert 7 <= reached < STEPS and (out / "checkpoints" / f"step-{reached:06d}").is_dir()

    for ranks, more in ((4, 4), (1, 8)):  # each a few steps further
        process = begin([*torchrun_command(ranks), *map(str, train_command(folder, rows, out))])
        wait_for(min(reached + more, STEPS - 2), process)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
        assert f"after step {reached}\n" in said, said + errors[-3000:]
        reached = steps()
    done = torchrun(2, *train_command(folder, rows, out), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, uninterrupted, 1e-5)
    again = torchrun(2, *train_command(folder, rows, out), timeout=120)
    assert again.returncode == 0 and "already finished; nothing to do" in again.stdout


@pytest.mark.parametrize("grouper", ["rho1", "llmlingua2"])
def test_what_the_ranks_prepare_together_is_what_one_prepares(place, tmp_path, grouper):
    here, folder, rows, _ = place
    Llama(LlamaConfig.from_folder(folder)).init_weights(9).save_pretrained(tmp_path / "phi")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "phi" / name)
    flags = ["--grouper", grouper, "--eta", 0.5]
    if grouper == "rho1":
        flags += ["--reference", tmp_path / "phi"]
    else:
        pytest.importorskip("transformers")
        flags += ["--llmlingua-model", classifier_folder(tmp_path, MBERT, TEXTS * 4)]
    one, two = (train_command(folder, rows, tmp_path / name, *flags) for name in ("one", "two"))
    alone = subprocess.run([sys.executable, *map(str, one)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(2, *two, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)
    kind = "reference" if grouper == "rho1" else "llmlingua2"
    for out in ("one", "two"):
        assert len(list((tmp_path / out / "cache").glob(f"{kind}-*.safetensors"))) == train.PARTS


def test_ctrl_c_ends_quickly_and_leaves_nothing_half_written(place, tmp_path):
    _, folder, rows, _ = place
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*torchrun_command(2), *map(str, train_command(folder, rows, out))], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (out / "checkpoints" / "step-000003").is_dir():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.005)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 45 and not (out / "model").exists()
    assert torchrun(2, *train_command(folder, rows, out), timeout=120).returncode == 0
    assert not list((out / "checkpoints").glob("*.part"))


def test_a_fault_on_one_rank_ends_all_with_its_message(place, tmp_path):
    _, folder, rows, _ = place
    program = tmp_path / "faulty.py"
    program.write_text(
        "import train\n"
        "update = train.update\n"
        "def faulty(*args):\n"
        "    if args[-1].rank == 1 and args[4] == 2:\n"
        "        raise ValueError('rank 1 has a fault of its own')\n"
        "    return update(*args)\n"
        "train.update = faulty\n"
        "train.main()\n"
    )
    began = time.monotonic()
    done = torchrun(2, program, *train_command(folder, rows, tmp_path / "out")[1:], timeout=120)
    assert done.returncode != 0 and "error: rank 1 has a fault of its own" in done.stderr
    assert time.monotonic() - began < 60 and not (tmp_path / "out" / "model").exists()


def test_a_stuck_rank_is_named_when_the_time_limit_ends_the_wait(place, tmp_path):
    _, folder, rows, _ = place
    program = tmp_path / "stuck.py"
    program.write_text(
        "import os, time, datetime, checkpoint, train\n"
        "checkpoint.TIMEOUT = datetime.timedelta(seconds=6)\n"
        "nll, calls = train.batch_nll, []\n"
        "def stuck(*args):\n"
        "    calls.append(1)\n"
        "    time.sleep(600 * (os.environ['RANK'] == '1' and len(calls) == 4))\n"
        "    return nll(*args)\n"
        "train.batch_nll = stuck\n"
        "train.main()\n"
    )
    for shard in ("ddp", "fsdp"):
        done = torchrun(2, program, *train_command(folder, rows, tmp_path / shard, "--shard", shard)[1:], timeout=120)
        assert done.returncode != 0
        said = re.search(r"error: rank 0: nothing has moved for .*; behind the others: (.*)", done.stderr)
        assert said, done.stderr[-3000:]
        assert said[1] == {"ddp": "rank 1", "fsdp": "none, all came equally far: one is stuck within the step, or gone"}[shard], (
            "fsdp's gathers leave no mark"
        )


def test_under_ddp_the_others_wait_until_rank_0_has_written_the_model(place, uninterrupted, tmp_path):
    _, folder, rows, _ = place
    program = tmp_path / "slow.py"
    program.write_text(
        "import time, datetime, checkpoint, model, train\n"
        "checkpoint.TIMEOUT = datetime.timedelta(seconds=15)\n"
        "save = model.Llama.save_pretrained\n"
        "model.Llama.save_pretrained = lambda *a, **k: (time.sleep(8), save(*a, **k))\n"
        "train.main()\n"
    )
    done = torchrun(2, program, *train_command(folder, rows, tmp_path / "out", "--shard", "ddp")[1:], timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "out", uninterrupted, 1e-5)


def two_agents(program: list, port: int, *flags) -> list[subprocess.Popen]:
    """Two torchrun agents on this machine, in the place of two nodes."""
    rendezvous = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "--rdzv-id",
        str(port),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *map(str, flags), *map(str, program)]
    how = dict(cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen(command, **how) for _ in range(2)]


FAULTY = (  # rank 1 fails while it prepares, as often as the file says
    "import os, pathlib, train\n"
    "prepare, left = train.prepare, pathlib.Path(os.environ['FAULTS'])\n"
    "def faulty(*args):\n"
    "    if os.environ['RANK'] == '1' and (n := int(left.read_text())):\n"
    "        left.write_text(str(n - 1))\n"
    "        raise ValueError('a fault of its own')\n"
    "    return prepare(*args)\n"
    "train.prepare = faulty\n"
    "train.main()\n"
)


def test_a_fault_on_one_node_ends_the_other_with_its_message_and_a_restart_on_one_goes_well(place, uninterrupted, tmp_path, monkeypatch):
    _, folder, rows, _ = place
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("FAULTS", str(tmp_path / "faults"))
    program = [tmp_path / "faulty.py", *train_command(folder, rows, tmp_path / "out")[1:]]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    (tmp_path / "faults").write_text("9")
    said = [process.communicate(timeout=120) for process in two_agents(program, port)]
    errors = "".join(errors for _, errors in said)
    assert "error: a fault of its own" in errors and "error: rank 1: a fault of its own" in errors, errors[-3000:]
    (tmp_path / "faults").write_text("1")
    processes = two_agents(program, port + 1, "--max-restarts", 2)
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert_same_run(tmp_path / "out", uninterrupted, 1e-5)


if __name__ == "__main__":
    run_cases(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
