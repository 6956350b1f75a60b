"""Ranks, under real torchrun processes: they change nothing but the speed, and a fault of one is one clear line.

As a program (`torchrun tests/test_ranks.py CASES.json OUT`) it trains each case on its ranks and leaves its run in
OUT/<name of the case>, and what it printed in OUT/said.
"""

import contextlib
import functools
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from classifiers import MBERT, classifier_folder
from tiny import TEXTS, tiny_folder

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import train
from group_dro import GroupDRO
from model import Llama
from support.ranks import Ranks

WORDS = "water|a long river|the sun|bread|time|a king|glass|the sea|salt|an owl|iron|rain|an old shore".split("|")
ROWS = [
    {"prompt": f"What is {w}?", "completion": f"It is {w * (1 + n % 5)}, or so they say, {w} and {n}."}
    for n, w in enumerate(WORDS)
]
STEPS = 20
BASE = "--context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 10 --lr 3e-3 --dtype float32 --eta 0.7 --seed 3"
BASE += f" --eps 1e-5 --save-dtype float32 --max-steps {STEPS} --grouper tfidf --lam-max 0.9"
# eps: a gradient that is zero but for rounding is not to be blown up to a step of Adam's full size
MANY = "--batch-size 12 --context 90 --micro-batch-tokens 89"
MICRO = "--scope micro_batch --micro-batch-tokens 63 --context 64 --data {long}"
CASES = {  # the same cases on every number of ranks; later flags override BASE's
    "many micro-batches": f"--grouper loss {MANY}",
    "guesses": MANY,  # of prices, some right and some wrong
    "one sample a step": "--batch-size 1",  # every other rank has only a blank row
    "the other kind of head": "--grouper loss --model {untied}",
    **{f"{name} {lam}": f"--grouper {name} --lam-max {lam}" for name in ("tfidf", "loss") for lam in (0, 1)},
    "rho1 in Eq. 3": "--grouper rho1 --reference {phi}",
    "rho1's own row": f"--grouper rho1 --reference {{phi}} --objective important_only --lam-max 1 {MANY}",
    "many, and no look first": f"--lam-max 0 {MANY}",
    "three groups": f"--grouper loss --eta 0.4 0.8 {MANY}",
    "none, decaying, clipped": "--grouper none --objective sft_go --clip 0.5 --lam-min 0.1",
    "group DRO": f"--objective {ROOT}/examples/group_dro.py:group_dro --grouper loss --eta 0.4 0.8 {MANY}",
    "weighted tokens": f"--objective {ROOT}/examples/dft.py:dft --grouper loss {MANY}",
    "weighted tokens, one sample": f"--objective {__file__}:weighted --batch-size 1",
    "given groups": f"--objective {ROOT}/examples/cvar.py:cvar --grouper {ROOT}/examples/classes.py:classes {MANY}",
    "one group": f"--objective {ROOT}/examples/softmax.py:softmax --grouper {__file__}:one",
    "scores in the step": f"--grouper {__file__}:hard --lam-max 1 {MANY}",
    "recomputed": "--checkpoint-activations",
    # every sample fills a row, so there is one cut into micro-batches for any number of ranks
    "scope micro_batch": f"--grouper loss {MICRO}",
    "scope micro_batch, group DRO": f"--objective {ROOT}/examples/group_dro.py:group_dro --grouper loss {MICRO}",
    "scope micro_batch, weighted": f"--objective {__file__}:weighted --grouper loss --eta 0.4 0.8 {MICRO}",
}
if find_spec("transformers"):
    CASES["llmlingua2"] = "--grouper llmlingua2 --eta 0.5 --llmlingua-model {classifier}"


def weighted(nats, tokens, lam):
    """The price depends on the losses."""
    full = tokens > 0
    means = nats[full] / tokens[full]
    return means.softmax(0) @ means


weighted.weigh = lambda nll, batch: nll / nll[batch.loss_mask].max() + batch.targets % 2  # fails on a row of nothing


class Both(GroupDRO):
    """A state, and weights: the price depends on the losses."""

    def weigh(self, nll, batch):
        return nll.square() / 30 + batch.targets % 2


