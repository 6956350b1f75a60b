"""Requests to packed rows: what they share in front is put into a row once, the same request once at all.

A header (a subject's examples) is shared by contexts (its questions), a context by continuations (its choices), and continuations
that differ in their last token only share the others. All of it is found in the tokens, never in the texts.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

HEADER = 16  # tokens from which on contexts that begin alike share them
Pair = tuple[bytes, list[int]]  # a context, its ids as big-endian int32 (hashed, sorted and compared as one string), and a continuation


def packed(ids: list[int]) -> bytes:
    return np.array(ids, ">i4").tobytes()


def unpacked(context: bytes) -> np.ndarray:
    return np.frombuffer(context, ">i4")


@dataclass
class Row:
    """A packed row, as it grows: its tokens by segment, and which of its places score what."""

    tokens: list[np.ndarray] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # the hidden state that predicts
    targets: list[int] = field(default_factory=list)  # the token that it should
    owners: list[int] = field(default_factory=list)  # for which request
    size: int = 0  # tokens in the row
    questions: int = 0  # contexts in the row
    goes_on: bool = False  # segment 0 is the last row's `keep`: remembered, not in the row
    keep: int | None = None  # the segment that the next row goes on from

    def add(self, tokens: np.ndarray | tuple[int, ...], parent: int) -> int:
        self.tokens.append(np.asarray(tokens, np.int64))
        self.parents.append(parent)
        self.size += len(tokens)
        return len(self.parents) - 1

    def expect(self, at: int, target: int, owners: list[int]) -> None:
        self.at += [at] * len(owners)
        self.targets += [target] * len(owners)
        self.owners += owners

    def next(self, header: int | None) -> "Row":
        """The row after this one, going on from the header in this one's segment `header`."""
        if header is None:
            return Row()
        self.keep = header
        return Row([self.tokens[header]], [-1], goes_on=True)


Question = tuple[bytes, dict[tuple[int, ...], list[int]]]  # a context, and which requests ask for each continuation


def questions(pairs: list[Pair], window: int) -> list[Question]:
    """Each different context with its different continuations and their requests, sorted by the contexts' tokens.

    What is longer than the model's window is cut from the left, before anything is shared.
    """
    found = defaultdict(lambda: defaultdict(list))
    for i, (context, continuation) in enumerate(pairs):
        if not continuation:
            continue  # an empty continuation, whose log-likelihood is 0
        keep = window + 1 - len(continuation)
        if keep < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens: the model reads {window} at most")
        found[context[-4 * keep :]][tuple(continuation)].append(i)
    return sorted(found.items())


def shared(a: bytes, b: bytes) -> int:
    """How many tokens two contexts begin with in common, short of the whole of either."""
    n = min(len(a), len(b)) // 4 - 1
    differ = unpacked(a)[:n] != unpacked(b)[:n]
    return int(differ.argmax()) if differ.any() else n


def families(found: list[Question]) -> Iterator[tuple[int, list[Question]]]:
    """(tokens of a header, the questions that begin with it): neighbours stay together while that saves more tokens."""
    family, header = found[:1], 0
    for question in found[1:]:
        common = shared(family[-1][0], question[0])
        common = min(common, header) if len(family) > 1 else common
        if common >= HEADER and len(family) * common > (len(family) - 1) * header:
            family.append(question)
            header = common
        else:
            yield header, family
            family, header = [question], 0
    if family:
        yield header, family


def cost(question: Question) -> int:
    """Tokens that the model reads for it."""
    return len(question[0]) // 4 + sum(len(continuation) - 1 for continuation in question[1])


def rows(pairs: list[Pair], window: int, max_tokens: int) -> list[Row]:
    """Packed rows of at most `max_tokens` tokens (but for a single longer question); the longest questions first.

    Args:
        pairs: requests in tokens.
        window: the most tokens that the model reads at once.
    """
    groups = [(header, sorted(family, key=cost, reverse=True)) for header, family in families(questions(pairs, window))]
    out = [Row()]
    for header, family in sorted(groups, key=lambda group: cost(group[1][0]), reverse=True):
        above = None  # the header's segment in this row
        for question in family:
            context = unpacked(question[0])
            if out[-1].size and out[-1].size + cost(question) - (header if above is not None else 0) > max_tokens:
                out.append(out[-1].next(above))
                above = None if above is None else 0
            row = out[-1]
            if header and above is None:
                above = row.add(context[:header], -1)
            ask(row, context[header:], question[1], -1 if above is None else above)
    return [row for row in out if row.size]


def ask(row: Row, context: np.ndarray, continuations: dict, parent: int) -> None:
    """Put a question into the row: the context's last state predicts every first token, a continuation's own states the others."""
    row.questions += 1
    segment = row.add(context, parent)
    last = row.size - 1
    tails = defaultdict(list)  # continuations that differ in their last token only share the rest
    for continuation, owners in continuations.items():
        row.expect(last, continuation[0], owners)
        if len(continuation) > 1:
            tails[continuation[:-1]].append((continuation, owners))
    for tail, found in tails.items():
        begin = row.size
        row.add(tail, segment)
        for continuation, owners in found:
            for j, target in enumerate(continuation[1:]):
                row.expect(begin + j, target, owners)
