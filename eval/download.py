"""Fetch the benchmarks from the Hub: `python -m eval.download --to benchmarks`; run again, what is still missing."""

import fnmatch
import sys
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # python PATH/eval/download.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import command_line
from eval.benchmarks import BENCHMARKS, task_names
from eval.rows import READ, Source
from published.hub import refused


def fetch(source: Source, to: Path) -> str:
    """Put one split into the folder, unless it is there, and check its number of rows; returns a line about it."""
    known = "already here" if source.paths(to) else "fetched"
    if known == "fetched":
        download(source, to / source.folder)
    rows = source.read(to)
    return f"{source.folder:<14}{len(rows):>7,} rows {known}: {', '.join(map(str, source.paths(to)))}"


def download(source: Source, into: Path) -> None:
    """The files of one split from the Hub, under their paths there; ValueError says what to do by hand."""
    from huggingface_hub import HfApi, hf_hub_download  # comes with tokenizers

    name, by_hand = source.repository, f"put the released {source.file} (or .gz) into {into}"
    if source.pattern.endswith(".parquet") and find_spec("pyarrow") is None:
        install = 'its files are parquet; to read them: pip install -e ".[parquet]"'
        raise ValueError(f"{name}: {install}; or {by_hand}")
    pattern = source.pattern.removeprefix("**/")
    try:
        about = HfApi().dataset_info(name)
        files = fnmatch.filter([file.rfilename for file in about.siblings], pattern)
        files = [file for file in files if file.endswith(READ)]
        for file in files:
            hf_hub_download(name, file, repo_type="dataset", revision=about.sha, local_dir=into)
    except Exception as e:  # the Hub's client raises many kinds
        flags = f'--repo-type dataset --include "{pattern}" --local-dir {into}\nor {by_hand}'
        raise refused(name, flags, e) from e
    if not files:
        raise ValueError(f"{name}: the Hub has no file like {pattern} there any more; {by_hand}")


def main(argv: list[str] | None = None) -> None:
    parser = command_line("python -m eval.download", "Fetch the benchmarks' test sets from the Hub, for `--data`.")
    parser.add_argument("--tasks", default="all", metavar="A,B", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--to", default="benchmarks", metavar="PATH", help="the folder to fill (default: benchmarks)")
    args, missed = parser.parse_args(argv), []
    try:
        names = task_names(args.tasks)
    except ValueError as e:
        sys.exit(f"error: {e}")
    for source in dict.fromkeys(source for name in names for source in BENCHMARKS[name].sources):
        try:
            print(fetch(source, Path(args.to)), flush=True)
        except (ValueError, OSError) as e:
            missed.append(f"error: {e}")
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
