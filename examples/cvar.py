"""Conditional value at risk: the mean of the worst ALPHA of all tokens, taken group by group, the worst group first.

    python train.py --objective examples/cvar.py:cvar --grouper loss --eta 0.2 0.4 0.6 0.8

With ALPHA = 1 it is cross-entropy; with an ALPHA below the worst group's share it is `sft_go`.
"""

import torch

ALPHA = 0.3


def cvar(nats, tokens, lam):
    means = torch.where(tokens > 0, nats / tokens.clamp(min=1), -torch.inf)  # (K,)
    order = means.argsort(descending=True)
    before = tokens[order].cumsum(0) - tokens[order]  # tokens of worse groups
    room = (ALPHA * tokens.sum() - before).clamp(min=0)
    taken = torch.zeros_like(means).scatter(0, order, torch.minimum(tokens[order], room).to(means.dtype))  # (K,) tokens
    worst = torch.where(taken > 0, taken * means, 0.0).sum() / taken.sum()
    return (1 - lam) * nats.sum() / tokens.sum() + lam * worst