both = Both(rate=0.1)


def one(corpus, seed):
    return np.zeros(len(corpus.ids), int)


def hard(nll, prior):
    return nll + prior


hard.in_step = True
hard.prior = lambda corpus, seed: (corpus.ids % 3).astype(float)

KEYS = ("loss", "ce", "important", "unimportant", "grad_norm", "lr", "lam", "tokens", "epoch")


def run_cases(cases: dict[str, list[str]], out: Path) -> None:
    """Train each case on the ranks that there are, in one process group."""
    with Ranks() as ranks, contextlib.redirect_stdout(io.StringIO()) as said:
        with patch.object(train, "Ranks", lambda: contextlib.nullcontext(ranks)), patch.object(train.report, "ending"):
            for name, flags in cases.items():
                train.train(train.parse_args([*flags, "--out", str(out / name), "--checkpoint-every", "0"]))
    if ranks.rank == 0:
        (out / "said").write_text(said.getvalue())


def environment(**more) -> dict:
    path = f"{ROOT}:{ROOT / 'tests'}"
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path, **more}


MINUTES = 900  # in seconds: no machine is as slow as that
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(ranks: int, *command, flags=(), held: Path | str = "", **how) -> subprocess.Popen:
    """A command under torchrun; on one rank, as plain python. `held`: the file by which HELD tells that it waits."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *flags] if ranks > 1 else []
    words = map(str, [sys.executable, *torchrun, *command])
    return subprocess.Popen([*words], cwd=ROOT, env=environment(HELD=str(held)), **PIPES, **how)


def ended(process: subprocess.Popen, code: int | None = 0) -> tuple[str, str]:
    """Its stdout and stderr; code None: any but 0."""
    said, errors = process.communicate(timeout=MINUTES)
    assert process.returncode == code if code is not None else process.returncode, said + errors[-3000:]
    ours = [line for line in errors.splitlines() if f'File "{ROOT}' in line and "site-packages" not in line]
    assert not ours, errors[
        -3000:
    ]  # a traceback of ours; torchrun prints its own, perhaps from a .venv in the checkout
    return said, errors


def metrics(out: Path) -> list[dict]:
    log = out / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def wait_for(there, process: subprocess.Popen) -> None:
    """Until there() is true, which a process brings about."""
    while True:
        alive = process.poll() is None  # asked first: what it did before its end counts
        if there():
            return
        assert alive, process.communicate()[1][-3000:]
        time.sleep(0.005)


HELD = """
import os, signal, sys, time
from pathlib import Path
import data
file, real, calls = Path(os.environ["HELD"]), data.micro_batches, []
last = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))
def held(*given):
    calls.append(1)
    if last and len(calls) == 5 and not file.exists():
        asked = []
        before = signal.signal(signal.SIGTERM, lambda *signal: (asked.append(1), before(*signal)))
        file.with_suffix(".part").write_text(str(os.getpid()))
        file.with_suffix(".part").rename(file)
        while not asked:  # or until it is killed or interrupted
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, before)
    return real(*given)
data.micro_batches = held
import train
train.main()
"""


@pytest.fixture
def held(tmp_path):
    """A program and a file: train.py whose last rank, once it has four steps behind it, writes its id and waits."""
    (tmp_path / "held.py").write_text(HELD)
    return tmp_path / "held.py", tmp_path / "held"


def assert_same_run(a: Path, b: Path, tolerance: float) -> None:
    """The same log, without a step missing or doubled, and the same model."""
    one, other = metrics(a), metrics(b)
    assert [row["step"] for row in one] == [row["step"] for row in other] == [*range(1, STEPS + 1)]
    for x, y in zip(one, other):
        for key in KEYS:
            assert x[key] is y[key] is None or abs(x[key] - y[key]) <= tolerance, (a, x["step"], key)
    ours, theirs = (dict(Llama.from_pretrained(out / "model").named_parameters()) for out in (a, b))
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert (p - theirs[name]).abs().max() <= tolerance, (a, name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny models, rows, the base flags, and what one process makes of every case."""
    here = tmp_path_factory.mktemp("ranks")
    folder, untied = tiny_folder(here / "model"), tiny_folder(here / "untied", tie_word_embeddings=False)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"], (
        "both kinds of head are in the cases"
    )
    phi = tiny_folder(here / "phi", seed=9)
    rows, long = here / "rows.jsonl", here / "long.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    long.write_text("".join(json.dumps({**row, "completion": 9 * row["completion"]}) + "\n" for row in ROWS))
    base = f"--model {folder} --data {rows} {BASE}".split()
    names = {"untied": untied, "phi": phi, "long": long}
    if "llmlingua2" in CASES:
        names["classifier"] = classifier_folder(here, MBERT, TEXTS * 4)
    cases = {name: [*base, *flags.format(**names).split()] for name, flags in CASES.items()}
    run_cases(cases, here / "one")
    return here, [*base, "--objective", f"{__file__}:both"], cases  # of runs that stop: with a state, and weights


