"""bench/gpu.py, bench/roofline.py and the plan's time: what can be known of them without a GPU."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from bench import gpu, lengths, roofline
from bench.gpu import Bench, Row
from model import Llama, LlamaConfig
from published.config import read_config
from support import report

ROOT = Path(train.__file__).parent


def llama(folder, shape):
    with torch.device("meta"):
        model = Llama(LlamaConfig(**read_config(lengths.folder_of(folder, shape))))
    return model.cfg, sum(p.numel() for p in model.parameters())


# The plan's time.


@pytest.mark.fast
def test_the_arithmetic_of_a_forward_pass_is_torch_s(tmp_path):
    model = Llama(llama(tmp_path, "tiny")[0])
    corpus = lengths.corpus("alpaca", model.cfg.vocab_size, 64)
    batch = data.pack(corpus, corpus.kind, torch.arange(5).numpy())
    with FlopCounterMode(display=False) as counted:
        batch.nll(model)
    matmuls = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    positions, supervised = batch.tokens.numel(), int(batch.loss_mask.sum())
    assert 0 < supervised < positions
    assert report.forward_flops(model.cfg, positions, supervised, 0) == matmuls
    squares, heads = sum(n * n for n in batch.layout.lengths), model.cfg.num_attention_heads * model.cfg.head_dim
    causal = 2 * model.cfg.num_hidden_layers * heads * squares  # scores and their sum of values, half of each
    assert report.forward_flops(model.cfg, positions, supervised, squares) == matmuls + causal


@pytest.mark.parametrize("shape, name, ranks, recompute", [("3b", "lima", 1, False), ("8b", "lima", 8, True)])
def test_the_plan_s_arithmetic_is_the_roofline_of_the_step(tmp_path, shape, name, ranks, recompute):
    by_kind, useful = roofline.roofline(shape, name, ranks, recompute)
    cfg, parameters = llama(tmp_path, shape)
    corpus = lengths.corpus(name, cfg.vocab_size)
    n, share = corpus.lengths - 1, lengths.BATCH[name] / len(corpus)
    step = share * n.sum(), share * corpus.loss_mask.sum(), share * (n**2).sum()
    micro_batches = -(-int(step[0] / ranks) // 8192)
    said = report.seconds_needed(cfg, parameters, step, micro_batches, ranks, recompute)
    assert said == pytest.approx(roofline.longest(by_kind), rel=0.1)
    if not recompute:  # the head's logits are made twice, and attention's scores too
        flops, without = report.forward_flops(cfg, *step), report.forward_flops(cfg, *step[:2], 0)
        again = 2 * cfg.vocab_size * cfg.hidden_size * step[1] + (flops - without) / 2
        share = useful / (by_kind["matmul"] + by_kind["attention"])
        assert share == pytest.approx(3 * flops / (3 * flops + again), rel=0.01)
    assert useful < by_kind["matmul"] + by_kind["attention"] < roofline.longest(by_kind)
    assert all(by_kind[kind] > 0 for kind in roofline.KINDS if ranks > 1 or kind != "collectives")


def test_a_dry_run_says_the_time_on_a_gpu_where_steps_are_long(folder, rows, tmp_path, capsys):
    def said(model):
        train.train(train.parse_args(f"--model {model} --data {rows} --fresh --dry-run --checkpoint-every 0".split()))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]

    (folder / "model.safetensors").unlink()
    assert said(folder) == []
    lengths.folder_of(folder, "3b")
    assert said(folder) == ["time    about 2 seconds on one H100, by arithmetic"]


@pytest.mark.fast
def test_the_time_of_lima_s_recipe_on_one_gpu_and_on_eight(tmp_path):
    cfg = train.Config(model="-", data="-", batch_size=64)
    shape, parameters = llama(tmp_path, "3b")
    corpus = lengths.corpus("lima", shape.vocab_size)
    one, eight = (report.expected(cfg, shape, parameters, corpus, 255, ranks) for ranks in (1, 8))
    assert one == "about 7 minutes on one H100, by arithmetic"
    assert eight == "about 54 seconds on eight H100, by arithmetic"


# bench/gpu.py.


def works(bench):
    yield Row("before", 1.5, "units")
    yield Row("told", bench.known.get("before", 0.0))


def fails(bench):
    yield Row("kept", 2.0)
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried")


def hangs(bench):
    yield Row("kept, too", 3.0)
    time.sleep(60)


def dies(bench):
    yield Row("sent", 4.0)
    os._exit(9)


@pytest.mark.fast
def test_a_part_that_fails_hangs_or_dies_leaves_its_rows_and_the_next_part(tmp_path, monkeypatch):
    parts = {"fails": (fails, 9), "hangs": (hangs, 0.5), "dies": (dies, 9), "works": (works, 9), "late": (works, 900)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.run([*parts], False, 0.5, tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["part"], row["what"], row["value"]) for row in rows] == [
        *[("fails", "kept", 2.0), ("fails", "fails", None), ("hangs", "kept, too", 3.0), ("hangs", "hangs", None)],
        *[("dies", "sent", 4.0), ("dies", "dies", None), ("works", "before", 1.5), ("works", "told", 0.0)],
        ("late", "late", None),
    ]
    notes = [row["note"] for row in rows if row["value"] is None]
    out_of_memory = "OutOfMemoryError: CUDA out of memory."
    assert notes == [out_of_memory, "stopped: its time was over", "its process ended with 9", "no time left"]
    table = (tmp_path / "gpu.md").read_text()
    assert f"| fails | fails | not measured |  | {out_of_memory} |" in table and "| 1.5 units |" in table
    assert "Traceback" in (tmp_path / "gpu.log").read_text()


def test_every_part_but_the_tests_and_the_compiler_works_on_tiny_shapes(tmp_path):
    pytest.importorskip("transformers")
    names = [name for name in gpu.PARTS if name not in ("checks", "compiled")]
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--tiny", "--out", tmp_path, "--parts", ",".join(names)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in rows} == {*names}
    assert [row for row in rows if row["note"] != "ran on tiny shapes"] == []
    assert all(row["value"] is None for row in rows), "a CPU's number is none of a GPU's"


def test_tiny_transformers_and_the_scorer_measure_what_they_say():
    bench = Bench(tiny=True)
    pytest.importorskip("transformers")
    (difference, *_) = gpu.transformers(bench)
    assert 0 < difference.value < 0.01
    asked = lengths.pairs("mmlu", 512)
    assert len({context for context, _ in asked}) * 4 == len(asked), "four choices a question"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "fake_gpu"))
def test_every_bench_says_how_it_is_used_and_needs_no_extras_for_that(name, monkeypatch, capsys):
    for extra in ("transformers", "trl", "datasets", "lm_eval", "llmlingua", "sklearn", "pyarrow"):
        monkeypatch.setitem(sys.modules, extra, None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "bench" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_large_is_begun_and_no_table_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: no GPU here; --tiny shows"):
        gpu.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_a_later_part_leaves_the_rows_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"works": (works, 9), "fails": (fails, 9)})
    for part in ("fails", "works", "fails"):
        gpu.run([part], False, 0.5, tmp_path)
    rows = [(row["part"], row["what"]) for row in json.loads((tmp_path / "gpu.json").read_text())]
    assert rows == [("works", "before"), ("works", "told"), ("fails", "kept"), ("fails", "fails")]
