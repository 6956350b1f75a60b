"""What tests of whole runs begin with."""

import json

import pytest
from tiny import tiny_folder


@pytest.fixture
def folder(tmp_path):
    """A tiny model folder without weights."""
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture
def rows(tmp_path):
    """A file of eleven short dialogues."""
    from test_train import ROWS

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path
