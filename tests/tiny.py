"""A tiny Llama in the published layout, for tests: the demo's configuration and tokenizer training, shrunk."""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import torch

from model import Llama, LlamaConfig
from published.config import read_config

VOCAB = 512
TEXTS = [
    "Once upon a time there was a little tide pool, and the water in the pool was warm.\n\nThe end.\n\n\n",
    "User: Why is the sea salt?\n\nAssistant: Rain and rivers carry a little salt down to the sea.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName",
    "### Response:\nThe three colours:\nred, blue and yellow.\n\n### Input:\n1 2 3 10 100 1000\n\n"
    "### Response:Yes\n\n\n",
    "He said that it's what they'd do; she thought the other thing, which is more than they would have said of him.",
    "Every morning the old fisherman walked along the shore, where small crabs were hiding under stones and shells.",
]
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=4096)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@lru_cache
def make_base():
    """demo/make_base.py as a module of our own, so that its vocabulary can be made small here and nowhere else."""
    spec = importlib.util.spec_from_file_location("tiny_make_base", Path(__file__).parents[1] / "demo" / "make_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.VOCAB = VOCAB
    return module


@lru_cache
def tokenizer_json() -> str:
    tokenizer = make_base().train_tokenizer(4 * TEXTS)
    assert tokenizer.get_vocab_size() == VOCAB, "too little text for so many tokens"
    return tokenizer.to_str()


def tiny_folder(path: str | Path, seed: int | None = 0, **config_changes) -> Path:
    """Write config.json, tokenizer.json, tokenizer_config.json and weights drawn from `seed` into `path` (None: none).

    The tokenizer is byte-level BPE with Llama 3's special tokens as its last eight of 512 ids; by itself it adds a BOS.
    """
    path, base = Path(path), make_base()
    path.mkdir(parents=True, exist_ok=True)
    bos, end = base.SPECIAL[:2]
    ids = {"bos_token_id": VOCAB - len(base.SPECIAL), "eos_token_id": VOCAB - len(base.SPECIAL) + 1}
    (path / "config.json").write_text(json.dumps({**base.CONFIG, **SHAPE, **ids, **config_changes}))
    (path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": end}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if seed is not None:
        with torch.device("meta"):
            model = Llama(LlamaConfig(**read_config(path)))
        model.fill(path, "cpu", seed).save_pretrained(path)
    return path