SPLITS = [(2, "fsdp"), (2, "ddp"), (4, "fsdp")]


def chosen(cases: dict, ranks: int, shard: str) -> list[str]:
    """The cases to run so."""
    return [*cases][: None if (ranks, shard) == SPLITS[0] else 4]


@pytest.fixture(scope="module")
def many(place):
    """many(ranks): the folder of the runs "<case>, <shard>" on so many ranks, all in one start."""
    here, _, cases = place

    @functools.cache
    def started(ranks):
        out, shards = here / f"{ranks} ranks", [shard for n, shard in SPLITS if n == ranks]
        runs = {f"{name}, {shard}": [*cases[name], "--shard", shard]
                for shard in shards for name in chosen(cases, ranks, shard)}  # fmt: skip
        if "llmlingua2, fsdp" in runs:
            runs["again"] = [*cases["llmlingua2"], "--cache", str(out / "llmlingua2, fsdp" / "cache")]
        (here / "cases.json").write_text(json.dumps(runs))
        ended(launch(ranks, "tests/test_ranks.py", here / "cases.json", out))
        return out

    return started


@pytest.mark.parametrize("ranks, shard", SPLITS)
def test_any_number_of_ranks_gives_the_single_process_run(place, many, ranks, shard):
    here, _, cases = place
    for name in chosen(cases, ranks, shard):
        assert_same_run(here / "one" / name, many(ranks) / f"{name}, {shard}", 1e-5)


@pytest.mark.parametrize("shard", ["fsdp", "ddp"])
def test_every_rank_begins_a_step_again_where_the_guess_was_wrong(many, shard):
    """One that did so alone would wait for the others, so these runs would not have ended."""
    prices = re.search(rf"/guesses, {shard}, on .*?\nprices  (.*)", (many(2) / "said").read_text(), re.DOTALL)[1]
    assert "guessed right" in prices and "guessed wrong" in prices


# Runs that stop and resume.


@pytest.fixture(scope="module")
def uninterrupted(place):
    """One process from the first step to the last, over six epochs."""
    here, base, _ = place
    out = here / "uninterrupted"
    ended(launch(1, "train.py", *base, "--out", out, "--checkpoint-every", 3))
    return out


def test_a_run_killed_anywhere_resumes_bit_for_bit(place, uninterrupted, tmp_path):
    _, base, _ = place
    out, rng = tmp_path / "out", np.random.default_rng(0)
    command = ("train.py", *base, "--out", out, "--checkpoint-every", 3)
    for kill in range(3):
        process = launch(1, *command)
        wait_for(lambda: len(metrics(out)) >= 5 * kill + 2, process)
        time.sleep(rng.uniform(0, 0.15))  # somewhere in the next steps, perhaps in a save, perhaps after the end
        process.kill()
        process.communicate()
    ended(launch(1, *command))
    assert_same_run(out, uninterrupted, 0)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000018", "step-000020"]


def test_a_worker_killed_under_torchrun_is_restarted_and_resumes(place, uninterrupted, held, tmp_path):
    _, base, _ = place
    out, (program, file) = tmp_path / "out", held
    command = (program, *base, "--out", out, "--checkpoint-every", 3)
    process = launch(2, *command, flags=["--max-restarts", 2], held=file)
    wait_for(file.exists, process)
    os.kill(int(file.read_text()), signal.SIGKILL)
    said, errors = process.communicate(timeout=MINUTES)
    assert process.returncode == 0 and "after step 3\n" in said, errors[-3000:]
    assert_same_run(out, uninterrupted, 1e-5)


