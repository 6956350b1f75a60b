"""JSON, text and safetensors files: read with errors that name the file, written completely or not at all."""

import gzip
import json
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

IN_ITS_PLACE = {  # how a file begins that lies under another's name
    b"version https://git-lfs": "only a Git LFS pointer to it is here; fetch it with: git lfs pull",
    b"<": "a web page in its place; did the address need a login?",
    b"PK": "PyTorch's pickle in its place, which can run code when opened; convert it to safetensors",
    b"\x80": "a pickle in its place, which can run code when opened; convert it to safetensors",
    b"GGUF": "a GGUF file in its place; get the safetensors of this model",
}


def found(path: Path, fault: Exception) -> str:
    """Why a file could not be read, for a message: what it is instead, if that is known, else the fault."""
    if isinstance(fault, OSError):
        return str(fault)
    with open(path, "rb") as f:
        start = f.read(64)
    safetensors = start[8:9] == b"{"  # after the header's length, which may begin with any byte
    told = [told for begins, told in IN_ITS_PLACE.items() if start.startswith(begins) and not safetensors]
    return told[0] if told else str(fault)


def as_json(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError where it is none, or could not be written again (Python reads Infinity)."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON ({found(path, e)})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    for name, field in value.items():
        try:
            as_json({name: field})
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: {name} cannot be written as JSON ({e}); change it or take it out") from e
    return value


def write_json(path: Path, value: dict) -> None:
    part = Path(f"{path}.part")
    part.write_bytes(as_json(value))
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
        raise ValueError(f"{path}: a damaged safetensors file ({found(path, e)}); is the download complete?") from e


def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    """A tensor of the file, or some of its rows; the rest is not read."""
    with open_safetensors(path) as f:
        try:
            return f.get_tensor(name) if rows == slice(None) else f.get_slice(name)[rows]
        except SafetensorError as e:
            raise ValueError(f"{path}: cannot read {name} ({e})") from e


def tensor_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor -> (shape, type) of a safetensors file; only its header is read."""
    with open_safetensors(path) as f:
        parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118, no dict
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.touch()
        mode = path.stat().st_mode  # what the umask allows; the library would leave 0600, unreadable for a colleague
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written ({e}); is the disk full?") from e
