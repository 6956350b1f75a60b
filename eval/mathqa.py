"""MathQA (Amini et al. 2019): word problems with up to five answers; the answers are scored."""

import re
from pathlib import Path

from eval.rows import Source
from eval.score import Item

TEST = Source("mathqa", "test.json", "regisss/math_qa", "**/*test*", rows=2_985)


def choices(options: str) -> tuple[str, ...]:
    """The answers in "a ) 38 , b ) 27.5 , …": each ends at its first comma, the fifth at the end of the string."""
    return tuple(answer[4:].rstrip(" ,") for answer in re.findall(r"[abcd] \) .*?, |e \) .*?$", options))


def load(data: Path) -> list[Item]:
    items = []
    for i, row in enumerate(TEST.read(data)):
        answers, gold = row.choices(choices(row.get("options")), range(6)), row.index("correct", tuple("abcde"))
        if not answers:
            found = f"no answers in options {row.get('options')!r:.60}"
            raise ValueError(f"{row.where}: {found}; expected 'a ) 1 , b ) 2 , …'")
        # A gold beyond the answers is never right.
        items.append(Item("mathqa", i, f"Question: {row.get('Problem')}\nAnswer:", answers, gold))
    return items
