"""Objectives and groupers by name: one of ours, or NAME of a user's FILE.py."""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path


def named(name: str, ours: dict[str, Callable], flag: str) -> Callable:
    """One of ours, or what FILE.py calls NAME; the file is run once.

    Raises:
        ValueError: no such name, file or function; the file's own fault.
    """
    file, _, attribute = name.rpartition(":")
    if name in ours:
        return ours[name]
    if not file:
        raise ValueError(f"{flag} {name}: expected one of {', '.join(ours)}, or FILE.py:NAME")
    if not Path(file).is_file():
        raise ValueError(f"{flag} {name}: no such file {file}")
    if Path(file).suffix != ".py":
        raise ValueError(f"{flag} {name}: not a Python file (its name must end in .py)")
    try:
        found = getattr(module(Path(file).resolve()), attribute, None)
    except Exception as e:  # any: it is somebody's program
        raise ValueError(f"{flag} {name}: {type(e).__name__} while it was imported ({e})") from e
    if not callable(found):
        raise ValueError(f"{flag} {name}: {file} has no function {attribute}")
    return found


@cache
def module(path: Path):
    spec = importlib.util.spec_from_file_location(f"user file {path}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
