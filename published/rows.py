"""The objects of a JSON, JSONL or Parquet file; what is wrong with one is said with file and line."""

import gzip
import json
import re
import zlib
from contextlib import suppress
from pathlib import Path

from published.files import read_text

FILES = (".jsonl", ".json", ".parquet")
ARCHIVE = "unpack it and give one of its files"
JSON_LINES = "write its rows as JSON lines"
CSV = f"a table of text (CSV); {JSON_LINES}, as pandas' to_json(FILE, orient='records', lines=True) does"
PICKLE = f"a Python pickle, which can run code when opened; {JSON_LINES}"
PAGE = "a web page in place of a file; fetch the file itself (its raw or download link)"
DATASETS = "of the datasets library; write it with Dataset.to_json"
OTHERS = {  # (place, what stands there in lower case) -> what such a file is, and what to do
    (0, b"pk\x03\x04"): f"a zip archive; {ARCHIVE}: unzip FILE",
    (0, b"pk\x05\x06"): "a zip archive without a file in it",
    (0, b"\x28\xb5\x2f\xfd"): "compressed by Zstandard; unpack it: zstd -d FILE",
    (0, b"\xfd7zxz"): "compressed by xz; unpack it: xz -d FILE",
    (0, b"bzh"): "compressed by bzip2; unpack it: bzip2 -d FILE",
    (0, b"\x04\x22\x4d\x18"): "compressed by LZ4; unpack it: lz4 -d FILE",
    (0, b"\x1f\x9d"): "compressed by compress; unpack it: uncompress FILE",
    (0, b"\x1f\x8b"): "gzipped twice; unpack it once: gunzip FILE",
    (0, b"7z\xbc\xaf\x27\x1c"): f"a 7-Zip archive; {ARCHIVE}: 7z x FILE",
    (0, b"rar!"): f"a RAR archive; {ARCHIVE}: unrar x FILE",
    (257, b"ustar"): f"a tar archive; {ARCHIVE}: tar xf FILE",
    (0, b"arrow1"): f"an Arrow file {DATASETS}",
    (0, b"\xff\xff\xff\xff"): f"an Arrow stream {DATASETS}",
    (0, b"fea1"): f"a Feather file; {JSON_LINES}",
    (0, b"orc"): f"an ORC file; {JSON_LINES}",
    (0, b"obj\x01"): f"an Avro file; {JSON_LINES}",
    (0, b"sqlite format 3"): f"an SQLite database; {JSON_LINES}",
    (0, b"\x89hdf"): f"an HDF5 file; {JSON_LINES}",
    (0, b"\x93numpy"): f"a numpy array; {JSON_LINES}",
    (0, b"%pdf"): "a PDF; write its text as JSON lines",
    **{(0, bytes([0x80, protocol])): PICKLE for protocol in (2, 3, 4, 5)},
    (0, b"<"): PAGE,
    (0, b"version https://git-lfs"): "a Git LFS pointer in place of the file; fetch it: git lfs pull",
    (0, b"\xff\xfe"): "UTF-16; convert it: iconv -f utf-16 -t utf-8 FILE",
    (0, b"\xfe\xff"): "UTF-16; convert it: iconv -f utf-16 -t utf-8 FILE",
}


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) for each object of a JSON array or of JSON lines; `where` is "file:line", for messages.

    Raises:
        ValueError: naming the file, and the line where there is one.
    """
    path = readable(Path(path))
    if path.open("rb").read(4) == b"PAR1":
        rows = [(f"{path}: row {i}", row) for i, row in enumerate(read_parquet(path), 1)]
    elif (text := read_text(path)).lstrip().startswith("["):
        rows = [(f"{path}: item {i}", row) for i, row in enumerate(parsed(text, path, 1), 1)]
    else:  # not splitlines(): JSON strings may hold U+2028
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) > 1 and not lines[0][1].rstrip().endswith("}"):  # one object over several lines
            lines = [(1, text)]
        rows = [(f"{path}:{number}", parsed(line, path, number)) for number, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__}, expected an object")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def readable(path: Path) -> Path:
    """The path of a file of rows; ValueError says what else it is, and what to do."""
    if path.is_dir():
        inside = sorted(x.name for x in path.iterdir() if x.name.removesuffix(".gz").endswith(FILES))
        example = f", for example {', '.join(inside[:2])}" if inside else ""
        raise ValueError(f"{path}: a folder; --data takes one file{example}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a pipe or a device, which can be read only once; write it to a file first")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data takes one JSON, JSONL or Parquet file, the first two also .gz")
    with open(path, "rb") as f:
        begin = f.read(512)
    if begin[:2] == b"\x1f\x8b":
        begin = b""  # where it is damaged, `read_text` says so
        with suppress(OSError, EOFError, zlib.error), gzip.open(path) as f:
            begin = f.read(512)
        if begin.startswith(b"PAR1"):
            raise ValueError(f"{path}: gzipped Parquet; unpack it: gunzip FILE")
    begin = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    for (at, magic), told in OTHERS.items():
        if begin[at : at + len(magic)].lower() == magic:
            told = f"a spreadsheet; {JSON_LINES}" if path.suffix == ".xlsx" else told
            raise ValueError(f"{path}: {told}")
    columns = begin[:1] not in (b"{", b"[", b"") and re.match(rb"[^\n]*[,;\t]", begin) and begin[:4] != b"PAR1"
    if columns or re.search(r"(?i)\.[ct]sv(\.gz)?$", path.name):
        raise ValueError(f"{path}: {CSV}")
    return path


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
