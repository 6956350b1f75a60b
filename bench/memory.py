"""The table of docs/running.md: what a step of Llama 3 takes on each GPU, by support/report.py's arithmetic.

    python bench/memory.py

It measures nothing and needs no GPU. tests/test_cuda_path.py compares the arithmetic with the tensors of such steps.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from model import Llama, LlamaConfig
from support.report import memory_needed

BOTH = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
SIZES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"
SHAPES = {  # the published configurations
    "3B": BOTH | dict(zip(SIZES, (3072, 8192, 28, 24, True))),
    "8B": BOTH | dict(zip(SIZES, (4096, 14336, 32, 32, False))),
}
PARTS = "weights, AdamW", "gradients", "activations", "logits", "gathered"


def table() -> str:
    heads = "model", "GPUs", "tokens", "recomputed", *PARTS, "several micro-batches", "one"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, ranks, tokens, again in product(SHAPES, (1, 8), (4096, 8192), (False, True)):
        cfg = LlamaConfig(**SHAPES[name])
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Llama(cfg).parameters())
        one, needed = (memory_needed(cfg, parameters, tokens, 2, ranks, again, several) for several in (False, True))
        parts = [f"{needed[part] / 1e9:.1f}" if needed[part] else "" for part in PARTS]
        totals = [f"{sum(parts.values()) / 1e9:.0f}" for parts in (needed, one)]
        lines.append(f"| {' | '.join([name, str(ranks), f'{tokens:,}', 'yes' if again else '', *parts, *totals])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    print(table())
