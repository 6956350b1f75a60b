"""Fetch the benchmarks' files from the Hub: `python -m eval.download --to benchmarks`. Run again, it fetches what is missing."""

import fnmatch
import sys
from importlib.util import find_spec
from pathlib import Path

from eval import command_line
from eval.benchmarks import BENCHMARKS, task_names
from eval.rows import READ, Source
from files import not_given


def fetch(source: Source, to: Path) -> str:
    """One split, here when this returns, with as many rows as it must have; what to say of it.

    Raises:
        ValueError: the Hub did not give it (with what to do by hand), or gave another number of rows.
    """
    known = "already here"
    if not source.paths(to):
        known = "fetched"
        get(source, to / source.folder)
    rows = source.read(to)
    return f"{source.folder:<14}{len(rows):>7,} rows {known}: {', '.join(map(str, source.paths(to)))}"


def get(source: Source, into: Path) -> None:
    """The files of one split from the Hub, under their paths there."""
    from huggingface_hub import HfApi, hf_hub_download  # comes with tokenizers

    by_hand = f"or put the released {source.file} (or .gz) into {into}"
    if source.pattern.endswith(".parquet") and find_spec("pyarrow") is None:
        raise ValueError(f'{source.repository}: its files are parquet; to read them: pip install -e ".[parquet]"; {by_hand}')
    pattern = source.pattern.removeprefix("**/")
    try:
        about = HfApi().dataset_info(source.repository)
        names = [name for name in fnmatch.filter([file.rfilename for file in about.siblings], pattern) if name.endswith(READ)]
        for name in names:
            hf_hub_download(source.repository, name, repo_type="dataset", revision=about.sha, local_dir=into)
    except Exception as e:  # the Hub's client raises many kinds
        raise not_given(source.repository, f'--repo-type dataset --include "{pattern}" --local-dir {into}\n{by_hand}', e) from e
    if not names:
        raise ValueError(f"{source.repository}: the Hub has no file like {pattern} there any more; {by_hand.removeprefix('or ')}")


def main(argv: list[str] | None = None) -> None:
    parser = command_line(
        "python -m eval.download", "Fetch the benchmarks' test sets from the Hub into a folder that `python -m eval --data` reads."
    )
    parser.add_argument("--tasks", default="all", metavar="A,B", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--to", default="benchmarks", metavar="PATH", help="the folder to fill (default: benchmarks)")
    args = parser.parse_args(argv)
    missed = []
    try:
        names = task_names(args.tasks)
    except ValueError as e:
        sys.exit(f"error: {e}")
    for source in dict.fromkeys(source for name in names for source in BENCHMARKS[name].sources):
        try:
            print(fetch(source, Path(args.to)), flush=True)
        except (ValueError, OSError) as e:
            missed.append(str(e))
    if missed:
        sys.exit("error: " + "\nerror: ".join(missed))


if __name__ == "__main__":
    main()
