"""Generation, the scorer, the classifier and export on a GPU that computes nothing: devices, waits, shapes, memory."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from classifiers import MBERT, classifier_folder
from safetensors.torch import load_file
from tiny import TEXTS, tiny_folder

from bench.fake_gpu import FakeGPU, seen
from eval.generate import room_for
from eval.score import log_likelihoods
from eval.sharing import pack, packed
from model import Llama, LlamaConfig
from published.tokenizer import Tokenizer
from support.checkpoint import export
from support.generate import generate
from support.llmlingua2 import Classifier
from support.ranks import Ranks

# Generation, the scorer, the classifier, export. Shapes are Llama-3.2-3B's but for layers and vocabulary.

WIDTHS = dict(hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8, head_dim=128)


def llama(gpu, layers, dtype=torch.bfloat16, vocab=1024):
    cfg = LlamaConfig(vocab, num_hidden_layers=layers, max_position_embeddings=4096, **WIDTHS)
    with torch.device("meta"):
        return Llama(cfg, dtype).to(dtype).to_empty(device=gpu.device)


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


def score(layers, pairs, max_tokens, dtype=torch.bfloat16, vocab=2**20):
    """The operations of each row, and attention's calls."""
    marks, attention = [], Attention()
    with FakeGPU() as gpu, patch.object(F, "scaled_dot_product_attention", attention), torch.no_grad():
        model = llama(gpu, layers, dtype, vocab)
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


def test_flash_attention_s_demands_are_met():
    """Its kernel checks them, a fake of it does not."""
    for ops in score(2, questions(300), 1000)[0]:
        calls = [op for op in ops if op.name == "torch_attn._varlen_attn"]
        assert len(calls) == 2 * 3, "in each layer the segments themselves, the header, the contexts"
        for call in calls:
            q, k, v, *bounds = call.inputs
            assert {x.device for x in call.inputs} == {"cuda"} and {x.dtype for x in (q, k, v)} == {torch.bfloat16}
            assert all(x.stride[2] == 1 and x.shape[2] % 8 == 0 for x in (q, k, v)) and q.shape[1] % k.shape[1] == 0
            assert bounds and all(x.dtype == torch.int32 and x.stride == (1,) for x in bounds)


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


def test_export_holds_a_matrix_at_a_time(tmp_path):
    folder, cfg = tiny_folder(tmp_path / "tiny", None), LlamaConfig(512, 32, 64, 12, 4, 2, 8)
    with FakeGPU() as gpu:
        with torch.device("meta"):
            model = Llama(cfg, torch.bfloat16)
        model.to_empty(device=gpu.device)
        gpu.peak, start = gpu.alive, len(gpu.ops)
        export(model, Tokenizer(folder, 512), "plain", torch.bfloat16, tmp_path, Ranks())
    sizes = [p.numel() for p in model.parameters()]
    assert gpu.peak - gpu.alive < 8 * max(sizes) < sum(sizes), "bytes of its cast and of the masks of what is finite"
    assert waits(gpu.ops[start:]) == 2 * len(sizes), "is it finite; to the CPU"
    saved = load_file(tmp_path / "model" / "model.safetensors").values()
    assert {(x.device.type, x.dtype) for x in saved} == {("cpu", torch.bfloat16)}
    assert sum(x.numel() for x in saved) == sum(sizes) and not mixed(gpu.ops[start:])
