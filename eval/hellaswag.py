"""HellaSwag (Zellers et al. 2019): which of four endings continues a description; the endings are scored."""

import re
from pathlib import Path

from eval.rows import Row, Source
from eval.score import Item

VALIDATION = Source("hellaswag", "hellaswag_val.jsonl", "Rowan/hellaswag", "data/validation-*.parquet", rows=10_042)


def clean(text: str) -> str:
    """Without WikiHow's markers. Not stripped again at the end: what a marker leaves behind there stays."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def context(row: Row) -> str:
    """The description, with the fragment that the endings complete capitalized, which also lowers its other letters.

    A file without `ctx_a` and `ctx_b` has both in `ctx`: there the fragment is what follows the last end of a sentence.
    """
    if "ctx_a" in row.fields:
        begun, fragment = row.get("ctx_a"), row.get("ctx_b")
    else:
        begun, fragment = re.fullmatch(r"(?s)(.*[.!?][\"')]*(?:\s|$))?(.*)", row.get("ctx")).groups(default="")
        begun = begun.rstrip()
    return clean(f"{row.get('activity_label')}: {begun} {fragment.capitalize()}")


def load(data: Path) -> list[Item]:
    items = []
    for i, row in enumerate(VALIDATION.read(data)):  # only this split has labels
        endings = row.choices(tuple(map(clean, row.strings("endings"))), (4,))
        items.append(Item("hellaswag", i, context(row), endings, row.index("label", tuple("0123"))))
    return items
