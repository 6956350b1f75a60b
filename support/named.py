"""Objectives and groupers: one of ours by name, NAME of a user's FILE.py, or an object given from Python."""

import copy
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from groupers import GROUPERS
from sftgo import OBJECTIVES

CHECKOUT = Path(__file__).resolve().parents[1]
OURS = {path.stem for path in CHECKOUT.glob("*.py")} | {*"published support eval".split()}  # what `import` finds first
KNOWN = {"--objective": OBJECTIVES, "--grouper": GROUPERS}
ARGUMENTS = {"--objective": "nats, tokens, lam", "--grouper": "corpus, seed"}
OPTIONAL = {  # attributes, and their arguments
    "constant_price": "lam",
    "weigh": "nll, batch",
    "update": "nats, tokens",
    "state_dict": "",
    "load_state_dict": "state",
    "prior": "corpus, seed",
}
UNKNOWN = "no source "  # how the digest of what has no source begins; no two of them are the same


class Named:
    """An objective or a grouper: called as the function is, with the function's attributes.

    A fault of a user's code, raised in it or seen in what it returns, is one ValueError that says where.
    """

    def __init__(self, name: str, function: Callable | None, flag: str, digest: str | None = None):
        self.name, self.function, self.flag = name, function, flag
        self.digest = digest  # SHA-256 of a user's file or source; None: one of ours

    def __call__(self, *args):
        if getattr(self, "in_step", False):
            return self.floats(self.function, *args)
        found = self.call(self.function, *args)
        if self.flag == "--objective":
            self.expect(found, isinstance(found, Tensor) and not found.shape, "a tensor ()")
            if args[0].requires_grad and not found.requires_grad:
                raise ValueError(f"{self}: its loss carries no gradient of nats: nothing would be trained")
        return found

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        found = getattr(self.function, attribute)
        if attribute == "weigh":
            return partial(self.floats, found)
        return partial(self.call, found) if callable(found) else found

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    def call(self, function: Callable, *args):
        try:
            return function(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # any: it is somebody's program
            if self.digest is None:
                raise
            frames = traceback.extract_tb(e.__traceback__)
            theirs = [f for f in frames if f.filename != __file__ and "site-packages" not in f.filename]
            where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
            raise ValueError(f"{self}: {type(e).__name__}: {e}{where}") from e

    def expect(self, found, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{self}: returned {described(found)}, expected {expected}")

    def floats(self, function: Callable, nll: Tensor, *more) -> Tensor:
        """What it returned of the losses: a float for each, (T,)."""
        found = self.call(function, nll, *more)
        holds = isinstance(found, Tensor) and found.is_floating_point() and found.shape == nll.shape
        self.expect(found, holds, f"floats in a tensor {tuple(nll.shape)}")
        return found


def described(x) -> str:
    """Type and shape of what a function returned."""
    return f"{getattr(x, 'dtype', type(x).__name__)} {tuple(x.shape) if hasattr(x, 'shape') else ''}".strip()


def named(given: str | Callable, flag: str) -> Named:
    """One of ours, what FILE.py calls NAME, or the object itself.

    A user's object is copied: it may have a state, and each run begins with its first.

    Raises:
        ValueError: no such name, file or function; the file's own fault; it cannot be called as it would be.
    """
    ours = KNOWN[flag]
    name = given if isinstance(given, str) else next((name for name in ours if ours[name] is given), None)
    if name in ours:
        return Named(name, ours[name], flag)
    if name:
        found, digest = from_file(given, flag)
    else:
        of = given.func if isinstance(given, partial) else given
        of = of if hasattr(of, "__qualname__") else type(of)
        found, digest, name = given, None, f"{of.__module__}:{of.__qualname__}"
    wrong = f"{flag} {name}: "
    if inspect.isclass(found):
        raise ValueError(f"{wrong}a class; name an object of it: NAME = {found.__name__}(…)")
    if not callable(found):
        file, _, attribute = name.rpartition(":")
        raise ValueError(f"{wrong}{file} has no function {attribute} (it is {described(found)})")
    check_call(found, "nll, prior" if getattr(found, "in_step", False) else ARGUMENTS[flag], wrong)
    for optional, arguments in OPTIONAL.items():
        if hasattr(found, optional) and (optional == "prior") == (flag == "--grouper"):
            if not callable(getattr(found, optional)):
                kind = described(getattr(found, optional))
                raise ValueError(f"{wrong}its {optional} is {kind}, expected a function")
            check_call(getattr(found, optional), arguments, f"{wrong}its {optional}: ")
    states = [name for name in ("update", "state_dict", "load_state_dict") if hasattr(found, name)]
    if missing := {"state_dict", "load_state_dict"} - {*states} if states else {}:
        lacking = " and no ".join(sorted(missing))
        raise ValueError(f"{wrong}has {states[0]} but no {lacking}: a resumed run would lose its state")
    try:
        fresh = copy.deepcopy(found)
    except Exception as e:  # any: it holds what cannot be copied
        raise ValueError(f"{wrong}each run begins with a copy of it, and it cannot be copied ({e})") from e
    if fresh is found and states:  # a function, which is its own copy: put its first state back
        found.load_state_dict(copy.deepcopy(first_state(found)))
    return Named(name, fresh, flag, digest or source_digest(fresh))


def check_call(function: Callable, arguments: str, wrong: str) -> None:
    """ValueError where a function does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, and does not say
        return
    try:
        signature.bind(*filter(None, arguments.split(", ")))
    except TypeError as e:
        called = f"{getattr(function, '__name__', 'it')}{signature}"
        raise ValueError(f"{wrong}{called} cannot be called with ({arguments}): {e}") from None


@cache
def first_state(function: Callable) -> dict:
    return copy.deepcopy(function.state_dict())


def from_file(name: str, flag: str) -> tuple[object, str]:
    """What FILE.py:NAME is, and the SHA-256 of the file."""
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not file:
        raise ValueError(f"{flag} {name}: expected one of {', '.join(KNOWN[flag])}, or FILE.py:NAME")
    if not path.is_file():
        raise ValueError(f"{flag} {name}: no such file {file}")
    if path.suffix != ".py":
        raise ValueError(f"{flag} {name}: not a Python file (its name must end in .py)")
    path = path.resolve()
    beside = {f"{other}.py" for other in OURS} | {f"{other}/__init__.py" for other in OURS}
    if path.parent != CHECKOUT and (taken := sorted(other for other in beside if (path.parent / other).is_file())):
        like = f"{taken[0].split('/')[0]} beside it has the name of a module of this program"
        raise ValueError(f"{flag} {name}: {like}, which `import` finds first; rename it")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        made = module(path, digest)
    except (Exception, SystemExit) as e:  # any: it is somebody's program
        raise ValueError(f"{flag} {name}: {type(e).__name__} while it was imported ({e})") from e
    if not hasattr(made, attribute):
        raise ValueError(f"{flag} {name}: {file} has no function {attribute}")
    return getattr(made, attribute), digest


@cache
def module(path: Path, digest: str):
    """The file, run once for each content; what stands beside it can be imported, behind all else."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"user file {path}", path)
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def source_digest(given: Callable) -> str:
    """SHA-256 of an object's source and of all that was set on it; UNKNOWN where there is no source to read."""
    try:
        text = source(given)
    except (OSError, TypeError, ValueError, RecursionError):
        text = " at 0x"
    return UNKNOWN + uuid4().hex if " at 0x" in text else hashlib.sha256(text.encode()).hexdigest()


def source(x) -> str:
    """What an object is, in words that are the same in another process; an address (" at 0x") where there are none."""
    if isinstance(x, partial):
        return source([x.func, x.args, x.keywords])
    if isinstance(x, dict):
        return source([*x.items()])
    if isinstance(x, set | frozenset):
        return source(sorted(map(source, x)))
    if isinstance(x, list | tuple):
        return f"[{', '.join(map(source, x))}]"
    if isinstance(x, np.ndarray | Tensor):
        return repr(x.tolist())
    if inspect.ismethod(x):
        return source([x.__func__, x.__self__])
    if inspect.isfunction(x):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return inspect.getsource(x.__code__) + source([x.__defaults__, x.__kwdefaults__, cells, vars(x)])
    if type(x).__module__ == "builtins" or not hasattr(x, "__dict__"):
        return repr(x)
    classes = [kind for kind in type(x).__mro__ if kind.__module__ != "builtins"]
    return "".join(map(inspect.getsource, classes)) + source(vars(x))
