"""OpenBookQA (Mihaylov et al. 2018): elementary science; each choice is scored as the bare question's continuation."""

from pathlib import Path

from eval.arc_challenge import question
from eval.rows import Source
from eval.score import Item

TEST = Source("openbookqa", "test.jsonl", "allenai/openbookqa", "main/test-*.parquet", rows=500)


def load(data: Path) -> list[Item]:
    return [Item("openbookqa", i, *question(row, "question_stem", (4,))) for i, row in enumerate(TEST.read(data))]
