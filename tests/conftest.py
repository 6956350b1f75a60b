"""What tests of whole runs begin with."""

import json
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
def picture():
    """Asks for losses.png; it needs the extra `plots`."""
    pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """To draw takes as long as such a short run itself: without `picture` there is no matplotlib."""
    if "picture" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
