"""ARC-Challenge (Clark et al. 2018): grade-school science questions; the text of each choice is scored."""

from pathlib import Path

from eval.rows import Row, Source
from eval.score import Item

TEST = Source("arc_challenge", "ARC-Challenge-Test.jsonl", "allenai/ai2_arc", "ARC-Challenge/test-*.parquet", rows=1_172)


def question(row: Row, stem: str) -> tuple[str, tuple[str, ...], int]:
    """(stem, choices, gold): released, the stem and the choices lie in `question`; on the Hub they lie beside the answer."""
    if isinstance(row.fields.get("question"), dict):
        inner = row.row("question")
        choices = [Row(f"{row.where}: choices", choice if isinstance(choice, dict) else {}) for choice in inner.get("choices", list)]
        text, labels = (tuple(choice.get(name) for choice in choices) for name in ("text", "label"))
        return inner.get("stem"), text, row.index("answerKey", labels)
    choices = row.row("choices")
    text, labels = choices.strings("text"), choices.strings("label")
    if len(text) != len(labels):
        raise ValueError(f"{choices.where}: {len(text)} texts and {len(labels)} labels, expected as many of each")
    return row.get(stem), text, row.index("answerKey", labels)


def load(data: Path) -> list[Item]:
    items = []
    for i, row in enumerate(TEST.read(data)):
        stem, choices, gold = question(row, "question")
        items.append(Item("arc_challenge", i, f"Question: {stem}\nAnswer:", choices, gold))
    return items
