"""SFT-GO (Kim et al., arXiv 2506.15021): Eq. 1-5 and the token cross-entropy that they use. Imports only torch.

    paper                     here
    w in s                    one supervised token of a sample: a position where `loss_mask` is True
    g(w, s) in {1, 0}  Eq. 1  `group`: the grouper's label of that token, 1 important and 0 unimportant
    G1, G0             Eq. 2  entries 1 and 0 of `nats` (a group's summed loss) and `tokens` (its token count), (K,)
    L_GO, L_worst    Eq. 3-4  `sft_go`
    lambda_t           Eq. 5  `lam_at`

An objective needs two numbers of each group: the sum of its token losses (`nats`) and its token count (`tokens`). Sums
can be added over micro-batches and ranks; means and maxima cannot. An objective is therefore a function of (nats,
tokens), and its gradient is exact for any split of the batch into micro-batches and ranks.

N target positions, V vocabulary, D model width, K groups (the paper has two).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def group_sums(nll: Tensor, group: Tensor, loss_mask: Tensor, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Nats and tokens of each group (Eq. 2).

    Args:
        nll:       (...) float, nats per token, carries the gradient.
        group:     (...) bool or int, the group of each token, 0 ... K - 1; read only where `loss_mask` is True.
        loss_mask: (...) bool, True on the tokens that are trained on.
        groups:    K.

    Returns:
        nats, tokens: (K,) each. Outside `loss_mask` the gradient is exactly zero, even where nll is nan.
    """
    if not nll.shape == group.shape == loss_mask.shape or loss_mask.dtype != torch.bool:
        raise ValueError(
            f"nll {tuple(nll.shape)}, group {tuple(group.shape)}, loss_mask {tuple(loss_mask.shape)} {loss_mask.dtype}:"
            " expected one shape and a bool mask. Tensors aligned with input_ids must be shifted first: pass x[:, 1:]"
        )
    member = torch.stack([(group == k) & loss_mask for k in range(groups)]).flatten(1)  # (K, N)
    nats, tokens = torch.where(member, nll.flatten(), 0.0).sum(1), member.sum(1)  # (K,), (K,)
    if not nll.is_cuda and tokens.sum() != loss_mask.sum():  # CPU only: on a GPU this test would force a sync
        raise ValueError(f"group has labels outside 0 ... {groups - 1}: there are {groups} groups")
    return nats, tokens


# Objectives: (nats (K,), tokens (K,), λ of the step) -> loss, () nats per token. Add one by --objective FILE.py:NAME.
# It may be called any number of times in a step. An objective may also have (`examples/` has one of each):
#   constant_price(λ)     True where ∂loss / ∂nats is 1 / (all tokens) in every group, whatever the losses.
#   weigh(nll, batch)     (T,) weights of the tokens, 0 or above: nats becomes Σ weight · nll, tokens stay a count.
#   update(nats, tokens)  called once after each optimizer step, with the step's sums; the state that it changes is
#                         saved and loaded by state_dict() and load_state_dict(state).


def cross_entropy(nats: Tensor, tokens: Tensor, lam: float = 0.0) -> Tensor:
    """Standard supervised fine-tuning: the mean over all tokens. Groups change only the logged means (Fig. 1b)."""
    return nats.sum() / tokens.sum()


def sft_go(nats: Tensor, tokens: Tensor, lam: float) -> Tensor:
    """(1 - lam) · mean over all tokens + lam · largest group mean."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}, expected a weight in [0, 1]")
    means = torch.where(tokens > 0, nats / tokens.clamp(min=1), -torch.inf)  # (K,); an empty group is never the worst
    worst = means.flip(0).max(0).values  # (); on a tie the last (important) group gets the whole gradient
    return (1 - lam) * cross_entropy(nats, tokens) + lam * worst  # Eq. 3-4


def important_only(nats: Tensor, tokens: Tensor, lam: float = 0.0) -> Tensor:
    """The paper's Rho-1 baseline: the mean over the important tokens, or over all tokens if none is important."""
    return torch.where(tokens[-1] > 0, nats[-1] / tokens[-1].clamp(min=1), cross_entropy(nats, tokens))


