"""Sequences that begin alike, as packed rows in which what they share stands, and is computed, once.

    header ─┬─ question ─┬─ choice      the row:   header │ question │ choice │ choice │ question │ choice │ …
            │            └─ choice
            └─ question ─── choice …

A segment goes on where its parent ends and sees everything above it. Segments stand depth first, so a segment and all that goes
on from it are one stretch of the row: token i sees token j exactly where j <= i < end of the stretch that j's segment begins.
A header whose questions fill several rows is computed in the first; the others find its keys and values remembered.

T tokens of the row, P of a remembered header, H query heads, K key/value heads, hd head width.
"""

from functools import cache, cached_property
from inspect import signature
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Layout

SMALL = 512  # tokens up to which a stretch is one call under a mask; beyond, the mask's empty half costs more than calls do
Memory = list[tuple[Tensor, Tensor]]  # a header's keys and values, (1, K, P, hd) each, layer by layer


class Tree:
    """Who sees whom in a packed row.

    Args:
        lengths: tokens of each segment, depth first.
        parents: the segment that each goes on from, or -1.
        memory: the keys and values of segment 0, which then is not in the row.
        keep: a segment whose keys and values are wanted for the rows that follow; they are left in `kept`.
        device: where the model is.

    One tree serves one forward: `attend` is called by each layer in turn.
    """

    def __init__(self, lengths: list[int], parents: list[int], memory: Memory | None = None, keep: int | None = None, device="cpu"):
        self.lengths, self.parents, self.memory, self.keep, self.device = lengths, parents, memory, keep, device
        self.kept: Memory = []
        self.layer = 0
        self.starts = [0, *accumulate(lengths)]  # where each segment begins, and where the last one ends, counted over keys
        self.ends = self.starts[1:]  # where the stretch of each segment and all that goes on from it ends
        for s in range(len(lengths) - 1, -1, -1):
            if parents[s] >= 0:
                self.ends[parents[s]] = max(self.ends[parents[s]], self.ends[s])
        self.first = 0 if memory is None else 1  # the first segment in the row
        self.past = self.starts[self.first]  # keys that come before the row's own

    def layout(self) -> Layout:
        """What the model needs: the row's positions, each segment's after its parent's, and how it attends."""
        begin = []
        for parent in self.parents:
            begin.append(begin[parent] + self.lengths[parent] if parent >= 0 else 0)
        count = torch.tensor(self.lengths)
        within = torch.arange(self.starts[-1]) - torch.tensor(self.starts[:-1]).repeat_interleave(count)
        positions = within + torch.tensor(begin).repeat_interleave(count)
        return Layout(positions[None, self.past :].to(self.device), attention=self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, H, T, hd) queries, (1, K, T, hd) keys and values -> (1, H, T, hd)."""
        if self.memory is not None:
            k, v = (torch.cat(both, 2) for both in zip(self.memory[self.layer], (k, v)))  # (1, K, P + T, hd)
        self.layer += 1
        if self.keep is not None:
            here = slice(self.starts[self.keep], self.starts[self.keep + 1])
            self.kept.append((k[:, :, here].clone(), v[:, :, here].clone()))
        if q.is_cuda and q.dtype != torch.float32:
            from torch.nn.attention.varlen import varlen_attn

            return self.by_levels(q, k, v, varlen_attn)
        if q.is_cuda:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (1, H, P + T, hd)
        return self.by_masks(q, k, v)

    # By masks: on a CPU, and in float32.

    def by_masks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, grouped = torch.empty_like(q), k.shape[1] != q.shape[1]
        for above, start, stop, mask in self.pieces:
            seen = [*above, (start, stop)]
            keys, values = (torch.cat([x[:, :, a:b] for a, b in seen], 2) if above else x[:, :, start:stop] for x in (k, v))
            rows = slice(start - self.past, stop - self.past)
            y[:, :, rows] = F.scaled_dot_product_attention(
                q[:, :, rows], keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        return y

    @cached_property
    def pieces(self) -> list[tuple[list[tuple[int, int]], int, int, Tensor | None]]:
        """The row cut into stretches that attend by themselves: (what stands above, start, stop, mask)."""
        out, above, s = [], {-1: [], 0: [(0, self.past)]}, self.first
        while s < len(self.lengths):
            over, first, start, stop = above[self.parents[s]], s, self.starts[s], self.ends[s]
            if stop - start > SMALL:  # the segment alone; those that go on from it follow as pieces of their own
                stop = self.starts[s + 1]
                above[s] = [*over, (start, stop)]
            while s < len(self.lengths) and self.starts[s] < stop:
                s += 1
            out.append((over, start, stop, self.mask(first, s, sum(b - a for a, b in over))))
        return out

    def mask(self, first: int, last: int, above: int) -> Tensor | None:
        """(T', above + T') bool for the segments first … last - 1: all that stands above, then j <= i < end of j's stretch."""
        if last - first == 1 and not above:
            return None
        count = torch.tensor(self.lengths[first:last])
        token = torch.arange(self.starts[first], self.starts[last])  # (T',)
        end = torch.tensor(self.ends[first:last]).repeat_interleave(count)  # (T',)
        own = (token <= token[:, None]) & (token[:, None] < end)  # (T', T')
        return torch.cat([torch.ones(len(token), above, dtype=torch.bool), own], 1).to(self.device)

    # By the variable-length kernel: on a GPU.

    def by_levels(self, q: Tensor, k: Tensor, v: Tensor, varlen) -> Tensor:
        """Each segment over itself, then over what stands above it, a level at a time; the parts are joined by their log-sum-exp."""
        from torch.nn.attention.varlen import AuxRequest

        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T or P + T, H or K, hd)
        extra = {"return_aux": AuxRequest(lse=True)} | ({"enable_gqa": True} if "enable_gqa" in signature(varlen).parameters else {})
        ends = torch.tensor(self.starts[self.first :], dtype=torch.int32, device=q.device) - self.past
        longest = max(self.lengths[self.first :])
        y, lse = varlen(q, k[self.past :], v[self.past :], ends, ends, longest, longest, window_size=(-1, 0), **extra)
        turned = heads_first(varlen, q.dtype, q.device, q.shape[2])
        y, lse = y.float(), (lse.T if turned else lse).float()  # (T, H, hd), (T, H)
        for asking, asked, *bounds in self.levels:
            z, z_lse = varlen(q[asking], k[asked], v[asked], *bounds, window_size=(-1, -1), **extra)
            z_lse = (z_lse.T if turned else z_lse).float()
            both = torch.logaddexp(lse[asking], z_lse)  # (T', H)
            y[asking] = y[asking] * (lse[asking] - both).exp()[..., None] + z.float() * (z_lse - both).exp()[..., None]
            lse[asking] = both
        return y.to(q.dtype).transpose(0, 1)[None]

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int, int]]:
        """For each depth, over its segments that others go on from: the rows that ask and the keys they ask, (T',) each, the bounds
        of both by segment, and the longest of each."""
        depth = []
        for parent in self.parents:
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
        inner = [s for s in range(len(depth)) if self.ends[s] > self.starts[s + 1]]
        out = []
        for d in sorted({depth[s] for s in inner}):
            level = [s for s in inner if depth[s] == d]
            asking = [(self.starts[s + 1] - self.past, self.ends[s] - self.past) for s in level]
            asked = [(self.starts[s], self.starts[s + 1]) for s in level]
            rows = [torch.cat([torch.arange(a, b) for a, b in spans]) for spans in (asking, asked)]
            bounds = [F.pad(torch.tensor([b - a for a, b in spans]).cumsum(0), (1, 0)).int() for spans in (asking, asked)]
            longest = [max(b - a for a, b in spans) for spans in (asking, asked)]
            out.append((*(x.to(self.device) for x in (*rows, *bounds)), *longest))
        return out


@cache
def heads_first(varlen, dtype: torch.dtype, device: torch.device, hd: int) -> bool:
    """Whether the kernel's log-sum-exp is (H, T) and not (T, H): torch's documentation says one and FlashAttention returns the other."""
    from torch.nn.attention.varlen import AuxRequest

    one = torch.zeros(1, 2, hd, dtype=dtype, device=device)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    _, lse = varlen(one, one, one, ends, ends, 1, 1, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    return lse.shape == (2, 1)
