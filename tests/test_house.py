"""Which file may import which: eval, bench → train → support → groupers → data → model → published, and sftgo alone."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
FLOORS = (
    "published",
    "model",
    "data",
    "groupers",
    "support",
    "train",
    "eval",
    "bench",
)  # from below; others are on top
COMMAND_LINES = ("support/look.py",)  # which no other file imports


@cache
def checkout() -> dict[str, str]:
    """Path -> source of every program of ours but the tests."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    ours = [path for path in paths if path.parts[0] != "tests" and not path.parts[0].startswith(".")]
    return {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in ours}


@cache
def names(path: str, source: str) -> tuple[str, ...]:
    """What a file imports, wherever in it: modules, or names in one."""
    out = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            out += [f"{module}.{alias.name}" for alias in node.names]
    return tuple(out)


def imported(path: str, house: dict[str, str]) -> Iterator[str]:
    """The files of ours that a file imports."""
    for name in names(path, house[path]):
        parts = name.split(".")
        stems = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]  # the longest that is a file
        files = [file for stem in stems for file in (f"{stem}.py", f"{stem}/__init__.py") if file in house]
        yield from files[:1]


def floor(path: str) -> int:
    place = path.removesuffix(".py").split("/")[0]
    return FLOORS.index(place) if place in FLOORS else len(FLOORS)


def faults(house: dict[str, str]) -> list[str]:
    graph = {path: {*imported(path, house)} for path in house}
    out = []
    for path, others in graph.items():
        for other in sorted(others):
            same = "/" in path and path.split("/")[0] == other.split("/")[0]
            above = path == "sftgo.py" or floor(other) >= floor(path)
            if other == "sftgo.py":
                above = floor(path) == 0
            if other in COMMAND_LINES or above and not same:
                out.append(f"{path} imports {other}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        out.append("a circle: " + " → ".join(reversed(e.args[1])))
    return out


def test_every_import_points_down():
    assert faults(checkout()) == []


def test_the_reading_path_is_where_the_arrows_say():
    graph = {path: {*imported(path, checkout())} for path in checkout()}
    assert graph["sftgo.py"] == set() and "sftgo.py" in graph["train.py"] and "sftgo.py" in graph["data.py"]
    assert {"model.py", "published/rows.py"} <= graph["data.py"] and "data.py" in graph["groupers.py"]
    assert {"groupers.py", "support/ranks.py", "support/checkpoint.py"} <= graph["train.py"]


WRONG = {  # a file, what is added to it, what is then wrong
    "the paper imports ours": ("sftgo.py", "import model", "sftgo.py imports model.py"),
    "published imports ours": ("published/files.py", "from sftgo import sft_go", "published/files.py imports sftgo.py"),
    "up by one": ("model.py", "from data import Batch", "model.py imports data.py"),
    "in a function": ("data.py", "def f():\n    from groupers import cut", "data.py imports groupers.py"),
    "for types alone": ("groupers.py", "if TYPE_CHECKING:\n    import support.ranks", "imports support/ranks.py"),
    "support imports train": ("support/report.py", "import train as t", "support/report.py imports train.py"),
    "train imports eval": ("train.py", "import eval.score", "train.py imports eval/score.py"),
    "eval imports a bench": ("eval/score.py", "from bench import kill_resume", "imports bench/kill_resume.py"),
    "a command line": ("train.py", "from support import look", "train.py imports support/look.py"),
    "relative": ("support/named.py", "from .look import main", "support/named.py imports support/look.py"),
    "a circle": ("published/files.py", "from .weights import load", "a circle: "),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_import_is_noticed(wrong):
    path, added, fault = WRONG[wrong]
    house = checkout() | {path: f"{checkout()[path]}\n{added}\n"}
    assert any(fault in found for found in faults(house))
