"""How fast the scorer is, against the lm-evaluation-harness's own Hugging Face backend: same model, requests, scores.

    python bench/eval.py                 a seventieth of the suite, about 200,000 tokens, demo/base in float32
    python bench/eval.py --whole 3b     the complete test sets, random weights of Llama-3.2-3B's shape, ours alone (GPU)

The harness side needs `pip install -e ".[peers]"`. Both sides begin with text and get the same list of requests;
tokenization counts. The data sets are read from SFTGO_SHARED (default ../shared).
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("SFTGO_SHARED", ROOT.parent / "shared"))

import numpy as np
import torch

from eval.benchmarks import BENCHMARKS
from eval.score import Encoder, score
from eval.sharing import pack
from model import Llama, LlamaConfig
from published.files import write_json
from published.tokenizer import Tokenizer

LIKELIHOOD = ("mmlu", "mmlu_5shot", "mathqa", "arc_challenge", "openbookqa", "hellaswag", "truthfulqa_mc")
SHARES = {
    "mmlu": 200,
    "mmlu_5shot": 200,
    "mathqa": 40,
    "arc_challenge": 16,
    "openbookqa": 7,
    "hellaswag": 140,
    "truthfulqa_mc": 22,
}
SHAPES = {
    "demo": None,
    "3b": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def some(name: str) -> list:
    """About a seventieth of a test set; of MMLU, questions of two subjects, fewer than subjects have on average."""
    items = BENCHMARKS[name].load(SHARED / "data")
    if name.startswith("mmlu"):
        subjects = ("mmlu_astronomy", "mmlu_world_religions")
        return [item for item in items if item.task in subjects and item.doc_id < SHARES[name] // 2]
    return items[: SHARES[name]]


class Request:
    """What the harness hands a model."""

    def __init__(self, context: str, continuation: str):
        self.args = (context, continuation)


def timed(work) -> tuple[float, object]:
    began = time.monotonic()
    found = work()
    return time.monotonic() - began, found


def against_harness(batch_size: int, repeat: int) -> None:
    """Both sides on each task in turn, `repeat` times, the fastest of each kept."""
    from lm_eval.models.huggingface import HFLM

    from eval.harness import SFTGO

    folder = ROOT / "demo" / "base"
    ours = SFTGO(folder, "never", "float32", device="cpu")
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch_size, add_bos_token=False)
    threads = f"demo/base, float32, {torch.get_num_threads()} threads"
    print(f"{threads}; the harness in batches of {batch_size}; fastest of {repeat}")
    head = f"{'task':<16}{'items':>7}{'requests':>10}{'tokens':>10}{'read':>9}"
    print(f"{head}{'harness s':>11}{'ours s':>9}{'ratio':>8}{'largest difference':>20}")
    total = np.zeros(2)
    asked = tokens = read = 0
    for name in LIKELIHOOD:
        items = some(name)
        requests = [Request(item.context, f" {choice}") for item in items for choice in item.choices]
        pairs = list(ours.encoder.pairs([r.args for r in requests]))
        mine = sum(row.size for row in pack(pairs, ours.model.cfg.max_position_embeddings, 4096))
        inputs = {(c, tuple(k[:-1])) for c, k in pairs}  # the harness runs equal inputs once
        alone = sum(len(c) // 4 + len(k) for c, k in inputs)
        ours.loglikelihood(requests[:8]), theirs.loglikelihood(requests[:8], disable_tqdm=True)  # compile kernels
        seconds, found = [], []
        for side in (lambda: theirs.loglikelihood(requests, disable_tqdm=True), lambda: ours.loglikelihood(requests)):
            runs = [timed(side) for _ in range(repeat)]
            seconds.append(min(s for s, _ in runs))
            found.append(np.array([value for value, _ in runs[0][1]]))
        difference = np.abs(found[0] - found[1]).max()
        if difference > 1e-3:
            raise SystemExit(f"{name}: scores differ by {difference:.2g} nats; no speed is worth that")
        total += seconds
        asked, tokens, read = asked + len(requests), tokens + alone, read + mine
        print(
            f"{name:<16}{len(items):>7,}{len(requests):>10,}{alone:>10,}{mine:>9,}{seconds[0]:>11.2f}{seconds[1]:>9.2f}"
            f"{seconds[0] / seconds[1]:>8.1f}{difference:>20.1e}",
            flush=True,
        )
    theirs, ours = total
    print(f"{'all':<16}{'':>7}{asked:>10,}{tokens:>10,}{read:>9,}{theirs:>11.2f}{ours:>9.2f}{theirs / ours:>8.1f}")


def complete(shape: str, out: str | None) -> None:
    """Every likelihood task, complete, on random weights."""
    folder = Path(tempfile.mkdtemp())
    source = ROOT / "demo" / "base"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if SHAPES[shape] is None:
        model = Llama.from_pretrained(source, torch.bfloat16, torch.bfloat16, device)
    else:  # Llama 3's vocabulary in size; GPT-NeoX's tokenizer, whose tokens are about as long
        source = SHARED / "tokenizers" / "gpt-neox-20b"
        with torch.device("meta"):
            cfg = LlamaConfig(
                vocab_size=128_256, max_position_embeddings=131_072, tie_word_embeddings=True, **SHAPES[shape]
            )
            model = Llama(cfg, torch.bfloat16).to(torch.bfloat16)
        model.to_empty(device=device).tie()
        for p in model.parameters():
            torch.nn.init.ones_(p) if p.ndim == 1 else torch.nn.init.normal_(p, 0, 0.02)
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        write_json(folder / "tokenizer_config.json", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
        source = folder
    encoder = Encoder(Tokenizer(source, model.cfg.vocab_size))
    score(model, encoder, some("openbookqa"))  # compile kernels
    load, items = timed(lambda: {name: BENCHMARKS[name].load(SHARED / "data") for name in LIKELIHOOD})
    seconds = {"load": load}
    for name in LIKELIHOOD:
        s, _ = timed(lambda name=name: score(model, encoder, items[name], name=name))
        seconds[name], n = s, len(items[name])
        print(f"{name:<16}{n:>8,} items {s:>8.1f} s {n / s:>9.1f} items/s", flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    n = sum(map(len, items.values()))
    print(f"all, with loading: {sum(seconds.values()):.1f} s for {n:,} items on {where}, {shape}, bfloat16")
    if device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if out:
        write_json(Path(out), {"device": where, "shape": shape, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness (default: 16; its own default is 1)")
    parser.add_argument(
        "--repeat", type=int, default=2, help="runs of each side, of which the fastest counts (default: 2)"
    )
    parser.add_argument(
        "--whole", choices=SHAPES, help="time our side alone on the complete test sets, with a model of this shape"
    )
    parser.add_argument("--out", metavar="FILE.json", help="with --whole: write the seconds here")
    args = parser.parse_args()
    if args.whole:
        complete(args.whole, args.out)
    else:
        against_harness(args.batch_size, args.repeat)


if __name__ == "__main__":
    main()
