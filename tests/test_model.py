"""model.py: equal to transformers on tiny random Llamas, exact over packed documents, honest about bad folders."""

import copy
import json
import os
import shutil
from functools import partial

import pytest
import stories260k
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from model import Llama, LlamaConfig, Packed
from published import weights
from published.config import checked
from published.weights import weight_files
from support.generate import generate, sample

LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_SCALING["original_max_position_embeddings"] = 32
SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3)
SHAPE |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
TINY = {"model_type": "llama", **SHAPE, "rope_theta": 10000.0, "tie_word_embeddings": True}
TINY["initializer_range"] = 0.2  # large, so that a wrong angle or mask moves the logits far
VARIANTS = {
    "tied": {},
    "untied": dict(tie_word_embeddings=False),
    "one head a group": dict(num_key_value_heads=6),
    "wide heads": dict(head_dim=16),
    "llama3 rotary": dict(rope_theta=500.0, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=False),
    "llama3 rotary, newer spelling": dict(rope_theta=None, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500.0}),
}


def folder_of(tmp_path, **changes):
    raw = {k: v for k, v in {**TINY, **changes}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def logits(model, tokens, lengths=None):
    return model.lm_head(model(tokens[None], Packed(lengths or [len(tokens)])))[0]


@pytest.fixture
def tiny(tmp_path):
    return Llama.from_pretrained(folder_of(tmp_path), seed=3)


@pytest.mark.fast
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    ours = Llama.from_pretrained(folder_of(tmp_path, **VARIANTS[variant]), seed=3)
    ours.save_pretrained(tmp_path / "b")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    tokens = torch.randint(97, (120,), generator=torch.Generator().manual_seed(0))
    a, b = logits(ours, tokens), theirs(tokens[None]).logits[0]
    assert (a - b).abs().max() <= 1e-4
    assert a.std() > 0.5, "logits this flat would hide a fault"

    for out in (a, b):
        torch.nn.functional.cross_entropy(out[:-1], tokens[1:]).backward()
    names = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - names[name].grad).abs().max() <= 1e-4, name


@pytest.mark.fast
def test_a_folder_saved_by_transformers_loads_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = transformers.LlamaConfig(**{**TINY, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500.0}})
    theirs = transformers.LlamaForCausalLM(cfg)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = torch.arange(90)
    assert (logits(Llama.from_pretrained(tmp_path), tokens) - theirs(tokens[None]).logits[0]).abs().max() <= 1e-4


@pytest.mark.fast
def test_a_packed_document_equals_itself_alone_and_no_neighbour_changes_a_bit(tiny):
    lengths = [7, 1, 40, 23]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(97, (sum(lengths),), generator=generator)
    packed = logits(tiny, tokens, lengths).split(lengths)
    for document, out in zip(tokens.split(lengths), packed):
        assert (logits(tiny, document) - out).abs().max() <= 1e-5

    others = torch.randint(97, tokens.shape, generator=generator)
    start = sum(lengths[:2])
    others[start : start + 40] = tokens[start : start + 40]
    assert not torch.equal(others, tokens)
    again = logits(tiny, others, lengths).split(lengths)
    assert torch.equal(again[2], packed[2])
    assert not torch.equal(again[3], packed[3])


@pytest.mark.fast
def test_only_the_distance_between_positions_matters_also_far_out(tiny):
    tokens, layout = torch.arange(50)[None], Packed([50])
    far, stretched = copy.copy(layout), copy.copy(layout)
    far.positions, stretched.positions = layout.positions + 701, 2 * layout.positions
    assert (tiny(tokens, layout) - tiny(tokens, far)).abs().max() <= 1e-3
    assert (tiny(tokens, layout) - tiny(tokens, stretched)).abs().max() > 0.1


@pytest.mark.fast
def test_a_later_token_moves_no_earlier_logit(tiny):
    tokens = torch.arange(50)
    before = logits(tiny, tokens)
    tokens[30] = 96
    after = logits(tiny, tokens)
    assert torch.equal(before[:30], after[:30]) and not torch.equal(before[30:], after[30:])


@pytest.mark.fast
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_keep_every_bit_in_one_file_or_many(tmp_path, tied):
    (tmp_path / "a").mkdir()
    model = Llama.from_pretrained(folder_of(tmp_path / "a", tie_word_embeddings=tied), seed=1)
    model.save_pretrained(tmp_path / "one")
    weights.save(model, tmp_path / "many", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for folder in ("one", "many"):
        again = Llama.from_pretrained(tmp_path / folder)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters())
    assert ("lm_head.weight" in weight_files(tmp_path / "one")) == (not tied)


