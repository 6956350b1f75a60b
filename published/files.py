"""JSON, text and safetensors files: read with errors that name the file, written completely or not at all."""

import gzip
import json
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: dict) -> None:
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, perhaps gzipped, with or without a byte-order mark."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        fix = "convert the file, for example: iconv -f ENCODING -t utf-8"
        raise ValueError(f"{path}:{line}: byte 0x{raw[e.start]:02x} is not UTF-8; {fix}") from e
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: a damaged gzip file ({e}); is the download complete?") from e


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: a damaged safetensors file ({e}); is the download complete?") from e


def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    """A tensor of the file, or some of its rows; the rest is not read."""
    with open_safetensors(path) as f:
        try:
            return f.get_tensor(name) if rows == slice(None) else f.get_slice(name)[rows]
        except SafetensorError as e:
            raise ValueError(f"{path}: cannot read {name} ({e})") from e


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    with open_safetensors(path) as f:
        return tuple(f.get_slice(name).get_shape())


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.touch()
        mode = path.stat().st_mode  # what the umask allows; the library would leave 0600, unreadable for a colleague
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written ({e}); is the disk full?") from e
