"""Llama 3 in the published (Hub) layout: packed training forward, cached generation, safetensors in and out.

Knows no loss and no rank. `forward` returns hidden states; the caller applies the head (`model.lm_head`).

    tokens (B, T) ─ embed ─► x (B, T, D) ─ [ + attention(norm(x)) ─ + mlp(norm(x)) ] × layers ─ norm ─► hidden (B, T, D)

B sequences, T positions, V vocabulary, D model width, H query heads, K key/value heads, hd head width, F feed-forward
width, S cache slots. A packed row is (1, T): documents end to end, each with positions from 0, none seeing another.

Parameters are float32 (or `param_dtype`); every matrix is cast to the compute dtype where it is used, and the residual
stream runs in it; norms, rotary angles and softmax run in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import read_json, read_tensor, resolve, tensor_shape, weight_files, write_json, write_safetensors

LLAMA3_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Configuration.


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, under the names of a published `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's long-context scaling, or None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # the file as it was read; saved back with the weights

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config") -> "LlamaConfig":
        """Read a published config, in either spelling of its rotary settings.

        Raises:
            ValueError: not a Llama, or one with a feature this forward does not have; `source` names the file.
        """
        if raw.get("model_type") != "llama":
            raise ValueError(f"{source}: model_type is {raw.get('model_type')!r}, expected 'llama': only Llama models are read here")
        for name, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("quantization_config", None)):
            if raw.get(name, only) != only:
                raise ValueError(f"{source}: {name} is {raw[name]!r}, but this Llama has {name} = {only!r} only")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in required if name not in raw]:
            raise ValueError(f"{source}: {', '.join(missing)} missing; is this the config.json of the whole model?")
        for name in (*required, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = raw.get(name)
            if not (type(value) is int and value > 0) and (name in required or value is not None):
                raise ValueError(f"{source}: {name} is {value!r}, expected a whole number above 0")
        for name, kind in (("rms_norm_eps", float), ("rope_theta", float), ("initializer_range", float), ("tie_word_embeddings", bool)):
            value = raw.get(name)
            if value is not None and not (isinstance(value, bool) if kind is bool else type(value) in (int, float) and value > 0):
                raise ValueError(f"{source}: {name} is {value!r}, expected {'true or false' if kind is bool else 'a number above 0'}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{source}: rotary settings are {rope!r}, expected an object")
        rope = {name: value for name, value in rope.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"{source}: rotary scaling is {kind!r}, expected 'default' or 'llama3'")
        numbers = LLAMA3_SCALING if kind == "llama3" else {"rope_theta"} & rope.keys()
        if wrong := sorted(name for name in numbers if type(rope.get(name)) not in (int, float)):
            raise ValueError(f"{source}: rotary settings without a number for {', '.join(wrong)}")
        heads = raw["num_attention_heads"]
        optional = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range")
        cfg = cls(
            **{name: raw[name] for name in required},
            **{name: raw[name] for name in optional if raw.get(name) is not None},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=rope if kind == "llama3" else None,
            raw=raw,
        )
        if heads % cfg.num_key_value_heads or cfg.head_dim % 2:
            raise ValueError(
                f"{source}: {heads} query heads, {cfg.num_key_value_heads} key/value heads of width {cfg.head_dim}: "
                "expected query heads in equal groups, and an even width for the rotary pairs"
            )
        return cfg

    @classmethod
    def from_folder(cls, folder: Path) -> "LlamaConfig":
        """The config of a model folder; ValueError where it has none that fits."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no config.json here; expected a model folder in the published (Hub) layout")
        return cls.from_dict(read_json(path), str(path))

    def inv_freq(self, device=None) -> Tensor:
        """Rotary frequencies, (hd/2,) float32 radians per position, with Llama 3's scaling where the config asks for it."""
        freq = self.rope_theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim)
        if self.rope_scaling is None:
            return freq
        scale = self.rope_scaling
        low, high = scale["low_freq_factor"], scale["high_freq_factor"]
        turns = scale["original_max_position_embeddings"] * freq / (2 * math.pi)  # within the context it was trained with
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # fast frequencies stay, slow ones stretch, those between blend
        return keep * freq + (1 - keep) * freq / scale["factor"]


