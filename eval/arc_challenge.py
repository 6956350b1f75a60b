"""ARC-Challenge (Clark et al. 2018): grade-school science questions; the text of each choice is scored."""

from pathlib import Path

from eval.rows import Row, Source
from eval.score import Item

FILES = "ARC-Challenge-Test.jsonl", "allenai/ai2_arc", "ARC-Challenge/test-*.parquet"
TEST = Source("arc_challenge", *FILES, rows=1_172)


def question(row: Row, stem: str, counts: tuple[int, ...]) -> tuple[str, tuple[str, ...], int]:
    """(stem, choices, gold): released, `question` holds the stem and the choices; on the Hub the row does."""
    if isinstance(row.fields.get("question"), dict):
        inner = row.row("question")
        found = [choice if isinstance(choice, dict) else {} for choice in inner.get("choices", list)]
        found = [Row(f"{row.where}: choices", choice) for choice in found]
        text, labels = (tuple(choice.get(name) for choice in found) for name in ("text", "label"))
        return inner.get("stem"), row.choices(text, counts), row.index("answerKey", labels)
    text, labels = (row.row("choices").strings(name) for name in ("text", "label"))
    if len(text) != len(labels):
        raise ValueError(f"{row.where}: {len(text)} choices and {len(labels)} labels, expected as many of each")
    return row.get(stem), row.choices(text, counts), row.index("answerKey", labels)


def load(data: Path) -> list[Item]:
    found = [question(row, "question", (3, 4, 5)) for row in TEST.read(data)]
    return [Item("arc_challenge", i, f"Question: {stem}\nAnswer:", *rest) for i, (stem, *rest) in enumerate(found)]
