"""Which tokens are important? A score for every token, then one rule that cuts each sample in two (Eq. 1-2, §3.3).

A static grouper scores the whole corpus once, one float per token, higher is more important; what it cannot judge
(template, begin and end tokens) scores -inf. A loss-dependent one scores inside the step, from detached losses.
`important` turns either kind of score into the two groups.

    grouper     score of a token
    none        no groups: the objective is plain cross-entropy
    random      uniform, drawn once from the seed: what any grouping does by itself
    frequency   1 / its count in the corpus: rare is important
    tfidf       its count in the sample x smooth inverse document frequency: one score per token type and sample
    loss        its own loss under the model being trained, at every step

T tokens of a packed row or of a whole corpus, N samples, V token ids.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data import PROMPT, RESPONSE, Batch, Corpus

GROUPERS = ("none", "random", "frequency", "tfidf", "loss")
IN_STEP = ("loss",)  # labelled from the losses of the step

Label = Callable[[Tensor, Batch], Tensor]  # (detached nll (T,), batch) -> important (T,) bool


def important(scores: Tensor, loss_mask: Tensor, doc_ids: Tensor, eta: float) -> Tensor:
    """Split each sample's supervised tokens at the percentile eta of their scores.

    Of n supervised tokens, those that reach the k-th highest score are important, k = max(1, (1 - eta) n, rounded half
    up). Equal scores share a group, so the real share is somewhat above 1 - eta; -inf is never important.

    Args:
        scores:    (T,) float, higher is more important.
        loss_mask: (T,) bool, True on the tokens that are trained on.
        doc_ids:   (T,) int64, the sample of each token, 0 ... N - 1.
        eta:       percentile in [0, 1]; 0.9 leaves the bottom 90 % unimportant.

    Returns:
        (T,) bool, False outside `loss_mask`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a percentile in [0, 1]; 0.9 makes the top 10 % important")
    if not scores.shape == loss_mask.shape == doc_ids.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)}, loss_mask {tuple(loss_mask.shape)}, doc_ids {tuple(doc_ids.shape)}: expected one shape"
        )
    score, doc = scores[loss_mask], doc_ids[loss_mask]
    by_score = score.argsort(descending=True)
    order = by_score[doc[by_score].argsort(stable=True)]  # sample after sample, each from its highest score down
    n = doc.bincount(minlength=int(doc_ids.max()) + 1 if len(doc_ids) else 0)  # (N,) supervised tokens
    k = ((1 - eta) * n.double() + 0.5 + 1e-9).floor().long().clamp(min=1)  # (N,)
    kth = (n.cumsum(0) - n + k - 1).clamp(max=max(len(score) - 1, 0))  # (N,) its place in `order`; unread where n = 0
    threshold = score[order[kth]] if len(score) else score
    verdict = torch.zeros_like(loss_mask)
    verdict[loss_mask] = (score >= threshold[doc]) & (score > -torch.inf) if len(score) else False
    return verdict


def tfidf(corpus: Corpus) -> np.ndarray:
    """tf x idf, (T,) float64: raw count in the sample times ln((1 + N) / (1 + samples with the token)) + 1.

    A document is a sample's prompt and response text; scikit-learn's `TfidfVectorizer` has the same idf, and its
    normalization of each document would change no rank within it.
    """
    judged = judgeable(corpus)
    V = int(corpus.ids.max()) + 1
    pairs, pair_of_token, count = np.unique(corpus.doc_ids[judged] * V + corpus.ids[judged], return_inverse=True, return_counts=True)
    samples_with = np.bincount(pairs % V, minlength=V)  # (V,)
    idf = np.log((1 + len(corpus)) / (1 + samples_with)) + 1  # (V,)
    return scatter(judged, (count * idf[pairs % V])[pair_of_token])


def frequency(corpus: Corpus) -> np.ndarray:
    """Inverse count over the corpus' text, (T,) float64."""
    judged = judgeable(corpus)
    ids = corpus.ids[judged]
    return scatter(judged, 1 / np.bincount(ids)[ids])


def random(corpus: Corpus, seed: int) -> np.ndarray:
    """Uniform in [0, 1), (T,) float64, from a stream of its own, not the one that orders an epoch."""
    judged = judgeable(corpus)
    return scatter(judged, np.random.default_rng((seed, 0, 1)).random(int(judged.sum())))


def judgeable(corpus: Corpus) -> np.ndarray:
    """(T,) bool, True on a sample's own text: neither template nor begin nor end tokens."""
    return (corpus.kind == PROMPT) | (corpus.kind == RESPONSE)


def scatter(judged: np.ndarray, scores: np.ndarray) -> np.ndarray:
    out = np.full(len(judged), -np.inf)
    out[judged] = scores
    return out


def label_corpus(grouper: str, corpus: Corpus, eta: float, seed: int) -> np.ndarray:
    """A static grouper's verdicts, (T,) bool, aligned with `corpus.ids`; all False where it has none, or none before the step."""
    if grouper == "none" or grouper in IN_STEP:
        return np.zeros(len(corpus.ids), bool)
    score = {"random": partial(random, seed=seed), "frequency": frequency, "tfidf": tfidf}[grouper]
    return important(*map(torch.from_numpy, (score(corpus), corpus.loss_mask, corpus.doc_ids)), eta).numpy()


def labeller(grouper: str, eta: float) -> Label:
    """The step's own view of the grouper: labels from losses, or those that travelled with the batch."""
    if grouper in IN_STEP:
        return lambda nll, batch: important(nll, batch.loss_mask, batch.doc_ids, eta)
    return lambda nll, batch: batch.important
