"""Generation with a key/value cache: greedy, or sampled by temperature and top-p.

B sequences, T positions, S slots of the cache, H query heads, K key/value heads, hd head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama, Packed

STEP = 128  # slots; attention meets a new shape, for which a GPU's kernels are prepared anew, once in so many tokens


def slots(tokens: int) -> int:
    """Slots of the cache for a sequence of so many tokens."""
    return -(-tokens // STEP) * STEP


class Cached:
    """A layout that remembers keys and values: first all prompts as one packed row, then one new token a sequence."""

    def __init__(self, lengths: list[int], most: int, device):
        count = torch.tensor(lengths)
        self.packed, self.most = Packed(lengths, device), most  # tokens of the longest sequence, in the end
        self.sequence = torch.arange(len(lengths)).repeat_interleave(count).to(device)  # of each position
        self.positions, self.longest = self.packed.positions, max(lengths)
        self.layers, self.layer = [], 0  # keys and values of each layer, (B, K, S, hd)

    def grow(self, position: Tensor) -> None:
        """The next forward reads one token of each sequence, at these (B,) positions."""
        self.packed, self.sequence = None, torch.arange(len(position), device=position.device)
        self.positions, self.longest, self.layer = position[:, None], self.longest + 1, 0
        self.mask = None  # (B, 1, H / K, S), made in the first layer

    def keep(self, rows: Tensor) -> None:
        """Drop all other sequences."""
        for i, layer in enumerate(self.layers):  # a layer at a time, or both copies would be held
            self.layers[i] = [x[rows] for x in layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.packed is not None:
            shape = (len(self.packed.lengths), k.shape[1], slots(self.most), k.shape[3])  # (B, K, S, hd)
            self.layers.append([torch.zeros(shape, dtype=k.dtype, device=k.device) for _ in range(2)])
        keys, values = self.layers[self.layer]
        self.layer += 1
        at = self.sequence, slice(None), self.positions.flatten()
        keys[at], values[at] = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B * T, K, hd)
        if self.packed is not None:
            return self.packed.attend(q, k, v)
        B, H, _, hd = q.shape
        K, S = k.shape[1], slots(self.longest)
        if self.mask is None:  # in q's type and complete: cuDNN misreads another type, and need not broadcast queries
            empty = torch.arange(S, device=q.device) > self.positions  # (B, S)
            self.mask = q.new_zeros(B, 1, H // K, S).masked_fill_(empty[:, None, None], -torch.inf)
        # A key head's query heads pass as H / K queries of one head: under a mask, enable_gqa may copy keys and values.
        y = F.scaled_dot_product_attention(q.reshape(B, K, -1, hd), keys[:, :, :S], values[:, :, :S], self.mask)
        return y.reshape(B, H, 1, hd)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] | list[int] = (),
    seed: int = 0,
    ended: Callable[[list[int]], bool] = lambda new: False,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens, without the stop token that ended them.

    Args:
        prompts:     token ids, of any lengths; none may be empty.
        temperature: 0 is greedy; otherwise the logits' divisor before sampling.
        top_p:       sample from the smallest set of tokens that holds this much probability.
        stop_ids:    tokens that end a sequence.
        ended:       asked after each new token, with a sequence's new tokens so far; True ends it.

    Raises:
        ValueError: also where the logits after a sequence that has not ended are not finite.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, each of at least one token (a BOS counts)")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1")
    device, lengths, room = model.lm_head.weight.device, [*map(len, prompts)], model.cfg.max_position_embeddings
    if max(lengths) + max_new_tokens > room:
        raise ValueError(f"{max(lengths)} prompt and {max_new_tokens} new tokens exceed the model's {room} positions")
    cache, generator = Cached(lengths, max(lengths) + max_new_tokens, device), torch.Generator(device).manual_seed(seed)
    position = torch.tensor(lengths)
    row = torch.tensor([[t for prompt in prompts for t in prompt]]).to(device)  # (1, T)
    hidden = model(row, cache)[0, (position.cumsum(0) - 1).to(device)]  # (B, D)
    # Rows of the cache belong to the prompts in `owner`; done sequences leave it when they are half of its rows.
    new, owner, position, stops, done = (
        [[] for _ in prompts],
        list(range(len(prompts))),
        position.to(device),
        {*stop_ids},
        set(),
    )
    for n in range(1, max_new_tokens + 1):
        token = sample(model.lm_head(hidden).float(), temperature, top_p, generator)  # (B,)
        for i, t in zip(owner, token.tolist()):
            if i in done:
                continue
            if t < 0:
                raise ValueError(f"the model's logits are not finite (prompt {i + 1}, new token {n}); has it diverged?")
            if t not in stops:
                new[i].append(t)
            if t in stops or ended(new[i]):
                done.add(i)
        if len(done) == len(prompts) or n == max_new_tokens:
            break
        alive = [row for row, i in enumerate(owner) if i not in done]
        if 2 * len(alive) <= len(owner):
            keep, owner = torch.tensor(alive).to(device), [owner[row] for row in alive]
            token, position = token[keep], position[keep]
            cache.keep(keep)
        cache.grow(position)
        hidden, position = model(token.clamp(min=0)[:, None], cache)[:, 0], position + 1  # (B, D)
    return new


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id for each row of (B, V) logits, -1 where they are not finite: (B,)."""
    finite = logits.sum(1).isfinite()  # (B,), in one pass; told by the token, which is read anyway
    if temperature == 0:
        return logits.argmax(1).where(finite, -1)
    p, ids = (logits.where(finite[:, None], 0.0) / temperature).softmax(1).sort(1, descending=True)  # (B, V)
    p = p * (p.cumsum(1) - p < top_p)  # what stands before a token must leave it room; the first always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1).where(finite, -1)
