"""Which tokens are important? A score for every token, then one rule that cuts each sample in two (Eq. 1-2, §3.3).

    grouper     when     score of a token, higher is more important
    random      once     uniform, drawn from the seed: what any grouping does by itself
    frequency   once     1 / its count in the corpus: rare is important
    tfidf       once     its count in the sample × inverse document frequency
    llmlingua2  once     the probability that LLMLingua-2's token classifier keeps it (support/llmlingua2.py)
    loss        a step   its own loss under the model being trained
    rho1        a step   that loss less the loss under a frozen reference model: the excess loss of Eq. 9

What a grouper computes once travels with each token as `Batch.prior`: its score or, for rho1, the reference's nats.
Tokens that it cannot judge (template, end tokens) score -inf. Yours is a function of a corpus that returns (tokens,)
float32: --grouper FILE.py:NAME. `python -m support.look` shows what they pick.

T tokens of a packed row or of a whole corpus, N samples, V token ids.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data import PROMPT, RESPONSE, Batch, Corpus


def important(scores: Tensor, loss_mask: Tensor, doc_ids: Tensor, eta: float) -> Tensor:
    """Split each sample's supervised tokens at the percentile eta of their scores.

    Of n supervised tokens, those that reach the k-th highest score are important, k = max(1, (1 - eta) n, rounded half
    up). Equal scores share a group, so the real share is somewhat above 1 - eta; -inf is never important.

    Args:
        scores:    (T,) float, higher is more important.
        loss_mask: (T,) bool, True on the tokens that are trained on.
        doc_ids:   (T,) int64, the sample of each token, 0 ... N - 1, never falling.
        eta:       percentile in [0, 1]; 0.9 leaves the bottom 90 % unimportant.

    Returns (T,) bool, False outside `loss_mask`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a percentile in [0, 1]; 0.9 makes the top 10 % important")
    if not scores.shape == loss_mask.shape == doc_ids.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (scores, loss_mask, doc_ids))
        raise ValueError(f"scores, loss_mask, doc_ids are {shapes}: expected one shape")
    doc, score = doc_ids[loss_mask], scores[loss_mask].float()  # (supervised,)
    if not len(doc):
        return torch.zeros_like(loss_mask)
    ranked = score.argsort(descending=True)
    ranked = ranked[doc[ranked].argsort(stable=True)]  # sample by sample, from each one's highest score down
    n = doc.bincount()  # (N,) supervised tokens
    k = ((1 - eta) * n.double() + 0.5 + 1e-9).floor().long().clamp(min=1)  # (N,)
    kth = (n.cumsum(0) - n + k - 1).clamp(max=len(doc) - 1)  # (N,) its place in `ranked`; unread where n = 0
    threshold = score[ranked[kth]]  # (N,)
    return loss_mask.masked_scatter(loss_mask, (score >= threshold[doc]) & (score > -torch.inf))


# Once, over the corpus: (corpus, seed) -> (T,) float32.


def tfidf(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """tf × idf: the raw count in the sample times ln((1 + N) / (1 + samples that have the token)) + 1.

    A document is a sample's prompt and response. scikit-learn's TfidfVectorizer has the same idf; its normalization of
    each document would change no rank within it.
    """
    judged = judgeable(corpus)
    ids, vocab = corpus.ids[judged].astype(np.int64), int(corpus.ids.max()) + 1
    document = corpus.doc_ids[judged] * vocab
    pairs, pair, count = np.unique(document + ids, return_inverse=True, return_counts=True)  # (sample, token id)
    idf = np.log((1 + len(corpus)) / (1 + np.bincount(pairs % vocab, minlength=vocab))) + 1  # (V,)
    return spread(judged, count[pair] * idf[ids])


def frequency(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """1 / count over the corpus' text."""
    judged = judgeable(corpus)
    ids = corpus.ids[judged]
    return spread(judged, 1 / np.bincount(ids)[ids])


def random(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """Uniform in [0, 1), from a stream of its own, not the one that orders an epoch."""
    judged = judgeable(corpus)
    return spread(judged, np.random.default_rng((seed, 0, 1)).random(int(judged.sum()), np.float32))


def judgeable(corpus: Corpus) -> np.ndarray:
    """(T,) bool, True on a sample's own text: neither template nor begin nor end tokens."""
    return (corpus.kind == PROMPT) | (corpus.kind == RESPONSE)


def spread(judged: np.ndarray, scores: np.ndarray) -> np.ndarray:
    out = np.full(len(judged), -np.inf, np.float32)
    out[judged] = scores
    return out


ONCE = {"random": random, "frequency": frequency, "tfidf": tfidf}

# In every step: (nll, prior) -> score, (T,) each; nll is detached.

IN_STEP = {"loss": lambda nll, prior: nll, "rho1": lambda nll, reference_nll: nll - reference_nll}
NAMES = ("none", *ONCE, "llmlingua2", *IN_STEP)


def labeller(grouper: str, etas: tuple[float, ...]) -> Callable[[Tensor, Batch], Tensor]:
    """(nll, batch) -> group, (T,) int, from the losses of the step or from what was known before."""
    score = IN_STEP.get(grouper, lambda nll, prior: prior)
    return lambda nll, batch: cut(score(nll, batch.prior), batch.loss_mask, batch.doc_ids, etas)


def cut(scores: Tensor, loss_mask: Tensor, doc_ids: Tensor, etas: tuple[float, ...]) -> Tensor:
    """How many of the percentiles `etas` a token's score reaches, (T,) int: one of them makes two groups."""
    return sum(important(scores, loss_mask, doc_ids, eta).int() for eta in etas)
