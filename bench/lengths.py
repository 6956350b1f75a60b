"""Inputs of timings, for a machine that has none: shapes of Llamas, lengths of documents and of benchmarks' requests.

    python bench/lengths.py          write bench/lengths.json anew, some minutes; reads SFTGO_SHARED (../shared)

The tokenizer is GPT-NeoX's, the nearest to Llama 3's at hand: 50,000 tokens, where Llama 3 has 128,000 and reads the
same text in somewhat fewer. Documents of the file are [tokens, supervised tokens], cut at 4,096: all of LIMA, and 2,000
of Alpaca drawn with seed 0. A task of the suite is a sixteenth of its questions, by the header that they share: [tokens
of the header, [[tokens of the question, [tokens of each choice]], …]]; `read` is what the scorer reads for all of them.

`corpus` and `pairs` make random tokens of these lengths; a corpus's are as unequal as words are: the rare ones are the
important ones and the worse ones, as in text.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("SFTGO_SHARED", ROOT.parent / "shared"))
FILE = Path(__file__).with_name("lengths.json")

import numpy as np

from bench import memory
from data import END, PROMPT, RESPONSE, Corpus, load_corpus
from eval.benchmarks import BENCHMARKS
from eval.score import Encoder
from eval.sharing import Pair, families, pack, packed
from model import Llama
from published.files import read_json, write_json
from published.tokenizer import Tokenizer

WINDOW, ROW = 131_072, 65_536  # positions of Llama 3.2, tokens of the scorer's row on a GPU
TINY = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)  # to try programs
SHAPES = memory.SHAPES | {"tiny": TINY | {"bos_token_id": 0, "eos_token_id": 1}}  # changes of demo/base's config.json
BATCH = {"lima": 64, "alpaca": 32}  # samples of a step, as in the paper's recipes
DATA = {"lima": "lima/train.jsonl.gz", "alpaca": "alpaca/alpaca_data.json.gz"}
SUITE = ("mmlu", "mmlu_5shot", "mathqa", "arc_challenge", "openbookqa", "hellaswag", "truthfulqa_mc")


def folder_of(folder: Path, shape: str, **changes) -> Path:
    """Write a config.json of this shape there."""
    base = read_json(ROOT / "demo" / "base" / "config.json") | {"max_position_embeddings": WINDOW}
    write_json(folder / "config.json", base | SHAPES[shape] | changes)
    return folder


def filled(model: Llama, folder, device, *_) -> Llama:
    """`Llama.fill` without weights: memory, and whatever numbers are in it."""
    model.to_empty(device=device)
    model.tie()
    return model


def lengths() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def corpus(name: str, vocabulary: int, longest: int = 4096) -> Corpus:
    """A data set's documents as random tokens; the last ones of each are supervised."""
    size, answer = np.array(lengths()[name]).T  # (N,) each
    size, answer = np.minimum(size, longest), np.minimum(answer, longest // 2)
    kind = np.concatenate([np.repeat([PROMPT, RESPONSE], [n - m, m]) for n, m in zip(size, answer)]).astype(np.uint8)
    starts = np.cumsum([0, *size])
    kind[starts[1:] - 1] = END
    ids = (vocabulary ** np.random.default_rng(0).random(len(kind))).astype(np.int32)  # Zipf's law
    return Corpus(ids, kind, starts, template="plain", counts={"rows": len(size), "kept": len(size)})


def pairs(task: str, vocabulary: int) -> list[Pair]:
    """The requests of a task's sixteenth, as random tokens that share what the task's contexts share."""
    rng, out = np.random.default_rng(0), []
    for header, questions in lengths()[task]["families"]:
        head = rng.integers(vocabulary, size=header).tolist()
        for size, choices in questions:
            context = packed(head + rng.integers(vocabulary, size=size).tolist())
            out += [(context, rng.integers(vocabulary, size=n).tolist()) for n in choices]
    return out


def documents(file: str, tokenizer: Tokenizer) -> list[list[int]]:
    found = load_corpus(SHARED / "data" / file, tokenizer, "auto", 4096)
    supervised = np.bincount(found.doc_ids, found.loss_mask, len(found)).astype(int)  # (N,)
    return np.stack([found.lengths, supervised], 1).tolist()


def sixteenth(task: str, tokenizer: Tokenizer) -> dict:
    items = BENCHMARKS[task].load(SHARED / "data")
    asked = list(Encoder(tokenizer).pairs([(item.context, f" {c}") for item in items for c in item.choices]))
    found = defaultdict(dict)
    for context, choice in asked:
        found[context][tuple(choice)] = []
    groups = []
    for header, questions in families(sorted(found.items())):
        groups.append([header, [[len(c) // 4 - header, [*map(len, choices)]] for c, choices in questions]])
    if len(groups) < 16:
        groups = [[header, questions[::16]] for header, questions in groups]
    else:
        groups = groups[8::16]
    read = sum(row.size for row in pack(asked, WINDOW, ROW))
    return {"requests": len(asked), "read": read, "families": groups}


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        neox = (SHARED / "tokenizers" / "gpt-neox-20b" / "tokenizer.json").read_bytes()
        (Path(folder) / "tokenizer.json").write_bytes(neox)
        write_json(Path(folder) / "tokenizer_config.json", dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>"))
        tokenizer = Tokenizer(folder, 50_432)
        found = {name: documents(file, tokenizer) for name, file in DATA.items()}
        drawn = np.random.default_rng(0).choice(len(found["alpaca"]), 2000, replace=False)
        found["alpaca"] = [found["alpaca"][i] for i in np.sort(drawn)]
        suite = {task: sixteenth(task, tokenizer) for task in SUITE}
    lines = [f"{json.dumps(name)}: {json.dumps(x, separators=(',', ':'))}" for name, x in (found | suite).items()]
    FILE.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    write()