def test_sigterm_saves_and_any_number_of_ranks_resumes(place, uninterrupted, held, tmp_path, capsys):
    _, base, _ = place
    out, (program, file) = tmp_path / "out", held
    flags = [*base, "--out", str(out), "--checkpoint-every", "3"]
    command = (program, *flags)
    for ranks, reached in ((2, 5), (1, 10)):
        process = launch(ranks, *command, flags=["--shutdown-timeout", MINUTES], held=file)
        wait_for(file.exists, process)
        process.send_signal(signal.SIGTERM)
        said, errors = ended(process, None)
        assert f"stopped by SIGTERM after step {reached} of" in said and f"resume with --out {out}" in said, errors[
            -3000:
        ]
        assert "after step 5\n" in said or ranks == 2
        assert len(metrics(out)) == reached and (out / "checkpoints" / f"step-{reached:06d}").is_dir()
        file.unlink()
    file.touch()  # so that none waits
    said, _ = ended(launch(2, *command, held=file))
    assert "2 ranks, after step 10\n" in said
    assert_same_run(out, uninterrupted, 1e-5)
    train.train(train.parse_args(flags))  # on one, in this process
    assert "already finished; nothing to do" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing_unfinished(place, held, tmp_path):
    _, base, _ = place
    out, (program, file) = tmp_path / "out", held
    flags = [*base, "--out", str(out), "--checkpoint-every", "3"]
    process = launch(2, program, *flags, held=file, start_new_session=True)
    wait_for(file.exists, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=MINUTES)
    assert process.returncode != 0 and not (out / "model").exists()
    assert errors.count(f"interrupted; saved: {out / 'checkpoints' / 'step-'}") == 1, errors[-3000:]
    train.train(train.parse_args(flags))
    assert not list((out / "checkpoints").glob("*.part")) and len(metrics(out)) == STEPS


# What ranks prepare together.


def test_scores_of_a_model_are_shared_out_and_one_file_keeps_them(place, many):
    pytest.importorskip("transformers")
    one, two, again = place[0] / "one", many(2) / "llmlingua2, fsdp", many(2) / "again"
    for said, runs in ((one / "said", 1), (many(2) / "said", 2)):
        groups = re.findall(r"^groups  5\d\.\d% of the supervised tokens important$", said.read_text(), re.M)
        assert len(groups) == runs
    assert_same_run(again, two, 0)
    (mine,), (theirs,) = ([*(out / "cache").iterdir()] for out in (one / "llmlingua2", two))
    assert mine.name == theirs.name and np.allclose(np.load(mine), np.load(theirs), atol=1e-6)
    assert not (again / "cache").exists(), "--cache had them"


LIMIT = """
from datetime import timedelta
import torch.distributed as dist
from support import ranks
def limit(seconds, patient=None):  # from now on, how long this rank waits: an earlier limit would measure the machine
    ranks.STEP = timedelta(seconds=seconds)
    for group in dist.distributed_c10d._world.pg_map:
        if group is not patient:
            dist.distributed_c10d._set_pg_timeout(ranks.STEP, group)
"""

SLOW = """
import os, time
from pathlib import Path
from published import weights
waits, save, first = Path(os.environ["HELD"]), weights.save, ranks.Ranks.first
def slow(*given, **more):  # on rank 0 alone
    while not waits.exists():
        time.sleep(0.01)
    time.sleep(3)
    save(*given, **more)
def waiting(self, work):
    if self.rank and work.__name__ == "write":
        limit(1, self.patient)
        waits.touch()
    return first(self, work)
weights.save, ranks.Ranks.first = slow, waiting
import train
train.main()
"""


def test_the_others_wait_longer_than_a_step_may_take_while_rank_0_writes_the_model(place, uninterrupted, tmp_path):
    _, base, _ = place
    (tmp_path / "program.py").write_text(LIMIT + SLOW)
    flags, waits = [*base, "--shard", "ddp", "--out", tmp_path / "out"], tmp_path / "waits"
    ended(launch(2, tmp_path / "program.py", *flags, held=waits))
    assert waits.exists()
    assert_same_run(tmp_path / "out", uninterrupted, 1e-5)


