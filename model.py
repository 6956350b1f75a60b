"""Llama 3 in the published (Hub) layout. Knows no loss and no rank: `forward` returns hidden states.

    tokens (B, T) ─ embed ─► x (B, T, D) ─ [ + attention(norm(x)) ─ + mlp(norm(x)) ] × layers ─ norm ─► hidden (B, T, D)

B sequences, T positions, V vocabulary, D model width, H query heads, K key/value heads, hd head width.

Parameters are float32 (or `param_dtype`). Each matrix is cast to the compute dtype where it is used. The residual
stream is in the compute dtype. Norms, rotary angles and softmax are computed in float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from published import weights
from published.config import read_config
from published.hub import resolve


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, under the names of a published `config.json`; published/config.py reads and checks one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_scaling: dict | None = None  # Llama 3's long-context scaling, or None
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # the file as read; saved with the weights

    def inv_freq(self, device=None) -> Tensor:
        """Rotary frequencies, (hd/2,) float32 radians per position, with Llama 3's scaling where the config has it."""
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        freq = self.rope_theta**-pair
        if self.rope_scaling is None:
            return freq
        factor, low, high = (self.rope_scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = self.rope_scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (hd/2,) 1: frequency unchanged, 0: divided by factor
        return keep * freq + (1 - keep) * freq / factor


class Layout(Protocol):
    """Position and attention mask of a forward pass: the model itself knows neither documents nor a key/value cache.

    Below: packed rows for training. support/generate.py: a key/value cache. eval/: shared prefixes.
    """

    positions: Tensor  # (B, T) int64, restarting at 0 in every document

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, hd) queries, (B, K, T, hd) keys and values -> (B, H, T, hd); called by each layer in turn."""


class Packed:
    """Documents one after the other in one row. A document's output is bitwise independent of its neighbours."""

    def __init__(self, lengths: list[int], device="cpu"):
        self.lengths = lengths
        count = torch.tensor(lengths)
        ends = F.pad(count.cumsum(0), (1, 0))  # (documents + 1,)
        self.ends = ends.int().to(device)
        self.positions = (torch.arange(sum(lengths)) - ends[:-1].repeat_interleave(count))[None].to(device)  # (1, T)

    def to(self, device) -> "Packed":
        return Packed(self.lengths, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = k.shape[1] != q.shape[1]
        if q.is_cuda and q.dtype != torch.float32:
            from torch.nn.attention.varlen import varlen_attn

            qkv, longest = [x[0].transpose(0, 1) for x in (q, k, v)], max(self.lengths)  # (T, H or K, hd)
            gqa = {"enable_gqa": grouped} if "enable_gqa" in signature(varlen_attn).parameters else {}  # not in 2.11
            y = varlen_attn(*qkv, self.ends, self.ends, longest, longest, window_size=(-1, 0), **gqa)  # (-1, 0): causal
            return y.transpose(0, 1)[None]  # (1, H, T, hd)
        if q.is_cuda:  # in float32, enable_gqa would select the kernel that stores all (T, T) scores
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (1, H, T, hd)
            grouped = False
        documents = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)))
        attended = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=grouped) for qkv in documents]
        return torch.cat(attended, dim=2)


class Rotate(torch.autograd.Function):
    """Rotary embedding of (B, heads, T, hd): pair (x_i, x_{i + hd/2}) turns by angle i of its position.
    The gradient turns back, by hand: autograd would make twice as many passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = x * torch.cat((cos, cos), -1)  # (B, heads, T, hd)
        (a, b), (turned_a, turned_b) = x.chunk(2, -1), y.chunk(2, -1)
        turned_a.addcmul_(b, sin, value=-1)  # a cos - b sin
        turned_b.addcmul_(a, sin)  # b cos + a sin
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad, cos, -sin), None, None


class _CastLinear(torch.autograd.Function):
    """x Wᵀ with W cast to x's dtype in forward and again in backward: autograd alone would keep every cast weight
    alive until its backward, a second copy of the model. `cast` is that copy, where there is room for it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, cast: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, cast)
        return F.linear(x, weight.to(x.dtype) if cast is None else cast)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, cast = ctx.saved_tensors  # (..., in), (out, in); grad is (..., out)
        grad_x = grad @ (weight.to(x.dtype) if cast is None else cast)
        return grad_x, (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype), None


