"""support/scores.py: losses of a reference that are numbers, or one line and nothing kept."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import TEXTS, VOCAB, tiny_folder

import train
from data import load_corpus
from model import Llama
from published.tokenizer import Tokenizer
from support.named import named
from support.ranks import Ranks
from support.scores import with_model

pytestmark = pytest.mark.fast


@pytest.fixture
def reference(tmp_path):
    folder = tiny_folder(tmp_path / "phi")
    Llama.from_pretrained(folder, seed=9).save_pretrained(folder)
    return folder


@pytest.fixture
def scored(reference, tmp_path):
    """scored(*flags): the losses that a run of rho1 with these flags begins with."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": "Why?", "completion": t}) for t in TEXTS))
    corpus = load_corpus(tmp_path / "rows.jsonl", Tokenizer(reference, VOCAB), "plain", 512)

    def score(*flags):
        base = f"--model {reference} --data {tmp_path / 'rows.jsonl'} --context 512 --grouper rho1 --dtype float32"
        cfg = train.parse_args([*base.split(), "--reference", str(reference), *flags])
        return with_model(cfg, named("rho1", "--grouper"), corpus, tmp_path / "cache", Ranks())

    return score


def scale(folder, name: str, factor: float) -> None:
    """Multiply a tensor; all its values stay finite."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name] = (tensors[name].double() * factor).to(tensors[name].dtype)
    assert tensors[name].isfinite().all()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_that_are_not_finite_are_refused_and_nothing_is_kept(reference, scored, tmp_path, dtype):
    scale(reference, "model.norm.weight", 1e38)
    scale(reference, "model.embed_tokens.weight", 1e4)
    with pytest.raises(ValueError, match=r"phi: the losses of [\d,]+ of [\d,]+ tokens are nan or infinite; are") as e:
        scored("--dtype", dtype)
    assert "\n" not in str(e.value) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_kept_losses_that_are_not_finite_are_made_again(scored, tmp_path, capsys, value):
    first = scored()
    (path,) = (tmp_path / "cache").iterdir()
    np.save(path, np.where(np.arange(len(first)) == len(first) - 1, value, first).astype(np.float32))
    assert np.array_equal(scored(), first) and np.array_equal(np.load(path), first)
    assert capsys.readouterr().out.startswith(f"{path}: damaged (nan or infinite scores); made again")


def test_losses_are_made_again_for_other_weights_another_dtype_or_torch_and_for_no_other_file(
    reference, scored, tmp_path, monkeypatch
):
    scored()
    kept = tmp_path / "cache"
    for name in ("tokenizer_config.json", "generation_config.json", "README.md", "vocab.txt"):
        (reference / name).write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}')
    scored()
    assert len([*kept.iterdir()]) == 1
    scored("--dtype", "bfloat16")
    assert len([*kept.iterdir()]) == 2
    scale(reference, "model.norm.weight", 2)
    scored()
    assert len([*kept.iterdir()]) == 3
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    scored()
    assert len([*kept.iterdir()]) == 4