@pytest.mark.fast
def test_saving_over_older_weights_leaves_none_of_them(tmp_path, tiny):
    weights.save(tiny, tmp_path / "x", shard_bytes=20_000)
    with torch.no_grad():
        tiny.model.norm.weight.fill_(7.0)
    tiny.save_pretrained(tmp_path / "x")
    assert Llama.from_pretrained(tmp_path / "x").model.norm.weight[0] == 7
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "x" / "model.safetensors").stat().st_mode == (tmp_path / "x" / "config.json").stat().st_mode


@pytest.mark.fast
def test_a_config_made_in_code_is_saved_complete(tmp_path):
    cfg = LlamaConfig(**SHAPE, rms_norm_eps=1e-4, rope_theta=500.0, rope_scaling=LLAMA3_SCALING)
    Llama(cfg).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).cfg == cfg


@pytest.mark.fast
def test_a_frozen_matrix_gets_no_gradient_and_the_others_the_same(tmp_path):
    model = Llama.from_pretrained(folder_of(tmp_path), compute_dtype=torch.bfloat16, seed=3)
    frozen = model.model.layers[1].mlp.up_proj.weight

    def gradient():
        model(torch.arange(60)[None], Packed([60])).float().square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p is not frozen and p.grad is not None}

    full = gradient()
    model.zero_grad()
    frozen.requires_grad_(False)
    assert all(torch.equal(g, full[n]) for n, g in gradient().items()) and frozen.grad is None


@pytest.mark.fast
def test_bf16_compute_keeps_fp32_parameters_and_no_second_copy_of_them(tmp_path):
    model = Llama.from_pretrained(folder_of(tmp_path), compute_dtype=torch.bfloat16, seed=3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden = model(torch.arange(60)[None], Packed([60]))
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for n, p in model.named_parameters() if p.grad is not None)
    shapes = {p.shape for p in model.parameters() if p.ndim == 2}
    assert not [
        t.shape
        for t in saved
        if t.ndim == 2 and t.dtype == torch.bfloat16 and (t.shape in shapes or t.mT.shape in shapes)
    ]

    full = Llama.from_pretrained(folder_of(tmp_path), seed=3)(torch.arange(60)[None], Packed([60]))
    assert (hidden - full).abs().mean() < 0.03 < full.abs().mean()


@pytest.mark.fast
def test_weights_cast_once_give_the_same_bits_with_one_cast_each_and_are_gone_afterwards(tmp_path):
    model, casts = Llama.from_pretrained(folder_of(tmp_path), compute_dtype=torch.bfloat16, seed=3), []
    matrices = [p.data_ptr() for name, p in model.model.named_parameters() if p.ndim == 2 and "embed" not in name]

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in matrices:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    def gradient():
        for _ in range(2):  # micro-batches
            model(torch.arange(60)[None], Packed([25, 35])).float().square().sum().backward()
        grads = [p.grad for p in model.model.parameters()]
        model.zero_grad()
        return grads

    plain = gradient()
    for room, expected in (False, 4), (True, 1):
        model.room_to_cast = room
        casts.clear()
        with Casts(), model.cast_once():
            once = gradient()
        assert len(casts) == expected * len(matrices)
        assert all(map(torch.equal, plain, once))
    assert not any(getattr(m, "cast", None) is not None for m in model.modules())
    with pytest.raises(KeyError), model.cast_once():
        raise KeyError
    assert not any(getattr(m, "cast", None) is not None for m in model.modules()), "nor after a step that failed"


def test_compiled_blocks_serve_all_row_lengths_and_give_the_plain_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor's: LOG.md
    plain, compiled = (
        Llama.from_pretrained(folder_of(tmp_path), compute_dtype=torch.bfloat16, seed=3) for _ in range(2)
    )
    monkeypatch.setattr(Packed, "attend", torch.compiler.disable(Packed.attend))  # as `train.build` does
    for block in compiled.model.layers:
        block.compile(dynamic=True)
    torch._dynamo.reset()
    graphs = []
    for lengths in [[30, 4], [5], [17, 3, 9, 2], [60], [2, 2], [41]]:
        tokens = torch.arange(sum(lengths))[None]
        losses = [m(tokens, Packed(lengths))[..., ::5].float().exp().mean() for m in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert abs(losses[0] - losses[1]) < 5e-3 * losses[0]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] and len({*graphs}) == 1, "the first row compiles; no later one"
    for a, b in zip(plain.parameters(), compiled.parameters()):
        assert a.grad is None or (a.grad - b.grad).norm() < 0.03 * a.grad.norm()


