"""Sequences that begin alike, as one packed row in which what they share stands, and is computed, once.

    header ─┬─ question ─┬─ choice      the row:   header │ question │ choice │ choice │ question │ choice │ …
            │            └─ choice
            └─ question ─── choice …

A segment goes on where its parent ends and sees everything above it. Segments stand depth first, so a segment and all that goes
on from it are one stretch of the row: token i sees token j exactly where j <= i < end of the stretch that j's segment begins.

T tokens of the row, H query heads, K key/value heads, hd head width.
"""

from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Layout

SMALL = 512  # tokens up to which a stretch is one call under a mask; beyond, the mask's empty half costs more than calls do


def tree_layout(lengths: list[int], parents: list[int], device=None) -> Layout:
    """The layout of a packed row of segments, depth first; `parents[s]` is the segment that s goes on from, or -1."""
    tree = Tree(tuple(lengths), tuple(parents))
    begin = [0] * len(lengths)  # the position of each segment's first token in its sequence
    for s, parent in enumerate(parents):
        begin[s] = begin[parent] + lengths[parent] if parent >= 0 else 0
    count = torch.tensor(lengths)
    within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)  # (T,)
    positions = within + torch.tensor(begin).repeat_interleave(count)  # (T,)
    return Layout(positions[None].to(device), attention=tree.attend)


@dataclass(frozen=True)
class Tree:
    """Who sees whom in a packed row of segments."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Where each segment begins in the row, and where the last one ends."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return starts

    @cached_property
    def ends(self) -> list[int]:
        """Where the stretch of each segment and all that goes on from it ends."""
        ends = self.starts[1:]
        for s in range(len(ends) - 1, -1, -1):
            if (parent := self.parents[s]) >= 0:
                ends[parent] = max(ends[parent], ends[s])
        return ends

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, H, T, hd) queries, (1, K, T, hd) keys and values -> (1, H, T, hd)."""
        if q.is_cuda and q.dtype != torch.float32:
            from torch.nn.attention.varlen import varlen_attn

            return self.in_levels(q, k, v, varlen_attn)
        if q.is_cuda:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (1, H, T, hd)
        return self.in_stretches(q, k, v)

    # By masks: for a CPU, and for float32.

    @cached_property
    def stretches(self) -> list[tuple[list[tuple[int, int]], int, int, Tensor | None]]:
        """The row cut into pieces that attend by themselves: (what stands above, start, stop, mask over above and piece)."""
        pieces, above = [], {-1: []}
        s = 0
        while s < len(self.lengths):
            over, start, stop = above[self.parents[s]], self.starts[s], self.ends[s]
            if stop - start > SMALL:  # this segment alone; those that go on from it follow as pieces of their own
                above[s] = over + [(start, self.starts[s + 1])]
                stop = self.starts[s + 1]
            first = s
            while s < len(self.lengths) and self.starts[s] < stop:
                s += 1
            pieces.append((over, start, stop, self.mask(first, s, sum(b - a for a, b in over))))
        return pieces

    def mask(self, first: int, last: int, above: int) -> Tensor | None:
        """(T', above + T') bool for the segments first … last - 1: all of what stands above, then j <= i < end of j's stretch."""
        if last - first == 1 and not above:
            return None
        count = torch.tensor(self.lengths[first:last])
        token = torch.arange(int(count.sum())) + self.starts[first]  # (T',)
        end = torch.tensor(self.ends[first:last]).repeat_interleave(count)  # (T',)
        own = (token <= token[:, None]) & (token[:, None] < end)  # (T', T')
        return torch.cat([torch.ones(len(token), above, dtype=torch.bool), own], 1)

    def in_stretches(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, grouped = torch.empty_like(q), k.shape[1] != q.shape[1]
        for over, start, stop, mask in self.stretches:
            keys, values = (torch.cat([x[:, :, a:b] for a, b in [*over, (start, stop)]], 2) if over else x[:, :, start:stop] for x in (k, v))
            mask = None if mask is None else mask.to(q.device)
            y[:, :, start:stop] = F.scaled_dot_product_attention(
                q[:, :, start:stop], keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        return y

    # By the variable-length kernel: for a GPU.

    @cached_property
    def levels(self) -> list[tuple[list[int], list[int]]]:
        """For each depth, the segments that others go on from, and nothing of those that end there: (segments of the depth with children)."""
        depth = []
        for parent in self.parents:
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
        inner = [s for s in range(len(depth)) if self.ends[s] > self.starts[s + 1]]
        return [[s for s in inner if depth[s] == d] for d in sorted({depth[s] for s in inner})]

    @cached_property
    def spans(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int, int]]:
        """For each level: the rows that ask and the rows they see, (T',) each, the bounds of both by segment, the longest of each."""
        out = []
        for level in self.levels:
            asked = [(self.starts[s], self.starts[s + 1]) for s in level]
            asking = [(self.starts[s + 1], self.ends[s]) for s in level]
            rows = [torch.cat([torch.arange(a, b) for a, b in pairs]) for pairs in (asking, asked)]
            bounds = [F.pad(torch.tensor([b - a for a, b in pairs]).cumsum(0), (1, 0)).int() for pairs in (asking, asked)]
            out.append((*rows, *bounds, *(max(b - a for a, b in pairs) for pairs in (asking, asked))))
        return out

    def in_levels(self, q: Tensor, k: Tensor, v: Tensor, varlen) -> Tensor:
        """Each segment over itself, then over what stands above it, one level at a time; the parts are joined by their log-sum-exp."""
        from torch.nn.attention.varlen import AuxRequest

        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H or K, hd)
        extra = {"return_aux": AuxRequest(lse=True)} | ({"enable_gqa": True} if "enable_gqa" in signature(varlen).parameters else {})
        ends, longest = torch.tensor(self.starts, dtype=torch.int32, device=q.device), max(self.lengths)
        y, lse = varlen(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **extra)
        y, lse = y.float(), by_token(lse, y)
        for asking, asked, *bounds in self.spans:
            asking, asked, q_ends, k_ends = (x.to(q.device) for x in (asking, asked, *bounds[:2]))
            z, z_lse = varlen(q[asking], k[asked], v[asked], q_ends, k_ends, *bounds[2:], window_size=(-1, -1), **extra)
            z_lse = by_token(z_lse, z)
            both = torch.logaddexp(lse[asking], z_lse)  # (T', H)
            y[asking] = y[asking] * (lse[asking] - both).exp()[..., None] + z.float() * (z_lse - both).exp()[..., None]
            lse[asking] = both
        return y.to(q.dtype).transpose(0, 1)[None]


def by_token(lse: Tensor, y: Tensor) -> Tensor:
    """(T, H) float32 of either (T, H) or (H, T): versions of torch differ."""
    return (lse if lse.shape == y.shape[:2] else lse.T).float()
