"""Rows with groups for other people's trainers: `hf_trainer.py` and `trl_sft.py` begin with these."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout: data, groupers

import torch
from torch.nn.utils.rnn import pad_sequence

from data import load_corpus
from groupers import important, tfidf
from published.tokenizer import Tokenizer


def samples(path: str, model: str, vocab_size: int, eta: float = 0.9) -> list[dict]:
    """Each sample's input_ids, labels (-100: not trained on) and `important`, (tokens,) each, under TF-IDF."""
    corpus = load_corpus(path, Tokenizer(model, vocab_size), "auto", context=1024)
    ids, mask, doc_ids = map(torch.from_numpy, (corpus.ids.astype(int), corpus.loss_mask, corpus.doc_ids))
    group = important(torch.from_numpy(tfidf(corpus)), mask, doc_ids, eta)
    rows = zip(*(column.split(corpus.lengths.tolist()) for column in (ids, ids.where(mask, -100), group)))
    return [dict(zip(("input_ids", "labels", "important"), row)) for row in rows]


def collate(rows: list[dict]) -> dict:
    """A micro-batch padded on the right; without an attention mask, because no token sees what comes after it."""
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in ("input_ids", "labels", "important")}
    return {name: pad_sequence(column, True, -100 if name == "labels" else 0) for name, column in columns.items()}