@pytest.mark.fast
def test_greedy_generation_with_a_cache_equals_running_the_whole_text_again(tiny):
    prompts = [[5], [8, 13, 21, 34, 55], [1, 2, 3]]
    new = generate(tiny, prompts, 20)
    for prompt, out in zip(prompts, new):
        text = list(prompt)
        for _ in range(20):
            text.append(int(logits(tiny, torch.tensor(text))[-1].argmax()))
        assert out == text[len(prompt) :]


@pytest.mark.fast
def test_generation_stops_at_stop_ids_and_samples_by_seed(tiny):
    full = generate(tiny, [[5]], 12)[0]
    assert generate(tiny, [[5], [6]], 12, stop_ids=(full[4],))[0] == full[: full.index(full[4])]
    hot = [generate(tiny, [[5]], 12, temperature=2.0, seed=s)[0] for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert generate(tiny, [[5]], 12, temperature=2.0, top_p=1e-6)[0] == full
    assert generate(tiny, [[5]], 0) == [[]]
    with pytest.raises(ValueError, match="256 positions"):
        generate(tiny, [[5] * 250], 7)
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny, [[]], 7)


@pytest.mark.fast
def test_top_p_samples_only_from_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, 4)
    generator = torch.Generator().manual_seed(0)
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(sample(logits, 1.0, top_p, generator).tolist()) == allowed


def test_stories260k_writes_the_text_that_llama2c_pins(tmp_path):
    folder = stories260k.convert(tmp_path)
    model = Llama.from_pretrained(folder)
    out = generate(model, [[1]], 200, stop_ids=(1, 2))[0]
    assert stories260k.decode(out) == stories260k.PINNED


@pytest.mark.fast
def test_bf16_gradients_are_the_fp32_ones_but_for_rounding_also_far_into_a_document(tmp_path):
    folder_of(tmp_path, max_position_embeddings=1024, initializer_range=0.1)
    tokens = torch.randint(97, (900,), generator=torch.Generator().manual_seed(0))

    def run(dtype):
        model = Llama.from_pretrained(tmp_path, seed=3, compute_dtype=dtype)
        out = logits(model, tokens).float()
        torch.nn.functional.cross_entropy(out[:-1], tokens[1:]).backward()
        return out.detach(), {n: p.grad for n, p in model.named_parameters()}

    (full, exact), (half, rounded) = run(torch.float32), run(torch.bfloat16)
    assert (full[600:] - half[600:]).norm() < 0.05 * full[600:].norm()
    for name, grad in exact.items():
        assert (grad - rounded[name]).norm() < 0.1 * grad.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the variable-length attention kernel")
def test_the_gpu_kernel_agrees_with_the_document_loop(tmp_path):
    cfg, lengths = folder_of(tmp_path, head_dim=16), [7, 1, 40, 23]
    tokens = torch.randint(97, (sum(lengths),))

    def logits_and_gradient(device, dtype):
        model = Llama.from_pretrained(cfg, seed=3, compute_dtype=dtype, device=device)
        out = model.lm_head(model(tokens[None].to(device), Packed(lengths, device)))[0].float()
        torch.nn.functional.cross_entropy(out[:-1], tokens[1:].to(device)).backward()
        return out.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])

    reference = logits_and_gradient("cpu", torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        for expected, got in zip(reference, logits_and_gradient("cuda", dtype)):
            assert (expected - got).norm() < tolerance * expected.norm()


# Bad folders.


def _config(**changes):
    def edit(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, **changes}))

    return edit


def _tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _truncate(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index_without_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_outside(folder):
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index(*names):
    def edit(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys("ab", *names)}))

    return edit


def _pickle_index_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def _index_astray(folder):
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "a.safetensors")
    names = dict.fromkeys(load_file(folder / "b.safetensors"), "b.safetensors") | {"model.norm.weight": "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _holds(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def _dangling(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0f")


def _left(name):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0")

    return edit


