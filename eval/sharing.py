"""Requests that begin with the same tokens, packed into rows where those tokens stand, and are computed, once.

    header ─┬─ question ─┬─ choice      one packed row, depth first:
            │            └─ choice      header │ question │ choice │ choice │ question │ choice │ …
            └─ question ─── choice …

A header (a subject's examples) is shared by contexts (its questions), a context by continuations (its choices), and
continuations that differ in their last token share the others. Sharing is found in the tokens, never in the texts.

The tokens of a segment follow those of its parent. A segment and its descendants are one stretch of the row, its
subtree: token i attends to token j exactly where j <= i and i lies in the subtree of j's segment. Where the questions
of a header fill several rows, the first row computes the header and the others reuse its keys and values.

T tokens of the row, P of a remembered header, H query heads, K key/value heads, hd head width.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEADER = 16  # tokens that contexts must have in common to share them
SMALL = 512  # tokens up to which a subtree is one call under a mask; beyond, its empty half costs more than calls
Pair = tuple[bytes, list[int]]  # context and continuation; a context is big-endian int32, sorted and compared as bytes
Question = tuple[bytes, dict[tuple[int, ...], list[int]]]  # a context, and the requests for each of its continuations
Memory = list[tuple[Tensor, Tensor]]  # a header's keys and values, (1, K, P, hd) each, layer by layer


def packed(ids: list[int]) -> bytes:
    return np.array(ids, ">i4").tobytes()


def unpacked(context: bytes) -> np.ndarray:
    return np.frombuffer(context, ">i4")


@dataclass
class PackedRow:
    """A packed row as it grows: its segments, and which hidden states predict what for which request."""

    tokens: list[np.ndarray] = field(default_factory=list)  # of each segment
    parents: list[int] = field(default_factory=list)  # of each segment, -1 without one
    predictions: list[tuple[int, int, int]] = field(default_factory=list)  # (place in the row, token, request)
    size: int = 0  # tokens in the row
    continued: bool = False  # segment 0 is the previous row's `keep`: remembered, not in this row
    keep: int | None = None  # the segment whose keys and values the next row reuses

    def add(self, tokens: np.ndarray | tuple[int, ...], parent: int) -> int:
        self.tokens.append(np.asarray(tokens, np.int64))
        self.parents.append(parent)
        self.size += len(tokens)
        return len(self.parents) - 1

    def ask(self, context: np.ndarray, continuations: dict[tuple[int, ...], list[int]], parent: int) -> None:
        """Add a question. The context's last state predicts each first token, a continuation's own states the rest."""
        segment, tails = self.add(context, parent), defaultdict(list)
        last = self.size - 1
        for continuation, owners in continuations.items():
            self.predictions += [(last, continuation[0], i) for i in owners]
            if len(continuation) > 1:
                tails[continuation[:-1]].append((continuation, owners))
        for tail, found in tails.items():
            begin = self.size
            self.add(tail, segment)
            for continuation, owners in found:
                self.predictions += [(begin + j, token, i) for j, token in enumerate(continuation[1:]) for i in owners]


def pack(pairs: list[Pair], window: int, max_tokens: int) -> list[PackedRow]:
    """Rows of at most `max_tokens` tokens (more only for a single longer question), the longest questions first.

    A request longer than `window`, the most tokens that the model reads at once, is cut from the left before anything
    is shared. An empty continuation is left out: its log-likelihood is 0.
    """
    found = defaultdict(lambda: defaultdict(list))  # each different context, its continuations, their requests
    for i, (context, continuation) in enumerate(pairs):
        keep = window + 1 - len(continuation)
        if keep < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens: the model reads {window} at most")
        if continuation:
            found[context[-4 * keep :]][tuple(continuation)].append(i)
    groups = [(header, sorted(group, key=cost, reverse=True)) for header, group in families(sorted(found.items()))]
    out = [PackedRow()]
    for header, family in sorted(groups, key=lambda group: cost(group[1][0]), reverse=True):
        above = -1  # the header's segment in this row, once it is there
        for question in family:
            context, row = unpacked(question[0]), out[-1]
            if row.size and row.size + cost(question) - (header if above >= 0 else 0) > max_tokens:
                row.keep = above if above >= 0 else None
                out.append(PackedRow() if above < 0 else PackedRow([row.tokens[above]], [-1], continued=True))
                above, row = min(above, 0), out[-1]  # a remembered header is the first segment
            if header and above < 0:
                above = row.add(context[:header], -1)
            row.ask(context[header:], question[1], above)
    return [row for row in out if row.size]


def families(found: list[Question]) -> Iterator[tuple[int, list[Question]]]:
    """(tokens of the header, the questions that share it): neighbours stay together while that saves more tokens."""
    family, header = found[:1], 0
    for question in found[1:]:
        common = shared(family[-1][0], question[0])
        common = min(common, header) if len(family) > 1 else common
        if common >= HEADER and len(family) * common > (len(family) - 1) * header:
            family.append(question)
            header = common
        else:
            yield header, family
            family, header = [question], 0
    if family:
        yield header, family


def shared(a: bytes, b: bytes) -> int:
    """How many tokens two contexts have in common from the left; each keeps at least one of its own."""
    n = min(len(a), len(b)) // 4 - 1
    differ = unpacked(a)[:n] != unpacked(b)[:n]
    return int(differ.argmax()) if differ.any() else n


def cost(question: Question) -> int:
    """Tokens that the model reads for it."""
    return len(question[0]) // 4 + sum(len(continuation) - 1 for continuation in question[1])


class Tree:
    """The layout of a packed row, for one forward: how long each segment is, and which it follows (-1: none).

    With a `memory`, the keys and values of segment 0, that is not in the row. `kept` holds those of segment `keep`.
    """

    def __init__(self, lengths: list[int], parents: list[int], memory: Memory | None = None, keep=None, device="cpu"):
        self.lengths, self.parents, self.memory, self.keep, self.device = lengths, parents, memory, keep, device
        self.kept, self.layer = [], 0
        self.starts = [0, *accumulate(lengths)]  # where each segment begins, and where the last ends, counted over keys
        self.ends = self.starts[1:]  # where each subtree ends
        shift = []  # of each segment, from a token's place among the keys to its position
        for s, parent in enumerate(parents):
            shift.append((shift[parent] + self.starts[parent + 1] if parent >= 0 else 0) - self.starts[s])
        for s in reversed([s for s, parent in enumerate(parents) if parent >= 0]):
            self.ends[parents[s]] = max(self.ends[parents[s]], self.ends[s])
        self.first = 0 if memory is None else 1  # the first segment in the row
        self.past = self.starts[self.first]  # keys before the row's own
        positions = torch.arange(self.starts[-1]) + torch.tensor(shift).repeat_interleave(torch.tensor(lengths))
        self.positions = positions[None, self.past :].to(device)  # (1, T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, H, T, hd) queries, (1, K, T, hd) keys and values -> (1, H, T, hd); called by each layer in turn."""
        if self.memory is not None:
            k, v = (torch.cat(both, 2) for both in zip(self.memory[self.layer], (k, v)))  # (1, K, P + T, hd)
        self.layer += 1
        if self.keep is not None:
            here = slice(self.starts[self.keep], self.starts[self.keep + 1])
            self.kept.append((k[:, :, here].clone(), v[:, :, here].clone()))
        if q.is_cuda and q.dtype != torch.float32 and q.shape[1] != q.shape[2]:  # `by_levels` tells T and H apart
            from torch.nn.attention.varlen import varlen_attn

            return self.by_levels(q, k, v, varlen_attn)
        if q.is_cuda:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (1, H, P + T, hd)
        return self.by_masks(q, k, v)

    def by_masks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """On a CPU, and in float32: a piece of the row at a time."""
        y, grouped = torch.empty_like(q), k.shape[1] != q.shape[1]
        for above, start, stop, mask in self.pieces:
            seen = [*above, (start, stop)]
            kv = [torch.cat([x[:, :, a:b] for a, b in seen], 2) if above else x[:, :, start:stop] for x in (k, v)]
            rows, how = slice(start - self.past, stop - self.past), {"is_causal": mask is None, "enable_gqa": grouped}
            y[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], *kv, attn_mask=mask, **how)
        return y

    @cached_property
    def pieces(self) -> list[tuple[list[tuple[int, int]], int, int, Tensor | None]]:
        """The row cut into stretches that attend separately: (key ranges of all ancestors, start, stop, mask)."""
        out, above, s, end = [], {-1: [], 0: [(0, self.past)]}, self.first, len(self.lengths)
        while s < end:
            over, first, start, stop = above[self.parents[s]], s, self.starts[s], self.ends[s]
            if stop - start > SMALL:  # the segment alone; its descendants follow as pieces of their own
                stop = self.starts[s + 1]
                above[s] = [*over, (start, stop)]
            while s < end and self.starts[s] < stop:
                s += 1
            out.append((over, start, stop, self.mask(first, s, sum(b - a for a, b in over))))
        return out

    def mask(self, first: int, last: int, above: int) -> Tensor | None:
        """(T', above + T') bool for the segments first … last - 1: all ancestors, then j <= i < end of j's subtree."""
        if last - first == 1 and not above:
            return None
        count = torch.tensor(self.lengths[first:last])
        token = torch.arange(self.starts[first], self.starts[last])  # (T',)
        end = torch.tensor(self.ends[first:last]).repeat_interleave(count)  # (T',)
        own = (token <= token[:, None]) & (token[:, None] < end)  # (T', T')
        return torch.cat([torch.ones(len(token), above, dtype=torch.bool), own], 1).to(self.device)

    def by_levels(self, q: Tensor, k: Tensor, v: Tensor, varlen) -> Tensor:
        """On a GPU: each segment over itself, then its ancestors, a level at a time; log-sum-exps join the parts."""
        from torch.nn.attention.varlen import AuxRequest

        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T or P + T, H or K, hd)
        how = {"enable_gqa": True} if "enable_gqa" in signature(varlen).parameters else {}
        how["return_aux"] = AuxRequest(lse=True)
        ends, longest = self.bounds, max(self.lengths[self.first :])
        y, lse = varlen(q, k[self.past :], v[self.past :], ends, ends, longest, longest, window_size=(-1, 0), **how)
        turned = len(lse) != len(q)  # torch's documentation says (T, H), FlashAttention returns (H, T)
        y, lse = y.float(), (lse.T if turned else lse).float()  # (T, H, hd), (T, H)
        for asking, asked, *bounds in self.levels:
            z, z_lse = varlen(q[asking], k[asked], v[asked], *bounds, window_size=(-1, -1), **how)
            z_lse = (z_lse.T if turned else z_lse).float()
            share = (z_lse - lse[asking]).sigmoid()[..., None]  # (T', H, 1), of z in a softmax over both
            y[asking] = y[asking].lerp(z.float(), share)
            lse[asking] = torch.logaddexp(lse[asking], z_lse)
        return y.to(q.dtype).transpose(0, 1)[None]

    @cached_property
    def bounds(self) -> Tensor:
        """Where the row's segments begin, and where the last ends, (segments + 1,)."""
        return (torch.tensor(self.starts[self.first :]) - self.past).int().to(self.device)

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int, int]]:
        """For each depth: descendants of its segments (queries), its segments (keys), bounds and longest of both."""
        depth, levels, out = {-1: -1}, defaultdict(list), []
        for s, parent in enumerate(self.parents):
            depth[s] = depth[parent] + 1
            if self.ends[s] > (own := self.starts[s + 1]):
                levels[depth[s]].append(((own - self.past, self.ends[s] - self.past), (self.starts[s], own)))
        for level in levels.values():
            spans = list(zip(*level))
            rows = [torch.cat([torch.arange(*span) for span in of]) for of in spans]
            counts = [torch.tensor([b - a for a, b in of]) for of in spans]
            bounds = [F.pad(n.cumsum(0), (1, 0)).int() for n in counts]
            out.append((*(x.to(self.device) for x in (*rows, *bounds)), *(int(n.max()) for n in counts)))
        return out
