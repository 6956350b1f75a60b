"""SFT-GO (Kim et al., arXiv 2506.15021) as code: Eq. 1-5, and the cross-entropy they are made of.

    paper                     here
    w in s                    one supervised token of a sample: a position where `loss_mask` is True
    g(w, s) in {1, 0}  Eq. 1  `group` / `important`: the grouper's verdict on that token
    G1, G0             Eq. 2  index 1 (important) and index 0 (unimportant) of `nats` and `tokens`
    L_GO               Eq. 3  `sft_go`
    L_worst            Eq. 4  `worst` inside it
    lambda_t           Eq. 5  `lam_at`

The whole method needs two numbers of each group, a sum of nats and a count of tokens. Sums add up over micro-batches
and ranks, means and maxima do not, so everything here is a function of sums. Imports torch only; knows no model and no trainer.

N target positions, V vocabulary, D model width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def group_sums(nll: Tensor, group: Tensor, loss_mask: Tensor, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Nats and tokens of each group (Eq. 2): all that the objective needs to know of a batch.

    Args:
        nll:       (...) float, nats per token, carries the gradient.
        group:     (...) bool or int, 1 important and 0 not; read only where `loss_mask` is True.
        loss_mask: (...) bool, True on the tokens that are trained on.
        groups:    how many groups there are; the paper has two.

    Returns:
        nats, tokens: (groups,) each, nll's dtype and int64.

    A position outside `loss_mask` gets a gradient of exactly zero, whatever stands there, `nan` included.
    """
    if not nll.shape == group.shape == loss_mask.shape:
        raise ValueError(
            f"nll is {tuple(nll.shape)}, group {tuple(group.shape)}, loss_mask {tuple(loss_mask.shape)}: all three are "
            "indexed by target position, so a mask or group made from input ids must drop its first column"
        )
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask is {loss_mask.dtype}, expected torch.bool: True on the tokens that are trained on")
    member = torch.stack([(group == k) & loss_mask for k in range(groups)])  # (groups, ...)
    nats = torch.where(member, nll, 0.0)  # (groups, ...)
    return nats.flatten(1).sum(1), member.flatten(1).sum(1)  # (groups,), (groups,)


def sft_go(nats: Tensor, tokens: Tensor, lam: float, worst: str = "max") -> Tensor:
    """The SFT-GO objective (Eq. 3-4): cross-entropy, pulled towards the worse of two token groups.

        L = (1 - lam) * mean over all tokens  +  lam * max(mean over G0, mean over G1)

    Args:
        nats:   (2,) float, summed nll of the unimportant and the important tokens.
        tokens: (2,) their counts.
        lam:    weight of the worst group, in [0, 1]; 0 is ordinary supervised fine-tuning.
        worst:  "max" is Eq. 4; "important" trains G1 whichever is higher (Rho-1's row of the paper, with lam = 1).

    Returns:
        loss: () nats per token.

    Raises:
        ValueError: lam outside [0, 1], an unknown `worst`, or no supervised token at all.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}, expected a weight in [0, 1]")
    if worst not in ("max", "important"):
        raise ValueError(f"worst is {worst!r}, expected 'max' or 'important'")
    if not tokens.any():
        raise ValueError("no supervised token in the step: its mean cross-entropy is undefined")
    unimportant_mean, important_mean = nats / tokens.clamp(min=1)  # nats per token
    # An empty group is never the worst; a tie goes to the important one, where max's own subgradient would split it.
    higher = (tokens[0] == 0) | (important_mean >= unimportant_mean)
    important_is_worst = (tokens[1] > 0) & (higher | (worst == "important"))
    worst_mean = torch.where(important_is_worst, important_mean, unimportant_mean)
    return (1 - lam) * nats.sum() / tokens.sum() + lam * worst_mean


def lam_at(step: int, total_steps: int, lam_max: float, lam_min: float) -> float:
    """The weight of the worst group after `step` finished steps (0 ... total_steps - 1); constant if lam_max == lam_min (Eq. 5)."""
    if not 0 <= lam_min <= lam_max <= 1:
        raise ValueError(f"lam_min {lam_min} and lam_max {lam_max}: expected 0 <= lam_min <= lam_max <= 1")
    return max(lam_max * (1 - step / total_steps), lam_min)


def sft_go_loss(nll: Tensor, important: Tensor, loss_mask: Tensor, lam: float, worst: str = "max") -> tuple[Tensor, dict]:
    """Eq. 1-4 for one batch held in one place: what to call from another trainer.

    Args:
        nll, important, loss_mask: (...) any one shape, as `group_sums` takes them.
        lam, worst: as `sft_go` takes them.

    Returns:
        loss:  () nats per token, carries the gradient.
        stats: detached tensors `ce`, `important`, `unimportant` (nats per token; nan for an empty group),
               `important_tokens`, `unimportant_tokens`.
    """
    nats, tokens = group_sums(nll, important, loss_mask)
    loss = sft_go(nats, tokens, lam, worst)
    unimportant_mean, important_mean = (nats / tokens).detach()
    stats = {
        "ce": (nats.sum() / tokens.sum()).detach(),
        "important": important_mean,
        "unimportant": unimportant_mean,
        "important_tokens": tokens[1],
        "unimportant_tokens": tokens[0],
    }
    return loss, stats


def token_nll(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Cross-entropy of each target, -log p(target | hidden), without ever holding all (N, V) logits.

    Args:
        hidden:         (N, D) float, the model's last hidden states.
        lm_head_weight: (V, D) float, cast to hidden's dtype at use.
        targets:        (N,) int64.
        chunk:          rows of logits that exist at one time.

    Returns:
        nll: (N,) float32, nats. The softmax runs in float32.

    Forward keeps one number a row, the log-sum-exp; backward makes each chunk's logits again.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or lm_head_weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, lm_head_weight {tuple(lm_head_weight.shape)}, targets {tuple(targets.shape)}: "
            "expected (N, D), (V, D) and (N,)"
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least one row")
    return _TokenNLL.apply(hidden, lm_head_weight, targets, chunk)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        lse = hidden.new_empty(len(hidden), dtype=torch.float32)  # (N,)
        target_logit = torch.empty_like(lse)  # (N,)
        head = weight.to(hidden.dtype).T  # (D, V)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ head).float()  # (chunk, V)
            lse[rows] = logits.logsumexp(1)
            target_logit[rows] = logits.gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk = chunk
        return lse - target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        head = weight.to(hidden.dtype)  # (V, D)
        grad_hidden = torch.empty_like(hidden)  # (N, D)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # (V, D), over all chunks
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = (hidden[rows] @ head.T).float()  # (chunk, V)
            grad = logits.sub_(lse[rows, None]).exp_()  # d nll / d logits = softmax - one-hot
            grad.scatter_add_(1, targets[rows, None], -torch.ones_like(grad[:, :1]))
            grad = grad.mul_(grad_nll[rows, None]).to(hidden.dtype)  # (chunk, V)
            grad_hidden[rows] = grad @ head
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
