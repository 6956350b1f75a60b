"""Score a model on the paper's benchmarks: `python -m eval --model OUT/model --data FOLDER`, also under torchrun.

Everything that can be wrong with the request, the data and the tokenizer is found before the weights are read.
"""

import argparse
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

from eval import command_line
from eval.benchmarks import BENCHMARKS, task_names
from eval.generate import Prompt, end_tokens, require_room, write
from eval.results import HEAD, earlier, fingerprint, line, run_of, write_samples
from eval.score import Encoder, Item, by_task, score
from model import Llama, LlamaConfig
from published.config import read_config
from published.files import write_json
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
    usual = "(default: eval.json beside a run's model, else eval-NAME.json here)"
    add("--out", metavar="FILE.json", help=f"results; the same command resumes after the last finished task {usual}")
    holds = "a line an item: prompt, choices and log-likelihoods, or response; metrics"
    whole = "Written completely or not at all; an existing file is refused"
    add("--samples", metavar="FILE.jsonl", help=f"for each task also FILE.TASK.jsonl, {holds}. {whole}")
    args = parser.parse_args(argv)
    args.tasks = task_names(args.tasks)
    for name in ("limit", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    return args


def paths(args: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The results file, and each task's samples file."""
    model, samples = Path(args.model), Path(args.samples).resolve() if args.samples else None
    if (model / "model" / "config.json").is_file():
        raise ValueError(f"--model {model}: the folder of a run; its model is {model / 'model'}")
    name = f"eval-{model.resolve().name if model.is_dir() else model.name}.json"
    out = Path(args.out or (model.parent / "eval.json" if run_of(model) else name))
    of_task = {name: samples.with_suffix(f".{name}{samples.suffix}") for name in args.tasks} if samples else {}
    if out.is_dir() or out.resolve() in (samples, *of_task.values()):
        raise ValueError(f"--out {out}: {'a folder' if out.is_dir() else 'also --samples'}, expected a file of its own")
    return out, of_task


def prepare(args: argparse.Namespace) -> tuple[dict[str, list], Path, Encoder, tuple[int, ...]]:
    """The items of each task, the model's folder, its tokenizer, the tokens that end a text."""
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
    settings = {name: getattr(args, name) for name in ("bos", "dtype", "limit")}
    sha = ranks.first(lambda: fingerprint(folder))
    about = {
        "model": args.model,
        "fingerprint": sha,
        "run": run_of(Path(args.model)),
        "settings": settings,
        "tasks": {},
    }
    about = ranks.first(lambda: earlier(out, about, samples))
    todo = [name for name in args.tasks if name not in about["tasks"]]
    if done := [name for name in args.tasks if name not in todo]:
        print(f"{out}: already has {', '.join(done)}")
    if not todo:
        return
    device, dtype = ranks.device, DTYPES[args.dtype]
    model = ranks.each(lambda: Llama.from_pretrained(folder, dtype, dtype, device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    installed = [(name, next(iter(distributions(name=name)), None)) for name in LIBRARIES]
    versions = {"python": platform.python_version()} | {name: found.version for name, found in installed if found}
    made = {"device": where, "ranks": ranks.size, "versions": versions, "git_commit": git_commit()}
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.model}: {size:,.1f}M parameters in {args.dtype} on {where}; BOS {args.bos}; results go to {out}")
    print(HEAD, flush=True)
    for name in todo:
        began, mine, file = time.monotonic(), items.pop(name), samples.get(name)
        if isinstance(mine[0], Item):
            scored = score(model, encoder, mine, args.batch_tokens, ranks, name)
        else:
            scored = write(model, encoder, mine, stop_ids, ranks, name)
        seconds, summary = time.monotonic() - began, BENCHMARKS[name].summarize(by_task(mine, scored))
        timed = {"seconds": round(seconds, 2), "items_per_second": round(len(mine) / seconds, 2)}
        about["tasks"][name] = summary | {"made": made | timed | ({"samples": str(file)} if file else {})}
        if file:
            ranks.first(lambda: write_samples(file, mine, scored))
        ranks.first(lambda: write_json(out, about))
        print(line(name, len(mine), summary, seconds), flush=True)


def main() -> None:
    def program() -> None:
        with Ranks() as ranks:
            evaluate(ranks.each(parse_args), ranks)

    again = "interrupted; the same command resumes after the last task that has its line"
    command(program, "lower --batch-tokens, or leave the GPU to this job alone", again)


if __name__ == "__main__":
    main()
