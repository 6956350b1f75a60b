"""Fine-tune a Llama with SFT-GO: configuration, one optimizer step, sharding, the loop.

    python train.py                                     the demo, on a CPU, in about a minute
    torchrun --nproc-per-node 8 train.py --recipe …     the same code; --recipe list prints the paper's runs

One step: a batch of samples, cut into micro-batches -> loss of each supervised token -> nats and tokens of each group,
summed over the whole step -> price = ∂objective / ∂nats of each group -> backward on Σ price · nats -> AdamW.

T positions of a micro-batch, K groups.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # a CPU compiles kernels for every row length; keep few
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # rows of many lengths: no fragments
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # one progress bar is enough

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import groupers
from data import TEMPLATES, Batch, Corpus
from model import Llama, LlamaConfig, Packed
from published.config import read_config
from published.hub import data_file, resolve
from published.weights import DTYPES
from sftgo import OBJECTIVES, group_sums, lam_at, price
from support import checkpoint, flags, report, scores
from support.guess import Guess, groups_before, same
from support.llmlingua2 import LLMLINGUA2
from support.named import Named, named
from support.ranks import Ranks, command, everywhere, own_rows
from support.recipes import RECIPES, table

Objective = Callable[[Tensor, Tensor], Tensor]  # (nats, tokens) of the groups, (K,) each -> loss, ()
Label = Callable[[Tensor, Batch], Tensor]  # (detached nll (T,), batch) -> group (T,)
Method = tuple[Named, Label | None, int]  # objective (nats, tokens, λ) -> loss; label, where losses decide groups; K

# Configuration: a field is a flag. What it must be stands beside it, as a test and in words.

UNIT = (lambda x: 0 <= x <= 1), "in [0, 1]"
BELOW_ONE = (lambda x: 0 <= x < 1), "in [0, 1)"
POSITIVE = (lambda x: 0 < x < 2**31), "above 0, below 2^31"
NOT_NEGATIVE = (lambda x: 0 <= x < 2**31), "0 or above, below 2^31"
NAMES, SCOPES, SHARDS = ("list", *RECIPES), ("step", "micro_batch"), ("fsdp", "ddp")
SCHEDULES, COMPUTE_DTYPES = ("cosine", "linear", "constant"), ("bfloat16", "float32")


def opt(default, help: str, check: tuple = ((lambda x: True), ""), choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "check": check, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; one command-line flag each, generated from here."""

    recipe: str | None = opt(None, "named settings; other flags override them; list prints them", choices=NAMES)
    model: str | None = opt(None, "folder in the published layout, or a Hub name")
    fresh: bool = opt(False, "start from random weights, for a --model folder that has a config and no weights")
    data: str | None = opt(None, "training data: JSON, JSONL (also .gz), Parquet; or hf://datasets/ORG/NAME/FILE")
    template: str = opt("auto", "how a row becomes text; auto follows the data", choices=("auto", *TEMPLATES))
    context: int = opt(4096, "tokens a sample is cut to", ((lambda x: 2 <= x < 2**31), "at least 2"))
    batch_size: int = opt(64, "samples in an optimizer step", POSITIVE)
    micro_batch_tokens: int = opt(8192, "maximum tokens per forward pass: memory and speed; see --scope", POSITIVE)
    epochs: int = opt(15, "passes over the data", POSITIVE)
    max_steps: int | None = opt(None, "end after this many optimizer steps; the schedules end there too", POSITIVE)
    drop_last: bool = opt(False, "skip an epoch's last, short batch")

    objective: str | Callable | None = opt(
        None, f"{', '.join(OBJECTIVES)} or FILE.py:NAME (default: sft_go; with --grouper none: cross_entropy)"
    )
    grouper: str | Callable = opt("tfidf", f"{', '.join(groupers.GROUPERS)} or FILE.py:NAME")
    eta: tuple[float, ...] = opt(
        (0.9,), "percentile: 0.9 makes a sample's top 10 %% important; two values make three groups", UNIT
    )
    lam_max: float = opt(0.9, "weight of the worst group at the first step; 0 is ordinary SFT", UNIT)
    lam_min: float | None = opt(None, "where that weight decays to (default: it stays at --lam-max)", UNIT)
    reference: str | None = opt(None, "rho1: the frozen model of the same domain, a folder or a Hub name")
    llmlingua_model: str = opt(LLMLINGUA2, "llmlingua2: its token classifier, a folder or a Hub name")
    scope: str = opt("step", "tokens that group means run over: the step's, or each micro-batch's", choices=SCOPES)

    lr: float = opt(1e-5, "peak learning rate", POSITIVE)
    schedule: str = opt("cosine", "learning rate after warm-up; cosine and linear go to 0", choices=SCHEDULES)
    warmup_ratio: float = opt(0.0, "share of all steps that warm up", BELOW_ONE)
    weight_decay: float = opt(0.1, "AdamW's, on matrices only", NOT_NEGATIVE)
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's", BELOW_ONE)
    eps: float = opt(1e-8, "AdamW's", POSITIVE)
    clip: float = opt(1.0, "largest gradient norm; 0 does not clip", NOT_NEGATIVE)
    seed: int = opt(0, "of the data order, the random grouper and fresh weights", NOT_NEGATIVE)
    dtype: str = opt("bfloat16", "compute type; parameters, gradients and AdamW stay float32", choices=COMPUTE_DTYPES)

    shard: str | None = opt(None, "over several ranks: fsdp splits the model (default), ddp copies it", choices=SHARDS)
    compile: bool = opt(False, "compile the blocks by torch.compile, for all row lengths; it takes a minute or more")
    checkpoint_activations: bool = opt(False, "keep only each block's input; recompute the block in backward")
    checkpoint_every: int = opt(50, "steps between checkpoints, also at the end and on SIGTERM; 0: none", NOT_NEGATIVE)
    keep: int = opt(2, "checkpoints to keep, the newest", POSITIVE)
    out: str | None = opt(None, "run folder, where an interrupted run resumes (default: the next runs/<recipe>-<n>)")
    cache: str | None = opt(None, "folder of scores and reference losses, for runs to share (default: OUT/cache)")
    save_dtype: str | None = opt(None, "type of the saved weights (default: the compute type)", choices=tuple(DTYPES))
    dry_run: bool = opt(False, "print the plan and stop")

    def __post_init__(self):
        usual = {"lam_min": self.lam_max, "objective": "cross_entropy" if self.grouper == "none" else "sft_go"}
        for name in [name for name in usual if getattr(self, name) is None]:
            object.__setattr__(self, name, usual[name])
        for f in fields(self):
            (holds, expected), value = f.metadata["check"], getattr(self, f.name)
            for x in value if isinstance(value, tuple) else (value,):
                if x is not None and not holds(x):
                    raise ValueError(f"--{f.name.replace('_', '-')} {x}: expected {expected}")
        for name in ("objective", "grouper"):
            if (found := named(getattr(self, name), f"--{name}")).digest is None:  # ours, perhaps the function itself
                object.__setattr__(self, name, found.name)
        if self.grouper == "none":
            object.__setattr__(self, "eta", self.eta[:1])  # two groups, one of them empty
        tokens, none, rho1 = self.micro_batch_tokens, self.grouper == "none", self.grouper == "rho1"
        missing = "--data" if self.model else "--model"
        for wrong, message in (
            (not (self.model and self.data), f"{missing} is missing; give --model and --data, or neither: the demo"),
            (self.lam_min > self.lam_max, f"--lam-min {self.lam_min} is above --lam-max {self.lam_max}"),
            (tokens < self.context - 1, f"--micro-batch-tokens {tokens} cannot hold --context {self.context}"),
            (none and self.objective == "important_only", "--objective important_only needs a --grouper"),
            (rho1 and not self.reference, "--grouper rho1 needs --reference, a model of the same domain"),
            (not rho1 and self.reference, f"--reference is for --grouper rho1 alone, not {self.grouper}"),
            (self.cache and Path(self.cache).is_file(), f"--cache {self.cache}: a file, expected a folder"),
        ):
            if wrong:
                raise ValueError(message)


