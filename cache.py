"""What a run can find instead of making it again: tokens, scores, reference losses, one safetensors file each. Off the reading path."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from files import write_safetensors

Arrays = dict[str, np.ndarray]


def cached(folder: Path | None, kind: str, key: list, make: Callable[[], tuple[Arrays, dict]]) -> tuple[Arrays, dict]:
    """make(), arrays and facts about them, or what an earlier run left of it in `folder` under the same key.

    An entry that is damaged, or was written for another key, is made again with a notice. A writer renames a whole file
    into place, so two of them at once do no harm.
    """
    if folder is None:
        return make()
    key = json.dumps(key)
    path = folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="np") as f:
                found, arrays = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
            if found.get("key") != key:
                raise ValueError("not what its name says")
            if found["sha256"] != digest(arrays):
                raise ValueError("its bytes have changed")
            return arrays, json.loads(found["about"])
        except (SafetensorError, OSError, KeyError, ValueError) as e:
            print(f"{path}: damaged, or another's ({e}); made again")
    arrays, about = make()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{uuid4().hex}.part")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    write_safetensors(part, tensors, {"key": key, "sha256": digest(arrays), "about": json.dumps(about)})
    part.replace(path)
    return arrays, about


def digest(arrays: Arrays, text: str = "") -> str:
    """SHA-256 of what the arrays hold, and of a text."""
    sha = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.dtype} {array.shape} ".encode())
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()


def source(*modules: str) -> str:
    """SHA-256 of files of this program, for keys of what they made."""
    return hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in modules)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content(folder: Path) -> str:
    """SHA-256 of a model folder: every file that lies in it."""
    files = [f"{path.name} {file_digest(path)}" for path in sorted(Path(folder).iterdir()) if path.is_file()]
    return hashlib.sha256(" ".join(files).encode()).hexdigest()
