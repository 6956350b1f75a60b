"""Score a model on the paper's benchmarks: `python -m eval --model OUT/model --tasks all --data FOLDER`, also under torchrun.

Everything that can be wrong with the request, the data and the tokenizer is found before the weights are read.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cache import file_digest
from checkpoint import World, git_commit
from data import Tokenizer
from eval import command_line
from eval.benchmarks import BENCHMARKS, task_names
from eval.generate import Prompt, end_tokens, require_room, write
from eval.score import BOS, Encoder, Item, by_task, score
from files import read_json, resolve, weight_files, write_json
from model import DTYPES, Llama, LlamaConfig

LIBRARIES = ("torch", "tokenizers", "numpy", "sacrebleu", "rouge-score", "lm-eval", "nltk", "langdetect")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line("python -m eval", "Score a model on the paper's benchmarks. Tasks: " + ", ".join(BENCHMARKS) + ".")
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


def fingerprint(folder: Path) -> str:
    """SHA-256 of what makes the model and its texts: weights, configuration, tokenizer."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    files = [folder / name for name in names if (folder / name).is_file()] + sorted(set(weight_files(folder).values()))
    return hashlib.sha256(" ".join(f"{path.name} {file_digest(path)}" for path in files).encode()).hexdigest()


def earlier(out: Path, samples: Path | None, about: dict) -> dict:
    """The results that the file already holds of this very model under these settings, to go on from; `about` where it is not there.

    The samples' file is cut back to what those results wrote: more is of a task that was interrupted.

    Raises:
        ValueError: another model's results, or under other settings, or a samples' file that is not theirs.
    """
    for path in filter(None, (out, samples)):
        path.parent.mkdir(parents=True, exist_ok=True)
    before = read_json(out) if out.exists() else about | {"samples": samples and {"file": str(samples), "bytes": 0}, "tasks": {}}
    if not isinstance(before.get("tasks"), dict):
        raise ValueError(f"{out}: not a result of `python -m eval`; choose another --out")
    for name in ("fingerprint", "settings"):
        if before.get(name) != about[name]:
            was, now = before.get(name), about[name]
            changed = [f"{k} {was.get(k)}, now {now[k]}" for k in now if was.get(k) != now[k]] if isinstance(was, dict) else []
            other = f"another model's results ({before.get('model')})" if name == "fingerprint" else f"results with {'; '.join(changed)}"
            raise ValueError(f"{out}: holds {other}; choose another --out, or move it away")
    theirs = before.get("samples")
    if samples and (theirs is None or theirs["file"] != str(samples)):
        kept = f"results whose samples are in {theirs['file']}" if theirs else "results without samples"
        raise ValueError(f"{out}: holds {kept}; choose another --out, to have all samples in one file")
    if theirs:  # also where --samples is not given again
        file = Path(theirs["file"])
        size = file.stat().st_size if file.exists() else 0
        if size and not out.exists():
            raise ValueError(f"{file}: exists; choose another --samples, or move it away")
        if size < theirs["bytes"]:
            raise ValueError(f"{file}: shorter than when {out} was written; move both away")
        with open(file, "ab") as f:
            f.truncate(theirs["bytes"])
    return before