SECTIONS = {"recipe": "model and data", "objective": "SFT-GO", "lr": "optimization", "shard": "run"}  # by first field
METAVARS = {str: "PATH", int: "N", float: "X"} | dict.fromkeys(("recipe", "objective", "grouper"), "NAME")


def parse_args(argv: list[str] | None = None) -> Config:
    """Flags -> Config: defaults, then the recipe's values, then what was given."""
    argv = sys.argv[1:] if argv is None else argv
    about = "Fine-tune a Llama with SFT-GO. Without --model and --data it runs the demo."
    given = flags.given(Config, argv, about, SECTIONS, METAVARS)
    if given.get("recipe") == "list":
        print(table())
        raise SystemExit
    if not given.keys() & {"recipe", "model", "data"}:
        given["recipe"] = "demo"
    given = RECIPES.get(given.get("recipe"), {}) | given
    if given.get("grouper") == "rho1" and not given.get("reference"):
        raise ValueError(scores.how_to_reference(argv))
    return Config(**given)


# The step.


def sums(model: Llama, batch: Batch, label: Label, groups: int, weigh=None) -> tuple[Tensor, Tensor, Tensor]:
    """(nats, tokens, unweighted nats) of a micro-batch's groups, (K,) each; the third, for the log, has no gradient.

    The first call fixes `batch.group` and `batch.weight`; later calls reuse them.
    """
    nll = batch.nll(model)
    if batch.group is None:
        batch.group = label(nll.detach().clone(), batch)  # a copy: a user's function may change it in place
    if batch.weight is None and weigh:
        batch.weight = weigh(nll.detach().clone(), batch)
    nats, tokens = group_sums(nll, batch.group, batch.loss_mask, groups)
    if batch.weight is None:
        return nats, tokens, nats.detach()
    weight = batch.weight.detach().where(batch.weight >= 0, math.nan)  # no wait here: `update` stops at a loss of nan
    return group_sums(weight * nll, batch.group, batch.loss_mask, groups)[0], tokens, nats.detach()