# Attention over packed documents.


@dataclass(frozen=True)
class Layout:
    """Which positions a call holds, and which keys each may see."""

    positions: Tensor  # (B, T) int64, restarting at 0 in every document
    lengths: tuple[int, ...] = ()  # a packed row's documents, in tokens, end to end; () when decoding
    ends: Tensor | None = None  # (documents + 1,) int32, their boundaries, for the variable-length kernel
    sequence: Tensor | None = None  # (B * T,) int64, the cache row of each position; None without a cache
    cache: tuple[Tensor, Tensor] | None = None  # keys and values of the layer at work, each (B, K, S, hd)
    attention: Callable | None = None  # (q, k, v) -> y in place of all below: rows whose documents share a beginning (eval/tree.py)

    @classmethod
    def packed(cls, lengths: list[int], device=None) -> "Layout":
        """Documents of `lengths` tokens end to end in one row."""
        count = torch.tensor(lengths)
        ends = F.pad(count.cumsum(0), (1, 0))  # (documents + 1,)
        positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(count)  # (T,)
        return cls(positions[None], tuple(lengths), ends.int()).to(device)

    def to(self, device) -> "Layout":
        """A packed layout on another device."""
        return replace(self, positions=self.positions.to(device), ends=self.ends.to(device))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each document; (B, H, T, hd) queries, (B, K, T, hd) keys and values -> (B, H, T, hd).

    The only place that knows documents, cache and device. A document's result is computed from its own rows alone, so
    what lies beside it in the packed row cannot change a bit of it.
    """
    if layout.attention is not None:
        return layout.attention(q, k, v)
    if layout.cache is not None:
        keys, values = layout.cache
        at = layout.sequence, slice(None), layout.positions.flatten()
        keys[at], values[at] = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B * T, K, hd)
        if not layout.lengths:  # decoding: one new token a sequence, which sees every slot up to its own
            visible = torch.arange(keys.shape[2], device=q.device) <= layout.positions[:, None, :, None]  # (B, 1, T, S)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
    if q.is_cuda and q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        rows = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H or K, hd)
        longest = max(layout.lengths)
        grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}  # torch 2.11 needs no telling
        y = varlen_attn(*rows, layout.ends, layout.ends, longest, longest, window_size=(-1, 0), **grouped)
        return y.transpose(0, 1)[None]
    if q.is_cuda:  # float32: with enable_gqa only the kernel that holds all (T, T) scores is left
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, T, hd)
    grouped = k.shape[1] != q.shape[1]
    documents = zip(*(x.split(layout.lengths, dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=grouped) for qkv in documents], dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, heads, T, hd) by the angles of its positions; the two halves of a head are the pair's coordinates."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# The network.


class _CastLinear(torch.autograd.Function):
    """x Wᵀ with W cast to x's dtype in forward and again in backward: autograd alone would keep every cast weight
    alive until its backward, a second copy of the model."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class Linear(nn.Linear):
    """A matrix without bias, stored in the parameters' dtype, used in its input's."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.weight.dtype == x.dtype else _CastLinear.apply(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


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
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, layout)  # (B, H, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        D, width = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = Linear(D, width)
        self.up_proj = Linear(D, width)
        self.down_proj = Linear(width, D)

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


Part = Callable[[nn.Parameter], tuple[Tensor, slice]]  # a parameter -> the tensor to fill, and which of its rows that is


def whole(p: nn.Parameter) -> tuple[Tensor, slice]:
    return p, slice(None)


class Llama(nn.Module):
    """Llama 3. Build with `from_pretrained`, or on `meta` and fill the parameters in place."""

    def __init__(self, cfg: LlamaConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.compute_dtype = cfg, compute_dtype
        self.recompute = False  # keep only each block's input for backward, and run the block again there
        self.model = Backbone(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding itself, where the config says so (again after moving off `meta`, which splits them)."""
        if self.cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, layout: Layout, caches: Sequence = ()) -> Tensor:
        """Hidden states after the last norm, (B, T, D) in the compute dtype, of (B, T) int64 tokens; `caches` has one for each layer."""
        angles = layout.positions[..., None].float() * self.cfg.inv_freq(tokens.device)  # (B, T, hd/2)
        cos, sin = (f(angles)[:, None].to(self.compute_dtype) for f in (torch.cos, torch.sin))  # (B, 1, T, hd/2)
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)  # (B, T, D)
        for block, cache in zip(self.model.layers, caches or repeat(None)):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layout, use_reentrant=False)
            else:
                x = block(x, cos, sin, replace(layout, cache=cache))
        return self.model.norm(x)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        compute_dtype: torch.dtype = torch.float32,
        param_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> "Llama":
        """A model from a folder in the published layout, or from a Hub name such as "meta-llama/Llama-3.2-3B".

        A folder with a config and no weights gives fresh ones, drawn from `seed`.

        Raises:
            ValueError: naming the file or tensor: not a Llama, a damaged file, a missing or misshapen tensor, no safetensors.
        """
        folder = resolve(name)
        with torch.device("meta"):
            model = cls(LlamaConfig.from_folder(folder), compute_dtype).to(param_dtype)
        model.to_empty(device=device)
        model.tie()
        files = weight_files(folder)
        return model.load(files) if files else model.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int, part: Part = whole) -> "Llama":
        """Fresh weights: matrices normal with the config's `initializer_range`, norms 1; the same on every device, and in any parts."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            target, rows = part(p)
            if p.ndim == 1:
                target.fill_(1.0)
            else:
                target.copy_(torch.empty(p.shape).normal_(0, self.cfg.initializer_range, generator=generator)[rows])
        return self

    @torch.no_grad()
    def load(self, files: dict[str, Path], part: Part = whole) -> "Llama":
        """Fill every parameter in place, tensor by tensor, from `files` (tensor name -> safetensors file).

        Of a parameter that is here in part, only its rows are read.
        """
        wanted = dict(self.named_parameters())  # a tied head is one parameter, under the embedding's name
        where = next(iter(files.values())).parent
        if missing := sorted(wanted.keys() - files.keys()):
            found = ", ".join(sorted(files.keys() - wanted.keys())[:3])
            meta = "; these are in Meta's layout, this loader reads Hugging Face's" if "tok_embeddings.weight" in files else ""
            raise ValueError(
                f"{where}: {len(missing)} of {len(wanted)} tensors missing ({', '.join(missing[:3])}{', …' * (len(missing) > 3)})"
                + (f"; found {found}" if found else "")
                + meta
            )
        extra = files.keys() - wanted.keys() - {"lm_head.weight"}
        if extra := sorted(name for name in extra if not name.endswith("rotary_emb.inv_freq")):
            raise ValueError(f"{where}: {len(extra)} tensors this Llama does not have ({', '.join(extra[:3])}); does config.json fit them?")
        for name, path in files.items():
            if name not in wanted and name != "lm_head.weight":
                continue
            param = wanted.get(name, self.lm_head.weight)
            target, rows = part(param)
            if (shape := tensor_shape(path, name)) != tuple(param.shape):
                raise ValueError(f"{path}: {name} is {shape}, but config.json makes it {tuple(param.shape)}")
            tensor = read_tensor(path, name, rows)
            if name in wanted:
                target.copy_(tensor)
            elif not torch.equal(tensor, read_tensor(files["model.embed_tokens.weight"], "model.embed_tokens.weight", rows)):
                raise ValueError(
                    f"{path}: lm_head.weight differs from the embedding, but config.json says they are tied (tie_word_embeddings)"
                )
        return self

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 10**9,
        read: Callable[[Tensor], Tensor] = lambda p: p,
    ) -> None:
        """Write config.json and the weights in `dtype` (None: as they are), sharded with an index above `max_shard_bytes`.

        `read` gives a parameter's whole value, already in `dtype`; it is called for each once, in the order of `parameters()`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards, size, total = [{}], 0, 0
        for name, p in self.named_parameters():
            nbytes = p.numel() * (dtype or p.dtype).itemsize
            if size and size + nbytes > max_shard_bytes:
                shards, size = [*shards, {}], 0
            shards[-1][name] = p
            size, total = size + nbytes, total + nbytes
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards):
            tensors = {t: read(p.detach().to(dtype or p.dtype)).cpu().contiguous() for t, p in shard.items()}
            write_safetensors(folder / f"{name}.part", tensors, {"format": "pt"})
            saved_dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            del tensors  # one shard at a time is held in `dtype`
        for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
            old.unlink(missing_ok=True)  # of weights that stood here before: a stale index would hide the new file
        for name in names:
            (folder / f"{name}.part").rename(folder / name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {t: n for n, shard in zip(names, shards) for t in shard}}
            write_json(folder / "model.safetensors.index.json", index)
        fields = self.cfg.raw or {"model_type": "llama", **asdict(self.cfg)}
        fields = {k: v for k, v in fields.items() if k not in ("torch_dtype", "dtype", "raw")}
        write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **fields, "torch_dtype": saved_dtype})

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: tuple[int, ...] = (),
        seed: int = 0,
        ended: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt; returns the new tokens, without the stop token that ended them.

        Args:
            prompts:     token ids, of any lengths; none may be empty.
            temperature: 0 is greedy; otherwise the logits' divisor before sampling.
            top_p:       sample from the smallest set of tokens that holds this much probability.
            stop_ids:    tokens that end a sequence.
            ended:       asked after each new token, with a sequence's new tokens so far; True ends it.
        """
        if not prompts or not all(prompts):
            raise ValueError("generate needs at least one prompt, each of at least one token (a BOS counts)")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature}, top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1")
        device, B, cfg = self.lm_head.weight.device, len(prompts), self.cfg
        lengths = torch.tensor([len(p) for p in prompts])  # (B,)
        longest = int(lengths.max())
        if longest + max_new_tokens > cfg.max_position_embeddings:
            raise ValueError(f"{longest} prompt and {max_new_tokens} new tokens exceed the model's {cfg.max_position_embeddings} positions")
        shape = (B, cfg.num_key_value_heads, longest + max_new_tokens, cfg.head_dim)
        caches = [[torch.zeros(shape, dtype=self.compute_dtype, device=device) for _ in range(2)] for _ in self.model.layers]
        generator = torch.Generator(device).manual_seed(seed)

        # The prompts go through as one packed row, which fills the cache; then every sequence grows by a token at a time.
        layout = replace(Layout.packed(lengths.tolist(), device), sequence=torch.arange(B).repeat_interleave(lengths).to(device))
        hidden = self(torch.tensor([[t for p in prompts for t in p]], device=device), layout, caches)[0, lengths.cumsum(0) - 1]  # (B, D)
        new, rows, position = [[] for _ in prompts], list(range(B)), lengths.to(device)  # rows: the prompt of each row of the cache
        stops, done = set(stop_ids), set()
        for n in range(1, max_new_tokens + 1):
            token = sample(self.lm_head(hidden).float(), temperature, top_p, generator)  # (B,)
            for row, t in zip(rows, token.tolist()):
                if row in done:
                    continue
                if t not in stops:
                    new[row].append(t)
                if t in stops or (ended is not None and ended(new[row])):
                    done.add(row)
            if len(done) == B or n == max_new_tokens:
                break
            alive = [i for i, row in enumerate(rows) if row not in done]
            if 2 * len(alive) <= len(rows):  # half of the rows write for nothing: leave them out
                keep = torch.tensor(alive, device=device)
                token, position, rows = token[keep], position[keep], [rows[i] for i in alive]
                for i, cache in enumerate(caches):  # a layer at a time, or both copies would be held
                    caches[i] = [x[keep] for x in cache]
            filled = [[x[:, :, : longest + n] for x in cache] for cache in caches]  # the slots that hold anything by now
            sequence = torch.arange(len(rows), device=device)
            hidden = self(token[:, None], Layout(position[:, None], sequence=sequence), filled)[:, 0]  # (B, D)
            position = position + 1
        return new


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id for each row of (B, V) logits: (B,)."""
    if temperature == 0:
        return logits.argmax(1)
    p, ids = (logits / temperature).softmax(1).sort(1, descending=True)  # (B, V)
    p = p * (p.cumsum(1) - p < top_p)  # what stands before a token must leave it room; the first always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)