def test_several_processes_need_a_run_folder(place):
    _, base, _ = place
    _, errors = ended(launch(2, "train.py", *base), None)
    assert errors.count("error: --out is missing: several processes") == 1, errors[-3000:]


# Faults.

FAULTY = """
import os
import sftgo
calls = []
def objective(nats, tokens, lam):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 5:
        raise ValueError("a fault of its own")
    return sftgo.sft_go(nats, tokens, lam)
"""


def test_a_fault_of_one_rank_between_two_steps_ends_all(place, tmp_path):
    _, base, _ = place
    (tmp_path / "mine.py").write_text(FAULTY)
    flags = [*base, "--objective", f"{tmp_path / 'mine.py'}:objective", "--out", tmp_path / "out"]
    _, errors = ended(launch(2, "train.py", *flags), None)
    assert re.search(r"error: --objective \S+: ValueError: a fault of its own", errors), errors[-3000:]
    assert not (tmp_path / "out" / "model").exists()


STUCK = """
import os, signal, time
from pathlib import Path
import data
stuck, real, calls = Path(os.environ["HELD"]), data.micro_batches, []
def one_is_stuck(*given):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun would wait for this rank to save a checkpoint
        stuck.touch()
        while True:
            time.sleep(1)
    if len(calls) == 4:
        while not stuck.exists():
            time.sleep(0.01)
        limit(2)
    return real(*given)
data.micro_batches = one_is_stuck
import train
train.main()
"""


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_a_stuck_rank_ends_the_run_with_one_line(place, tmp_path, shard):
    _, base, _ = place
    (tmp_path / "program.py").write_text(LIMIT + STUCK)
    flags = [*base, "--shard", shard, "--out", tmp_path / "out", "--checkpoint-every", 0]
    _, errors = ended(launch(2, tmp_path / "program.py", *flags, held=tmp_path / "stuck"), None)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0: lost touch with the other ranks; one is stuck or gone (")
    if shard == "ddp":  # they meet at our own sum; fsdp's gathers come before it
        assert "Ranks 1 failed to pass monitoredBarrier" in line
    assert len(metrics(tmp_path / "out")) == 3


# Two nodes: two torchrun agents on this machine.


def agents(program: list, port: int, *flags, **how) -> list[subprocess.Popen]:
    torchrun = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id {port}"
    torchrun += " --rdzv-conf keep_alive_max_attempt=200"  # of 5 seconds each: an agent that is slow is not gone
    command = [sys.executable, *torchrun.split(), "--rdzv-endpoint", f"localhost:{port}", *flags, *program]
    return [subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment(**how), **PIPES) for _ in range(2)]


EARLY = """
import os, pathlib
import groupers
left = pathlib.Path(os.environ["FAULTS"])
def faulty(corpus, seed):
    if os.environ["RANK"] == "1" and (n := int(left.read_text())):
        left.write_text(str(n - 1))
        raise ValueError("an early fault")
    return groupers.tfidf(corpus)
"""


def test_a_fault_on_one_node_is_told_on_the_other_and_a_restart_of_both_goes_well(place, uninterrupted, tmp_path):
    _, base, _ = place
    (tmp_path / "mine.py").write_text(EARLY)
    program = ["train.py", *base, "--grouper", f"{tmp_path / 'mine.py'}:faulty", "--out", tmp_path / "out"]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    (tmp_path / "faults").write_text("1")
    both = agents(program, port, "--max-restarts", 2, FAULTS=str(tmp_path / "faults"))
    said = [process.communicate(timeout=MINUTES) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    errors = "".join(errors for _, errors in said)
    said = "--grouper \\S+:faulty: ValueError: an early fault"
    assert re.search(f"error: {said}", errors) and re.search(f"error: rank 1: {said}", errors), errors[-3000:]
    assert_same_run(tmp_path / "out", uninterrupted, 1e-5)


if __name__ == "__main__":
    run_cases(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