def backward(prices: Tensor, nats: Tensor) -> None:
    (prices.to(nats.dtype) * nats).sum().backward()


def step(model, batches, objective, label, reduce=lambda t: t, groups=2, constant_price=False, weigh=None, guess=None):
    """Add this rank's part of one optimizer step's gradient to `.grad`; return the step's `sums`, (K,) each.

    The parameters change the loss only through nats. So the gradient is Σ_k price_k · ∇nats_k. It is exact for any
    split into micro-batches and ranks. The step's gradient is the sum of the ranks' parts.

    Args:
        batches:        this rank's micro-batches; every rank has the same number.
        reduce:         sums a tensor over ranks, so every rank computes the same prices.
        constant_price: every price is 1 / (all tokens), as in plain cross-entropy: no extra forward pass.
        weigh:          (detached nll (T,), batch) -> weight of each token (T,); without it, each weighs 1.
        guess:          prices (K,) to try before they are known, from empty gradients; a wrong one changes no result.
    """

    def accumulate(prices: Tensor, held=()) -> tuple[Tensor, ...]:
        parts = []
        for part in held or (sums(model, batch, label, groups, weigh) for batch in batches):
            backward(prices, part[0])
            parts.append([t.detach() for t in part])
        return total(parts, reduce)

    if constant_price:
        tokens = reduce(torch.stack([batch.loss_mask.sum() for batch in batches]).sum())  # () of the whole step
        return accumulate((1 / tokens.double()).expand(groups))
    if guess is not None:
        found = accumulate(guess)
        prices = price(objective, *found[:2])
        if same(prices, guess, reduce):
            return found
        model.zero_grad()
        return accumulate(prices)
    alone = len(batches) == 1  # keep its graph; with more, forward again: 1/3 more work
    with torch.set_grad_enabled(alone):
        held = [sums(model, batch, label, groups, weigh) for batch in batches]
    return accumulate(price(objective, *total(held, reduce)[:2]), held if alone else ())