def _meta_layout(folder):
    save_file({"tok_embeddings.weight": torch.zeros(97, 48)}, folder / "model.safetensors")


BROKEN = {
    "not a Llama": (_config(model_type="mistral"), r"config\.json: model_type is 'mistral', expected 'llama'"),
    "biases": (_config(attention_bias=True), "attention_bias is True"),
    "yarn": (_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rotary scaling is 'yarn'"),
    "heads": (
        _config(num_key_value_heads=4),
        "6 query heads, 4 key/value heads of width 8, expected query heads in equal groups",
    ),
    "eps as text": (_config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', expected a number above 0"),
    "theta as text": (_config(rope_theta="x"), r"config\.json: rope_theta is 'x'"),
    "tied as text": (_config(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true or false"),
    "factor as text": (
        _config(rope_scaling={**LLAMA3_SCALING, "factor": "8"}),
        "rotary factor is '8', expected a number above 0",
    ),
    "no tensor": (lambda f: save_file({}, f / "model.safetensors"), "holds no tensor"),
    "odd width": (_config(head_dim=7), "an even width"),
    "no heads": (_config(num_attention_heads=0), "num_attention_heads is 0, expected a whole number above 0"),
    "width as text": (_config(hidden_size="48"), "hidden_size is '48', expected a whole number"),
    "no layers": (_config(num_hidden_layers=None), "num_hidden_layers is None"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json: holds a list, expected an object",
    ),
    "rotary a word": (_config(rope_scaling="llama3"), "rotary settings are 'llama3', expected an object"),
    "rotary incomplete": (
        _config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rotary low_freq_factor is None, expected a number above 0",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not readable as JSON"),
    "truncated": (_truncate, r"model\.safetensors: a damaged safetensors file"),
    "missing tensor": (
        _tensors(lambda t: t.pop("model.norm.weight")),
        r"1 of 29 tensors missing \(model\.norm\.weight\)",
    ),
    "foreign tensor": (_tensors(lambda t: t.update(x=torch.zeros(1))), r"1 tensors this Llama does not have \(x\)"),
    "misshapen": (
        _tensors(lambda t: t.update({"model.norm.weight": torch.zeros(47)})),
        r"model\.norm\.weight is \(47,\).*\(48,\)",
    ),
    "claimed tied": (
        _tensors(lambda t: t.update({"lm_head.weight": torch.zeros(97, 48)})),
        "lm_head.weight differs from the embedding",
    ),
    "claimed untied": (_config(tie_word_embeddings=False), r"missing \(lm_head\.weight\)"),
    "pickle": (_pickle_only, "pytorch_model.bin, a pickle"),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "q4.gguf"), "only as q4.gguf, llama.cpp's; convert them"),
    "only an index of pickles": (_pickle_index_only, "only as pytorch_model.bin.index.json, a pickle"),
    "pickle in the index": (
        _index("pytorch_model-00001-of-00002.bin"),
        r"index\.json: names pytorch\S+, a pickle, which",
    ),
    "tensor astray": (_index_astray, r"names model.norm.weight in a\.safetensors, which does not hold it"),
    "pointer": (_holds(b"version https://git-lfs.github.com/spec/v1\noid"), "a Git LFS pointer .* git lfs pull"),
    "web page": (_holds(b"<!DOCTYPE html><title>Sign in"), "a web page in its place"),
    "renamed pickle": (_holds(b"PK\x03\x04archive/data.pkl"), "PyTorch's pickle in its place"),
    "weights of another name": (
        _config(transformers_weights="b.safetensors"),
        "transformers_weights is 'b.safetensors'",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), r"a LoRA adapter \(adapter_config\.json\)"),
    "quantized": (
        _tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)})),
        "type I8",
    ),
    "nan": (
        _tensors(lambda t: t["model.norm.weight"].fill_(torch.nan)),
        r"safetensors: model\.norm\.weight is not finite",
    ),
    "dangling link": (_dangling, r"model\.safetensors but neither .* \(it left model\.safetensors\)"),
    "broken download": (
        _left(".cache/huggingface/download/x.0f.incomplete"),
        r"no weights .* left \S+x\.0f\.incomplete\)",
    ),
    "broken wget": (_left("model.safetensors.part"), r"no weights .* \(it left model\.safetensors\.part\)"),
    "config alone": (_left("README.md"), r"no weights in the folder, only a configuration; .* --fresh"),
    "infinity": (_config(time_step_limit=[0.0, float("inf")]), r"config\.json: time_step_limit cannot be written"),
    "half a pair": (_config(note="\ud83d"), r"config\.json: note cannot be written as JSON"),
    "too large a number": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "x": {"y": 1e999}}'),
        r"config\.json: x cannot be written as JSON",
    ),
    "lost shard": (_index_without_shard, "names model-00001-of-00002.safetensors, not in this folder"),
    "index a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json: holds a list"),
    "index of numbers": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        "no weight_map from tensors to files",
    ),
    "shards without index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "neither model.safetensors nor its index",
    ),
    "index points outside": (_index_outside, "not in this folder"),
    "Meta's layout": (_meta_layout, "these are in Meta's layout"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.fast
@pytest.mark.parametrize("fault", BROKEN)
def test_a_bad_folder_gets_one_clear_error(tmp_path, fault):
    folder = tmp_path / "model"
    folder.mkdir()
    Llama.from_pretrained(folder_of(folder), seed=0).save_pretrained(folder)
    break_it, message = BROKEN[fault]
    break_it(folder)
    with pytest.raises(ValueError, match=message) as e:
        Llama.from_pretrained(folder)
    assert "model" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.fast
def test_of_one_file_and_an_index_the_file_is_read_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "both"
    old, new = (Llama.from_pretrained(folder_of(tmp_path), seed=seed) for seed in (1, 2))
    weights.save(old, folder, shard_bytes=20_000)
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", folder)
    name = "model.embed_tokens.weight"
    ours = dict(Llama.from_pretrained(folder).named_parameters())[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()[name]
    assert torch.equal(ours, theirs) and torch.equal(ours, new.model.embed_tokens.weight)
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(
        ValueError, match=r"index\.json: names .* not in this folder.*; model\.safetensors is beside it"
    ):
        Llama.from_pretrained(folder)


@pytest.mark.fast
def test_a_run_folder_a_checkpoint_and_a_hub_cache_name_the_model_that_is_meant(tmp_path, tiny):
    run, cache = tmp_path / "run", tmp_path / "models--a--b"
    for folder in (run / "model", cache / "snapshots" / "0f"):
        tiny.save_pretrained(folder)
    (run / "config.json").write_text('{"config": {}, "versions": {}}')
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    for given, meant in (
        (run, "run/model"),
        (run / "checkpoints" / "step-000002", "run/model"),
        (cache, "snapshots/0f"),
    ):
        with pytest.raises(ValueError, match=rf"{given.name}: not a model's folder; the model is \S+/{meant}$"):
            Llama.from_pretrained(given)
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="a run without a model: it has not ended"):
        Llama.from_pretrained(run)
    Llama.from_pretrained(cache / "snapshots" / "0f")


@pytest.mark.fast
def test_a_broken_download_in_the_hubs_cache_is_named(tmp_path):
    (folder := tmp_path / "snapshots" / "0f").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "ab.incomplete").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"no weights .*ab\.incomplete"):
        Llama.from_pretrained(folder_of(folder))


