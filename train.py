"""Fine-tune a Llama with SFT-GO: configuration, step, plan, loop. The only file that knows ranks and clocks.

    python train.py                                   the demo, on a CPU, in about a minute
    python train.py --model FOLDER --data FILE …      your own; `--help` lists every flag

One step: a batch of samples, cut into micro-batches -> nll of each supervised token -> nats and tokens of both groups,
added up over the whole step -> the objective's price of a nat in each group -> backward on price x nats -> AdamW.

T positions of a micro-batch.
"""

import argparse
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import UnionType

# On a CPU oneDNN compiles kernels for every new row length and keeps 1,024 of them, gigabytes; a quarter is no slower (LOG.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # one progress bar is enough

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tqdm import tqdm

import checkpoint
import data
import groupers
import recipes
from cache import Arrays, cached, content, source
from checkpoint import World
from data import TEMPLATES, Batch, Corpus, Tokenizer
from files import resolve, weight_files
from model import DTYPES, Llama, LlamaConfig
from recipes import RECIPES
from sftgo import group_sums, lam_at, sft_go, token_nll

Objective = Callable[[Tensor, Tensor], Tensor]  # (nats, tokens) of the groups -> loss


# Configuration.


def opt(default, help: str, group: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


DATA, METHOD, OPTIM, RUN = "model and data", "SFT-GO", "optimization", "run"


@dataclass(frozen=True)
class Config:
    """Every setting of a run; one command-line flag each, generated from here."""

    recipe: str | None = opt(
        None,
        "named settings that the other flags override, `list` prints them; demo where neither --model nor --data is given",
        DATA,
        ("list", *RECIPES),
    )
    model: str | None = opt(None, "model folder in the published layout, or a Hub name; a config without weights starts fresh", DATA)
    data: str | None = opt(None, "training data: JSON or JSONL, each also .gz; or hf://datasets/ORGANISATION/NAME/FILE", DATA)
    template: str = opt("auto", "how a row becomes text; auto follows the data", DATA, ("auto", *TEMPLATES))
    context: int = opt(4096, "tokens a sample is cut to", DATA)
    batch_size: int = opt(64, "samples in an optimizer step", DATA)
    micro_batch_tokens: int = opt(
        8192, "most tokens in one forward pass: memory and speed; the result only under --scope micro_batch", DATA
    )
    epochs: int = opt(15, "passes over the data", DATA)
    max_steps: int | None = opt(None, "end after this many optimizer steps, and the schedules with it", DATA)
    drop_last: bool = opt(False, "skip an epoch's last, short batch", DATA)

    grouper: str = opt("tfidf", "who decides which tokens are important", METHOD, groupers.GROUPERS)
    eta: float = opt(0.9, "percentile: 0.9 makes each sample's top 10 %% important", METHOD)
    lam_max: float = opt(0.9, "weight of the worse group at the first step; 0 is ordinary SFT", METHOD)
    lam_min: float | None = opt(None, "where that weight decays to; not given: it stays at --lam-max", METHOD)
    worst: str = opt("max", "max: the worse group (Eq. 4); important: always the important one (Rho-1)", METHOD, ("max", "important"))
    reference: str | None = opt(None, "rho1: the frozen model of the same domain, a folder or a Hub name", METHOD)
    llmlingua_model: str = opt(groupers.LLMLINGUA2, "llmlingua2: its token classifier, a folder or a Hub name", METHOD)
    scope: str = opt(
        "step", "tokens the group means run over: the whole optimizer step, or each micro-batch", METHOD, ("step", "micro_batch")
    )

    lr: float = opt(1e-5, "peak learning rate", OPTIM)
    schedule: str = opt("cosine", "learning rate after warm-up; cosine and linear go to 0", OPTIM, ("cosine", "linear", "constant"))
    warmup_ratio: float = opt(0.0, "share of all steps that warm up", OPTIM)
    weight_decay: float = opt(0.1, "AdamW's, on matrices only", OPTIM)
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's", OPTIM)
    eps: float = opt(1e-8, "AdamW's", OPTIM)
    clip: float = opt(1.0, "largest gradient norm; 0 does not clip", OPTIM)
    seed: int = opt(0, "of the data order, the random grouper and fresh weights", OPTIM)
    dtype: str = opt("bfloat16", "compute type; parameters, gradients and AdamW stay float32", OPTIM, ("bfloat16", "float32"))

    shard: str | None = opt(
        None, "weights, gradients, AdamW: fsdp splits them over the ranks, ddp copies them; not given: fsdp where there are several", RUN,
        ("none", "ddp", "fsdp"),
    )  # fmt: skip
    checkpoint_activations: str = opt(
        "none", "full: keep a block's input alone for backward, and run it again there", RUN, ("none", "full")
    )
    checkpoint_every: int = opt(50, "steps between checkpoints, and one at the end and on SIGTERM; 0: none at all", RUN)
    keep: int = opt(2, "checkpoints to keep, the newest", RUN)
    resume: str = opt("auto", "auto: go on from the newest whole checkpoint in --out", RUN, ("auto", "never"))
    out: str | None = opt(None, "run folder; not given: the next free runs/<recipe>-<n>", RUN)
    cache: str | None = opt(None, "folder of tokens and scores, for runs to share; not given: OUT/cache, or runs/cache without --out", RUN)
    save_dtype: str | None = opt(None, "type of the saved weights; not given: the compute type", RUN, tuple(DTYPES))
    overwrite: bool = opt(False, "replace the run that --out holds; nothing but a run of this program", RUN)
    dry_run: bool = opt(False, "print the plan and stop", RUN)

    def __post_init__(self):
        for name, given in (("--model", self.model), ("--data", self.data)):
            if given is None:
                raise ValueError(f"{name} is missing; give both --model and --data, or neither for the demo")
        if self.lam_min is None:
            object.__setattr__(self, "lam_min", self.lam_max)
        checks = [
            (0 <= self.eta <= 1, f"--eta {self.eta}: expected a percentile in [0, 1]; 0.9 makes the top 10 % important"),
            (
                0 <= self.lam_min <= self.lam_max <= 1,
                f"--lam-max {self.lam_max} --lam-min {self.lam_min}: expected 0 <= lam_min <= lam_max <= 1",
            ),
            (self.context >= 2, f"--context {self.context}: expected at least 2 tokens"),
            (
                self.micro_batch_tokens >= self.context - 1,
                f"--micro-batch-tokens {self.micro_batch_tokens} cannot hold --context {self.context}: lower --context, or raise it",
            ),
            (
                self.batch_size >= 1 and self.epochs >= 1,
                f"--batch-size {self.batch_size} --epochs {self.epochs}: expected at least 1 of each",
            ),
            (self.max_steps is None or self.max_steps >= 1, f"--max-steps {self.max_steps}: expected at least 1"),
            (
                self.lr > 0 and 0 <= self.warmup_ratio < 1,
                f"--lr {self.lr} --warmup-ratio {self.warmup_ratio}: expected lr > 0 and a ratio in [0, 1)",
            ),
            (
                all(0 <= b < 1 for b in self.betas) and self.eps > 0,
                f"--betas {self.betas} --eps {self.eps}: expected betas in [0, 1) and eps > 0",
            ),
            (self.weight_decay >= 0 and self.clip >= 0, f"--weight-decay {self.weight_decay} --clip {self.clip}: expected neither below 0"),
            (self.seed >= 0, f"--seed {self.seed}: expected 0 or above"),
            (self.checkpoint_every >= 0, f"--checkpoint-every {self.checkpoint_every}: expected a number of steps, or 0 for none"),
            (self.keep >= 1, f"--keep {self.keep}: expected at least 1"),
            (not self.overwrite or self.out is not None, "--overwrite needs --out: without it every run has a folder of its own"),
            (
                all(type(v) is not int or v < 2**31 for v in vars(self).values()),
                "a whole number of 2^31 or more: no flag takes one so large",
            ),
            (self.grouper != "none" or self.worst == "max", "--worst important needs important tokens; choose a --grouper"),
            (self.grouper != "rho1" or self.reference is not None, self.how_to_reference()),
            (self.grouper == "rho1" or self.reference is None, f"--reference is for --grouper rho1 alone, not {self.grouper}"),
            (self.cache is None or not Path(self.cache).is_file(), f"--cache {self.cache}: a file, expected a folder"),
        ]
        for holds, message in checks:
            if not holds:
                raise ValueError(message)

    def command(self, **changes) -> str:
        """The command line of this configuration with some settings changed: all that differs from the recipe and the defaults."""
        settings = vars(self) | changes
        if settings["lam_min"] == settings["lam_max"]:
            settings["lam_min"] = None
        usual, words = self.usual(settings["recipe"]), ["python", "train.py"]
        for name, value in settings.items():
            if value is not None and value != usual[name]:
                flag = "--" + name.replace("_", "-")
                words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
        return shlex.join(words)

    @classmethod
    def usual(cls, recipe: str | None) -> dict:
        """A recipe's settings, the defaults among them."""
        return {f.name: f.default for f in fields(cls)} | RECIPES.get(recipe, {})

    def how_to_reference(self) -> str:
        """What to run for Rho-1: first its reference model φ, then θ."""
        usual, method = self.usual(self.recipe), ("recipe", "grouper", "eta", "lam_max", "lam_min", "worst", "out")
        given = {name: value for name, value in vars(self).items() if value != usual[name] and name not in method}
        plain = self.recipe.removesuffix("-rho1") + "-sft" if self.recipe and self.recipe.endswith("-rho1") else self.recipe
        phi = self.command(**self.usual(plain) | given | {"recipe": plain, "grouper": "none", "out": "runs/reference"})
        return (
            "--grouper rho1 needs --reference, a model trained on data of the same domain. Train one, then the run itself:\n"
            f"  {phi}\n  {self.command(reference='runs/reference/model')}"
        )


def parse_args(argv: list[str] | None = None) -> Config:
    """Flags -> Config: defaults, then the recipe's values, then what was given."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py [--recipe NAME] [--model FOLDER --data FILE] [--flag VALUE …]",
        description="Fine-tune a Llama with SFT-GO. Without --model and --data it runs the demo.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34, width=110),
    )
    sections = {name: parser.add_argument_group(name) for name in (DATA, METHOD, OPTIM, RUN)}
    for f in fields(Config):
        kind = f.type.__args__[0] if isinstance(f.type, UnionType) else f.type
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        how = {"help": f.metadata["help"] + ("" if f.default is None or kind is bool else f" (default: {shown})")}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif f.metadata["choices"]:
            how |= {"choices": f.metadata["choices"]} | ({"metavar": "NAME"} if f.name == "recipe" else {})
        elif isinstance(f.default, tuple):
            how |= {"type": float, "nargs": 2, "metavar": ("B1", "B2")}
        else:
            how |= {"type": kind, "metavar": {str: "PATH", int: "N", float: "X"}[kind]}
        sections[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), **how)
    given = vars(parser.parse_args(argv))
    if given.get("recipe") == "list":
        print(recipes.table())
        raise SystemExit
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    if not given.keys() & {"recipe", "model", "data"}:
        given["recipe"] = "demo"
    return Config(**Config.usual(given.get("recipe")) | given)


# The step.


def batch_nll(model: Llama, batch: Batch) -> Tensor:
    """Nats of each supervised target of a packed row, 0 elsewhere, (T,); the head runs on supervised rows only."""
    hidden = model(batch.tokens, batch.layout)[0]  # (T, D)
    mask = batch.loss_mask
    nll = token_nll(hidden[mask], model.lm_head.weight, batch.targets[mask])  # (supervised,)
    return nll.new_zeros(mask.shape).masked_scatter(mask, nll)  # (T,)


def price(objective: Objective, nats: Tensor, tokens: Tensor) -> Tensor:
    """What one more nat in each group costs: ∂ loss / ∂ nats, (2,) float64."""
    nats = nats.detach().double().requires_grad_()
    return torch.autograd.grad(objective(nats, tokens), nats)[0]


def backward(cost: Tensor, nats: Tensor) -> None:
    (cost.to(nats.dtype) * nats).sum().backward()


def step(
    model: Llama, batches: list[Batch], objective: Objective, label: groupers.Label, reduce=lambda t: t, probe: bool = True
) -> tuple[Tensor, Tensor]:
    """Put the gradient of one optimizer step into `.grad`; return the step's (nats, tokens), each (2,).

    The loss of Eq. 3-4 depends on the parameters through the step's nats alone, so its gradient is Σ_k price_k · ∇nats_k:
    exact, however the step is cut into micro-batches and over ranks. Each rank is left with the gradient of its own batches;
    `combine_gradients` adds them up.

    Args:
        batches: this rank's; every rank has equally many.
        reduce:  sums a tensor over ranks, so that a nat has the same price wherever its token landed.
        probe:   False where prices do not depend on losses (λ = 0: every nat costs 1 / tokens), which saves a forward.
    """
    if len(batches) == 1:  # one graph fits: look, then pay
        nll = batch_nll(model, batches[0])
        nats, tokens = group_sums(nll, label(nll.detach(), batches[0]), batches[0].loss_mask)
        total = reduce(nats.detach().double()), reduce(tokens)
        backward(price(objective, *total), nats)
        return total
    if probe:  # several: look first without a graph, +1/3; a token keeps the label it gets here
        with torch.no_grad():
            looks = [batch_nll(model, batch) for batch in batches]
            labels = [label(nll, batch) for nll, batch in zip(looks, batches)]
        sums = [group_sums(nll, group, batch.loss_mask) for nll, group, batch in zip(looks, labels, batches)]
        cost = price(objective, *map(reduce, add_up(sums)))
    else:
        labels = [None] * len(batches)
        tokens = reduce(torch.stack([batch.loss_mask.sum() for batch in batches]).sum())
        cost = price(objective, torch.zeros(2, device=tokens.device), torch.stack([tokens, 0 * tokens]))
    sums = []
    for batch, group in zip(batches, labels):
        nll = batch_nll(model, batch)
        nats, tokens = group_sums(nll, label(nll.detach(), batch) if group is None else group, batch.loss_mask)
        backward(cost, nats)
        sums.append((nats.detach(), tokens))
    return tuple(map(reduce, add_up(sums)))


def micro_batch_step(
    model: Llama, batches: list[Batch], objective: Objective, label: groupers.Label, reduce=lambda t: t
) -> tuple[Tensor, Tensor, Tensor]:
    """`--scope micro_batch`: Σ_m (N_m / N) · L_GO(micro-batch m), what a loss inside an ordinary trainer approximates.

    Returns:
        nats, tokens (2,) of the step, and its loss ().
    """
    supervised = torch.stack([batch.loss_mask.sum() for batch in batches])
    sums, loss = [], torch.zeros((), dtype=torch.float64, device=supervised.device)
    for batch, share in zip(batches, supervised / reduce(supervised.sum())):
        own = (lambda nats, tokens: share * objective(nats, tokens)) if share else (lambda nats, tokens: 0.0 * nats.sum())  # noqa: B023
        sums.append(step(model, [batch], own, label))
        loss += own(*sums[-1])
    nats, tokens = map(reduce, add_up(sums))
    return nats, tokens, reduce(loss)


def add_up(sums: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(nats, tokens) over micro-batches, nats in float64."""
    nats, tokens = zip(*sums)
    return torch.stack(nats).double().sum(0), torch.stack(tokens).sum(0)


# Ranks.


def build(cfg: Config, folder: Path, world: World) -> Llama:
    """The model with its weights. Under fsdp a rank builds and reads its own rows of every matrix, and no more.

    Norm weights are so few that every rank keeps them whole: they stay float32 in use, where fsdp would cast them with the rest.
    """
    dtype = DTYPES[cfg.dtype]
    if cfg.shard != "fsdp":
        model = Llama.from_pretrained(folder, dtype, device=world.device, seed=cfg.seed)
    else:
        with torch.device("meta"):
            model = Llama(LlamaConfig.from_folder(folder), dtype)
        whole = {p for p in model.parameters() if p.ndim == 1}
        cast = dtype if dtype != torch.float32 else None
        how = {
            "mesh": dist.init_device_mesh(world.device.type, (world.size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "ignored_params": whole,
        }
        for module in (*model.model.layers, model):
            fully_shard(module, **how)
        model.to_empty(device=world.device)
        model.tie()
        files = weight_files(folder)
        model.load(files, own_rows) if files else model.init_weights(cfg.seed, own_rows)
    model.recompute = cfg.checkpoint_activations == "full"
    return model


def own_rows(p: torch.nn.Parameter) -> tuple[Tensor, slice]:
    """Where this rank's part of a parameter is, and which rows of the whole it holds."""
    if not isinstance(p, DTensor):
        return p, slice(None)
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), slice(offset[0], offset[0] + shape[0])


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def combine_gradients(model: Llama, world: World) -> None:
    """Make each gradient the sum over ranks of what `step` left there."""
    for p in model.parameters():
        if isinstance(p, DTensor):
            local(p.grad).mul_(world.size)  # fsdp took the mean; the prices count every token of the step already
        elif world.size > 1:
            dist.all_reduce(p.grad)


def clip_gradients(model: Llama, largest: float, world: World) -> float:
    """Scale all gradients to at most this norm (0: not at all); returns the norm they had."""
    grads = [p.grad for p in model.parameters()]
    in_parts = [local(g) for g in grads if isinstance(g, DTensor)]
    whole = [g for g in grads if not isinstance(g, DTensor)]
    squares = [torch.stack([x.double() for x in torch._foreach_norm(part)]).square().sum() if part else 0.0 for part in (in_parts, whole)]
    norm = float((world.sum(squares[0]) if in_parts else 0.0) + squares[1]) ** 0.5
    if largest and math.isfinite(norm) and norm > largest:
        torch._foreach_mul_([local(g) for g in grads], largest / norm)
    return norm


# Preparation.


def prepare(cfg: Config, tokenizer: Tokenizer, cache: Path | None, world: World) -> tuple[Corpus, np.ndarray]:
    """The corpus, and what its static grouper knows of each token. Rank 0 tokenizes and counts, the others read what it stored."""

    path = data.data_file(cfg.data)
    corpus = world.before_others("tokens", lambda: data.load_corpus(path, tokenizer, cfg.template, cfg.context, cache))
    if cfg.grouper == "llmlingua2" and not cfg.dry_run:  # in a dry run it would be minutes on a CPU, for one number of the plan
        folder = resolve(cfg.llmlingua_model)

        def load() -> Callable[[Corpus], np.ndarray]:
            classifier = groupers.Classifier(folder, world.device)
            return lambda part: groupers.llmlingua2(part, classifier)

        key = [world.first("the classifier's digest", lambda: content(folder)), world.device.type, source("groupers")]
        scores = in_parts("llmlingua2", corpus, key, load, cache, world)
        return corpus, groupers.label(scores, corpus, cfg.eta)
    static = "none" if cfg.grouper == "llmlingua2" else cfg.grouper
    return corpus, groupers.label_corpus(static, corpus, cfg.eta, cfg.seed, cache)


def check_reference(cfg: Config, tokenizer: Tokenizer) -> None:
    """Refuse a `--reference` whose losses could not be compared with the model's, token by token."""
    folder = resolve(cfg.reference)
    llama = LlamaConfig.from_folder(folder)
    if not weight_files(folder):
        raise ValueError(f"--reference {cfg.reference}: no weights in the folder")
    if Tokenizer(folder, llama.vocab_size).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ValueError(
            f"--reference {cfg.reference}: its tokenizer is not that of {cfg.model}; losses of other tokens cannot be compared"
        )
    if cfg.context > llama.max_position_embeddings:
        raise ValueError(f"--context {cfg.context}: the reference {cfg.reference} has {llama.max_position_embeddings} positions")


def reference_nll(cfg: Config, corpus: Corpus, cache: Path | None, world: World) -> np.ndarray:
    """Rho-1's φ: `corpus_nll` under `--reference`, computed once for a data set, by all ranks; the model is gone afterwards."""
    folder, dtype = resolve(cfg.reference), DTYPES[cfg.dtype]

    def score() -> Callable[[Corpus], np.ndarray]:
        model = Llama.from_pretrained(folder, dtype, dtype, world.device)
        return lambda part: corpus_nll(model, part, cfg.micro_batch_tokens)

    digest = world.first("the reference's digest", lambda: content(folder))
    key = [digest, cfg.dtype, world.device.type, source("data", "model", "sftgo", "train")]
    return in_parts("reference", corpus, key, score, cache, world)


PARTS = 8  # of a data set, for up to so many ranks; the same for any number of them, so that what one run stored serves another


def in_parts(kind: str, corpus: Corpus, key: list, load: Callable, cache: Path | None, world: World) -> np.ndarray:
    """What load() gives for each token of a corpus, (tokens,): every rank scores and stores its parts, then reads them all.

    There is no collective in it that a slow rank could time out.
    """
    parts = [np.arange(part, len(corpus), PARTS) for part in range(PARTS)]
    scorer, found = None, {}
    for n in range(world.rank, PARTS, world.size):

        def make(samples=parts[n]) -> tuple[Arrays, dict]:
            nonlocal scorer
            scorer = scorer or load()
            return {"values": scorer(corpus.take(samples)) if len(samples) else np.zeros(0, np.float32)}, {}

        found[n] = cached(cache, kind, [corpus.digest, n, *key], make)[0]["values"]
    scorer = None
    world.all(kind)
    values = np.zeros(len(corpus.ids), np.float32)
    for n, samples in enumerate(parts):
        if n not in found:
            found[n] = cached(cache, kind, [corpus.digest, n, *key], lambda: lost(kind, cache))[0]["values"]
        values[data.ragged(corpus.starts[samples], corpus.lengths[samples])] = found[n]
    return values


def lost(kind: str, cache: Path | None):
    raise ValueError(f"{cache}: another rank's {kind} is not here; is --cache, or --out, a folder that all nodes share?")


@torch.no_grad()
def corpus_nll(model: Llama, corpus: Corpus, max_tokens: int) -> np.ndarray:
    """Nats of each supervised token of a corpus, (tokens,) float32, 0 elsewhere; in packed rows of at most `max_tokens`."""
    nats, places = np.zeros(len(corpus.ids), np.float32), np.arange(len(corpus.ids))
    for samples in tqdm(np.array_split(np.arange(len(corpus)), math.ceil(len(corpus) / 256)), "losses", disable=None, leave=False):
        for batch in data.micro_batches(corpus, places, samples, max_tokens):  # `known` brings each target's place in the corpus
            nll = batch_nll(model, batch.to(model.lm_head.weight.device)).cpu()
            nats[batch.known[batch.loss_mask].numpy()] = nll[batch.loss_mask].numpy()
    return nats


# The plan.


def memory_needed(
    cfg: LlamaConfig, parameters: int, positions: int, compute_bytes: int, ranks: int = 1, recompute: bool = False
) -> dict[str, int]:
    """Bytes on one rank for its largest micro-batch's step, by what they are for.

    A parameter takes 16 bytes: itself, its gradient and AdamW's two moments, each float32; fsdp splits them over `ranks`. A
    position of a layer keeps for backward: two norms' float32 input, float32 normalized row (a fused kernel saves this one)
    and output, q, k, v, the attention's output twice, and four feed-forward rows; with `recompute` its input alone, and all
    that of one layer at a time. The head holds one chunk of logits, its float32 copy, and its weight's cast and gradient.
    Over several ranks come the gathered weights and gradients of the embedding, the head and two layers, in the compute
    dtype, and the largest of these gradients in float32 on its way to its ranks.
    """
    D, q, kv, ff = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim, cfg.intermediate_size
    layer = 2 * 8 * D + compute_bytes * (2 * D + 3 * q + 2 * kv + 4 * ff)
    layers = cfg.num_hidden_layers * layer if not recompute else cfg.num_hidden_layers * compute_bytes * D + layer
    block = D * (2 * q + 2 * kv + 3 * ff)
    root = parameters - cfg.num_hidden_layers * block
    needed = {
        "weights, gradients, AdamW": 16 * parameters // ranks,
        "activations": positions * (layers + (8 + 2 * compute_bytes) * D),
        "logits": cfg.vocab_size * (min(1024, positions) * (4 + 2 * compute_bytes) + (4 + 2 * compute_bytes) * D),
    }
    return needed | ({"gathered": 2 * compute_bytes * (root + 2 * block) + 4 * max(root, block)} if ranks > 1 else {})


def print_plan(
    cfg: Config, corpus: Corpus, known: np.ndarray, llama: LlamaConfig, fresh: bool, steps: int, per_epoch: int, ranks: int = 1
) -> None:
    """Say, before anything large is loaded, what will be trained on what.

    Raises:
        ValueError: the disk cannot hold the checkpoints.
    """
    mask = corpus.loss_mask
    counts = dict(corpus.counts)
    rows, kept = counts.pop("rows"), counts.pop("kept")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(llama).parameters())
    lengths = np.sort(corpus.lengths - 1)
    positions = min(cfg.micro_batch_tokens, max(int(lengths[-1]), math.ceil(lengths[-cfg.batch_size :].sum() / ranks)))
    split = ranks if cfg.shard == "fsdp" else 1
    memory = memory_needed(llama, parameters, positions, DTYPES[cfg.dtype].itemsize, split, cfg.checkpoint_activations == "full")
    weight = f"{cfg.lam_max:g}" if cfg.lam_max == cfg.lam_min else f"{cfg.lam_max:g} → {cfg.lam_min:g}"
    share = f"{known[mask].mean():.1%} of the supervised tokens important"
    if cfg.grouper in groupers.IN_STEP:
        share = "labelled at each step" + f" against {cfg.reference}" * (cfg.grouper == "rho1")
    elif cfg.dry_run and cfg.grouper == "llmlingua2":
        share = f"{cfg.llmlingua_model} will score the answers"
    groups = f"{cfg.grouper}, η {cfg.eta:g}: {share}; λ {weight}, worst {cfg.worst}, scope {cfg.scope}"
    saves = (
        f"{12 * parameters / 1e9:.2g} GB each, every {cfg.checkpoint_every} steps, the newest {cfg.keep} kept"
        if cfg.checkpoint_every
        else "none"
    )
    free = checkpoint.disk_free(cfg)
    lines = {
        "data": f"{cfg.data}: {rows:,} rows, {kept:,} {'pieces' if corpus.template == 'text' else 'samples kept'}"
        + "".join(f"; {n:,} {what}" for what, n in counts.items()),
        "tokens": f"{len(mask):,}, {mask.mean():.1%} supervised; longest sample {corpus.lengths.max():,}; template {corpus.template}",
        "groups": "none: plain cross-entropy" if cfg.grouper == "none" else groups,
        "steps": f"{per_epoch:,} an epoch, {cfg.batch_size} samples each; {steps:,} in all; micro-batches of up to {positions:,} tokens",
        "ranks": f"{ranks}, {cfg.shard}" if ranks > 1 else "",
        "model": f"{cfg.model}: {parameters / 1e6:,.1f}M parameters{' (fresh: no weights in the folder)' * fresh}, computed in {cfg.dtype}",
        "memory": f"about {sum(memory.values()) / 1e9:.2g} GB of tensors{' on each rank' * (ranks > 1)}: "
        + ", ".join(f"{what} {n / 1e9:.2g}" for what, n in memory.items()),
        "saves": f"checkpoints: {saves}",
    }
    lines = {name: text for name, text in lines.items() if text}
    for name, text in lines.items():
        print(f"{name:<8}{text}")
    needed = 12 * parameters * (cfg.keep + 1) if cfg.checkpoint_every else 0
    if needed > free:
        raise ValueError(
            f"{cfg.out or 'runs'}: {free / 1e9:.3g} GB free, but {cfg.keep} checkpoints and one being written take {needed / 1e9:.3g} GB; "
            "choose an --out on a larger disk, a smaller --keep, or --checkpoint-every 0"
        )


# The loop.


def adamw(model: Llama, cfg: Config) -> torch.optim.AdamW:
    """AdamW in float32, weight decay on matrices only."""
    parameters = list(model.parameters())
    sets = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(sets, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(cfg: Config) -> Path | None:
    """Run `cfg` to its end; returns the run folder (None after --dry-run).

    Raises:
        ValueError, OSError: one line about what is wrong; on other ranks too, about the one that has it.
        SystemExit: 143, after a SIGTERM; its checkpoint is saved.
    """
    world = World()
    try:
        return prepare_and_fit(cfg, world)
    except RuntimeError as e:
        world.fault(e)
        if world.size > 1 and re.search("(?i)gloo|nccl|timed? ?out|connection|broken pipe", str(e)):
            raise ValueError(f"rank {world.rank}: a collective failed; behind the others: {world.late()} ({str(e).splitlines()[0]})") from e
        raise
    except Exception as e:
        world.fault(e)
        raise
    finally:
        checkpoint.HELD.clear()


def prepare_and_fit(cfg: Config, world: World) -> Path | None:
    """Everything before the weights: what is wrong with the settings, the corpus, the groups, the plan. Then `fit`."""
    cfg = replace(cfg, shard=cfg.shard or ("fsdp" if world.size > 1 else "none"))
    if (cfg.shard == "none") != (world.size == 1):
        raise ValueError(
            f"--shard {cfg.shard} with {world.size} process{'es' * (world.size > 1)}: fsdp and ddp are for several (torchrun), none for one"
        )
    folder = world.before_others("model", lambda: resolve(cfg.model))
    llama = LlamaConfig.from_folder(folder)
    if cfg.context > llama.max_position_embeddings:
        raise ValueError(f"--context {cfg.context}: {cfg.model} has {llama.max_position_embeddings} positions (max_position_embeddings)")
    tokenizer = Tokenizer(folder, llama.vocab_size)
    if cfg.template == "llama3":
        data.require_trained_headers(folder, tokenizer)
    if cfg.grouper == "rho1":
        world.before_others("reference", lambda: check_reference(cfg, tokenizer))
    elif cfg.grouper == "llmlingua2":
        groupers.need_transformers()
        world.before_others("classifier", lambda: resolve(cfg.llmlingua_model))
    if world.first("run folder", lambda: checkpoint.finished(cfg)):
        print(f"{cfg.out}: this run is already finished; nothing to do")
        return Path(cfg.out)

    cache = Path(cfg.cache) if cfg.cache else None if cfg.dry_run else Path(cfg.out or "runs") / "cache"
    corpus, known = prepare(cfg, tokenizer, cache, world)
    per_epoch = len(data.epoch_order(len(corpus), cfg.batch_size, cfg.seed, 0, cfg.drop_last))
    total_steps = min(cfg.epochs * per_epoch, cfg.max_steps or sys.maxsize)
    if not total_steps:
        raise ValueError(
            f"{cfg.data}: {len(corpus)} samples make no full batch of {cfg.batch_size}; lower --batch-size or leave out --drop-last"
        )
    print_plan(cfg, corpus, known, llama, not weight_files(folder), total_steps, per_epoch, world.size)
    if cfg.dry_run:
        return None
    return fit(cfg, folder, tokenizer, corpus, known, cache, total_steps, per_epoch, world)


def fit(
    cfg: Config, folder: Path, tokenizer: Tokenizer, corpus: Corpus, known: np.ndarray, cache: Path | None,
    total_steps: int, per_epoch: int, world: World,
) -> Path:  # fmt: skip
    """Everything after the plan: weights, the steps, the model in the end."""
    if cfg.grouper == "rho1":
        known = reference_nll(cfg, corpus, cache, world)
    world.all("data")
    world.open()
    model = build(cfg, folder, world)
    optimizer = adamw(model, cfg)
    out = Path(world.first("claim", lambda: str(checkpoint.claim(cfg))))
    begun = checkpoint.resume(out, model, optimizer, world) if cfg.resume == "auto" else 0
    print(f"run     {out}, on {world.device.type}" + f", {world.size} ranks" * (world.size > 1) + f", after step {begun}" * bool(begun))
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    try:
        ended = loop(cfg, model, optimizer, corpus, known, out, begun, total_steps, per_epoch, world, stop)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if not ended:
        world.close()
        raise SystemExit(143)  # 128 + SIGTERM: not finished, for whoever starts it again

    broken = torch.stack([~local(p).isfinite().all() for p in model.parameters()]).sum()
    if world.sum(broken):
        raise ValueError(f"{out}: the last update left weights that are not finite; no model written. Lower --lr")
    checkpoint.export(model, tokenizer, corpus.template, DTYPES[cfg.save_dtype or cfg.dtype], out, world)
    if world.rank == 0:
        checkpoint.plot_losses(out)
        print(f"wrote   {', '.join(sorted(p.name for p in out.iterdir() if p.name not in ('cache', 'lock')))} in {out}")
        if cfg.shard != "fsdp":  # where it would take all ranks, in step, token by token
            print_sample(model, tokenizer, corpus)
    world.all("end")  # rank 0 may write for longer than a collective waits
    world.close()
    return out


def loop(
    cfg: Config, model: Llama, optimizer: torch.optim.Optimizer, corpus: Corpus, known: np.ndarray, out: Path,
    begun: int, total_steps: int, per_epoch: int, world: World, stop: list,
) -> bool:  # fmt: skip
    """The steps from `begun` on; False where a SIGTERM ended them."""
    order = None
    with (
        open(out / "metrics.jsonl" if world.rank == 0 else os.devnull, "a", encoding="utf-8") as log,
        tqdm(total=total_steps, initial=begun, unit="step", disable=None, dynamic_ncols=True) as bar,
    ):
        for done in range(begun, total_steps):
            epoch, at = divmod(done, per_epoch)
            if at == 0 or order is None:
                order = data.epoch_order(len(corpus), cfg.batch_size, cfg.seed, epoch, cfg.drop_last)
            began = time.perf_counter()
            batches = data.micro_batches(corpus, known, order[at], cfg.micro_batch_tokens, world.rank, world.size)
            batches = [batch.to(world.device) for batch in batches]
            row = {"step": done + 1, "epoch": epoch, **update(model, optimizer, batches, cfg, done, total_steps, world)}
            read = int((corpus.lengths[order[at]] - 1).sum())
            seconds = time.perf_counter() - began
            memory = peak_memory_bytes(world.device)
            row |= {"tokens": read, "seconds": seconds, "tokens_per_second": read / seconds, "peak_memory_bytes": memory}
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {row['loss']:.3f}, important {shown(row['important'])}, unimportant {shown(row['unimportant'])}")
            bar.update()
            if done == begun or done + 1 == total_steps or (done + 1) % math.ceil(total_steps / 10) == 0:
                bar.write(log_line(row, total_steps), file=sys.stdout)
            stopped = bool(world.sum(torch.tensor(len(stop), device=world.device)))  # a signal may reach one rank before another
            last = done + 1 == total_steps
            if cfg.checkpoint_every and (stopped or last or (done + 1) % cfg.checkpoint_every == 0):
                if world.rank == 0:
                    os.fsync(log.fileno())
                checkpoint.save(out, done + 1, model, optimizer, cfg.keep, world)
            if stopped and not last:
                kept = f"; its checkpoint is saved, start it again{' without --overwrite' * cfg.overwrite} to go on"
                kept = kept if cfg.checkpoint_every else "; nothing is saved (--checkpoint-every 0)"
                print(f"stopped by SIGTERM after step {done + 1} of {total_steps}{kept}", flush=True)
                return False
    return True


def lr_at(step: int, total_steps: int, lr: float, schedule: str, warmup_ratio: float) -> float:
    """Learning rate after `step` finished steps: linear warm-up over ceil(ratio · total), never 0, then the schedule to 0."""
    warmup = math.ceil(warmup_ratio * total_steps - 1e-9)  # 0.07 of 100 is 7, in floats too
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (total_steps - warmup)
    return lr * {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]


def update(
    model: Llama, optimizer: torch.optim.Optimizer, batches: list[Batch], cfg: Config, done: int, total_steps: int, world: World
) -> dict:
    """One optimizer step, the one after `done` others; returns its part of the log.

    Raises:
        ValueError: the loss or the gradient is not finite; the parameters are then as they were.
    """
    lam = lam_at(done, total_steps, cfg.lam_max, cfg.lam_min)
    objective, label = partial(sft_go, lam=lam, worst=cfg.worst), groupers.labeller(cfg.grouper, cfg.eta)
    if cfg.scope == "step":
        nats, tokens = step(model, batches, objective, label, world.sum, probe=lam > 0 and cfg.grouper != "none")
        loss = objective(nats, tokens)
    else:
        nats, tokens, loss = micro_batch_step(model, batches, objective, label, world.sum)
    combine_gradients(model, world)
    grad_norm = clip_gradients(model, cfg.clip, world)
    lr = lr_at(done, total_steps, cfg.lr, cfg.schedule, cfg.warmup_ratio)
    row = metrics(nats, tokens) | {"lam": lam, "lr": lr, "grad_norm": grad_norm}
    row = {"loss": float(loss), **row}
    if not math.isfinite(row["loss"]) or not math.isfinite(grad_norm):
        raise ValueError(
            f"step {done + 1}: loss is {row['loss']:.4g} (important {shown(row['important'])}, unimportant {shown(row['unimportant'])}), "
            f"gradient norm {grad_norm:.4g}. Not updated, and no model written; the metrics up to here are kept. "
            "A lower --lr, more --warmup-ratio or --dtype float32 are the usual cures"
        )
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return row


def metrics(nats: Tensor, tokens: Tensor) -> dict:
    """Both groups' means in nats per token, their counts, and which is the worse."""
    (n0, n1), (t0, t1) = nats.tolist(), tokens.tolist()
    unimportant, important = n0 / t0 if t0 else None, n1 / t1 if t1 else None
    return {
        "ce": (n0 + n1) / (t0 + t1),
        "important": important,
        "unimportant": unimportant,
        "important_tokens": t1,
        "unimportant_tokens": t0,
        "worst": "important" if t1 and (not t0 or important >= unimportant) else "unimportant",
    }


def shown(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.3f}"


def log_line(row: dict, total_steps: int) -> str:
    return (
        f"step {row['step']}/{total_steps} | loss {row['loss']:.3f} | ce {row['ce']:.3f} | important {shown(row['important'])} "
        f"({row['important_tokens']:,}) | unimportant {shown(row['unimportant'])} ({row['unimportant_tokens']:,}) | "
        f"lr {row['lr']:.1e} | grad {row['grad_norm']:.2f} | {row['tokens_per_second'] / 1e3:.1f}k tok/s"
    )


def print_sample(model: Llama, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """One greedy answer to the data's first prompt (plain text: to its first words)."""
    first = slice(*corpus.starts[:2])
    ids, kind = corpus.ids[first], corpus.kind[first]
    prompt = ids[:24] if corpus.template == "text" else ids[: int((kind == data.RESPONSE).argmax())]
    room = min(128, model.cfg.max_position_embeddings - len(prompt))
    answer = model.generate([prompt.tolist()], room, stop_ids=tuple(tokenizer.stop_ids(corpus.template)))[0]
    print(f"sample  {tokenizer.decode(prompt.tolist()).strip()}\n      → {tokenizer.decode(answer).strip()}")


def main() -> None:
    try:
        train(parse_args())
    except (ValueError, OSError) as e:
        if dist.is_initialized():  # no orderly end: it would wait for ranks that are gone
            print(f"error: {e}", file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(f"error: {e}")
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        sys.exit(f"error: out of memory ({str(e).splitlines()[0]}); lower --micro-batch-tokens or --context")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint, where there is an --out and one in it")


if __name__ == "__main__":
    main()
