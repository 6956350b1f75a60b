"""Groupers: a score for every token, then one threshold per sample that makes two groups (Eq. 1-2, §3.3).

    grouper     computed     score of a token; higher is more important
    random      before       uniform in [0, 1): the control, a grouping without information
    frequency   before       1 / its count in the corpus: rare tokens are important
    tfidf       before       its count in the sample × inverse document frequency
    llmlingua2  before       the keep probability of LLMLingua-2's token classifier (support/llmlingua2.py)
    loss        every step   its loss under the model in training
    rho1        every step   that loss - its loss under a frozen reference model: the excess loss of Eq. 9

Your own, --grouper FILE.py:NAME, is one of
    (corpus, seed) -> (T,) floats      scores; --eta cuts each sample at its percentiles
    (corpus, seed) -> (T,) integers    the groups 0 ... K - 1 themselves
    (nll, prior)   -> (T,) floats      with `in_step = True`: scores in every step, from the detached losses and from
                                       what its `prior(corpus, seed)` returned before training (`Batch.prior`)
Scores made before training are -inf on template and end tokens. `python -m support.look` shows the chosen tokens.

T tokens of a packed row or of a whole corpus, N samples, V largest token id + 1.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data import PROMPT, RESPONSE, Batch, Corpus


def important(scores: Tensor, loss_mask: Tensor, doc_ids: Tensor, eta: float) -> Tensor:
    """Split each sample's supervised tokens at percentile eta of their scores.

    With n supervised tokens, k = max(1, (1 - eta) n rounded half up). A token is important if its score is at least the
    sample's k-th highest score and above -inf. Ties are all important, so the share can be far above 1 - eta.

    Args:
        scores:    (T,) floats or integers, compared in their own type; higher is more important, +inf the highest.
        loss_mask: (T,) bool, True on the tokens that are trained on.
        doc_ids:   (T,) integers, the sample of each token, 0 ... N - 1, in any order.
        eta:       percentile in [0, 1]; 0.9 puts the bottom 90 % into the unimportant group.

    Returns (T,) bool, False outside `loss_mask`.
    Raises ValueError, also for a nan in `loss_mask`; on a GPU, where a look would wait, `labeller` marks that one.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a percentile in [0, 1]; 0.9 makes the top 10 % important")
    if not scores.shape == loss_mask.shape == doc_ids.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (scores, loss_mask, doc_ids))
        raise ValueError(f"scores, loss_mask, doc_ids are {shapes}: expected one shape")
    if loss_mask.dtype != torch.bool or doc_ids.is_floating_point():
        raise ValueError(f"loss_mask, doc_ids are {loss_mask.dtype}, {doc_ids.dtype}: expected bool and integers")
    scores = scores if scores.is_floating_point() else scores.long()
    doc, score = doc_ids.long()[loss_mask], scores[loss_mask]  # (supervised,)
    if not len(doc):
        return torch.zeros_like(loss_mask)
    if not score.is_cuda and (score.isnan().any() or doc.min() < 0):
        found = f"{int(score.isnan().sum())} scores of nan, the lowest of doc_ids is {int(doc.min())}"
        raise ValueError(f"{found}: expected none, and 0 or above")
    ranked = score.argsort(descending=True)
    ranked = ranked[doc[ranked].argsort(stable=True)]  # (supervised,) by sample, then by falling score
    n = doc.bincount()  # (N,) supervised tokens of each sample
    k = ((1 - eta) * n.double() + 0.5 + 1e-9).floor().long().clamp(min=1)  # (N,); 1e-9 corrects float error in 1 - eta
    kth = n.cumsum(0) - n + k - 1  # (N,) index into `ranked`; where n = 0 it belongs to the next sample: not used
    threshold = score[ranked[kth]]  # (N,)
    return loss_mask.masked_scatter(loss_mask, (score >= threshold[doc]) & (score > -torch.inf))  # (T,)


# Before training.


def tfidf(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """tf × idf: the raw count in the sample times ln((1 + N) / (1 + samples that have the token)) + 1.

    A document is the prompt and response text of one sample. The idf is that of scikit-learn's TfidfVectorizer; its
    document normalization is left out, because it changes no rank within a document.
    """
    judged = judgeable(corpus)
    ids, vocab = corpus.ids[judged].astype(np.int64), int(corpus.ids.max()) + 1  # (judged,), V
    keys = corpus.doc_ids[judged] * vocab + ids  # (judged,) one integer per (sample, token id)
    pairs, pair_of, count = np.unique(keys, return_inverse=True, return_counts=True)  # (pairs,), (judged,), (pairs,)
    idf = np.log((1 + len(corpus)) / (1 + np.bincount(pairs % vocab, minlength=vocab))) + 1  # (V,)
    return spread(judged, count[pair_of] * idf[ids])


def frequency(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """1 / the token's count in the corpus, over prompt and response text."""
    judged = judgeable(corpus)
    ids = corpus.ids[judged]
    return spread(judged, 1 / np.bincount(ids)[ids])


def random(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """Uniform in [0, 1); the seed tuple differs from the (seed, epoch) of the data order."""
    judged = judgeable(corpus)
    return spread(judged, np.random.default_rng((seed, 0, 1)).random(int(judged.sum()), np.float32))


def none(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """No score: every token is unimportant."""
    return np.full(len(corpus.ids), -np.inf, np.float32)


def judgeable(corpus: Corpus) -> np.ndarray:
    """(T,) bool, True on a sample's own text: neither template nor begin nor end tokens."""
    return (corpus.kind == PROMPT) | (corpus.kind == RESPONSE)


def spread(judged: np.ndarray, scores: np.ndarray) -> np.ndarray:
    out = np.full(len(judged), -np.inf, np.float32)  # (T,); `scores` is (judged,)
    out[judged] = scores
    return out


# In every step.


def loss(nll: Tensor, prior: Tensor) -> Tensor:
    return nll


def rho1(nll: Tensor, reference_nll: Tensor) -> Tensor:
    return nll - reference_nll


loss.in_step = rho1.in_step = True
GROUPERS = {f.__name__: f for f in (none, random, frequency, tfidf, loss, rho1)}
GROUPERS["llmlingua2"] = None  # it takes a model, as rho1's reference losses do: support/scores.py


def labeller(grouper: Callable | None, etas: tuple[float, ...]) -> Callable[[Tensor, Batch], Tensor]:
    """The function (detached nll (T,), batch) -> group (T,) int; a score of nan is an error, on a GPU group -1."""

    def label(nll: Tensor, batch: Batch) -> Tensor:
        scores = grouper(nll, batch.prior) if getattr(grouper, "in_step", False) else batch.prior
        if not scores.is_floating_point():
            return scores
        if not scores.is_cuda and scores[batch.loss_mask].isnan().any():  # a GPU would wait: the step refuses -1
            raise ValueError(f"{grouper}: a score of nan")
        return cut(scores, batch.loss_mask, batch.doc_ids, etas).masked_fill(scores.isnan(), -1)

    return label


def cut(scores: Tensor, loss_mask: Tensor, doc_ids: Tensor, etas: tuple[float, ...]) -> Tensor:
    """Group of each token, (T,) int: how many of the percentiles `etas` its score reaches; one eta: two groups."""
    return sum(important(scores, loss_mask, doc_ids, eta).int() for eta in etas)