class Linear(nn.Linear):
    """A matrix without bias, stored in the parameters' dtype, used in its input's."""

    cast: Tensor | None = None  # in the compute dtype, inside `Llama.cast_once`

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight  # (out, in)
        return F.linear(x, w) if w.dtype == x.dtype else _CastLinear.apply(x, w, self.cast)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in float32 inside one kernel, which takes x and weight in the same dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention, (B, T, D) -> (B, T, D): H query heads share K key/value heads."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        D, H, K, hd = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.head_dim = hd
        self.q_proj = Linear(D, H * hd)  # names are the published weights',
        self.k_proj = Linear(D, K * hd)  # so loading needs no table
        self.v_proj = Linear(D, K * hd)
        self.o_proj = Linear(H * hd, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        y = layout.attend(Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin), v)  # (B, H, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything but the head: what the published names call `model.`"""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Llama(nn.Module):
    """Llama 3. Build it with `from_pretrained`, or on the meta device and then call `fill`."""

    def __init__(self, cfg: LlamaConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.compute_dtype = cfg, compute_dtype
        self.recompute = False  # activation checkpointing: keep each block's input, recompute the block in backward
        self.room_to_cast = False  # there is memory for what `cast_once` makes
        self.model = Backbone(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding itself where the config says so; again after `to_empty`, which splits them."""
        if self.cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """(B, T) int64 tokens -> hidden states after the last norm, (B, T, D) in the compute dtype."""
        angles = layout.positions[..., None].float() * self.cfg.inv_freq(tokens.device)  # (B, T, hd/2)
        cos, sin = (f(angles)[:, None].to(self.compute_dtype) for f in (torch.cos, torch.sin))  # (B, 1, T, hd/2)
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)  # (B, T, D)
        for block in self.model.layers:
            args = x, cos, sin, layout
            x = checkpoint(block, *args, use_reentrant=False) if self.recompute else block(*args)
        return self.model.norm(x)

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Inside, and where there is room, a block's matrices are cast to the compute dtype once, not at each use."""
        matrices = [module for module in self.model.modules() if isinstance(module, Linear) and self.room_to_cast]
        for matrix in matrices:
            matrix.cast = matrix.weight.detach().to(self.compute_dtype)
        try:
            yield
        finally:
            for matrix in matrices:
                matrix.cast = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, compute_dtype=torch.float32, param_dtype=torch.float32, device="cpu", seed=None
    ) -> "Llama":
        """A model from a folder in the published layout, or from a Hub name such as "meta-llama/Llama-3.2-3B".

        A config without weights is refused, or with a `seed` gives fresh ones. ValueError names what is wrong.
        """
        folder = resolve(name)
        with torch.device("meta"):
            model = cls(LlamaConfig(**read_config(folder)), compute_dtype).to(param_dtype)
        return model.fill(folder, device, seed)

    @torch.no_grad()
    def fill(self, folder: Path, device, seed: int | None, part: weights.Part = lambda p: (p, slice(None))) -> "Llama":
        """Give a model on `meta` its memory and its weights; fresh ones only with a `seed`.

        `part(p)` returns the tensor to fill for parameter p, and which rows of p it holds. Fresh weights do not depend
        on device or parts: norms are 1, matrices are normal.
        """
        self.to_empty(device=device)
        self.tie()
        if files := weights.fitting(self, folder, fresh=seed is not None):
            weights.load(self, files, part)
            return self
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            target, rows = part(p)
            if p.ndim == 1:
                target.fill_(1.0)
            else:
                target.copy_(torch.empty(p.shape).normal_(0, self.cfg.initializer_range, generator=generator)[rows])
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and the weights in `dtype` (None: as they are); ValueError: one is not finite in it."""
        if fault := dtype and weights.not_finite(self, dtype):
            raise ValueError(f"{folder}: {fault}; not written")
        weights.save(self, Path(folder), dtype)
