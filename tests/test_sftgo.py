"""sftgo.py: the objective against loops over Python floats, `token_nll` against full logits, and a table of objectives that are wrong.

A *step* here is a list of micro-batches (nll, group, loss_mask); an *objective* is a function (step, lam, worst="max") -> loss.
Every property of the objective is a plain function of one, so that the same property meets the real objective, which must keep it,
and each saboteur, which must be caught. To see what another idea changes, put it into SABOTEURS and read which properties it breaks.
"""

import functools
import math
import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftgo import group_sums, lam_at, sft_go, sft_go_loss, token_nll

pytestmark = pytest.mark.fast


def step_loss(sums=group_sums, loss=sft_go):
    """The objective as a trainer computes it: add up the sums of the micro-batches, then ask for the loss."""
    return lambda step, lam, worst="max": loss(*map(sum, zip(*(sums(*batch) for batch in step))), lam, worst)


def whole(step):
    return [torch.cat([x.flatten() for x in column]) for column in zip(*step)]


REAL = {"group_sums, sft_go": step_loss(), "sft_go_loss": lambda step, lam, worst="max": sft_go_loss(*whole(step), lam, worst)[0]}


def steps():
    """40 of (step, lam, worst): (T,) or (B, T), labels bool or int, often without one group, sometimes with a micro-batch of prompt only.

    Half of the nats are negative, which no cross-entropy is: it shows an empty group's 0.0 that takes part in the max.
    """
    for seed in range(40):
        pick, generator, step = random.Random(seed), torch.Generator().manual_seed(seed), []
        supervised, important, labels = pick.choice([0.2, 0.7, 1]), pick.choice([0, 0.1, 0.5, 0.9, 1]), pick.choice([torch.bool, torch.int])
        for shape in pick.choices([(9,), (1, 6), (3, 5), (4, 1)], k=pick.randint(1, 3)):
            nll = torch.randn(shape, generator=generator, dtype=torch.float64) + pick.choice([-1, 1])
            group, mask = (torch.rand(shape, generator=generator) < share for share in (important, supervised))
            step.append((nll, group.to(labels), mask))
        step[0][2].view(-1)[0] = True  # a step without any supervised token is an error
        yield step, pick.choice([0.0, 0.25, 0.9, 1.0, pick.random()]), pick.choice(["max", "important"])


def by_hand(step, lam, worst):
    """Eq. 1-4 as a loop over Python floats: the loss, and its gradient with respect to every token."""
    nats, tokens = [0.0, 0.0], [0, 0]
    positions = [p for batch in step for p in zip(*(x.flatten().tolist() for x in batch))]
    for nll, group, supervised in positions:
        if supervised:
            nats[group] += nll
            tokens[group] += 1
    mean = {k: nats[k] / tokens[k] for k in (0, 1) if tokens[k]}  # an empty group is never the worst
    worst_group = 1 if worst == "important" and 1 in mean else max(mean, key=lambda k: (mean[k], k))  # a tie goes to group 1
    loss = (1 - lam) * sum(nats) / sum(tokens) + lam * mean[worst_group]
    price = [(1 - lam) / sum(tokens) + lam / tokens[k] * (k == worst_group) if k in mean else None for k in (0, 1)]
    return loss, [price[group] if supervised else 0.0 for _, group, supervised in positions]


def gradients(objective, step, lam, worst="max"):
    leaves = [nll.clone().requires_grad_() for nll, _, _ in step]
    loss = objective([(leaf, group, mask) for leaf, (_, group, mask) in zip(leaves, step)], lam, worst)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, materialize_grads=True)])  # (positions of the step,)


def near(a, b):
    return bool((torch.as_tensor(a) - torch.as_tensor(b, dtype=torch.float64)).abs().max() < 1e-12)  # False for nan


# The properties of the objective.


def value(objective):
    """The loss is what a loop over the tokens gives."""
    for step, lam, worst in steps():
        assert near(objective(step, lam, worst), by_hand(step, lam, worst)[0]), (lam, worst)


def gradient(objective):
    """A token's gradient is (1 - lam) / N, plus lam / N_worst if it is in the worst group, and 0 outside the mask."""
    for step, lam, worst in steps():
        assert near(gradients(objective, step, lam, worst), by_hand(step, lam, worst)[1]), (lam, worst)


def ce(objective):
    """At lam = 0 the loss is token-mean cross-entropy."""
    for step, _, worst in steps():
        nll, group, mask = whole(step)
        logits, targets = nll[:, None] * torch.arange(7), torch.arange(len(nll)) % 7
        step = [(cross_entropy(logits, targets, reduction="none"), group, mask)]
        assert near(objective(step, 0.0, worst), cross_entropy(logits[mask], targets[mask]))


def rises(objective):
    """The loss is never below cross-entropy, and never falls as lam grows."""
    for step, _, _ in steps():
        nll, _, mask = whole(step)
        losses = torch.stack([nll[mask].mean(), *(objective(step, lam) for lam in (0, 0.1, 0.5, 0.9, 1))])
        assert (losses.diff() > -1e-12).all(), "below cross-entropy, or falling"


