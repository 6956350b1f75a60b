"""The objects of a JSON or JSONL file, perhaps gzipped; what is wrong with one is said with file and line."""

import json
from pathlib import Path

from published.files import read_text


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) for each object of a JSON array or of JSON lines; `where` is "file:line", for messages.

    Raises:
        ValueError: naming the file, and the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data takes one JSON or JSONL file, each also .gz")
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = [(f"{path}: item {i}", row) for i, row in enumerate(parsed(text, path, 1), 1)]
    else:  # not splitlines(): JSON strings may hold U+2028
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(f"{path}:{number}", parsed(line, path, number)) for number, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__}, expected an object")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_parquet(path: Path) -> list[dict]:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise ValueError(f'{path}: parquet needs pyarrow; install it with: pip install -e ".[parquet]"') from e
    try:
        return parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as e:  # pyarrow's own, without the file
        raise ValueError(f"{path}: not an intact parquet file ({e}); move it away and fetch it again") from e


def half_pair(text: str) -> str:
    r"""The first half of a surrogate pair in a text, as JSON spells it (\ud83d), which no tokenizer reads; else ""."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"\\u{ord(text[e.start]):04x}"
    return ""


def parsed(text: str, path: Path, line: int):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # not JSON; nested too deeply, or a number of too many digits
        fault = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
        line += getattr(e, "lineno", 1) - 1
        raise ValueError(f"{path}:{line}: not JSON ({fault}); expected one object a line, or one array") from e
