"""Score a model on the paper's benchmarks: `python -m eval --model OUT/model --data FOLDER`, also under torchrun.

Everything that can be wrong with the request, the data and the tokenizer is found before the weights are read.
"""

import argparse
import hashlib
import os
import platform
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

if not __package__:  # python PATH/eval, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # one progress bar is enough

import torch

from eval import command_line, say
from eval.benchmarks import BENCHMARKS, task_names
from eval.generate import Prompt, end_tokens, require_room, write
from eval.results import HEAD, SETTINGS, earlier, fingerprint, line, record, run_of
from eval.rows import how_to_fetch
from eval.score import Encoder, by_task, score
from model import Llama, LlamaConfig
from published.config import read_config
from published.hub import resolve
from published.tokenizer import Tokenizer
from published.weights import DTYPES
from support.checkpoint import git_commit
from support.ranks import Ranks, command

LIBRARIES = ("torch", "tokenizers", "numpy", "sacrebleu", "rouge-score", "lm-eval", "nltk", "langdetect")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    about = f"Score a model on the paper's benchmarks. Tasks: {', '.join(BENCHMARKS)}."
    parser = command_line("python -m eval", about, scores=True)
    add = parser.add_argument
    add("--tasks", default="all", metavar="A,B", help="names separated by commas (default: all)")
    add("--data", default="benchmarks", metavar="PATH", help="of `python -m eval.download` (default: benchmarks)")
    add("--batch-tokens", type=int, metavar="N", help="of a packed row (default: 4,096 on a CPU, 65,536 on a GPU)")
    usual = "default: eval.json beside a run's model, else eval-NAME.json here; with --limit N: eval-limit-N.json"
    add("--out", metavar="FILE.json", help=f"results; the same command resumes after the last finished task ({usual})")
    samples = "for each task also FILE.TASK.jsonl: each prompt, what the model gave, metrics"
    add("--samples", metavar="FILE.jsonl", help=f"{samples}; an existing file is refused")
    args = parser.parse_args(argv)
    args.tasks = task_names(args.tasks)
    for name in ("limit", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    return args


def paths(args: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The results file, and each task's samples file."""
    model = Path(args.model)
    if (model / "model" / "config.json").is_file():
        raise ValueError(f"--model {model}: the folder of a run; its model is {model / 'model'}")
    name = model.resolve().name if model.is_dir() else model.name
    tried = f"-limit-{args.limit}.json" if args.limit else ".json"  # never in the way of the complete one
    out = Path(args.out or (model.parent / f"eval{tried}" if run_of(model) else f"eval-{name}{tried}"))
    given = [Path(args.samples).resolve()] if args.samples else []
    samples = {task: path.with_suffix(f".{task}{path.suffix}") for path in given for task in args.tasks}
    if out.is_dir() or out.resolve() in (*given, *samples.values()):
        raise ValueError(f"--out {out}: {'a folder' if out.is_dir() else 'also --samples'}, expected a file of its own")
    return out, samples


def prepare(args: argparse.Namespace) -> tuple[dict[str, list], Path, Encoder, tuple[int, ...]]:
    """The items of each task, the model's folder, its tokenizer, the tokens that end a text."""
    lacking = {
        name: source for name in args.tasks for source in BENCHMARKS[name].sources if not source.paths(args.data)
    }
    if lacking:
        found, others = next(iter(lacking.values())).missing(Path(args.data)), ", ".join([*lacking][1:])
        raise ValueError(f"{found}{f' (likewise {others})' * bool(others)}; {how_to_fetch([*lacking], args.data)}")
    items = {name: BENCHMARKS[name].load(Path(args.data)) for name in args.tasks}
    items = {name: [x for x in found if x.doc_id < (args.limit or len(found))] for name, found in items.items()}
    folder = resolve(args.model)
    cfg = LlamaConfig(**read_config(folder))
    tokenizer = Tokenizer(folder, cfg.vocab_size)
    for name, found in items.items():
        if isinstance(found[0], Prompt):
            require_room(found[0].max_new_tokens, cfg.max_position_embeddings, name)
    return items, folder, Encoder(tokenizer, args.bos), end_tokens(folder, tokenizer)


def evaluate(args: argparse.Namespace, ranks: Ranks) -> None:
    """Score the model on each task in turn; after each, write the files and print a line."""
    out, samples = ranks.each(lambda: paths(args))
    items, folder, encoder, stop_ids = ranks.each(lambda: prepare(args))
    about = {"model": args.model, "fingerprint": ranks.first(lambda: fingerprint(folder))}
    about |= {"run": run_of(Path(args.model)), "settings": {name: vars(args)[name] for name in SETTINGS}, "tasks": {}}
    about = ranks.first(lambda: earlier(out, about, samples))
    if done := items.keys() & about["tasks"].keys():
        say(f"{out}: already has {', '.join(name for name in items if name in done)}")
    if done == items.keys():
        return
    device, dtype = ranks.device, DTYPES[args.dtype]
    model = ranks.each(lambda: Llama.from_pretrained(folder, dtype, dtype, device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version()}
    versions |= {name: found.version for name in LIBRARIES for found in distributions(name=name)}
    made = {"device": where, "ranks": ranks.size, "versions": versions, "git_commit": git_commit()}
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{args.model}: {size:,.1f}M parameters in {args.dtype} on {where}; BOS {args.bos}; results go to {out}")
    say(HEAD)
    for name in [name for name in items if name not in done]:
        began, asked, kept = time.monotonic(), items.pop(name), None
        if isinstance(asked[0], Prompt):
            of = [about["fingerprint"], args.bos, args.dtype, *((x.text, x.max_new_tokens, x.stops) for x in asked)]
            of = hashlib.sha256(repr(of).encode()).hexdigest()[:12]
            kept = out.with_name(f"{out.stem}.{name}-{of}.responses.json")
            scored = write(model, encoder, asked, stop_ids, ranks, name, kept)
        else:
            scored = score(model, encoder, asked, args.batch_tokens, ranks, name)
        seconds, summary = time.monotonic() - began, BENCHMARKS[name].summarize(by_task(asked, scored))
        this = made | {"seconds": round(seconds, 2), "items_per_second": round(len(asked) / seconds, 2)}
        rows = [item.asked | row for item, row in zip(asked, scored, strict=True)]
        found, given = summary | {"made": this}, samples.get(name)
        out = ranks.first(lambda: record(out, about, name, found, given, rows))
        if kept:
            ranks.first(lambda: kept.unlink(missing_ok=True))
        say(line(name, len(asked), summary, seconds))


def main() -> None:
    def program() -> None:
        with Ranks() as ranks:
            evaluate(ranks.each(parse_args), ranks)

    again = "interrupted; the same command resumes after the last task that has its line"
    command(program, "lower --batch-tokens, or leave the GPU to this job alone", again)


if __name__ == "__main__":
    main()
