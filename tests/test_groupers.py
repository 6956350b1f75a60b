"""groupers.py: scores a human can check, one threshold rule, and groups that stay with their tokens."""

import gzip
import math
import random as python_random

import numpy as np
import pytest
import torch
from stories260k import SHARED
from tiny import VOCAB, tiny_folder

import groupers
from data import END, PROMPT, RESPONSE, TEMPLATE, Corpus, load_corpus, micro_batches
from groupers import cut, important, labeller
from published.tokenizer import Tokenizer
from support.named import Named, named
from support.scores import without_model

ONCE = ("random", "frequency", "tfidf")  # scores of the corpus alone
LIMA = SHARED / "data" / "lima" / "train.jsonl.gz"


def corpus_of(*samples):
    """Samples of (ids, kinds) end to end."""
    ids, kinds = zip(*samples)
    starts = np.cumsum([0, *map(len, ids)])
    return Corpus(np.concatenate(ids).astype(np.int32), np.concatenate(kinds).astype(np.uint8), starts)


def sentence(*ids):
    """A BOS, one prompt token of its own, the response, an end token."""
    return [100, 50, *ids, 101], [TEMPLATE, PROMPT] + [RESPONSE] * len(ids) + [END]


def groups(grouper, corpus, *etas, seed=0) -> np.ndarray:
    """The group of every token of a corpus, (tokens,) int."""
    mask, doc_ids = torch.from_numpy(corpus.loss_mask), torch.from_numpy(corpus.doc_ids)
    return cut(torch.from_numpy(without_model(named(grouper, "--grouper"), corpus, seed)), mask, doc_ids, etas).numpy()


def plain_loop(scores, loss_mask, doc_ids, eta):
    """The rule of the docstring, a token at a time."""
    verdict = [False] * len(scores)
    for doc in set(doc_ids):
        mine = [i for i in range(len(scores)) if doc_ids[i] == doc and loss_mask[i]]
        if mine:
            k = max(1, math.floor((1 - eta) * len(mine) + 0.5 + 1e-9))
            threshold = sorted((scores[i] for i in mine), reverse=True)[k - 1]
            for i in mine:
                verdict[i] = scores[i] >= threshold and scores[i] > -math.inf
    return verdict


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(40))
def test_important_follows_the_threshold_rule(seed):
    rng = python_random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
    doc_ids = [d for d, n in enumerate(lengths) for _ in range(n)]
    scores = [rng.choice([0.0, -0.0, 0.5, 1.0, -1.0, -2.0, -math.inf, rng.random() - 0.5]) for _ in doc_ids]
    loss_mask = [rng.random() < 0.7 for _ in doc_ids]
    for eta in (0.0, 0.25, 0.5, 0.7, 0.9, 1.0):
        got = important(torch.tensor(scores), torch.tensor(loss_mask), torch.tensor(doc_ids), eta)
        assert got.tolist() == plain_loop(scores, loss_mask, doc_ids, eta)


@pytest.mark.fast
@pytest.mark.parametrize(
    "n, eta, count",
    [(10, 0.9, 1), (10, 0.75, 3), (10, 0.7, 3), (5, 0.9, 1), (15, 0.9, 2), (1, 0.9, 1), (20, 0.85, 3)]
    + [(4, 1.0, 1), (4, 0.0, 4)],
)
def test_eta_is_a_percentile_rounded_half_up_and_never_empties_a_sample(n, eta, count):
    got = important(torch.arange(float(n)), torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64), eta)
    assert got.sum() == count and got[-1] and (count == n or not got[0])


@pytest.mark.fast
def test_equal_scores_share_a_group_and_what_is_not_judged_is_never_important():
    everywhere, one, inf = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.int64), -torch.inf
    assert important(torch.tensor([3.0, 1, 3, 3, 0]), everywhere, one, 0.9).int().tolist() == [1, 0, 1, 1, 0]
    assert important(torch.tensor([inf, inf, inf, 1, inf]), everywhere, one, 0.5).int().tolist() == [0, 0, 0, 1, 0]
    assert not important(torch.full((5,), inf), everywhere, one, 0.5).any()