def micro_batch_step(model, batches, objective, label, reduce=lambda t: t, groups=2, weigh=None) -> tuple[Tensor, ...]:
    """`--scope micro_batch`: Σ_m (N_m / N) · objective(micro-batch m), the loss that an ordinary trainer approximates.

    Returns the step's `sums` and its loss.
    """
    supervised = torch.stack([batch.loss_mask.sum() for batch in batches])
    parts, loss = [], supervised.new_zeros((), dtype=torch.float64)
    for batch, share in zip(batches, supervised.double() / reduce(supervised.sum())):
        nats, tokens, unweighted = sums(model, batch, label, groups, weigh)  # (K,) each
        prices = price(objective, nats, tokens) if share else nats.new_zeros(groups)  # share 0: a row by `blank`
        backward(share * prices, nats)
        loss += share * objective(nats.detach().double(), tokens) if share else 0.0
        parts.append([nats.detach(), tokens, unweighted])
    return *total(parts, reduce), reduce(loss)


def total(parts: list, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """The sums over micro-batches and ranks, in float64."""
    columns = [torch.stack(column).detach().double().sum(0) for column in zip(*parts)]
    return reduce(torch.stack(columns)).unbind()


# Sharding.


def build(cfg: Config, folder: Path, ranks: Ranks) -> Llama:
    """The model with its weights. Under fsdp a rank builds and reads its own rows of every parameter, and no more."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**read_config(folder)), DTYPES[cfg.dtype])
    if cfg.compile:  # once for all row lengths; attention stays outside, because documents differ from row to row
        Packed.attend = torch.compiler.disable(Packed.attend)
        for block in model.model.layers:
            block.compile(dynamic=True)
    if ranks.size > 1 and cfg.shard == "fsdp":
        mesh = dist.init_device_mesh(ranks.device.type, (ranks.size,))
        cast = MixedPrecisionPolicy(DTYPES[cfg.dtype], torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=cast)
        fully_shard(model, mesh=mesh, mp_policy=cast)  # a root stays gathered after forward: `nll` uses lm_head.weight
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)  # sum over ranks, not mean: prices use the whole step's tokens
                module.set_force_sum_reduction_for_comms(True)
    model.recompute = cfg.checkpoint_activations
    return model.fill(folder, ranks.device, cfg.seed if cfg.fresh else None, own_rows)


def finish_gradients(model: Llama, largest: float, ranks: Ranks) -> float:
    """Sum gradients over ranks (fsdp has done it), clip them to norm `largest` (0: no clipping), return the norm."""
    grads = [p.grad for p in model.parameters()]
    if sharded := isinstance(grads[0], DTensor):
        grads = [grad.to_local() for grad in grads]
    elif ranks.size > 1:
        flat = torch.cat(small := [grad for grad in grads if grad.ndim == 1])  # the norms' go together
        for grad in (flat, *(grad for grad in grads if grad.ndim > 1)):
            dist.all_reduce(grad)
        torch._foreach_copy_(small, flat.split([*map(len, small)]))
    norm = torch.nn.utils.get_total_norm(grads)
    norm = ranks.sum(norm.square()).sqrt() if sharded else norm  # one sum; clip_grad_norm_ makes one a parameter
    if largest:
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


# The loop.


def lr_at(step: int, total_steps: int, lr: float, schedule: str, warmup_ratio: float) -> float:
    """Learning rate after `step` finished steps: linear warm-up over ceil(ratio · total), never 0; then `schedule`."""
    warmup = math.ceil(warmup_ratio * total_steps - 1e-9)  # 0.07 of 100 is 7, in floats too
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / (total_steps - warmup)
    return lr * {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[schedule]


def update(model, optimizer, batches, cfg, method, done: int, total_steps: int, ranks, guess=None, counts=None) -> dict:
    """One optimizer step, the one after `done` others; returns its part of the log.

    A `Guess` that is kept from step to step saves forward passes; `counts` (K,) are the tokens of this step's groups.
    ValueError, with the parameters unchanged, where the loss or the gradient is not finite or not the objective's.
    """
    lam, reduce, (chosen, label, groups) = lam_at(done, total_steps, cfg.lam_max, cfg.lam_min), ranks.reducer(), method
    weigh, constant = getattr(chosen, "weigh", None), getattr(chosen, "constant_price", lambda lam: False)(lam)

    def objective(nats: Tensor, tokens: Tensor) -> Tensor:
        return chosen(nats.clone(), tokens.double().clone(), lam)  # copies: see `sums`

    supervised = reduce(torch.stack([batch.loss_mask.sum() for batch in batches]).sum())
    several, guess = len(batches) > 1 and not constant, guess or Guess()
    with model.cast_once():
        if cfg.scope == "micro_batch":
            nats, tokens, unweighted, loss = micro_batch_step(model, batches, objective, label, reduce, groups, weigh)
        else:
            first = guess.make(objective, counts) if several else None
            nats, tokens, unweighted = step(model, batches, objective, label, reduce, groups, constant, weigh, first)
            loss = objective(nats, tokens)
            if several:
                guess.learn(objective, nats, tokens, reduce)
    norm = finish_gradients(model, cfg.clip, ranks)
    lr = lr_at(done, total_steps, cfg.lr, cfg.schedule, cfg.warmup_ratio)
    row = {"loss": float(loss), **report.group_means(unweighted, tokens), "lam": lam, "lr": lr, "grad_norm": norm}
    prices = partial(price, objective, nats, tokens)
    if fault := report.fault(row, chosen, nats, tokens, supervised, constant, prices, cfg.grouper):
        saved = f"Not updated, and no model written. Last checkpoint: {checkpoint.newest(cfg.out)}"
        raise everywhere(ValueError(f"step {done + 1}: {fault}. {saved}"))
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if hasattr(chosen, "update"):
        chosen.update(nats, tokens)
    return row


def steps_of(cfg: Config, corpus: Corpus) -> tuple[int, int]:
    """Optimizer steps of the run, and of an epoch."""
    per_epoch = len(data.epoch_order(len(corpus), cfg.batch_size, cfg.seed, 0, cfg.drop_last))
    return min(cfg.epochs * per_epoch, cfg.max_steps or sys.maxsize), per_epoch


def loop(cfg: Config, method: Method, model, corpus: Corpus, prior, groups, ranks: Ranks) -> bool:
    """Run the remaining steps; return False if a SIGTERM stopped them.

    `groups` is (tokens,): each token's group, or where the method has a label to ask, groups that are as large.
    """
    (objective, label, K), (total_steps, per_epoch) = method, steps_of(cfg, corpus)
    mask, guess, known = corpus.loss_mask, Guess(), groups if label is None else None
    size = np.bincount((corpus.doc_ids * K + groups)[mask], minlength=len(corpus) * K).reshape(-1, K)  # of each sample
    matrices, norms = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    sets = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(sets, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    begun = checkpoint.resume(Path(cfg.out), model, optimizer, objective, ranks)
    print(f"run     {cfg.out}, on {ranks}" + (f", after step {begun}" if begun else ""))
    log = open(f"{cfg.out}/metrics.jsonl" if ranks.rank == 0 else os.devnull, "a", encoding="utf-8")
    bar = tqdm(total=total_steps, initial=begun, unit="step", disable=None, dynamic_ncols=True)
    with ranks.sigterm() as asked_to_stop, log, bar:
        for done in range(begun, total_steps):
            epoch, at = divmod(done, per_epoch)
            if at == 0 or done == begun:
                order = data.epoch_order(len(corpus), cfg.batch_size, cfg.seed, epoch, cfg.drop_last)
            began = time.perf_counter()
            which = corpus, prior, order[at], cfg.micro_batch_tokens, ranks.rank, ranks.size, known
            batches = [batch.to(ranks.device) for batch in data.micro_batches(*which)]
            counts = torch.from_numpy(size[order[at]].sum(0)).double().to(ranks.device)  # (K,)
            row = {"step": done + 1, "epoch": epoch}
            row |= update(model, optimizer, batches, cfg, method, done, total_steps, ranks, guess, counts)
            row |= report.speed(int((corpus.lengths[order[at]] - 1).sum()), began, ranks.device)
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix_str(report.brief(row, cfg.grouper))
            bar.update()
            last = done + 1 == total_steps
            if done == begun or last or (done + 1) % math.ceil(total_steps / 10) == 0:
                bar.write(f"step {done + 1}/{total_steps} | {report.line(row, cfg.grouper)}", file=sys.stdout)
            stop = asked_to_stop()
            if cfg.checkpoint_every and (stop or last or (done + 1) % cfg.checkpoint_every == 0):
                checkpoint.save(Path(cfg.out), done + 1, model, optimizer, objective, cfg.keep, ranks)
            if stop and not last:
                how = f"resume with --out {cfg.out}" if cfg.checkpoint_every else "nothing saved (--checkpoint-every 0)"
                print(f"stopped by SIGTERM after step {done + 1} of {total_steps}; {how}", flush=True)
                return False
    if guess.steps:
        print("prices  " + ", ".join(f"{what} in {n} steps" for what, n in sorted(guess.steps.items())))
    return True


def train(cfg: Config, objective=None, grouper=None) -> Path | None:
    """Run `cfg` to its end; returns the run folder (None after --dry-run).

    Args:
        objective, grouper: in the place of cfg's: a name, FILE.py:NAME, or the object itself.

    Raises:
        ValueError, OSError: one line about what is wrong; on other ranks too, about the one that has it.
        SystemExit: 143, after a SIGTERM; its checkpoint is saved.
    """
    if grouper and not objective and "none" in (cfg.grouper, grouper):
        raise ValueError("a grouper in the place of none, or none in the place of one: give the objective, too")
    with Ranks() as ranks:
        shard, given = (cfg.shard or "fsdp") if ranks.size > 1 else None, {"objective": objective, "grouper": grouper}
        cfg = replace(cfg, shard=shard, **{k: x for k, x in given.items() if x is not None})
        objective, grouper = named(cfg.objective, "--objective"), named(cfg.grouper, "--grouper")
        folder = ranks.each(lambda: resolve(cfg.model))
        llama, tokenizer = ranks.each(lambda: scores.prepare(cfg, folder))
        about = ranks.first(lambda: checkpoint.record(cfg, objective, grouper))
        if cfg.out and ranks.first(lambda: checkpoint.finished(about, Path(cfg.out))):
            print(f"{cfg.out}: this run is already finished; nothing to do")
            return Path(cfg.out)
        file = ranks.each(lambda: data_file(cfg.data))
        corpus = ranks.each(lambda: data.load_corpus(file, tokenizer, cfg.template, cfg.context))
        prior = ranks.each(lambda: scores.without_model(grouper, corpus, cfg.seed))
        about_run = cfg, (objective, grouper), corpus, llama, folder, prior, steps_of(cfg, corpus), ranks.size
        room = ranks.each(lambda: report.plan(*about_run))
        if cfg.dry_run:
            return None
        with checkpoint.run_folder(cfg, about, ranks) as out:
            cfg = replace(cfg, out=str(out))
            if prior is None:
                prior = scores.with_model(cfg, grouper, corpus, Path(cfg.cache or out / "cache"), ranks)
            K = max(ranks.together(lambda: scores.how_many(grouper, prior, corpus.loss_mask, cfg.eta)))
            groups = groups_before(grouper, cfg.eta, corpus, prior, cfg.seed)
            label = groupers.labeller(grouper, cfg.eta) if getattr(grouper, "in_step", False) else None
            method = objective, label, K
            model, saved_as = ranks.each(lambda: build(cfg, folder, ranks)), DTYPES[cfg.save_dtype or cfg.dtype]
            model.room_to_cast = room
            checkpoint.finite(model, saved_as, ranks, f"{cfg.model}: as loaded,", "nothing trained. Choose a wider")
            if not loop(cfg, method, model, corpus, prior, groups, ranks):
                raise SystemExit(143)  # 128 + SIGTERM: not finished, for whoever starts it again
            checkpoint.export(model, tokenizer, corpus.template, saved_as, out, ranks)
            if ranks.rank == 0:
                with torch.compiler.set_stance("force_eager") if cfg.compile else nullcontext():
                    report.ending(out, model, tokenizer, corpus)
            return out


def main() -> None:
    command(lambda: train(parse_args()), "lower --micro-batch-tokens or --context", "interrupted; nothing is saved yet")


if __name__ == "__main__":
    main()
