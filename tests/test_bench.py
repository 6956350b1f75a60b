"""Benches at tiny size: the same work on every side, and numbers that follow from what was timed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from published.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
BASE, ROWS, PEERS = ROOT / "demo" / "base", ROOT / "demo" / "instructions.jsonl", ROOT / "bench" / "peers.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus():
    return data.load_corpus(ROWS, Tokenizer(BASE, 4096), "plain", 1024)


def test_every_side_trains_on_the_same_tokens(peers, corpus):
    """The loss of step 1 depends on rows, shift, loss mask and attention: demo/base is a trained model."""
    for package in ("trl", "datasets"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: it is in the extra `peers`")
    order = data.epoch_order(len(corpus), peers.BATCH, 0, 0)[:2]
    found = {
        name: peers.SIDES[name][0](BASE, ROWS, corpus, order) for name in ("ours", "sft-go", "trl-grouped", "bare")
    }
    known = found["ours"][0]
    for name, (loss, seconds) in found.items():
        assert abs(loss - known) < 1e-3 and len(seconds) == 2 and min(seconds) > 0, name


def test_a_ratio_compares_runs_of_one_round(peers, corpus, monkeypatch, capsys):
    seconds = {"ours": [1.0, 4.0], "trl": [5.0, 8.0]}  # in the first and second round; step 1, 99 s, does not count
    took = {"ours": iter(seconds["ours"]), "trl": iter(seconds["trl"])}

    def apart(side, *args):
        return 5.0, [99.0, next(took["trl" if side is peers.trl else "ours"])]

    monkeypatch.setattr(peers, "apart", apart)
    ours, trl = peers.beside(BASE, ROWS, corpus, 2, 2, ["ours", "trl"])
    step = data.epoch_order(len(corpus), peers.BATCH, 0, 0)[1]
    tokens = (corpus.lengths[step] - 1).sum()
    assert ours["ratios"] == [1, 1] and trl["ratios"] == [5, 2]
    assert ours["tokens_per_second"] == [tokens / 1, tokens / 4] and trl["tokens_per_second"] == [
        tokens / 5,
        tokens / 8,
    ]
    assert "3.50 ×   2.00 to 5.00" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [5.0011, float("nan")])
def test_a_side_with_another_loss_is_an_error(peers, corpus, monkeypatch, loss):
    monkeypatch.setattr(peers, "apart", lambda side, *args: (loss if side is peers.bare else 5.0, [1.0, 1.0]))
    with pytest.raises(ValueError, match="bare: step 1 has a loss of .*, ours 5.00000 on the same rows"):
        peers.beside(BASE, ROWS, corpus, 2, 1, ["ours", "bare"])


EXTRAS = ("trl", "transformers", "datasets", "accelerate")


def run(*flags) -> subprocess.CompletedProcess:
    """bench/peers.py where no extra is installed."""
    hidden = f"import runpy, sys; sys.modules |= dict.fromkeys({EXTRAS}); sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", hidden + "runpy.run_path(sys.argv[0], run_name='__main__')", PEERS, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def test_our_own_side_needs_no_extra(tmp_path):
    flags = f"--sides ours --model small --data {ROWS} --steps 2 --pairs 1 --out {tmp_path}/r.json"
    ended = run(*flags.split())
    assert ended.returncode == 0, ended.stderr[-2000:]
    written = json.loads((tmp_path / "r.json").read_text())
    (ours,) = written["results"]
    assert written["machine"]["threads"] and "trl" not in written["machine"]
    assert ours["tokens_per_second"][0] > 0 and f"{ours['loss']:.4f}" in ended.stdout


BENCHES = sorted(file for file in PEERS.parent.glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))
HELP = f"""
import contextlib, io, json, runpy, sys
sys.modules |= dict.fromkeys({(*EXTRAS, "lm_eval", "matplotlib", "nltk")})
ended = {{}}
for file in sys.argv[1:]:
    sys.argv = [file, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            code = runpy.run_path(file, run_name="__main__") and "it went on"
        except BaseException as e:
            code = e.code if isinstance(e, SystemExit) else repr(e)
    ended[file] = [code, said.getvalue()]
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def helps():
    """File -> [exit status, what it said], of all of them in one process."""
    ran = subprocess.run([sys.executable, "-c", HELP, *map(str, BENCHES)], capture_output=True, text=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("file", BENCHES, ids=lambda file: file.name)
def test_help_needs_no_extra(helps, file):
    status, said = helps[str(file)]
    assert status == 0 and said.startswith(f"usage: {file.name} [-h]"), status


@pytest.mark.parametrize(
    "flags, said",
    [
        ("", 'transformers and trl missing; install with: pip install -e ".[peers]"'),
        ("--objective --steps 3", "--objective times our own step alone"),
        ("--sides ours --data none.jsonl", "none.jsonl: no such file"),
        ("--sides ours --data {rows} --steps 1 --model small", "--steps 1: expected 2 to"),
        ("--sides ours --data {rows} --pairs 0", "--pairs 0: expected 1 or more"),
        ("--sides ours --data {rows} --out none/r.json", "no such folder"),
    ],
)
def test_a_mistake_is_one_line(peers, flags, said, monkeypatch):
    for package in EXTRAS:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["peers.py", *flags.format(rows=ROWS).split()])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert said in ended.value.code and ended.value.code.startswith("error: ") and "\n" not in ended.value.code


def test_the_objectives_take_turns(peers, corpus, monkeypatch, capsys):
    """A clock that only SFT-GO's steps move by 3 s and cross-entropy's by 2 s gives 1.5 in every pair."""
    at, update = [0.0], peers.train.update

    def timed(model, optimizer, batches, cfg, *rest, **more):
        at[0] += {"sft_go": 3.0, "cross_entropy": 2.0}[cfg.objective]
        seen.append((cfg.objective, len(batches), sum(int(batch.loss_mask.sum()) for batch in batches)))
        return update(model, optimizer, batches, cfg, *rest, **more)

    seen = []
    monkeypatch.setattr(peers.train, "update", timed)
    monkeypatch.setattr(peers, "now", lambda: at[0])
    found = peers.objectives(BASE, corpus, 3, 2)
    assert found["ratios"] == [1.5] * 3 and found["interval"] == [1.5, 1.5]
    assert sum(n for n, _ in found["prices"].values()) == 3 and {ratio for _, ratio in found["prices"].values()} == {
        1.5
    }
    assert "1.500 × cross-entropy, 95 % 1.500 to 1.500" in capsys.readouterr().out
    pairs = np.array(seen, dtype=object).reshape(-1, 2, 3)
    assert all(
        {a[0], b[0]} == {"sft_go", "cross_entropy"} and a[1] == 2 and a[1:].tolist() == b[1:].tolist() for a, b in pairs
    )
