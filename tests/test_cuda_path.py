"""What training does on a GPU, on a machine without one: bench/fake_gpu.py lists each operation of `train.train`.

The shapes are those of Llama 3.2 3B and 3.1 8B with two or three layers: an operation is the same in each layer.

Not shown here: what kernels compute and demand beyond the demands of FlashAttention that are written below; the memory
that kernels, NCCL and the allocator take for themselves; time. `pytest -m gpu` on a GPU is for these.
"""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifiers import MBERT, classifier_folder
from tiny import TEXTS, tiny_folder
from torch.nn.attention.varlen import varlen_attn  # noqa: F401, a torch without it fails here, not in every test

import train
from bench.fake_gpu import FakeGPU, Op, Seen, seen
from bench.lengths import filled
from bench.memory import SHAPES
from eval.generate import room_for
from eval.score import log_likelihoods
from eval.sharing import pack, packed
from model import Llama, LlamaConfig
from published.files import read_json
from published.weights import tensor_shapes
from published.tokenizer import Tokenizer
from support import checkpoint, report
from support.generate import generate
from support.llmlingua2 import Classifier
from support.ranks import Ranks

WORDS = "water time salt sea warm shore small stones rivers crabs".split()  # each of one token


class FirstOfRanks(Ranks):
    """Rank 0, whose others are not there: they agree with it."""

    def __init__(self, gpu: FakeGPU):
        self.rank, self.size, self.device, self.patient = 0, gpu.ranks, gpu.device, None

    def together(self, work):
        return [work()]

    def reducer(self):
        return self.sum

    def __exit__(self, *_):
        pass


def in_thirds(corpus, seed):
    """A user's own grouper: three groups."""
    return np.arange(len(corpus.ids)) % 3


def unlike_the_reference(nll, prior):
    """A user's own, in every step, as rho1."""
    return nll - prior


unlike_the_reference.in_step, unlike_the_reference.prior = True, lambda corpus, seed: np.float32(corpus.ids % 7)


@cache
def trained(shape="3B", layers=2, micro=1, ranks=1, grouper="tfidf", flags="", tokens=4096, memory=80):
    """The second step of a run, of `micro` micro-batches of `tokens` tokens: its operations, its peak, the plan's."""
    count, piece = 4 * micro * ranks, tokens // 4  # of one text: each piece has a BOS, its last token is a target only
    text = " ".join(np.random.default_rng(0).choice(WORDS, piece * count - 9))  # so that the last is nearly full, too
    gpu, seen, asked = FakeGPU(ranks, memory * 10**9), SimpleNamespace(layers=layers, ranks=ranks), []
    torch.manual_seed(0)  # of the losses that are made up

    def update(*args, real=train.update, **kwargs):
        begun, gpu.peak = len(gpu.ops), gpu.alive
        row = real(*args, **kwargs)
        seen.ops, seen.peak = gpu.ops[begun:], gpu.peak
        return row

    def memory_needed(*args, real=report.memory_needed, **kwargs):
        seen.parameters, parts = args[1], real(*args, **kwargs)
        asked.append(parts)
        return parts

    def plan(*args, real=report.plan):
        room = real(*args)
        seen.parts = asked[-1 if room else 0]  # it asks again for weights cast once, and takes them if there is room
        seen.plan = sum(seen.parts.values())
        return room

    with TemporaryDirectory() as folder, ExitStack() as patches:
        out = tiny_folder(folder, seed=None, **SHAPES[shape] | {"num_hidden_layers": layers})
        (out / "rows.jsonl").write_text(json.dumps({"text": text}))
        flags = f"--model {out} --fresh --data {out}/rows.jsonl --out {out}/run --context {piece + 1} {flags}"
        flags += "" if callable(grouper) else f" --grouper {grouper}"
        flags += f" --batch-size {count} --micro-batch-tokens {tokens} --drop-last --max-steps 2 --checkpoint-every 0"
        for owner, name, replacement in (
            (train, "Ranks", lambda: FirstOfRanks(gpu)),
            (train, "update", update),
            (report, "memory_needed", memory_needed),
            (report, "plan", plan),
            (report, "ending", lambda *_: None),
            (checkpoint, "export", lambda *_: None),
            (Llama, "fill", filled),
        ):
            patches.enter_context(patch.object(owner, name, replacement))
        with gpu:
            train.train(train.parse_args(flags.split()), grouper=grouper if callable(grouper) else None)
        seen.row = json.loads((out / "run/metrics.jsonl").read_text().splitlines()[-1])
    return seen