def swap(objective):
    """Which group is called important does not matter."""
    for step, lam, _ in steps():
        assert near(objective([(nll, 1 - group.int(), mask) for nll, group, mask in step], lam), objective(step, lam))


def prompt(objective):
    """Whatever stands outside the mask, nan included, changes nothing and gets a gradient of exactly 0."""
    for step, lam, worst in steps():
        noise = [(nll.where(mask, math.nan), group.int().where(mask, 1), mask) for nll, group, mask in step]
        assert near(objective(noise, lam, worst), objective(step, lam, worst))
        assert (gradients(objective, noise, lam, worst)[~whole(step)[2]] == 0).all()


def empty(objective):
    """With one group empty, either of them, the loss is cross-entropy."""
    for step, lam, worst in steps():
        nll, _, mask = whole(step)
        for everyone in (0, 1):
            one_group = [(nll, torch.full_like(mask, everyone), mask) for nll, _, mask in step]
            assert near(objective(one_group, lam, worst), nll[mask].mean())


def cut(objective):
    """The loss does not depend on how the step is cut into micro-batches."""
    for step, lam, worst in steps():
        assert near(objective(step, lam, worst), objective([whole(step)], lam, worst))


def tie(objective):
    """At equal means the unimportant group pays nothing for being the worst."""
    nll, group = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0, 9.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    assert near(gradients(objective, [(nll, group, nll < 9)], lam=0.25)[:3], 0.75 / 5)


PROPERTIES = [value, gradient, ce, rises, swap, prompt, empty, cut, tie]


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda p: p.__name__)
def test_the_objective_has_the_property(holds, real):
    holds(REAL[real])


# The same properties against objectives that are wrong, each in one way.


def other_worst(worst_mean):
    """The objective with another Eq. 4, made from the means of those groups that have tokens."""

    def loss(nats, tokens, lam, worst):
        if worst == "important":
            return sft_go(nats, tokens, lam, worst)
        return (1 - lam) * nats.sum() / tokens.sum() + lam * worst_mean(nats[tokens > 0] / tokens[tokens > 0])

    return step_loss(loss=loss)


def mean_of_micro_batches(step, lam, worst="max"):
    return torch.stack([sft_go_loss(*batch, lam, worst)[0] for batch in step if batch[2].any()]).mean()


def over_all_positions(step, lam, worst="max"):
    return step_loss()(step, lam, worst) * whole(step)[2].double().mean()


SABOTEURS = {  # what is wrong: (the objective, the properties that notice, and no others)
    "max is min": (other_worst(lambda means: means.min()), "value gradient rises tie"),
    "max is mean": (other_worst(lambda means: means.mean()), "value gradient rises tie"),
    "max is the important": (step_loss(loss=lambda n, t, lam, _: sft_go(n, t, lam, "important")), "value gradient rises swap"),
    "important is max": (step_loss(loss=lambda n, t, lam, _: sft_go(n, t, lam)), "value gradient"),
    "lam is 1 - lam": (step_loss(loss=lambda n, t, lam, worst: sft_go(n, t, 1 - lam, worst)), "value gradient ce rises tie"),
    "prompt leaks in": (step_loss(lambda nll, g, mask: group_sums(nll, g, mask | True)), "value gradient ce rises prompt empty tie"),
    "nan leaks in": (step_loss(lambda nll, group, mask: group_sums(nll + 0 * nll.sum(), group, mask)), "prompt"),
    "divided by B * T": (over_all_positions, "value gradient ce rises empty tie"),
    "mean of means": (mean_of_micro_batches, "value gradient rises empty cut"),
    "worst is detached": (other_worst(lambda means: means.max().detach()), "gradient"),
    "tie is split": (other_worst(lambda means: means.max()), "tie"),
}


def missing(objective):
    for holds in PROPERTIES:
        try:
            holds(objective)
        except AssertionError:
            yield holds.__name__


@pytest.mark.parametrize("wrong", SABOTEURS)
def test_a_wrong_objective_is_noticed_where_the_table_says(wrong):
    objective, noticed_by = SABOTEURS[wrong]
    assert " ".join(missing(objective)) == noticed_by


def test_no_property_is_idle():
    assert {p.__name__ for p in PROPERTIES} == set(" ".join(noticed_by for _, noticed_by in SABOTEURS.values()).split())


@pytest.mark.parametrize(
    "nats, tokens, worst, prices",
    [
        ((6.0, 2.0), (3, 1), "max", (0.75 / 4, 0.75 / 4 + 0.25)),  # an exact tie goes to the important group
        ((6.0, 0.0), (4, 0), "max", (0.25, 0.75 / 4)),  # an empty group's price is finite: the trainer multiplies 0 nats by it
        ((0.0, 6.0), (0, 4), "max", (0.75 / 4, 0.25)),
        ((6.0, 0.0), (4, 0), "important", (0.25, 0.75 / 4)),
    ],
)
def test_the_price_of_a_nat_at_a_tie_and_beside_an_empty_group(nats, tokens, worst, prices):
    nats = torch.tensor(nats, requires_grad=True)
    sft_go(nats, torch.tensor(tokens), 0.25, worst).backward()
    assert nats.grad.tolist() == list(prices)


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
    assert [stats[k].item() for k in ("ce", "important", "unimportant", "important_tokens", "unimportant_tokens")] == [3, 3.5, 2, 2, 1]
    assert loss.item() == 0.5 * 3.0 + 0.5 * 3.5 and not any(v.requires_grad for v in stats.values())
    assert sft_go_loss(nll, group, group, lam=0.5)[1]["unimportant"].isnan()


