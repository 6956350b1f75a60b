"""What tests of whole runs begin with."""

import json
import resource
import sys

import pytest
from tiny import tiny_folder


@pytest.fixture
def folder(tmp_path):
    """A tiny model folder."""
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture
def rows(tmp_path):
    """A file of eleven short dialogues."""
    from test_train import ROWS

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def shell(capsys, monkeypatch):
    """shell(*argv): (exit code, what it said on stderr) of `python train.py` as a shell would see it."""
    import train

    def ended(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        with pytest.raises(SystemExit) as e:
            train.main()
        if isinstance(e.value.code, str):  # the interpreter prints it and exits with 1
            return 1, e.value.code
        return e.value.code, capsys.readouterr().err

    return ended


@pytest.fixture
def full_disk(folder):
    """From now on no file of this process grows beyond 100 kB: the weights need 140 kB, a checkpoint more."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.fixture
def picture():
    """Asks for losses.png; it needs the extra `plots`."""
    pytest.importorskip("matplotlib")


@pytest.fixture
def answer():
    """Asks for the model's answer at the end of a run."""


@pytest.fixture(autouse=True)
def brief(request, monkeypatch):
    """To draw, and to answer, takes as long as such a short run: only where `picture` or `answer` asks for it."""
    if "picture" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    if "answer" not in request.fixturenames:
        monkeypatch.setattr("support.report.generate", lambda *_, **__: [[]])
