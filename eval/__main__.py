"""Score a model on the paper's benchmarks: `python -m eval --model OUT/model --tasks all --data FOLDER`, also under torchrun.

Everything that can be wrong with the request, the data and the tokenizer is found before the weights are read.
"""

import argparse
import json
import os
import platform
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cache import content
from checkpoint import World, git_commit
from data import Tokenizer
from eval.benchmarks import BENCHMARKS, task_names
from eval.generate import end_tokens, write
from eval.score import BOS, Encoder, Item, by_task, score
from files import read_json, resolve, write_json
from model import DTYPES, Llama, LlamaConfig

LIBRARIES = ("torch", "tokenizers", "numpy", "sacrebleu", "rouge-score", "lm-eval", "nltk", "langdetect")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Score a model on the paper's benchmarks. Tasks: " + ", ".join(BENCHMARKS) + ".",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=110),
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder in the published layout, OUT/model of a run for one, or a Hub name")
    add("--tasks", default="all", metavar="A,B", help="names with commas between (default: all)")
    add("--data", default="benchmarks", metavar="PATH", help="what `python -m eval.download` filled (default: benchmarks)")
    add("--limit", type=int, metavar="N", help="the first N items of each task, in MMLU of each subject; for a try, not for a table")
    add("--bos", default="never", choices=BOS, help="a BOS before each prompt (default: never, as in the paper's tables)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of weights and activations (default: bfloat16)")
    add("--batch-tokens", type=int, metavar="N", help="tokens in a packed row (default: 4,096 on a CPU, 65,536 on a GPU)")
    add("--out", metavar="FILE.json", help="results (default: eval.json beside a run's model, else eval-NAME.json here)")
    add("--samples", metavar="FILE.jsonl", help="a line for each item: prompt, choices and log-likelihoods, or response; metrics")
    args = parser.parse_args(argv)
    args.tasks = task_names(args.tasks)
    for name in ("limit", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    return args


def first(items: list, limit: int | None) -> list:
    """The first `limit` items of each task."""
    return [item for item in items if limit is None or item.doc_id < limit]


def default_out(model: str) -> Path:
    folder = Path(model)
    return folder.parent / "eval.json" if run_of(folder) else Path(f"eval-{folder.resolve().name if folder.is_dir() else folder.name}.json")


def run_of(folder: Path) -> dict | None:
    """The configuration that trained a run's model; None for any other model."""
    path = folder.parent / "config.json"
    return read_json(path).get("config") if folder.name == "model" and path.is_file() else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def earlier(out: Path, about: dict) -> dict:
    """The results that the file already holds of this very model under these settings, to go on from."""
    if not out.exists():
        return about | {"tasks": {}}
    before = read_json(out)
    for name in ("fingerprint", "settings"):
        if before.get(name) != about[name]:
            other = "another model's results" if name == "fingerprint" else f"results with settings {before.get(name)}, now {about[name]}"
            raise ValueError(f"{out}: holds {other}; choose another --out, or move it away")
    return before


def evaluate(args: argparse.Namespace, world: World) -> Path:
    """Score the model on each task in turn; after each, its line is printed and the results file written."""
    data = Path(args.data)
    items = {name: first(BENCHMARKS[name].load(data), args.limit) for name in args.tasks}
    folder = world.before_others("model", lambda: resolve(args.model))
    cfg = LlamaConfig.from_folder(folder)
    tokenizer = Tokenizer(folder, cfg.vocab_size)
    stop_ids = end_tokens(folder, tokenizer)

    out = Path(args.out) if args.out else default_out(args.model)
    about = {
        "model": args.model,
        "fingerprint": world.first("fingerprint", lambda: content(folder)),
        "run": run_of(Path(args.model)),
        "settings": {name: getattr(args, name) for name in ("bos", "dtype", "limit")},
        "window": cfg.max_position_embeddings,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "ranks": world.size,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    about = world.first("earlier results", lambda: earlier(out, about))
    if args.samples and Path(args.samples).exists() and not about["tasks"]:
        raise ValueError(f"{args.samples}: exists; choose another --samples, or move it away")
    todo = [name for name in args.tasks if name not in about["tasks"]]
    if done := [name for name in args.tasks if name in about["tasks"]]:
        print(f"{out}: already has {', '.join(done)}")
    if not todo:
        return out
    out.parent.mkdir(parents=True, exist_ok=True)

    dtype = DTYPES[args.dtype]
    model = Llama.from_pretrained(folder, dtype, dtype, world.device).eval()
    encoder = Encoder(tokenizer, args.bos)
    print(HEAD)
    for name in todo:
        began = time.monotonic()
        mine = items.pop(name)
        if isinstance(mine[0], Item):
            scored = score(model, encoder, mine, args.batch_tokens, world, name)
        else:
            scored = write(model, encoder, mine, stop_ids, world)
        if world.rank:
            continue
        seconds = time.monotonic() - began
        summary = BENCHMARKS[name].summarize(by_task(mine, scored))
        about["tasks"][name] = summary | {"seconds": round(seconds, 2), "items_per_second": round(len(mine) / seconds, 2)}
        if args.samples:
            save_samples(Path(args.samples), mine, scored)
        write_json(out, about)
        print(line(name, len(mine), summary, seconds), flush=True)
    print(f"results: {out}")
    return out


def save_samples(path: Path, items: list, scored: list[dict]) -> None:
    """A line for each item, in the form that eval/README's comparison with the harness reads."""
    with open(path, "a", encoding="utf-8") as f:
        for item, row in zip(items, scored):
            asked = {"task": item.task, "doc_id": item.doc_id, "prompt": item.context if isinstance(item, Item) else item.text}
            if isinstance(item, Item):
                asked |= {"gold": item.gold, "continuations": [f" {choice}" for choice in item.choices]}
            f.write(json.dumps(asked | row, ensure_ascii=False) + "\n")


HEAD = f"{'task':<16}{'items':>7}   {'scores, % (± standard error)':<76}{'seconds':>9}{'items/s':>9}"


def line(name: str, n: int, summary: dict, seconds: float) -> str:
    """One task's line for the terminal."""
    flat = {}
    for key, value in summary.items():
        flat |= {f"{key} {k}": v for k, v in value.items()} if key in ("mc1", "mc2") else {key: value}
    scores = []
    for key, value in flat.items():
        if key.endswith("acc") or key == "acc_norm":
            error = flat.get(f"{key}_stderr")
            label = key.removesuffix(" acc").removesuffix("_acc").replace("_level", "")
            scores.append(f"{label} {100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"))
    if "categories" in summary:
        scores += [f"{key} {100 * part['acc']:.2f}" for key, part in summary["categories"].items() if part["n"]]
    return f"{name:<16}{n:>7,}   {', '.join(scores):<76}{seconds:>9.1f}{n / seconds:>9.1f}"


def main() -> None:
    world = None
    try:
        args = parse_args()
        world = World()
        evaluate(args, world)
    except (ValueError, OSError) as e:
        if world is not None:
            world.fault(e)
        sys.exit(f"error: {e}")
    except RuntimeError as e:
        if world is not None:
            world.fault(e)
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        sys.exit(f"error: out of memory ({str(e).splitlines()[0]}); lower --batch-tokens")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with the tasks that are not in the results file")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
