"""Mean cross-entropy of a model over a data file: what a step of train.py would report at λ = 0, without the step.

    python bench/heldout.py --model FOLDER --data FILE

Every supervised token counts once, whatever sample or micro-batch it is in; the end token of an answer is one of them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from model import Llama, LlamaConfig
from published.config import read_config
from published.hub import resolve
from published.tokenizer import Tokenizer
from published.weights import DTYPES


@torch.no_grad()
def heldout(folder: Path, file: str, template: str, context: int, dtype: str) -> str:
    """The result in one line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    llama = LlamaConfig(**read_config(folder))
    if not 2 <= context <= (room := llama.max_position_embeddings):
        raise ValueError(f"--context {context}: expected 2 to {room}, the positions of {folder}")
    tokenizer = Tokenizer(folder, llama.vocab_size)
    corpus = data.load_corpus(file, tokenizer, template, context)
    model = Llama.from_pretrained(folder, DTYPES[dtype], device=device).eval()
    prior, nats = np.zeros(len(corpus.ids), np.float32), 0.0
    with tqdm(total=len(corpus), unit="sample", disable=None, leave=False) as bar:
        for samples in np.array_split(
            np.arange(len(corpus)), -(-len(corpus) // 64)
        ):  # 64 at a time: full rows, few of them alive
            for batch in data.micro_batches(corpus, prior, samples, max_tokens=8192):
                nats += float(batch.to(device).nll(model).double().sum())
            bar.update(len(samples))
    tokens = int(corpus.loss_mask.sum())
    characters = tokenizer.decode(corpus.ids[corpus.kind == data.RESPONSE].tolist())
    return (
        f"{nats / tokens:.4f} nats per token | {tokens:,} supervised tokens in {len(corpus):,} samples | "
        f"{nats / len(characters.encode()):.4f} nats per byte of their text | "
        f"{file}, template {corpus.template}, context {context}, {dtype}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="heldout.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="model folder in the published layout, or a Hub name"
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSON or JSONL as train.py reads it, each also .gz"
    )
    parser.add_argument(
        "--template", default="auto", choices=("auto", *data.TEMPLATES), help="how a row becomes text (default: auto)"
    )
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens a sample is cut to (default: 1024)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES), help="compute type (default: bfloat16)")
    args = parser.parse_args()
    try:
        print(heldout(resolve(args.model), args.data, args.template, args.context, args.dtype))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