def evaluate(args: argparse.Namespace, world: World) -> Path:
    """Score the model on each task in turn; after each, its line is printed and the results file written."""
    out = Path(args.out) if args.out else default_out(args.model)
    samples = Path(args.samples).resolve() if args.samples else None  # the results name it, and may go on from another folder
    if out.is_dir() or out.resolve() == samples:
        raise ValueError(f"--out {out}: {'a folder' if out.is_dir() else 'also --samples'}, expected a file of its own")
    if (Path(args.model) / "model" / "config.json").is_file():
        raise ValueError(f"--model {args.model}: the folder of a run; its model is {Path(args.model) / 'model'}")

    def prepare() -> tuple:
        items = {name: first(BENCHMARKS[name].load(Path(args.data)), args.limit) for name in args.tasks}
        folder = resolve(args.model)
        cfg = LlamaConfig.from_folder(folder)
        tokenizer = Tokenizer(folder, cfg.vocab_size)
        for name, found in items.items():
            if isinstance(found[0], Prompt):
                require_room(found[0].max_new_tokens, cfg.max_position_embeddings, name)
        return items, folder, Encoder(tokenizer, args.bos), end_tokens(folder, tokenizer)

    items, folder, encoder, stop_ids = world.before_others("data and tokenizer", prepare)
    settings = {name: getattr(args, name) for name in ("bos", "dtype", "limit")}
    about = {"model": args.model, "fingerprint": None, "run": run_of(Path(args.model)), "settings": settings}
    about["fingerprint"] = world.first("fingerprint", lambda: fingerprint(folder))
    about = world.first("earlier results", lambda: earlier(out, samples, about))
    todo = [name for name in args.tasks if name not in about["tasks"]]
    if done := [name for name in args.tasks if name in about["tasks"]]:
        print(f"{out}: already has {', '.join(done)}")
    if not todo:
        return out

    dtype = DTYPES[args.dtype]
    model = Llama.from_pretrained(folder, dtype, dtype, world.device).eval()
    where = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine()
    made = {"device": where, "ranks": world.size, "versions": versions(), "git_commit": git_commit()}
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{args.model}: {size / 1e6:,.1f}M parameters in {args.dtype} on {where}; BOS {args.bos}; results go to {out}\n{HEAD}", flush=True
    )
    for name in todo:
        began = time.monotonic()
        mine = items.pop(name)
        if isinstance(mine[0], Item):
            scored = score(model, encoder, mine, args.batch_tokens, world, name)
        else:
            scored = write(model, encoder, mine, stop_ids, world, name)
        if world.rank:
            continue
        seconds = time.monotonic() - began
        summary = BENCHMARKS[name].summarize(by_task(mine, scored))
        timed = {"seconds": round(seconds, 2), "items_per_second": round(len(mine) / seconds, 2)}
        about["tasks"][name] = summary | {"made": made | timed}
        if kept := about["samples"]:
            kept["bytes"] = save_samples(Path(kept["file"]), mine, scored)
        write_json(out, about)
        print(line(name, len(mine), summary, seconds), flush=True)
    return out


def save_samples(path: Path, items: list[Item] | list[Prompt], scored: list[dict]) -> int:
    """A line for each item: what was asked, what came of it, its metrics. Returns how long the file now is."""
    with open(path, "a", encoding="utf-8") as f:
        for item, row in zip(items, scored, strict=True):
            asked = {"task": item.task, "doc_id": item.doc_id, "prompt": item.context if isinstance(item, Item) else item.text}
            if isinstance(item, Item):
                asked |= {"gold": item.gold, "continuations": [f" {choice}" for choice in item.choices]}
            f.write(json.dumps(asked | row, ensure_ascii=False) + "\n")
    return path.stat().st_size


HEAD = f"{'task':<16}{'items':>7}{'seconds':>9}{'items/s':>9}   scores, % (± standard error)"


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
    return f"{name:<16}{n:>7,}{seconds:>9.1f}{n / seconds:>9.1f}   {', '.join(scores)}"


def main() -> None:
    world = None
    try:
        args = parse_args()
        world = World()
        evaluate(args, world)
    except (ValueError, OSError) as e:
        if world is not None:
            world.fault(e)
        told = world is not None and world.rank and str(e).startswith("rank 0: ")  # rank 0 has said it
        sys.exit(1 if told else f"error: {e}")
    except RuntimeError as e:
        if world is not None:
            world.fault(e)
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        sys.exit(f"error: out of memory ({str(e).splitlines()[0]}); lower --batch-tokens, or leave the GPU to this job alone")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on after the last task that has its line, the one at work begins anew")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
