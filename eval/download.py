"""Fetch the benchmarks from the Hub: `python -m eval.download --to benchmarks`; run again, what is still missing."""

import sys
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # python PATH/eval/download.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import command_line, say
from eval.benchmarks import BENCHMARKS, task_names
from eval.rows import Source, listed
from published.hub import refused


def fetch(source: Source, to: Path) -> str:
    """Put one split into the folder, unless it is there, and check its number of rows; returns a line about it."""
    paths, known = source.paths(to), "already here"
    if not paths:
        download(source, to)
        known = "fetched"
    try:
        rows = source.read(to)
    except ValueError as e:
        records = to / source.folder / ".cache" / "huggingface" / "download"  # the client's, of each file it fetched
        if not paths or not all((records / f"{x.relative_to(to / source.folder)}.metadata").is_file() for x in paths):
            said = isinstance(e.__cause__, ImportError) or "ove it away" in str(e)  # what to do
            raise ValueError(f"{e}{'' if said else '; move it away and run this again'}") from e  # never written over
        download(source, to, again=True)
        rows, known = source.read(to), "fetched again"
    return f"{source.folder:<14}{len(rows):>7,} rows {known}: {listed(source.paths(to))}"


def download(source: Source, to: Path, again: bool = False) -> None:
    """The files of one split from the Hub, under their paths there; ValueError says what to do by hand."""
    from huggingface_hub import snapshot_download  # comes with tokenizers

    name, pattern, into = source.repository, source.pattern.removeprefix("**/"), to / source.folder
    by_hand = f"or put the released {source.released or f'{source.file} (or .gz)'} into {into}"
    if pattern.endswith(".parquet") and find_spec("pyarrow") is None:
        raise ValueError(f'{name}: to read its parquet files: pip install -e ".[parquet]"; {by_hand}')
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=pattern, local_dir=into, force_download=again)
        if not source.paths(to):  # the client is silent without network where the folder has other files
            raise ValueError(f"it could not be reached, or has no {pattern} any more")
    except Exception as e:  # the Hub's client raises many kinds
        flags = f'--repo-type dataset --include "{pattern}" --local-dir {into}\n{by_hand}'
        raise refused(name, flags, e) from e


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
            say(fetch(source, Path(args.to)))
        except (ValueError, OSError) as e:
            missed.append(f"error: {e}")
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
