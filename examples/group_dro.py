"""Group DRO (Sagawa et al., arXiv 1911.08731, Algorithm 1): weights that grow exponentially with a group's loss.

    python train.py --objective examples/group_dro.py:group_dro --eta 0.5 0.9

The weights are a state: each step first moves them by its own losses, then trains with them. The loss only computes
them; `update` keeps them, once a step, so they are the same for any cut into micro-batches, any number of ranks, and
after a resume.
"""

import torch


class GroupDRO:
    def __init__(self, rate: float):
        self.rate, self.log_weights = rate, torch.zeros(())

    def moved(self, nats, tokens):
        means = nats.detach() / tokens.clamp(min=1)  # (K,); 0 for an empty group
        return (self.log_weights + self.rate * means).log_softmax(0)

    def __call__(self, nats, tokens, lam):
        worst = (self.moved(nats, tokens).exp() * nats / tokens.clamp(min=1)).sum()
        return (1 - lam) * nats.sum() / tokens.sum() + lam * worst

    def update(self, nats, tokens):
        self.log_weights = self.moved(nats, tokens)

    def state_dict(self):
        return {"log_weights": self.log_weights}

    def load_state_dict(self, state):
        self.log_weights = state["log_weights"]


group_dro = GroupDRO(rate=0.1)
