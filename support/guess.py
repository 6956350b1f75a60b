"""A step's prices before its first forward pass, so that a step of several micro-batches needs no probe.

The prices of sft_go depend on the token counts of the groups, which are known beforehand, and on which group is the
worst, which seldom changes where groups differ. A wrong guess is noticed, at the price of a second step; a probe costs
a third of one. So a guess pays below one wrong in three; the rule asks for one in four, because it sees few of them.
"""

from collections import Counter, deque

import numpy as np
from torch import Tensor

from data import Corpus
from sftgo import price
from support.report import groups_of_corpus


class Guess:
    """Prices of the last step's means, unless more than 1/4 of the last 24 would have been wrong."""

    def __init__(self):
        self.means, self.prices, self.tried, self.wrong = None, None, False, deque(maxlen=24)
        self.steps = Counter()  # how many were what

    def make(self, objective, tokens: Tensor) -> Tensor | None:
        """Prices (K,) for a step with this many `tokens` in each group, (K,) float64; None: probe."""
        self.prices = None if self.means is None else price(objective, self.means * tokens, tokens)
        self.tried = self.prices is not None and 4 * sum(self.wrong) <= len(self.wrong)
        return self.prices if self.tried else None

    def learn(self, objective, nats: Tensor, tokens: Tensor, reduce=lambda t: t) -> None:
        """From the step's sums, (K,) each; `reduce` sums over ranks."""
        right = self.prices is not None and same(self.prices, price(objective, nats, tokens), reduce)
        if self.prices is not None:
            self.wrong.append(not right)
        self.means = (nats / tokens).where(tokens > 0, 0.0 if self.means is None else self.means)
        self.steps["probed" if not self.tried else "guessed right" if right else "guessed wrong"] += 1


def same(prices: Tensor, guess: Tensor, reduce) -> bool:
    """Whether they are, to the last bit, on every rank: one that began its step again alone would wait for ever."""
    return not reduce((prices != guess).sum())


def groups_before(grouper, etas: tuple[float, ...], corpus: Corpus, prior: np.ndarray, seed: int) -> np.ndarray:
    """(tokens,) int, each token's group; of a grouper that waits for losses, groups by chance, as large as its own.

    Where scores tie they will be larger, and the guess is wrong.
    """
    if getattr(grouper, "in_step", False):
        prior = np.random.default_rng(seed).random(len(corpus.ids))
    return groups_of_corpus(None, etas, corpus, prior)