RUNS = {
    "3B": {},
    "8B": {"shape": "8B"},
    "no groups": {"grouper": "none"},
    "by the step's losses": {"grouper": "loss"},
    "against a reference": {"grouper": unlike_the_reference},
    "three groups of a user": {"grouper": in_thirds, "micro": 2},
    "several micro-batches": {"micro": 2},
    "several, no room for weights cast once": {"micro": 2, "memory": 16},
    "scope micro_batch": {"micro": 2, "flags": "--scope micro_batch"},
    "recomputed": {"flags": "--checkpoint-activations"},
    "recomputed, several": {"micro": 2, "flags": "--checkpoint-activations"},
    "long rows": {"tokens": 8192},
    "gradients fuller than activations": {"shape": "8B", "tokens": 512},
    "fsdp": {"ranks": 8},
    "fsdp, 8B, several, recomputed": {"shape": "8B", "ranks": 8, "micro": 2, "flags": "--checkpoint-activations"},
    "fsdp, 8B, short rows": {"shape": "8B", "ranks": 8, "tokens": 512},
    "ddp": {"ranks": 8, "flags": "--shard ddp"},
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_crosses_between_cpu_and_gpu_in_a_step(name):
    ops = trained(**RUNS[name]).ops
    assert {t.device for op in ops for t in op.inputs + op.outputs} == {"cuda"}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_masks_for_labels_and_at_its_end_and_for_nothing_else(name):
    run, micro = trained(**RUNS[name]), RUNS[name].get("micro", 1)
    grouper, scope = RUNS[name].get("grouper"), "micro_batch" in RUNS[name].get("flags", "")
    passes, groups = sum(op.name == "aten.embedding" for op in run.ops), 3 if grouper is in_thirds else 2
    assert micro <= passes <= 3 * micro
    masks, labels = 4 * passes, 3 * micro if grouper in ("loss", unlike_the_reference) else 0
    prices = 2 * micro if scope else 2 * (micro > 1 or grouper == "none")  # guessed, or said to be constant: compared
    log = 5 + 3 * groups
    assert 0 < sum(op.waits for op in run.ops) <= masks + labels + prices + log


@pytest.mark.parametrize("more", [{"layers": 3}, {"tokens": 8192}], ids=str)
@pytest.mark.parametrize("run", [{}, {"grouper": "loss"}, {"ranks": 8}], ids=str)
def test_waits_do_not_grow(run, more):
    few, many = (Counter(op.name for op in trained(**run | further).ops if op.waits) for further in ({}, more))
    assert few == many


def flash_faults(op: Op) -> list[str]:
    """What FlashAttention would refuse in a call of varlen_attn; the fake kernel takes everything."""
    q, k, v, ends, key_ends, longest, longest_key, *_ = op.args
    held = {
        "bf16 or fp16": {q.dtype, k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float16}),
        "(tokens, heads, width)": len(q.shape) == 3 and k.shape == v.shape and q.shape[2] == k.shape[2],
        "query heads in equal groups": q.shape[1] % k.shape[1] == 0,
        "last stride 1": all(t.stride[-1] == 1 for t in (q, k, v)),
        "a width of 8, 16 … 256": q.shape[2] % 8 == 0 and q.shape[2] <= 256,
        "rows begin at multiples of 16 bytes": all(s % 8 == 0 for t in (q, k, v) for s in t.stride[:2]),
        "boundaries int32": all(t.dtype == torch.int32 and t.stride == (1,) for t in (ends, key_ends)),
        "on the GPU": {t.device for t in (q, k, v, ends, key_ends)} == {"cuda"},
        "lengths are ints": type(longest) is type(longest_key) is int and 0 < longest <= q.shape[0],
    }
    return [demand for demand, holds in held.items() if not holds]


