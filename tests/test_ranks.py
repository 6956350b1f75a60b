"""Ranks, under real torchrun processes: they change nothing but the speed, and no fault of one is another's riddle.

As a program (`torchrun tests/test_ranks.py CASES.json OUT`) it trains each case on its ranks and leaves losses and weights in OUT.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stories260k import SHARED
from tiny import tiny_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import checkpoint
import data
import train
from model import Llama, LlamaConfig

WORDS = ("water", "a long river", "the sun", "bread", "time", "a king", "glass", "the sea", "salt", "an owl", "iron", "rain", "an old shore")
ROWS = [{"prompt": f"What is {w}?", "completion": f"It is {w * (1 + n % 5)}, or so they say, {w} and {n}."} for n, w in enumerate(WORDS)]
STEPS = 20
BASE = "--context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 9 --lr 3e-3 --dtype float32 --eta 0.7 --seed 3 --eps 1e-5"
# eps: a gradient that is zero but for rounding is not to be blown up to a step of Adam's full size
CASES = {  # flags of each; the same cases on every number of ranks
    **{f"{grouper} {lam}": f"--grouper {grouper} --lam-max {lam}" for grouper in ("tfidf", "loss", "rho1") for lam in (0, 0.9, 1)},
    "small micro-batches": "--grouper loss --lam-max 0.9 --micro-batch-tokens 127",
    "rho1's own row": "--grouper rho1 --worst important --lam-max 1 --micro-batch-tokens 127",
    "none, decaying, clipped": "--grouper none --clip 0.5 --lam-min 0.1",
    "recomputed": "--grouper tfidf --checkpoint-activations full",
    "one sample a step": "--grouper tfidf --batch-size 1",  # every other rank has only a blank row
}
CUT = {"scope": "--grouper tfidf --scope micro_batch --batch-size 4 --micro-batch-tokens 127 --context 127"}


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
        corpus, known = train.prepare(cfg, tokenizer, None, train.World()) if world.size == 1 else prepared(cfg, tokenizer)
        if cfg.grouper == "rho1":
            known = train.corpus_nll(Llama.from_pretrained(folder, seed=9), corpus, 512)
        model = train.build(cfg, folder, world)
        optimizer = train.adamw(model, cfg)
        per_epoch = math.ceil(len(corpus) / cfg.batch_size)
        assert train.loop(cfg, model, optimizer, corpus, known, here, 0, STEPS, per_epoch, world, [])
        weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
        if world.rank == 0:
            torch.save({name: p.detach() for name, p in weights.items()}, here / "weights.pt")
    world.close()


def prepared(cfg, tokenizer):
    """What `train.prepare` gives, without its store."""
    corpus = data.load_corpus(cfg.data, tokenizer, cfg.template, cfg.context)
    return corpus, train.groupers.label_corpus(cfg.grouper, corpus, cfg.eta, cfg.seed)


def torchrun(ranks: int, *command, **how) -> subprocess.CompletedProcess:
    return subprocess.run([*torchrun_command(ranks), *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, **how)


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
    cases = {name: arguments(folder, rows, flags) for name, flags in {**CASES, **CUT}.items()}
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
    cases = {name: [*flags, "--shard", shard] for name, flags in cases.items() if name != "scope"}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = torchrun(ranks, "tests/test_ranks.py", tmp_path / "cases.json", tmp_path / "many", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(here / "one", tmp_path / "many", cases)


if __name__ == "__main__":
    run_cases(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