@pytest.mark.fast
def test_important_handles_nothing_supervised_and_says_what_is_wrong():
    none = torch.zeros(3, dtype=torch.bool)
    assert not important(torch.rand(3), none, torch.zeros(3, dtype=torch.int64), 0.5).any()
    assert important(torch.rand(0), none[:0], torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)
    with pytest.raises(ValueError, match="eta is 90, expected a percentile"):
        important(torch.rand(3), none, torch.zeros(3, dtype=torch.int64), 90)
    with pytest.raises(ValueError, match="expected one shape"):
        important(torch.rand(4), none, torch.zeros(3, dtype=torch.int64), 0.9)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_types_change_no_group(dtype):
    generator = torch.Generator().manual_seed(0)
    scores, doc_ids = torch.randint(0, 100, (500,), generator=generator), torch.arange(500) // 7
    loss_mask = torch.rand(500, generator=generator) < 0.8
    for eta in (0.0, 0.3, 0.9):
        expected = plain_loop(scores.tolist(), loss_mask.tolist(), doc_ids.tolist(), eta)
        for given in ((scores.float(), doc_ids.to(dtype)), (scores.to(dtype), doc_ids), (scores.bfloat16(), doc_ids)):
            got = important(given[0], loss_mask, given[1], eta)
            assert got.dtype == torch.bool and got.tolist() == expected


@pytest.mark.fast
@pytest.mark.parametrize(
    "scores",
    [torch.arange(10) + 2**24, torch.arange(10) + 2**60, torch.arange(10, dtype=torch.int32) - 2**31]
    + [1 + torch.arange(10.0, dtype=torch.float64) * 2**-52, torch.arange(10.0, dtype=torch.float64) * 1e300],
    ids=["above 2^24", "above 2^53", "lowest", "float64 near 1", "float64 above float32"],
)
def test_scores_that_differ_do_not_tie(scores):
    everywhere, one = torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.int64)
    assert important(scores.flip(0), everywhere, one, 0.8).tolist() == [True] * 2 + [False] * 8
    if scores.is_floating_point():  # also on their way from a function of a user's
        corpus = corpus_of(([1] * 10, [RESPONSE] * 10))
        prior = torch.from_numpy(without_model(a_grouper(scores.numpy()), corpus, 0))
        assert cut(prior, everywhere, one, (0.8,)).sum() == 2


def a_grouper(scores):
    return Named("mine.py:f", lambda corpus, seed: scores, "--grouper", digest="of its file")


@pytest.mark.fast
def test_infinite_scores_are_the_highest_and_the_never_important():
    inf, everywhere, one = torch.inf, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64, torch.float16):
        scores = torch.tensor([inf, 1, -inf, inf, 2, 0], dtype=dtype)
        assert important(scores, everywhere, one, 0.9).tolist() == [True, False, False, True, False, False], "a tie"
        assert important(scores, everywhere, one, 0.5).tolist() == [True, False, False, True, True, False]
        assert important(scores, everywhere, one, 0.0).tolist() == [True, True, False, True, True, True]


@pytest.mark.fast
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001], ids=hex)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_nan_is_refused_whatever_its_sign_and_place_unless_nothing_is_trained_there(bits, dtype):
    mask, doc_ids = torch.arange(10) != 3, torch.arange(10) // 5
    for place in (0, 3, 4, 5, 9):
        scores = torch.arange(10.0)
        scores[place] = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
        scores = scores.to(dtype)
        if place == 3:
            assert important(scores, mask, doc_ids, 0.5).tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 1, 1]
        else:
            with pytest.raises(ValueError, match="1 scores of nan"):
                important(scores, mask, doc_ids, 0.5)


@pytest.mark.fast
def test_samples_come_in_any_order_and_masks_and_samples_in_no_other_type():
    scores, mask = torch.rand(40, generator=torch.Generator().manual_seed(1)), torch.ones(40, dtype=torch.bool)
    for doc_ids in (torch.arange(40) % 6, 5 - torch.arange(40) // 8, torch.arange(40).flip(0) % 3 * 2):
        for eta in (0.2, 0.75):
            assert important(scores, mask, doc_ids, eta).tolist() == plain_loop(
                scores.tolist(), mask.tolist(), doc_ids.tolist(), eta
            )
    for other in (mask.int(), mask.to(torch.uint8), mask.float()):
        with pytest.raises(ValueError, match="expected bool and integers"):
            important(scores, other, doc_ids, 0.5)
    with pytest.raises(ValueError, match="torch.float32: expected bool and integers"):
        important(scores, mask, doc_ids.float(), 0.5)
    with pytest.raises(ValueError, match="the lowest of doc_ids is -1"):
        important(scores, mask, doc_ids - 1, 0.5)


@pytest.mark.fast
def test_tfidf_of_three_sentences_worked_by_hand():
    # token 1 is in all three samples, 2 in two, 3 in one (twice); the prompt token 50 is in all three
    corpus = corpus_of(sentence(1, 2), sentence(1, 2, 2), sentence(1, 3, 3))
    rare, some, common = math.log(4 / 2) + 1, math.log(4 / 3) + 1, math.log(4 / 4) + 1
    inf = -math.inf
    by_hand = [inf, common, common, some, inf]
    by_hand += [inf, common, common, 2 * some, 2 * some, inf]
    by_hand += [inf, common, common, 2 * rare, 2 * rare, inf]
    np.testing.assert_allclose(groupers.tfidf(corpus), by_hand)
    best = 5 * [some] + 6 * [2 * some] + 6 * [2 * rare]
    assert groups("tfidf", corpus, 0.75).tolist() == [score == top for score, top in zip(by_hand, best)]


@pytest.mark.fast
def test_tfidf_counts_the_prompt_but_labels_only_what_is_trained_on():
    corpus = corpus_of(([100, 7, 7, 7, 7, 101], [TEMPLATE, PROMPT, PROMPT, PROMPT, RESPONSE, END]), sentence(8))
    assert groupers.tfidf(corpus)[4] == pytest.approx(4 * (math.log(3 / 2) + 1))
    assert groups("tfidf", corpus, 0.9).tolist() == [0, 0, 0, 0, 1, 0] + [0, 0, 1, 0]


@pytest.mark.fast
def test_frequency_calls_the_rarer_token_more_important():
    scores = groupers.frequency(corpus_of(sentence(1, 1, 2), sentence(1, 3)))
    np.testing.assert_allclose(scores, [-np.inf, 1 / 2, 1 / 3, 1 / 3, 1, -np.inf, -np.inf, 1 / 2, 1 / 3, 1, -np.inf])


@pytest.mark.fast
def test_random_depends_on_its_seed_alone():
    corpus = corpus_of(sentence(*range(1, 40)), sentence(*range(1, 40)))
    a, b, c = (groups("random", corpus, 0.7, seed=seed) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()
    assert a.sum() == 2 * 12, "30 % of 39 words and an end token, rounded, in each sample"


@pytest.mark.fast
def test_no_grouper_reads_or_moves_a_global_random_state():
    corpus = corpus_of(sentence(1, 2, 3), sentence(1, 4, 4))

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), python_random.getstate()

    before = states()
    for name in ONCE:
        groups(name, corpus, 0.5)
    assert states() == before


@pytest.mark.fast
def test_every_grouper_without_a_model_scores_each_token_before_the_first_step():
    corpus = corpus_of(sentence(1, 2, 3), sentence(1, 4, 4))
    for name in {*groupers.GROUPERS} - {"llmlingua2", "rho1", "loss"}:
        scores = without_model(named(name, "--grouper"), corpus, 0)
        assert scores.dtype == np.float32 and scores.shape == corpus.ids.shape
        assert np.isneginf(scores[(corpus.kind == TEMPLATE) | (corpus.kind == END)]).all()
        assert groups(name, corpus, 0.5).any() == (name in ONCE), "of none, no token is important"


# In a step: labels from a batch.


@pytest.mark.fast
def test_a_score_made_once_travels_with_its_token_and_the_losses_change_nothing():
    corpus = corpus_of(sentence(1, 2, 3), sentence(4, 5, 6))
    scores = np.arange(len(corpus.ids), dtype=np.float32)
    (batch,) = micro_batches(corpus, scores, np.arange(2), 64)
    assert batch.prior.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    for nll in (torch.rand(10), torch.full((10,), torch.nan)):
        assert labeller(groupers.tfidf, (0.5,))(nll, batch).tolist() == [0, 0, 0, 1, 1] * 2


@pytest.mark.fast
def test_the_loss_grouper_labels_the_highest_losses_of_each_sample():
    corpus = corpus_of(sentence(1, 2, 3), sentence(4, 5, 6))
    (batch,) = micro_batches(corpus, without_model(named("loss", "--grouper"), corpus, 0), np.arange(2), 64)
    nll = torch.tensor([9.0, 0.1, 0.2, 0.3, 0.0, 9.0, 5.0, 4.0, 6.0, 1.0])  # prompt, 3 words, end; twice
    assert labeller(groupers.loss, (0.7,))(nll, batch).tolist() == [0, 0, 0, 1, 0] * 2


@pytest.mark.fast
def test_rho1_labels_the_highest_excess_over_the_reference():
    corpus = corpus_of(sentence(1, 2, 3), sentence(4, 5, 6))
    reference = np.array([0, 0, 4.0, 1.0, 2.0, 0.5] * 2, np.float32)  # of each token itself: BOS, prompt, 3 words, end
    (batch,) = micro_batches(corpus, reference, np.arange(2), 64)
    assert batch.prior.tolist() == [0, 4, 1, 2, 0.5] * 2, "the reference's loss travels with the token it is of"
    nll = torch.tensor([9.0, 4.1, 1.3, 2.2, 0.5, 9.0, 3.0, 1.0, 2.0, 0.6])  # excess 0.1 0.3 0.2 0.0, then -1 0 0 0.1
    assert labeller(groupers.rho1, (0.7,))(nll, batch).tolist() == [0, 0, 1, 0, 0] + [0, 0, 0, 0, 1]
    level = labeller(groupers.rho1, (0.7,))(batch.prior.clone(), batch)
    assert torch.equal(level.bool(), batch.loss_mask), "a model that is its own reference: no excess, one group"


@pytest.mark.fast
@pytest.mark.parametrize("grouper", ["tfidf", "loss", "rho1"])
@pytest.mark.parametrize("etas", [(0.5, 0.9), (0.9, 0.5)])
def test_two_etas_make_three_groups(grouper, etas):
    corpus = corpus_of(
        sentence(*range(1, 10)), sentence(*range(11, 20))
    )  # with the end token ten supervised tokens each
    prior = np.zeros(len(corpus.ids), np.float32)
    prior[corpus.kind == RESPONSE] = np.tile(np.arange(9), 2)
    (batch,) = micro_batches(corpus, prior, np.arange(2), 64)
    nll = batch.prior.clone() * (2 if grouper == "rho1" else 1)
    by_hand = [0] + [0, 0, 0, 0, 1, 1, 1, 1, 2] + [0]  # the top 10 % are 2, the rest of the top half 1
    assert labeller(groupers.GROUPERS[grouper], etas)(nll, batch).tolist() == by_hand * 2


@pytest.mark.fast
def test_of_several_etas_what_is_not_judged_or_not_trained_on_is_in_group_0():
    scores, mask = torch.tensor([-torch.inf, 1.0, 2.0, 3.0, 4.0, 9.0]), torch.tensor([True] * 5 + [False])
    assert cut(scores, mask, torch.zeros(6, dtype=torch.int64), (0.0, 0.5, 0.9)).tolist() == [0, 1, 2, 2, 3, 0]


# On real data.


@pytest.fixture(scope="module")
def lima(tmp_path_factory):
    if not LIMA.is_file():
        pytest.skip(f"{LIMA} is absent; set SFTGO_SHARED to the folder that has data/lima")
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    rows = gzip.decompress(LIMA.read_bytes()).splitlines(keepends=True)[:300]
    (folder / "rows.jsonl").write_bytes(b"".join(rows))
    return load_corpus(folder / "rows.jsonl", Tokenizer(folder, VOCAB), "plain", 4096)


def test_tfidf_ranks_equal_scikit_learns_on_lima(lima):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    judged, ours = groupers.judgeable(lima), groupers.tfidf(lima)
    spans = list(zip(lima.starts, lima.starts[1:]))
    documents = [lima.ids[a:b][judged[a:b]].tolist() for a, b in spans]
    raw = text.TfidfVectorizer(analyzer=lambda ids: ids, norm=None)
    default = text.TfidfVectorizer(analyzer=lambda ids: ids)  # divides each document by its norm
    raw_rows, default_rows = raw.fit_transform(documents), default.fit_transform(documents)
    for i, (a, b) in enumerate(spans):
        mine, columns = ours[a:b][judged[a:b]], [raw.vocabulary_[t] for t in documents[i]]
        np.testing.assert_allclose(mine, raw_rows[[i]].toarray()[0, columns], rtol=1e-6)
        ratio = mine / default_rows[[i]].toarray()[0, columns]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)  # one factor a document: the same ranks


def test_on_lima_the_important_share_is_somewhat_above_one_minus_eta(lima):
    mask = lima.loss_mask
    for eta in (0.5, 0.9):
        share = groups("tfidf", lima, eta)[mask].mean()
        assert 1 - eta - 0.01 < share < 1 - eta + 0.2
    assert abs(groups("random", lima, 0.9)[mask].mean() - 0.1) < 0.003
