"""Every group counts, and a worse one counts more: group means weighted by their softmax.

    python train.py --objective examples/softmax.py:softmax --eta 0.5 0.9

The weights have no gradient: a group's price is its weight over its tokens.
"""


def softmax(nats, tokens, lam):
    full = tokens > 0  # an empty group has no mean
    means = nats[full] / tokens[full]
    weights = means.detach().softmax(0)
    return (1 - lam) * nats.sum() / tokens.sum() + lam * (weights * means).sum()