cross_entropy.constant_price = lambda lam: True
sft_go.constant_price = lambda lam: lam == 0
OBJECTIVES = {f.__name__: f for f in (sft_go, cross_entropy, important_only)}


def price(objective, nats: Tensor, tokens: Tensor) -> Tensor:
    """∂ loss / ∂ nats, (K,) float64: the weight of each group's summed loss in the step's gradient."""
    nats = nats.detach().double().requires_grad_()
    loss = objective(nats, tokens)
    prices = torch.autograd.grad(loss, nats, allow_unused=True)[0]
    if prices is None:
        raise ValueError("the objective's loss carries no gradient of nats: nothing would be trained")
    return prices


def lam_at(step: int, total_steps: int, lam_max: float, lam_min: float) -> float:
    """λ after `step` finished steps, 0 ... total_steps - 1; constant if lam_max == lam_min (Eq. 5)."""
    if not 0 <= lam_min <= lam_max <= 1:
        raise ValueError(f"lam_min {lam_min} and lam_max {lam_max}: expected 0 <= lam_min <= lam_max <= 1")
    return max(lam_max * (1 - step / total_steps), lam_min)


def sft_go_loss(nll: Tensor, important: Tensor, loss_mask: Tensor, lam: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1-4 for one whole batch on one device, for use in another trainer. Arguments as in `group_sums`.

    Returns the loss, () nats per token, and stats, detached: ce, important, unimportant (means, nan for an empty group)
    and the two token counts.
    """
    nats, tokens = group_sums(nll, important, loss_mask)
    if not tokens.any():
        raise ValueError("no supervised token in the step: its mean cross-entropy is undefined")
    unimportant_mean, important_mean = (nats / tokens).detach()
    stats = {"ce": cross_entropy(nats, tokens).detach(), "important": important_mean, "unimportant": unimportant_mean}
    return sft_go(nats, tokens, lam), stats | {"important_tokens": tokens[1], "unimportant_tokens": tokens[0]}


def token_nll(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Cross-entropy of each target, -log p(target | hidden), without storing the full (N, V) logits.

    Args:
        hidden:         (N, D) float, the model's last hidden states.
        lm_head_weight: (V, D) float, cast to hidden's dtype at use.
        targets:        (N,) int64.
        chunk:          rows of logits in memory at once; None: 4,096 on a GPU, 512 on a CPU.

    Returns (N,) float32 nats. Forward saves one log-sum-exp per row; backward computes each chunk of logits again.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or lm_head_weight.shape[1:] != hidden.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, lm_head_weight, targets))
        raise ValueError(f"hidden, lm_head_weight, targets are {shapes}: expected (N, D), (V, D) and (N,)")
    chunk = chunk or (4096 if hidden.is_cuda else 512)
    return _TokenNLL.apply(hidden, lm_head_weight, targets, chunk)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        lse = hidden.new_empty(len(hidden), dtype=torch.float32)  # (N,)
        target_logit = torch.empty_like(lse)  # (N,)
        head = weight.to(hidden.dtype)  # (V, D)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ head.T  # (chunk, V)
            target_logit[rows] = logits.gather(1, targets[rows, None]).squeeze(1)
            highest = logits.amax(1, keepdim=True).float()  # (chunk, 1)
            lse[rows] = (logits - highest).exp_().sum(1).log() + highest.squeeze(1)  # float32 from the subtraction on
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk = chunk
        return lse - target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        head, grad_hidden = weight.to(hidden.dtype), torch.empty_like(hidden)  # (V, D), (N, D)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # (V, D), summed over all chunks
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = hidden[rows] @ head.T  # (chunk, V)
            grad = (logits - lse[rows, None]).exp_()  # softmax, (chunk, V) float32
            grad.scatter_add_(1, targets[rows, None], -torch.ones_like(grad[:, :1]))  # minus one-hot
            grad = torch.mul(grad, grad_nll[rows, None], out=logits)  # d loss / d logits
            grad_hidden[rows] = grad @ head
            grad_weight += grad.T @ hidden[rows]
            del logits, grad  # before the next chunk's are made
        return grad_hidden, grad_weight.to(weight.dtype), None, None