def test_lam_falls_in_a_line_from_lam_max_and_stops_at_lam_min():
    assert [lam_at(step, 8, 1.0, 0.25) for step in (0, 1, 4, 6, 7)] == [1.0, 0.875, 0.5, 0.25, 0.25]
    assert lam_at(0, 10, 0.9, 0.01) == 0.9
    assert math.isclose(lam_at(5, 10, 0.9, 0.01), 0.45) and math.isclose(lam_at(9, 10, 0.9, 0.01), 0.09)
    assert lam_at(9, 10, 0.9, 0.1) == 0.1
    assert {lam_at(step, 10, 0.9, 0.9) for step in range(10)} == {0.9}, "static if equal"


ROW, ALL = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)
MISTAKES = {
    "a step without a supervised token": ("no supervised token", lambda: sft_go_loss(ROW, ALL, ~ALL, 0.5)),
    "lam above 1": (r"lam is 1.5, expected a weight in \[0, 1\]", lambda: sft_go_loss(ROW, ALL, ALL, 1.5)),
    "lam below 0": ("lam is -0.1", lambda: sft_go_loss(ROW, ALL, ALL, -0.1)),
    "lam is nan": ("lam is nan", lambda: sft_go_loss(ROW, ALL, ALL, math.nan)),
    "unknown worst": ("'mean', expected 'max' or 'important'", lambda: sft_go_loss(ROW, ALL, ALL, 0.5, "mean")),
    "a mask of input ids": (r"\(2, 4\), group \(2, 4\), loss_mask \(2, 5\).*first column", lambda: group_sums(ROW, ALL, torch.ones(2, 5))),
    "a group of input ids": (r"group \(2, 5\).*first column", lambda: group_sums(ROW, torch.ones(2, 5), ALL)),
    "shapes that would broadcast": (r"group \(4,\), loss_mask \(2, 4\)", lambda: group_sums(ROW, ALL[0], ALL)),
    "a mask of ones and zeros": ("torch.int64, expected torch.bool", lambda: group_sums(ROW, ALL, ALL.long())),
    "lam_min above lam_max": ("lam_min 0.9 and lam_max 0.1", lambda: lam_at(0, 10, 0.1, 0.9)),
    "lam_max above 1": ("lam_max 1.5", lambda: lam_at(0, 10, 1.5, 0.1)),
    "lam_min below 0": ("lam_min -0.1", lambda: lam_at(0, 10, 0.9, -0.1)),
    "hidden states with a batch axis": (r"expected \(N, D\)", lambda: token_nll(ROW[None], ROW, torch.zeros(1, 2).long())),
    "targets not shifted": (r"targets \(3,\)", lambda: token_nll(ROW, ROW, torch.zeros(3).long())),
    "another model's head": (r"lm_head_weight \(2, 3\)", lambda: token_nll(ROW, ROW[:, 1:], torch.zeros(2).long())),
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
    upstream = torch.randn(N, generator=generator) * (torch.rand(N, generator=generator) < 0.7)  # 0 where the prompt would be
    return hidden, weight, torch.randint(V, (N,), generator=generator), upstream


def nll_and_gradients(f, hidden, weight, targets, upstream):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = f(hidden, weight, targets)
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), upstream)


@pytest.mark.parametrize("N, chunk", [(0, 4), (1, 1), (1, 4), (37, 1), (37, 5), (37, 36), (37, 37), (37, 1024), (40, 8)])
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
    *_, grad = nll_and_gradients(functools.partial(token_nll, chunk=1), one, zero, torch.zeros(600).long(), torch.ones(600))
    assert grad.tolist() == [[-300], [300]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_exact(dtype):
    nll, hidden_grad, weight_grad = nll_and_gradients(
        token_nll, torch.full((2, 1), 2.0**13, dtype=dtype), torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), torch.ones(2)
    )
    assert nll.tolist() == [0, 2**14] and hidden_grad.tolist() == [[0], [2]] and weight_grad.tolist() == [[2**13], [-(2**13)]]

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
    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        nll = f(hidden, weight, targets)
    with Largest() as backward:
        nll.sum().backward()
    return forward.numel, max(saved), backward.numel


def test_no_more_than_one_chunk_of_logits_ever_exists():
    N, V, D, chunk = 96, 50, 4, 8
    *inputs, _ = problem(N, V, D)
    assert elements(full_nll, *inputs) == (N * V, N * V, N * V), "the watchers must see full logits where there are some"
    assert elements(functools.partial(token_nll, chunk=chunk), *inputs) == (chunk * V, N * D, chunk * V)