@pytest.mark.fast
def test_a_weight_too_large_for_the_saved_type_is_named_and_nothing_written(tmp_path, tiny):
    with torch.no_grad():
        tiny.model.layers[1].mlp.up_proj.weight[3, 3] = 1e30
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite in float16, though it is"
    ):
        tiny.save_pretrained(tmp_path / "half", torch.float16)
    assert not (tmp_path / "half").exists()
    tiny.save_pretrained(tmp_path / "wide", torch.bfloat16)


@pytest.mark.fast
def test_a_config_without_weights_gives_fresh_ones_by_seed(tmp_path):
    folder = folder_of(tmp_path)
    a, b, c = (Llama.from_pretrained(folder, seed=s).model.embed_tokens.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert abs(float(a.detach().std()) - 0.2) < 0.01


@pytest.mark.fast
def test_rotary_scaling_at_full_size_is_the_published_one():
    transformers = pytest.importorskip("transformers")
    scaling = dict(LLAMA3_SCALING, original_max_position_embeddings=8192)
    raw = TINY | dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    raw |= dict(rope_theta=500000.0, rope_scaling=scaling)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**{**raw, "max_position_embeddings": 131072})).inv_freq
    torch.testing.assert_close(LlamaConfig(**checked(raw)).inv_freq(), theirs, rtol=1e-6, atol=0)