@pytest.mark.parametrize("name", RUNS)
def test_attention_is_called_as_its_kernel_demands(name):
    run = trained(**RUNS[name])
    calls = [op for op in run.ops if op.name == "torch_attn._varlen_attn"]
    assert len(calls) >= run.layers and not any("scaled_dot_product" in op.name for op in run.ops)
    assert [fault for op in calls for fault in flash_faults(op)] == []
    tokens = RUNS[name].get("tokens", 4096)
    assert {(op.args[3].shape, op.args[5]) for op in calls} == {((5,), tokens // 4)}  # four documents


WRONG = {
    "bf16 or fp16": {"dtype": torch.float32},
    "last stride 1": {"stride": (8, 80, 2)},
    "a width of 8, 16 … 256": {"shape": (10, 2, 12), "stride": (24, 12, 1)},
    "on the GPU": {"device": "cpu"},
}


@pytest.mark.parametrize("demand", WRONG)
def test_what_the_kernel_would_refuse_is_seen(demand):
    good = Seen("cuda", torch.bfloat16, (10, 2, 64), (128, 64, 1))
    ends = Seen("cuda", torch.int32, (2,), (1,))
    call = Op("torch_attn._varlen_attn", (good, good, good, ends, ends, 10, 10), [], [], False)
    assert flash_faults(call) == []
    bad = good._replace(**WRONG[demand])
    assert demand in flash_faults(call._replace(args=(bad, bad, bad, *call.args[3:])))
    assert flash_faults(call._replace(args=(*call.args[:3], ends._replace(dtype=torch.int64), *call.args[4:])))
    assert flash_faults(call._replace(args=(*call.args[:5], ends, 10)))


@pytest.mark.parametrize("name", RUNS)
def test_weights_gradients_and_moments_are_float32_and_all_of_them_are_updated_in_few_kernels(name):
    run = trained(**RUNS[name])
    updates = [op for op in run.ops if op.name == "aten._fused_adamw_"]
    assert len(updates) == 2  # matrices; norms
    split = run.ranks if "fsdp" in name else 1
    for of_each in zip(*(op.args[:4] for op in updates)):  # weights, gradients, moments, squared moments
        held = [t for part in of_each for t in part]
        assert {t.dtype for t in held} == {torch.float32}
        assert sum(t.bytes for t in held) == 4 * run.parameters // split


@pytest.mark.parametrize("name", RUNS)
def test_matrices_are_multiplied_in_bf16_and_norms_take_the_fused_kernel(name):
    run = trained(**RUNS[name])
    products = [op for op in run.ops if op.name in ("aten.mm", "aten.bmm", "aten.addmm")]
    assert len(products) > 20 * run.layers
    assert {t.dtype for op in products for t in op.inputs + op.outputs} == {torch.bfloat16}
    norms = Counter(op.name for op in run.ops if "rms_norm" in op.name)
    passes = sum(op.name == "aten.embedding" for op in run.ops)
    assert norms["gpu.rms_norm"] >= passes * (2 * run.layers + 1) and norms["gpu.rms_norm_backward"]
    assert not any("rsqrt" in op.name for op in run.ops)


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_says_how_much_memory_a_step_takes(name):
    run = trained(**RUNS[name])
    assert 0.9 <= run.peak / run.plan <= 1.02
    assert run.row["peak_memory_bytes"] == run.peak


@pytest.mark.parametrize("name", ["3B", "several micro-batches", "recomputed"])
def test_one_layer_more_takes_the_activations_that_the_plan_says(name):
    """By themselves: beside the weights and logits of so few layers a fault in them would not be seen."""
    two, three = (trained(**RUNS[name] | {"layers": layers, "tokens": 12288}) for layers in (2, 3))
    planned = {what: three.parts[what] - two.parts[what] for what in two.parts}
    activations = planned.pop("activations")
    assert 0.98 <= (three.peak - two.peak - sum(planned.values())) / activations <= 1.02


def collectives(run, kind: str) -> list[Seen]:
    """What was sent, in order: of a gather a rank's part, of a scatter all of it."""
    ops = [op for op in run.ops if kind in op.name and "c10d" in op.name and "wrap" not in op.name]
    return [max(op.inputs, key=lambda t: t.bytes) for op in ops]


def sizes(shape: str, layers: int) -> tuple[int, int]:
    """Parameters of a block, and of the rest."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": layers}))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    return block, sum(p.numel() for p in model.parameters()) - layers * block


@pytest.mark.parametrize("name", [name for name in RUNS if "fsdp" in name])
def test_fsdp_gathers_bf16_and_scatters_float32_and_no_more_than_the_parameters(name):
    run = trained(**RUNS[name])
    block, rest = sizes(RUNS[name].get("shape", "3B"), run.layers)
    gathered, scattered = collectives(run, "allgather"), collectives(run, "reduce_scatter")
    assert {t.dtype for t in gathered} == {torch.bfloat16} and {t.dtype for t in scattered} == {torch.float32}
    backwards = sum(op.name == "aten.embedding_dense_backward" for op in run.ops)
    passes = sum(op.name == "aten.embedding" for op in run.ops)
    assert Counter(t.bytes for t in scattered) == {4 * block: run.layers * backwards, 4 * rest: backwards}
    blocks = run.layers * (passes + backwards)  # given back in between
    assert Counter(t.bytes for t in gathered) == {2 * block: blocks, 2 * rest: passes}


def test_ddp_sends_every_gradient_once_in_float32():
    run = trained(**RUNS["ddp"])
    sent = [t for t in collectives(run, "allreduce") if t.bytes > 1000]
    assert {t.dtype for t in sent} == {torch.float32} and sum(t.bytes for t in sent) == 4 * run.parameters
    assert not collectives(run, "allgather") and not collectives(run, "reduce_scatter")


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_small_collectives_do_not_grow_with_layers(name):
    """What such a collective takes is the time to begin it."""
    few, many = (trained(**RUNS[name] | more) for more in ({}, {"layers": 3}))
    small = [sum(t.bytes < 10**5 for t in collectives(run, "")) for run in (few, many)]
    assert small[0] == small[1] <= 6


@pytest.mark.parametrize("name", ["3B", "ddp"])
def test_kernels_after_backward_do_not_grow_with_layers(name):
    after = []
    for more in ({}, {"layers": 3}):
        names = [op.name for op in trained(**RUNS[name] | more).ops]
        last = len(names) - names[::-1].index("aten.embedding_dense_backward")
        after.append(Counter(name for name in names[last : names.index("aten._fused_adamw_")] if "c10d" not in name))
    assert after[0] == after[1] and len(after[0]) > 5


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_model_is_exported_from_the_gpu_tensor_by_tensor(tmp_path, ranks):
    model = tiny_folder(tmp_path / "tiny", num_hidden_layers=12)
    cfg = train.parse_args(f"--model {model} --data none --dtype bfloat16".split())
    with FakeGPU(ranks) as gpu:
        rank = FirstOfRanks(gpu)
        llama = train.build(replace(cfg, shard="fsdp"), model, rank)
        begun, alive = len(gpu.ops), gpu.alive
        gpu.peak = alive
        checkpoint.export(llama, Tokenizer(model, 512), "plain", torch.bfloat16, tmp_path, rank)
        names = [name for name, _ in llama.named_parameters()]
        largest = 4 * max(p.numel() for p in llama.parameters())
    copies = [op for op in gpu.ops[begun:] if op.crosses]
    shapes = tensor_shapes(tmp_path / "model/model.safetensors")
    assert sorted(shapes) == sorted(names) and {dtype for _, dtype in shapes.values()} == {"BF16"}
    assert [op.inputs[0].shape for op in copies] == [shapes[name][0] for name in names]
    assert {op.inputs[0].dtype for op in copies} == {torch.bfloat16} and gpu.peak - alive <= 2 * largest
    assert read_json(tmp_path / "model/config.json")["torch_dtype"] == "bfloat16"


# Generation, the scorer, the classifier.


def llama(gpu, layers, dtype=torch.bfloat16, vocabulary=1024):
    cfg = LlamaConfig(**SHAPES["3B"] | {"vocab_size": vocabulary, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = Llama(cfg, dtype).to(dtype)
    return filled(model, None, gpu.device, None, None)


class Attention:
    """In the place of scaled_dot_product_attention: what it was given. A call for which CUDA has no kernel fails."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        given = [seen(x) for x in (q, k, v, attn_mask) if x is not None]
        assert {x.device for x in given} == {"cuda"} and {x.dtype for x in given} <= {q.dtype, torch.bool}
        assert all(x.stride[-1] == 1 for x in given) and q.shape[3] % 8 == 0
        grouped = q.shape[1] != k.shape[1]
        assert not grouped or enable_gqa and attn_mask is None and q.dtype != torch.float32, "it would store all scores"
        self.calls.append(given)
        return torch.empty_like(q)


def waits(ops):
    return sum(op.waits for op in ops)


def mixed(ops):
    """Operations on both memories, but for copies from one to the other."""
    return [op for op in ops if op.crosses and op.name not in ("aten._to_copy", "aten.copy_")]


def decode(layers, lengths, new, ended=lambda text: False):
    """The operations of each new token, attention's calls, and by how many bytes each token after the first rose."""
    marks, attention = [], Attention()
    with FakeGPU() as gpu, patch.object(F, "scaled_dot_product_attention", attention), patch.object(torch, "Generator"):
        model = llama(gpu, layers)

        def mark(text):
            if len(text) > len(marks):
                marks.append((len(gpu.ops), gpu.alive, gpu.peak))
                gpu.peak = gpu.alive
            return ended(text)

        start = len(gpu.ops)
        generate(model, [[5] * n for n in lengths], new, ended=mark)
    ends = [start, *(ops for ops, *_ in marks)]
    above = [peak - alive for (_, alive, _), (*_, peak) in zip(marks, marks[1:])]
    return [gpu.ops[a:b] for a, b in zip(ends, ends[1:])], attention.calls, above


def test_decoding_waits_once_a_token_and_reads_the_cache_where_it_lies():
    lengths, new = [126, 20, 60, 9], 6
    few, calls, above = decode(1, lengths, new)
    many, *_ = decode(3, lengths, new)
    assert not mixed(sum(few + many, []))
    assert [*map(waits, few)] == [*map(waits, many)], "three layers wait as often as one"
    assert {*map(waits, few[1:])} == {len(lengths)}, "for the tokens alone, which a real GPU sends in one copy"
    assert [k.shape[2] for _, k, *_ in calls] == [128, 128, 256, 256, 256], "a new shape once in 128 tokens"
    for q, k, v, mask in calls:
        assert q.shape == (4, 8, 3, 128), "the queries of a key head"
        assert k.stride == v.stride == (8 * 256 * 128, 256 * 128, 128, 1), "the cache itself"
        assert mask.shape == (4, 1, 3, k.shape[2]) and mask.dtype == q.dtype and mask.stride[2:] == (mask.shape[3], 1)
    assert max(above) < 4 * 8 * 256 * 128 * 2, "nothing as large as a layer's keys"


def test_sequences_that_end_leave_the_cache_a_layer_at_a_time():
    answers = iter([False] * 16 + [True] * 12 + [False] * 4 * 3)  # of 16, 4 go on after their second token
    tokens, calls, above = decode(4, [70] * 16, 4, lambda text: next(answers))
    layer = 2 * 16 * 8 * 128 * 128 * 2  # bytes of its keys and values
    assert [q.shape[0] for q, *_ in calls] == [16] * 4 + [4] * 8
    assert layer / 8 < above[1] < layer / 2, "a quarter of one layer beside what it is taken from"
    assert waits(tokens[2]) == 4 + 1, "the tokens, and which sequences stay"
    assert not mixed(sum(tokens, []))


def test_a_batch_may_fill_what_torch_holds_free():
    with FakeGPU(memory=80 * 10**9) as gpu:
        model, each = llama(gpu, 2), 2 * 2 * 8 * 128 * 2
        with patch.object(torch.cuda, "memory_reserved", lambda device: gpu.alive + 30 * 10**9):
            assert room_for(model) == int(0.4 * (80 * 10**9 - gpu.alive + 30 * 10**9) / each)


def score(layers, pairs, max_tokens, dtype=torch.bfloat16):
    """The operations of each row, and attention's calls."""
    marks, attention = [], Attention()
    with FakeGPU() as gpu, patch.object(F, "scaled_dot_product_attention", attention), torch.no_grad():
        model = llama(gpu, layers, dtype, 2**20)
        model.register_forward_pre_hook(lambda *_: marks.append(len(gpu.ops)))
        log_likelihoods.__wrapped__(model, pairs, max_tokens)  # inference_mode knows no fake tensors
    return [gpu.ops[a:b] for a, b in zip(marks, [*marks[1:], None])], attention.calls


def questions(n):
    """n questions of one header, two choices each of up to three tokens."""
    header = [*range(100, 140)]
    return [(packed([*header, i, i + 1]), choice) for i in range(n) for choice in ([7], [8, i, 9])]


def test_a_row_s_waits_grow_with_neither_layers_nor_tokens_nor_chunks():
    pairs = questions(300)
    assert [(row.continued, row.keep) for row in pack(pairs, 4096, 1000)] == [(False, 0), (True, None)]
    few, _ = score(1, pairs, 1000)
    many, _ = score(3, pairs, 1000)
    small, _ = score(1, questions(60), 100)
    for ops in (few, many, small):
        assert not mixed(sum(ops, []))
    assert [*map(waits, few)] == [*map(waits, many)]
    assert waits(few[0]) == waits(small[0]) <= 20, "1,000 tokens and five chunks of logits as 100 and one"


def test_the_scorer_calls_attention_as_its_kernel_demands():
    for ops in score(2, questions(300), 1000)[0]:
        calls = [op for op in ops if op.name == "torch_attn._varlen_attn"]
        assert len(calls) == 2 * 3, "in each layer the segments themselves, the header, the contexts"
        assert [fault for op in calls for fault in flash_faults(op)] == []


def test_in_float32_heads_are_repeated_for_a_kernel_that_stores_no_scores():
    _, calls = score(2, questions(3), 1000, torch.float32)
    assert calls and all(q.shape[1] == k.shape[1] == 24 for q, k, *_ in calls)


def test_the_classifier_waits_three_times_a_batch_and_computes_in_float32(tmp_path):
    pytest.importorskip("transformers")
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    folder, batches = classifier_folder(tmp_path, MBERT, TEXTS, shape=shape), []
    with FakeGPU() as gpu:
        classifier = Classifier(folder, gpu.device)
        classifier.batch_pieces, start = classifier.batch_pieces // 256, len(gpu.ops)  # 128, as a GPU has 32,768
        classifier.model.register_forward_pre_hook(lambda *_: batches.append(1))
        keep = classifier.keep(TEXTS)
    ops = gpu.ops[start:]
    assert keep.shape == (sum(map(len, TEXTS)),) and len(batches) > 1
    assert waits(ops) == 3 * len(batches), "pieces and their mask there, probabilities back"
    assert not mixed(ops) and {x.dtype for op in ops for x in op.inputs if x.dtype.is_floating_point} == {torch.float32}
