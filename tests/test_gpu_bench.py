"""bench/gpu.py, bench/roofline.py and the plan's time: what can be known of them without a GPU."""

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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


@pytest.mark.parametrize("shape, name, ranks, recompute", [("3B", "lima", 1, False), ("8B", "lima", 8, True)])
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


def test_more_micro_batches_cost_as_much_more_in_the_arithmetic_as_in_the_roofline(tmp_path):
    cfg, parameters = llama(tmp_path, "3B")
    sizes = [roofline.record("3B", "alpaca", 1, 1, False, most)[1].rows for most in (2048, 1024)]
    few, many = (roofline.longest(roofline.roofline("3B", "alpaca", most=most)[0]) for most in (2048, 1024))
    step = sum(map(sum, sizes[0])), 0, 0
    said = [report.seconds_needed(cfg, parameters, step, len(rows)) for rows in sizes]
    assert said[1] - said[0] == pytest.approx(many - few, rel=0.3)  # small matmuls wait for their weights, too


def test_a_dry_run_says_the_time_on_a_gpu_where_steps_are_long(folder, rows, tmp_path, capsys):
    def said(model, more=""):
        flags = f"--model {model} --data {rows} --fresh --dry-run --checkpoint-every 0 {more}"
        train.train(train.parse_args(flags.split()))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]

    (folder / "model.safetensors").unlink()
    assert said(folder) == []
    lengths.folder_of(folder, "3B")
    assert said(folder) == ["time    under two seconds on one H100, by arithmetic"]
    assert said(folder, "--dtype float32") == [], "no GPU computes float32 at the rate of bf16"


@pytest.mark.fast
def test_the_time_of_lima_s_recipe_on_one_gpu_and_on_eight(tmp_path):
    cfg = train.Config(model="-", data="-", batch_size=64, shard="fsdp")
    shape, parameters = llama(tmp_path, "3B")
    corpus = lengths.corpus("lima", shape.vocab_size)
    one, eight = (report.expected(cfg, shape, parameters, corpus, 255, ranks) for ranks in (1, 8))
    assert report.expected(replace(cfg, shard="ddp"), shape, parameters, corpus, 255, 8) == ""
    assert one == "about 7 minutes on one H100, by arithmetic"
    assert eight == "about 54 seconds on eight H100, by arithmetic"


def test_micro_batches_of_as_many_tokens_need_not_be_alike(monkeypatch):
    """One document of 4,096 positions and two of 2,048: attention costs in one step what it costs in two."""

    def attention(sizes):
        kind = np.concatenate([np.repeat(np.uint8([data.PROMPT, data.RESPONSE]), [n, 1]) for n in sizes])
        starts = np.cumsum([0, *(n + 1 for n in sizes)])
        corpus = data.Corpus(np.ones(len(kind), np.int32), kind, starts, template="plain", counts={})
        monkeypatch.setattr(lengths, "corpus", lambda *_: corpus)
        return roofline.roofline("3B", most=4096)[0]["attention"]

    one, two = attention([4096]), attention([2048, 2048])
    assert one > 1.5 * two
    assert attention([4096, 2048, 2048]) == pytest.approx(one + two)


@pytest.mark.parametrize("flags", ["--ranks 0", "--micro-batch-tokens 1"])
def test_too_little_for_a_roofline_is_one_line(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline.py", *flags.split()])
    with pytest.raises(SystemExit, match=f"^error: {flags}: expected [12] or more$"):
        roofline.main()


def test_documents_fit_rows_of_fewer_tokens():
    _, step = roofline.record("tiny", "alpaca", 1, 1, False, 64)
    assert max(map(sum, step.rows)) <= 64


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


def starts_another(bench):
    child = subprocess.Popen(["sleep", "60"], pass_fds=[int(os.environ["PIPE"])])
    yield Row("begun", child.pid)
    child.wait()


@pytest.mark.fast
def test_what_a_part_starts_ends_with_it(tmp_path, monkeypatch):
    end, held = os.pipe()  # which reads as ended when nobody holds it any more
    monkeypatch.setenv("PIPE", str(held))
    monkeypatch.setattr(gpu, "PARTS", {"starts": (starts_another, 0.5)})
    gpu.run(["starts"], False, 0.5, tmp_path)
    os.close(held)
    assert [row.what for row in gpu.read(tmp_path / "gpu.json")] == ["begun", "starts"]
    assert select.select([end], [], [], 5)[0], "sleep still has it"
    os.close(end)


@pytest.mark.fast
def test_a_part_asked_for_again_leaves_the_others_rows(tmp_path, monkeypatch, capsys):
    def first(bench):
        yield Row("one", 1.0)

    def second(bench):
        yield Row("two", bench.known["one"] + 1)
        yield Row("three")

    monkeypatch.setattr(gpu, "PARTS", {"first": (first, 9), "second": (second, 9)})
    for names in (["first"], ["second"], ["first"]):
        gpu.run(names, False, 0.5, tmp_path)
    assert [(row.part, row.value) for row in gpu.read(tmp_path / "gpu.json")] == [
        *[("first", 1.0), ("second", 2.0), ("second", None)],
    ]
    (three,) = [line for line in capsys.readouterr().out.splitlines() if "three" in line]
    assert three.split() == ["second", "three", "not", "measured"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--out {0}", "error: no GPU here; --tiny shows that the parts work"),
        ("--tiny --out {0}/none", "error: --out {0}/none: no such folder; create it first"),
        ("--tiny --parts suite,other --out {0}", "error: --parts other: expected some of checks, ceilings"),
        ("--tiny --parts suite --out {0}", "error: --out {0}: [Errno 21] Is a directory: '{0}/gpu.json.part"),
        ("--tiny --parts suite --out {0}/of", "error: --out {0}/of: {0}/of/gpu.json: not a table of this program"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(flags, said, tmp_path, monkeypatch):
    (tmp_path / "gpu.json.part").mkdir()
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "gpu.json").write_text('["rows of another program"]')
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags.format(tmp_path).split()])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpu, "measured", None)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code.startswith(said.format(tmp_path)) and "\n" not in ended.value.code


def test_a_part_of_many_tokens_has_the_plan_of_its_largest_step(monkeypatch):
    bench, asked = Bench(tiny=True), []
    monkeypatch.setattr(Bench, "planned", lambda self, model, tokens, *more: asked.append((tokens, *more)) or 1)
    monkeypatch.setattr(Bench, "limit", lambda self, model: 4096)
    [*gpu.alpaca(bench)]
    assert asked[-1] == (bench.fullest, False, False) and 0 < bench.fullest <= 8 * 63


@pytest.mark.fast
def test_a_kernel_is_of_one_kind_and_a_span_of_code_of_none():
    def event(key, device="CUDA", span=False):
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=span, self_device_time_total=1.0)

    kernels = {"void scatter_kernel": "loss and other reductions", "CatArrayBatchedCopy": "copies, casts"}
    kernels |= {"aten::cat": "copies, casts", "fused_adam_kernel": "optimizer", "nvjet_tst_128x256": "matmul"}
    events = [*map(event, kernels), event("Optimizer.step#AdamW.step", span=True), event("aten::mm", "CPU")]
    found, names = gpu.by_kind(events, True)
    assert sum(found.values()) == len(kernels)
    assert {name: kind for kind, seen in names.items() for _, name in seen} == kernels


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
