"""stories260K (karpathy/llama2.c) as a folder in the published layout: a really pretrained Llama for tests.

The .bin layout and where the files come from are described in `weights/stories260K/README.md` of the shared data.
"""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

SHARED = Path(os.environ.get("SFTGO_SHARED", Path(__file__).parents[2] / "shared"))
SOURCE = SHARED / "weights" / "stories260K"

# What llama2.c's own test expects of a greedy run of 200 steps.
PINNED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. \
She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


def convert(folder: Path) -> Path:
    """Write config.json and model.safetensors into `folder`."""
    if not SOURCE.is_dir():
        pytest.skip(f"{SOURCE} is absent; set SFTGO_SHARED to the folder that has weights/stories260K")
    data = (SOURCE / "stories260K.bin").read_bytes()
    D, F, L, H, K, V, T = struct.unpack("<7i", data[:28])
    hd = D // H
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())

    def take(*shape):
        nonlocal numbers
        size = int(np.prod(shape))
        taken, numbers = numbers[:size], numbers[size:]
        return taken.view(shape)

    def halves(w):
        """Neighbouring rotary pairs (0, 1), (2, 3), ... of each head to the published split into two halves."""
        return w.view(-1, hd // 2, 2, D).transpose(1, 2).reshape(-1, D)

    tensors = {"model.embed_tokens.weight": take(V, D)}
    stacked = [
        ("input_layernorm", take(L, D)),
        ("self_attn.q_proj", take(L, H * hd, D)),
        ("self_attn.k_proj", take(L, K * hd, D)),
        ("self_attn.v_proj", take(L, K * hd, D)),
        ("self_attn.o_proj", take(L, D, H * hd)),
        ("post_attention_layernorm", take(L, D)),
        ("mlp.gate_proj", take(L, F, D)),
        ("mlp.down_proj", take(L, D, F)),
        ("mlp.up_proj", take(L, F, D)),
    ]
    tensors["model.norm.weight"] = take(D)
    assert len(numbers) == 2 * T * hd // 2, "two rotary tables should be all that is left"
    for name, stack in stacked:
        for i, w in enumerate(stack):
            w = halves(w) if name.endswith(("q_proj", "k_proj")) else w
            tensors[f"model.layers.{i}.{name}.weight"] = w.contiguous()
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        model_type="llama",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=K,
        max_position_embeddings=T,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decode(ids: list[int]) -> str:
    """Text of `ids`, as llama2.c prints it after a BOS: pieces joined, the first leading space dropped."""
    data, pieces, at = (SOURCE / "tok512.bin").read_bytes(), [], 4
    while at < len(data):
        _, size = struct.unpack("<fi", data[at : at + 8])
        pieces.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    raw = b"".join(bytes([i - 3]) if 3 <= i < 259 else pieces[i] for i in ids)
    return raw.decode("utf-8").removeprefix(" ")


def stories_folder(folder: Path) -> Path:
    """The model with tok512.bin as a SentencePiece-like tokenizer.json: words begin with ▁, unknown text is bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    convert(folder)
    data, pieces, at = (SOURCE / "tok512.bin").read_bytes(), [], 4
    while at < len(data):
        _, size = struct.unpack("<fi", data[at : at + 8])
        pieces.append(data[at + 8 : at + 8 + size].decode("utf-8", "replace").replace(" ", "▁"))
        at += 8 + size
    pieces[:259] = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    cuts = [(piece[:k], piece[k:]) for piece in pieces[259:] for k in range(1, len(piece))]  # best scores first
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder
