"""sftgo.py: objectives against loops over Python floats, `token_nll` against full logits, and what is wrong, caught.

A *step* here is a list of micro-batches (nll, group, loss_mask); an *objective* is a function (step, lam, K) -> loss,
of K groups. Every property of SFT-GO is a plain function of one: the real objective must have it, and each saboteur
must lack some. To see what another idea changes, put it into SABOTEURS and read which properties it breaks.
"""

import functools
import math
import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sftgo
from sftgo import group_sums, important_only, lam_at, sft_go, sft_go_loss, token_nll

pytestmark = pytest.mark.fast


def step_loss(sums=group_sums, loss=sft_go):
    """The objective as a trainer computes it: add up the sums of the micro-batches, then ask for the loss."""
    return lambda step, lam, K=2: loss(*map(sum, zip(*(sums(*batch, K) for batch in step))), lam)


def whole(step):
    return [torch.cat([x.flatten() for x in column]) for column in zip(*step)]


REAL = {  # name: (the objective, how many groups)
    "group_sums, sft_go": (step_loss(), 2),
    "group_sums, sft_go, three groups": (step_loss(), 3),
    "sft_go_loss": (lambda step, lam, K: sft_go_loss(*whole(step), lam)[0], 2),
}


@functools.cache
def steps(K):
    """40 of (step, lam): (T,) or (B, T), often without one of the groups, sometimes with a micro-batch of prompt only.

    Two groups are bool or int. Half of the nats are negative, which no cross-entropy is: it shows an empty group's 0.0
    that takes part in the max.
    """
    out = []
    for seed in range(40):
        pick, generator, step = random.Random(seed), torch.Generator().manual_seed(seed), []
        supervised, important = pick.choice([0.2, 0.7, 1]), pick.choice([0, 0.1, 0.5, 0.9, 1])
        labels = pick.choice([torch.bool, torch.int]) if K == 2 else torch.int
        for shape in pick.choices([(9,), (1, 6), (3, 5), (4, 1)], k=pick.randint(1, 3)):
            nll = torch.randn(shape, generator=generator, dtype=torch.float64) + pick.choice([-1, 1])
            group, mask = (torch.rand(shape, generator=generator) < share for share in (important, supervised))
            step.append((nll, (group * torch.randint(1, K, shape, generator=generator)).to(labels), mask))
        step[0][2].view(-1)[0] = True  # a step without any supervised token is an error
        out.append((step, pick.choice([0.0, 0.25, 0.9, 1.0, pick.random()])))
    return out


def add_up(step, K):
    """Nats and tokens of each group by a loop, and the group of every position, None outside the mask."""
    nats, tokens, groups = [0.0] * K, [0] * K, []
    for nll, group, supervised in [p for batch in step for p in zip(*(x.flatten().tolist() for x in batch))]:
        groups.append(int(group) if supervised else None)
        if supervised:
            nats[group] += nll
            tokens[group] += 1
    return nats, tokens, groups


def by_hand(step, lam, K):
    """Eq. 1-4: the loss, and its gradient with respect to every token."""
    nats, tokens, groups = add_up(step, K)
    mean = {k: nats[k] / tokens[k] for k in range(K) if tokens[k]}  # an empty group is never the worst
    worst = max(mean, key=lambda k: (mean[k], k))  # a tie goes to the higher group
    loss = (1 - lam) * sum(nats) / sum(tokens) + lam * mean[worst]
    price = {k: (1 - lam) / sum(tokens) + lam / tokens[k] * (k == worst) for k in mean} | {None: 0.0}
    return loss, [price[k] for k in groups]


def gradients(objective, step, lam, K):
    """(positions of the step,)"""
    leaves = [nll.clone().requires_grad_() for nll, _, _ in step]
    loss = objective([(leaf, group, mask) for leaf, (_, group, mask) in zip(leaves, step)], lam, K)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, materialize_grads=True)])


def near(a, b):
    return bool((torch.as_tensor(a) - torch.as_tensor(b, dtype=torch.float64)).abs().max() < 1e-12)  # False for nan


# The properties of the objective.


def value(objective, K):
    """The loss is what a loop over the tokens gives."""
    for step, lam in steps(K):
        assert near(objective(step, lam, K), by_hand(step, lam, K)[0]), lam


def gradient(objective, K):
    """A token's gradient is (1 - lam) / N, plus lam / N_worst if it is in the worst group, and 0 outside the mask."""
    for step, lam in steps(K):
        assert near(gradients(objective, step, lam, K), by_hand(step, lam, K)[1]), lam


def ce(objective, K):
    """At lam = 0 the loss is token-mean cross-entropy."""
    for step, _ in steps(K):
        nll, group, mask = whole(step)
        logits, targets = nll[:, None] * torch.arange(7), torch.arange(len(nll)) % 7
        step = [(cross_entropy(logits, targets, reduction="none"), group, mask)]
        assert near(objective(step, 0.0, K), cross_entropy(logits[mask], targets[mask]))


def rises(objective, K):
    """The loss is never below cross-entropy, and never falls as lam grows."""
    for step, _ in steps(K):
        nll, _, mask = whole(step)
        losses = torch.stack([nll[mask].mean(), *(objective(step, lam, K) for lam in (0, 0.1, 0.5, 0.9, 1))])
        assert (losses.diff() > -1e-12).all(), "below cross-entropy, or falling"


def swap(objective, K):
    """Which group is called important does not matter."""
    for step, lam in steps(K):
        swapped = [(nll, K - 1 - group.int(), mask) for nll, group, mask in step]
        assert near(objective(swapped, lam, K), objective(step, lam, K))


def prompt(objective, K):
    """Whatever stands outside the mask, nan included, changes nothing and gets a gradient of exactly 0."""
    for step, lam in steps(K):
        noise = [(nll.where(mask, math.nan), group.int().where(mask, 1), mask) for nll, group, mask in step]
        assert near(objective(noise, lam, K), objective(step, lam, K))
        assert (gradients(objective, noise, lam, K)[~whole(step)[2]] == 0).all()


def empty(objective, K):
    """With all tokens in one group, any of them, the loss is cross-entropy."""
    for step, lam in steps(K):
        nll, _, mask = whole(step)
        for everyone in range(K):
            one_group = [(nll, torch.full_like(mask, everyone, dtype=torch.int), mask) for nll, _, mask in step]
            assert near(objective(one_group, lam, K), nll[mask].mean())


def cut(objective, K):
    """The loss does not depend on how the step is cut into micro-batches."""
    for step, lam in steps(K):
        assert near(objective(step, lam, K), objective([whole(step)], lam, K))


def tie(objective, K):
    """At equal means the lower groups pay nothing for being the worst."""
    nll, group = torch.tensor([1.0, 3.0] * K + [9.0], dtype=torch.float64), torch.arange(2 * K + 1) // 2
    prices = gradients(objective, [(nll, group, nll < 9)], 0.25, K)
    assert near(prices[: 2 * K - 2], 0.75 / (2 * K))


PROPERTIES = [value, gradient, ce, rises, swap, prompt, empty, cut, tie]


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda p: p.__name__)
def test_the_objective_has_the_property(holds, real):
    holds(*REAL[real])


# The same properties against objectives that are wrong, each in one way.


def other_worst(worst_mean):
    """The objective with another Eq. 4, made from the means of those groups that have tokens."""

    def loss(nats, tokens, lam):
        return (1 - lam) * nats.sum() / tokens.sum() + lam * worst_mean(nats[tokens > 0] / tokens[tokens > 0])

    return step_loss(loss=loss)


def always_important(nats, tokens, lam):
    return (1 - lam) * sftgo.cross_entropy(nats, tokens) + lam * important_only(nats, tokens)


def mean_of_micro_batches(step, lam, K):
    return torch.stack([step_loss()([batch], lam, K) for batch in step if batch[2].any()]).mean()


def over_all_positions(step, lam, K):
    return step_loss()(step, lam, K) * whole(step)[2].double().mean()


SABOTEURS = {  # what is wrong: (the objective, the properties that notice, and no others)
    "max is min": (other_worst(lambda means: means.min()), "value gradient rises tie"),
    "max is mean": (other_worst(lambda means: means.mean()), "value gradient rises tie"),
    "max is the important": (step_loss(loss=always_important), "value gradient rises swap"),
    "lam is 1 - lam": (step_loss(loss=lambda n, t, lam: sft_go(n, t, 1 - lam)), "value gradient ce rises tie"),
    "prompt leaks in": (
        step_loss(lambda nll, group, mask, K: group_sums(nll, group % K, mask | True, K)),
        "value gradient ce rises prompt empty tie",
    ),
    "nan leaks in": (step_loss(lambda nll, group, mask, K: group_sums(nll + 0 * nll.sum(), group, mask, K)), "prompt"),
    "divided by B * T": (over_all_positions, "value gradient ce rises empty tie"),
    "mean of means": (mean_of_micro_batches, "value gradient rises empty cut"),
    "worst is detached": (other_worst(lambda means: means.max().detach()), "gradient"),
    "tie is split": (other_worst(lambda means: means.max()), "tie"),
}


def missing(objective, K):
    for holds in PROPERTIES:
        try:
            holds(objective, K)
        except AssertionError:
            yield holds.__name__


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("wrong", SABOTEURS)
def test_a_wrong_objective_is_noticed_where_the_table_says(wrong, K):
    objective, noticed_by = SABOTEURS[wrong]
    assert " ".join(missing(objective, K)) == noticed_by


def test_no_property_is_idle():
    assert {p.__name__ for p in PROPERTIES} == set(" ".join(noticed_by for _, noticed_by in SABOTEURS.values()).split())


CE = 0.75 / 4  # four tokens at lam = 0.25


@pytest.mark.parametrize(
    "nats, tokens, prices",
    [
        ((6.0, 2.0), (3, 1), (CE, CE + 0.25)),  # an exact tie goes to the important group
        ((6.0, 0.0), (4, 0), (0.25, CE)),  # an empty group's price is finite: the trainer multiplies 0 nats by it
        ((0.0, 6.0), (0, 4), (CE, 0.25)),
        ((4.0, 2.0, 2.0), (2, 1, 1), (CE, CE, CE + 0.25)),
        ((4.0, 2.0, 1.0), (2, 1, 1), (CE, CE + 0.25, CE)),
        ((-4.0, 0.0, -4.0), (2, 0, 2), (CE, CE, CE + 0.125)),
    ],
)
def test_the_price_of_a_nat_at_a_tie_and_beside_an_empty_group(nats, tokens, prices):
    nats = torch.tensor(nats, requires_grad=True)
    sft_go(nats, torch.tensor(tokens), 0.25).backward()
    assert nats.grad.tolist() == list(prices)


# The other objectives.


@pytest.mark.parametrize("K", [2, 3])
def test_important_only_is_the_mean_of_the_last_group_and_cross_entropy_where_it_is_empty(K):
    with_tokens = without = 0
    for step, lam in steps(K):
        nats, tokens, groups = add_up(step, K)
        trained = {K - 1} if tokens[-1] else {*range(K)}
        n = sum(tokens[k] for k in trained)
        objective = step_loss(loss=important_only)
        assert near(objective(step, lam, K), sum(nats[k] for k in trained) / n)
        assert near(gradients(objective, step, lam, K), [1 / n if k in trained else 0.0 for k in groups])
        with_tokens, without = with_tokens + (tokens[-1] > 0), without + (tokens[-1] == 0)
    assert with_tokens > 5 and without > 5


@pytest.mark.parametrize("K", [2, 3])
def test_cross_entropy_sees_neither_groups_nor_lam(K):
    for step, lam in steps(K):
        nll, _, mask = whole(step)
        assert near(step_loss(loss=sftgo.cross_entropy)(step, lam, K), nll[mask].mean())


@pytest.mark.parametrize("objective", [sftgo.cross_entropy, sft_go, important_only])
def test_an_objective_says_its_price_is_constant_exactly_where_a_nat_costs_one_over_the_tokens(objective):
    said = getattr(objective, "constant_price", lambda lam: False)
    for lam in (0.0, 0.01, 0.5, 1.0):
        nats, tokens = torch.tensor([3.0, 1.0, 2.5], requires_grad=True), torch.tensor([3, 4, 1])
        objective(nats, tokens, lam).backward()
        assert said(lam) == torch.allclose(nats.grad, torch.tensor(1 / 8))


def test_group_sums_counts_any_number_of_groups_in_any_shape_and_ignores_labels_outside_the_mask():
    nll = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    group = torch.tensor([[0, 2, 2], [1, 2, -9]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    for shape in ((2, 3), (6,), (3, 1, 2)):
        nats, tokens = group_sums(nll.view(shape), group.view(shape), mask.view(shape), groups=3)
        assert nats.tolist() == [1, 8, 18] and tokens.tolist() == [1, 1, 2]
        assert nats.dtype == torch.float32 and tokens.dtype == torch.int64


def test_the_stats_are_means_without_a_graph_and_an_empty_group_has_none():
    nll, group = torch.tensor([1.0, 2.0, 6.0, 9.0], requires_grad=True), torch.tensor([True, False, True, False])
    loss, stats = sft_go_loss(nll, group, nll < 9, lam=0.5)
    expected = {"ce": 3, "important": 3.5, "unimportant": 2, "important_tokens": 2, "unimportant_tokens": 1}
    assert {name: x.item() for name, x in stats.items()} == expected
    assert loss.item() == 0.5 * 3.0 + 0.5 * 3.5 and not any(x.requires_grad for x in stats.values())
    assert sft_go_loss(nll, group, group, lam=0.5)[1]["unimportant"].isnan()


def test_lam_falls_in_a_line_from_lam_max_and_stops_at_lam_min():
    assert [lam_at(step, 8, 1.0, 0.25) for step in (0, 1, 4, 6, 7)] == [1.0, 0.875, 0.5, 0.25, 0.25]
    assert lam_at(0, 10, 0.9, 0.01) == 0.9
    assert math.isclose(lam_at(5, 10, 0.9, 0.01), 0.45) and math.isclose(lam_at(9, 10, 0.9, 0.01), 0.09)
    assert lam_at(9, 10, 0.9, 0.1) == 0.1
    assert {lam_at(step, 10, 0.9, 0.9) for step in range(10)} == {0.9}, "static if equal"


ROW, ALL, LABELS = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.int)
MISTAKES = {
    "a step without a supervised token": ("no supervised token", lambda: sft_go_loss(ROW, ALL, ~ALL, 0.5)),
    "lam above 1": (r"lam is 1.5, expected a weight in \[0, 1\]", lambda: sft_go_loss(ROW, ALL, ALL, 1.5)),
    "lam below 0": ("lam is -0.1", lambda: sft_go_loss(ROW, ALL, ALL, -0.1)),
    "lam is nan": ("lam is nan", lambda: sft_go_loss(ROW, ALL, ALL, math.nan)),
    "a mask of input ids": (
        r"\(2, 4\), group \(2, 4\), loss_mask \(2, 5\).*shifted first",
        lambda: group_sums(ROW, ALL, torch.ones(2, 5)),
    ),
    "a group of input ids": (r"group \(2, 5\).*shifted first", lambda: group_sums(ROW, torch.ones(2, 5), ALL)),
    "shapes that would broadcast": (r"group \(4,\), loss_mask \(2, 4\)", lambda: group_sums(ROW, ALL[0], ALL)),
    "a mask of ones and zeros": ("torch.int64: .* a bool mask", lambda: group_sums(ROW, ALL, ALL.long())),
    "a label above the last group": ("labels outside 0 ... 1: there are 2", lambda: group_sums(ROW, LABELS + 2, ALL)),
    "a label below 0": ("labels outside 0 ... 2: there are 3", lambda: group_sums(ROW, LABELS - 1, ALL, 3)),
    "scores in place of labels": ("labels outside 0 ... 1", lambda: group_sums(ROW, LABELS + 0.5, ALL)),
    "lam_min above lam_max": ("lam_min 0.9 and lam_max 0.1", lambda: lam_at(0, 10, 0.1, 0.9)),
    "lam_max above 1": ("lam_max 1.5", lambda: lam_at(0, 10, 1.5, 0.1)),
    "lam_min below 0": ("lam_min -0.1", lambda: lam_at(0, 10, 0.9, -0.1)),
    "hidden states with a batch axis": (
        r"expected \(N, D\)",
        lambda: token_nll(ROW[None], ROW, torch.zeros(1, 2).long()),
    ),
    "targets not shifted": (r"\(2, 4\), \(2, 4\), \(3,\)", lambda: token_nll(ROW, ROW, torch.zeros(3).long())),
    "another model's head": (r"\(2, 4\), \(2, 3\)", lambda: token_nll(ROW, ROW[:, 1:], torch.zeros(2).long())),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_value_error_that_says_what_was_found(mistake):
    message, call = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


# token_nll. N rows, V words, D wide.


def full_nll(hidden, weight, targets):
    return cross_entropy(hidden @ weight.T, targets, reduction="none")


def problem(N, V=101, D=16):
    generator = torch.Generator().manual_seed(N)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    upstream = torch.randn(N, generator=generator) * (
        torch.rand(N, generator=generator) < 0.7
    )  # 0 where the prompt would be
    return hidden, weight, torch.randint(V, (N,), generator=generator), upstream


def nll_and_gradients(f, hidden, weight, targets, upstream):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = f(hidden, weight, targets)
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), upstream)


@pytest.mark.parametrize(
    "N, chunk", [(0, 4), (1, 1), (1, 4), (37, 1), (37, 5), (37, 36), (37, 37), (37, 1024), (40, 8)]
)
def test_nll_and_both_gradients_equal_cross_entropy_of_full_logits(N, chunk):
    ours = nll_and_gradients(functools.partial(token_nll, chunk=chunk), *problem(N))
    torch.testing.assert_close(ours, nll_and_gradients(full_nll, *problem(N)), rtol=1e-5, atol=2e-5)


def test_bf16_hidden_states_give_fp32_nats_and_an_fp32_gradient_of_an_fp32_weight():
    hidden, weight, targets, upstream = problem(300)
    full = nll_and_gradients(full_nll, hidden.bfloat16().float(), weight, targets, upstream)
    ours = nll_and_gradients(functools.partial(token_nll, chunk=64), hidden.bfloat16(), weight, targets, upstream)
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.float32]
    assert all((a - b).norm() < 0.01 * b.norm() for a, b in zip(ours, full))

    # Each of 600 chunks adds a half to a sum that bf16 would keep at 128.
    one, zero = torch.ones(600, 1, dtype=torch.bfloat16), torch.zeros(2, 1)
    *_, grad = nll_and_gradients(
        functools.partial(token_nll, chunk=1), one, zero, torch.zeros(600).long(), torch.ones(600)
    )
    assert grad.tolist() == [[-300], [300]]


GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: chunks of its size")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_several_chunks_of_the_usual_size_equal_full_float32_logits(device, dtype, tolerance):
    hidden, *rest = problem(4096 + 700)
    full = nll_and_gradients(full_nll, hidden.to(dtype).float(), *rest)
    ours = nll_and_gradients(token_nll, *(x.to(device) for x in (hidden.to(dtype), *rest)))
    assert all((a.to("cpu") - b).norm() < tolerance * b.norm() for a, b in zip(ours, full))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_exact(dtype):
    nll, hidden_grad, weight_grad = nll_and_gradients(
        token_nll,
        torch.full((2, 1), 2.0**13, dtype=dtype),
        torch.tensor([[1.0], [-1.0]]),
        torch.tensor([0, 1]),
        torch.ones(2),
    )
    assert (
        nll.tolist() == [0, 2**14]
        and hidden_grad.tolist() == [[0], [2]]
        and weight_grad.tolist() == [[2**13], [-(2**13)]]
    )

    hidden, *rest = problem(50)
    assert all(x.isfinite().all() for x in nll_and_gradients(token_nll, (hidden * 1e4).to(dtype), *rest))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation yields."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def elements(f, hidden, weight, targets):
    """The size of the largest tensor of the forward, saved for the backward, and of the backward."""
    hidden, weight, saved = hidden.requires_grad_(), weight.requires_grad_(), []
    with (
        Largest() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        nll = f(hidden, weight, targets)
    with Largest() as backward:
        nll.sum().backward()
    return forward.numel, max(saved), backward.numel


def test_no_more_than_one_chunk_of_logits_ever_exists():
    N, V, D, chunk = 96, 50, 4, 8
    *inputs, _ = problem(N, V, D)
    assert elements(full_nll, *inputs) == (N * V, N * V, N * V), (
        "the watchers must see full logits where there are some"
    )
    assert elements(functools.partial(token_nll, chunk=chunk), *inputs) == (chunk * V, N * D, chunk * V)
