"""Dynamic fine-tuning (Wu et al., arXiv 2508.05629): each token's loss times its own probability, without a gradient.

    python train.py --objective examples/dft.py:dft

`ce` and the groups' means in the log stay those of the unweighted losses.
"""


def dft(nats, tokens, lam):
    return nats.sum() / tokens.sum()  # nats: Σ weight · nll


dft.weigh = lambda nll, batch: (-nll).exp()
dft.constant_price = lambda lam: True  # a weighted nat always costs 1 / (all tokens)
