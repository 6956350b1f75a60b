"""What a run says of itself: the plan before it, a line for each step, a picture and an answer after it."""

import json
import math
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import groupers
from data import RESPONSE, Corpus
from model import Llama, LlamaConfig
from published.tokenizer import Tokenizer
from published.weights import DTYPES, weight_files
from support.generate import generate
from support.named import UNKNOWN, Named
from support.ranks import first_line

# A step.


def group_means(nats: Tensor, tokens: Tensor) -> dict:
    """The groups' means in nats per token, their counts, and which has the highest mean.

    `important` is the last group, `unimportant` the first.
    """
    means = [n / t if t else None for n, t in zip(nats.tolist(), tokens.tolist())]
    counts, unimportant, important = [int(t) for t in tokens.tolist()], means[0], means[-1]
    higher = important is not None and (unimportant is None or important >= unimportant)
    row = {"ce": float(nats.sum() / tokens.sum()), "important": important, "unimportant": unimportant}
    row |= {"important_tokens": counts[-1], "unimportant_tokens": counts[0]}
    if len(means) == 2:
        return row | {"worst": "important" if higher else "unimportant"}
    known = [-math.inf if mean is None else mean for mean in means]
    worst = max(range(len(known)), key=lambda k: (known[k], k))  # on a tie the last, as in `sft_go`
    return row | {"worst": f"group {worst}", "groups": [*map(list, zip(means, counts))]}


def groups_of(row: dict) -> dict[str, tuple[float | None, int]]:
    """Name -> (mean, tokens) of each group of a line of metrics.jsonl."""
    if "groups" in row:
        return {f"group {k}": tuple(group) for k, group in enumerate(row["groups"])}
    return {name: (row[name], row[f"{name}_tokens"]) for name in ("important", "unimportant")}


def fault(
    row: dict,
    objective: Named,
    nats: Tensor,
    tokens: Tensor,
    supervised: Tensor,
    constant: bool,
    prices: Callable[[], Tensor],
    grouper: object = "",
) -> str:
    """What forbids the update, after a step's gradient is there; "" if nothing does.

    Args:
        row:          what the log would have.
        nats, tokens: the step's sums, (K,) each, and how many tokens are `supervised`, ().
        constant:     the objective said that its price is.
        prices:       makes the step's prices, (K,).
        grouper:      with "none" the message leaves out the groups.
    """
    if tokens.sum() != supervised:
        return f"the grouper gave labels outside 0 … {len(tokens) - 1}, or scores of nan"
    if constant and not ((costs := prices()[tokens > 0] * tokens.sum()) - 1).abs().max() <= 1e-5:
        found = listed([f"{x:.4g}" for x in costs.tolist()], ", ")
        return f"{objective} calls its price constant, but a nat of its groups costs {found} times 1 / (all tokens)"
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) and nats.isfinite().all():
        return ""
    if math.isfinite(row["ce"]):
        if not nats.isfinite().all():
            return f"{line(row, grouper)}: {objective} made it by weights that are below 0 or not finite"
        if not math.isfinite(row["loss"]) or not prices()[tokens > 0].isfinite().all():
            return f"{line(row, grouper)}: {objective} made it of finite losses"
    return f"{line(row, grouper)}. Lower --lr or use --dtype float32"


def short(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.3f}"


def listed(parts: list[str], between: str, most: int = 12) -> str:
    """At most so many, then a dot for the rest."""
    return between.join(parts[:most] + ["…"] * (len(parts) > most))


def line(row: dict, grouper: object = "") -> str:
    """A line of metrics.jsonl for the terminal; with `--grouper none` there are no groups in it."""
    groups = [f"{name} {short(mean)} ({tokens:,})" for name, (mean, tokens) in groups_of(row).items()]
    groups = "" if grouper == "none" else f" | {listed(groups, ' | ')}"
    speed = f" | {row['tokens_per_second'] / 1e3:.1f}k tok/s" if "tokens_per_second" in row else ""
    rates = f"lr {row['lr']:.1e} | grad {row['grad_norm']:.2f}"
    return f"loss {row['loss']:.3f} | ce {row['ce']:.3f}{groups} | {rates}{speed}"


def brief(row: dict, grouper: object = "") -> str:
    means = {"ce": (row["ce"], 0)} if grouper == "none" else groups_of(row)
    means = [f"{name} {short(mean)}" for name, (mean, _) in means.items()]
    return f"loss {row['loss']:.3f}, {listed(means, ', ')}"


def speed(tokens: int, began: float, device: torch.device) -> dict:
    """Of a step that read so many tokens; `began` is what `time.perf_counter` said."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # AdamW may still be at work
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_memory_bytes": peak}


# The plan.


def memory_needed(
    cfg: LlamaConfig,
    parameters: int,
    positions: int,
    compute_bytes: int,
    ranks: int = 1,
    recompute: bool = False,
    several: bool = False,
    cast_once: bool = False,
) -> dict[str, int]:
    """Bytes of tensors on one GPU at the fullest moment of a step, by what they are for.

    All the time there are 12 bytes a parameter, float32: itself and AdamW's two moments. In backward, gradients
    (4 bytes a parameter) come while activations go, so the fullest moment is one of these:
    - Backward begins. A layer keeps of each position its input, its MLP's input, both normalized, q, k, v, the
      attention's output and four feed-forward rows. The head has its gradient, its cast weight and 4,096 rows of
      logits, once as computed and once in float32.
    - The last layer, or the first, is at work, with half as much again for gradients of what it keeps.
    - The embedding has two gradients: one may be of the tied head, or of the micro-batches before.

    Args:
        ranks:     fsdp's: each holds a part of parameters, gradients and moments. Embedding and head stay gathered, a
                   block comes and goes; gradients are complete for a moment, in float32.
        recompute: layers keep their input alone; one at a time makes the rest again.
        several:   micro-batches add up gradients, which are there from the first on.
        cast_once: the blocks' weights in the compute dtype are there all the time, too.
    """
    D, ff, c = cfg.hidden_size, cfg.intermediate_size, compute_bytes
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    layer = positions * (c * (4 * D + 2 * q + 2 * kv + 4 * ff) + 4 * (cfg.num_attention_heads + 2))
    kept = cfg.num_hidden_layers * (positions * c * D if recompute else layer)
    block, embedding = D * (2 * q + 2 * kv + 3 * ff + 2), cfg.vocab_size * D
    root, rows = parameters - cfg.num_hidden_layers * block, min(4096, positions)
    logits = c * rows * cfg.vocab_size + max(4 * rows * cfg.vocab_size, c * embedding)
    logits += 4 * embedding + (c * embedding if c < 4 and ranks == 1 else 0)
    gradients = 4 * parameters // ranks
    begun, twice = several * gradients, 4 * embedding if several or cfg.tie_word_embeddings else 0
    gathered, passing, reduced = (c * root, (3 * c + 4) * block, 4 * root) if ranks > 1 else (0, 0, 0)
    end = gradients - reduced // ranks if ranks > 1 else gradients + twice
    moments = (  # gradients, activations, logits, gathered
        (begun, kept + positions * 3 * c * D, logits, gathered),
        (begun, kept + layer // 2 + recompute * layer, 0, gathered + passing),
        (gradients, layer + layer // 2, 0, gathered + passing),
        (end, 0, 0, gathered + reduced),
    )
    names = "weights, AdamW", "weights as computed", "gradients", "activations", "logits", "gathered"
    return dict(zip(names, (12 * parameters // ranks, cast_once * c * (parameters - root), *max(moments, key=sum))))


GPUS = {  # FLOP/s of large bf16 matmuls, bytes/s of memory, bytes/s that a rank of eight gets from the others
    "H100": (700e12, 3.0e12, 370e9),
    "H200": (700e12, 4.3e12, 370e9),
}


def forward_flops(cfg: LlamaConfig, positions: int, supervised: int, squares: float) -> float:
    """Multiplications and additions of a forward pass; `squares` is the sum of the documents' squared lengths.

    The head runs on the supervised positions alone, a position attends to half of its document on average.
    """
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    block = cfg.hidden_size * (2 * q + 2 * kv + 3 * cfg.intermediate_size)  # parameters
    matmuls = cfg.num_hidden_layers * block * positions + cfg.vocab_size * cfg.hidden_size * supervised
    return 2 * matmuls + 2 * cfg.num_hidden_layers * q * squares


def seconds_needed(
    cfg: LlamaConfig,
    parameters: int,
    step: tuple[float, float, float],
    micro_batches: int,
    ranks: int = 1,
    recompute: bool = False,
    gpu: str = "H100",
) -> float:
    """Seconds of a step of (positions, supervised, squares) by arithmetic, as if GPUs never waited for anything.

    Matmuls run forward, and twice as long backward; attention 2.5 times. The head makes its logits again, and with
    `recompute` the layers all of theirs. Bytes: what norms, rotation, silu and sums of a layer read and write, 40 for a
    logit; of a parameter 40 for clipping and AdamW, 6 to make its gradient float32 in each micro-batch, 12 to add it to
    those before, 6 for a cast of the weight: once a step where one GPU has several micro-batches (`Llama.cast_once`),
    else forward and backward in each. Over several ranks fsdp sends 8 bytes of a parameter a micro-batch meanwhile. The
    forward passes of a probe are not in it: prices are constant, or guessed right.
    """
    (rate, memory, link), (positions, supervised, squares) = GPUS[gpu], (x / ranks for x in step)
    D, ff, head = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size * cfg.hidden_size * supervised
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    flops = (3 + recompute) * forward_flops(cfg, positions, supervised, squares)
    flops += cfg.num_hidden_layers * q * squares + 2 * head * (1 - recompute)
    forward, backward = (20 * D + 12 * (q + kv) + 10 * ff, 42 * D + 12 * (q + kv) + 18 * ff)
    moved = cfg.num_hidden_layers * positions * ((1 + recompute) * forward + backward)
    moved += 40 * cfg.vocab_size * supervised
    casts = 1 if ranks == 1 and micro_batches > 1 else 2 * micro_batches
    moved += parameters * (40 / ranks + 6 * micro_batches + 12 * (micro_batches - 1) + 6 * casts)
    sent = 8 * parameters * micro_batches * (ranks - 1) / ranks
    return max(flops / rate + moved / memory, sent / link)


def expected(cfg, llama: LlamaConfig, parameters: int, corpus: Corpus, steps: int, ranks: int) -> str:
    """The run's time, for the plan; "" where `seconds_needed` does not know it.

    It does not know float32, nor ddp, nor a step that is shorter than it takes to start its kernels.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu, n = next((gpu for gpu in GPUS if gpu in name), "H100"), corpus.lengths - 1
    totals = n.sum(), corpus.loss_mask.sum(), (n.astype(float) ** 2).sum()
    step = [min(1, cfg.batch_size / len(corpus)) * float(total) for total in totals]
    micro_batches = math.ceil(step[0] / ranks / cfg.micro_batch_tokens)
    each = seconds_needed(llama, parameters, step, micro_batches, ranks, cfg.checkpoint_activations, gpu)
    if each <= 0.02 or cfg.dtype != "bfloat16" or (ranks > 1 and cfg.shard != "fsdp"):
        return ""
    s = steps * each
    long = f"about {s / 3600:.1f} hours" if s >= 6000 else f"about {s / 60:.0f} minutes" if s >= 120 else ""
    long = long or (f"about {s:.0f} seconds" if s >= 2 else "under two seconds")
    number = {1: "one", 2: "two", 4: "four", 8: "eight"}.get(ranks, ranks)
    return f"{long} on {number} {gpu}, by arithmetic"


def plan(
    cfg,
    functions: tuple[Named, Named],
    corpus: Corpus,
    llama: LlamaConfig,
    folder: Path,
    prior: np.ndarray | None,
    steps: tuple[int, int],
    ranks: int,
) -> bool:
    """Say, before anything large is loaded, what will be trained on what.

    Returns whether this GPU has room for `Llama.cast_once`, where that saves time.

    Args:
        functions: the objective and the grouper.
        prior:     None where it takes a model.
        steps:     of the run, of an epoch.

    Raises:
        ValueError: there is no step, or the disk cannot hold the checkpoints.
    """
    (objective, grouper), (steps, per_epoch) = functions, steps
    if not steps:
        cure = "lower --batch-size or leave out --drop-last"
        raise ValueError(f"{cfg.data}: {len(corpus)} samples make no full batch of {cfg.batch_size}; {cure}")
    counts, mask, lengths = dict(corpus.counts), corpus.loss_mask, np.sort(corpus.lengths - 1)
    rows, kept = counts.pop("rows"), counts.pop("kept")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(llama).parameters())
    positions = max(int(lengths[-1]), math.ceil(lengths[-cfg.batch_size :].sum() / ranks))
    several, positions = positions > cfg.micro_batch_tokens, min(cfg.micro_batch_tokens, positions)
    split, again = ranks if cfg.shard == "fsdp" else 1, cfg.checkpoint_activations
    arguments = llama, parameters, positions, DTYPES[cfg.dtype].itemsize, split, again, several
    memory, room = memory_needed(*arguments), False
    if several and split == 1 and cfg.dtype != "float32" and torch.cuda.is_available():
        more = memory_needed(*arguments, cast_once=True)
        if room := sum(more.values()) < 0.95 * torch.cuda.get_device_properties().total_memory:
            memory = more
    lam = f"{cfg.lam_max:g}" + f" → {cfg.lam_min:g}" * (cfg.lam_min != cfg.lam_max)
    groups = share(cfg, grouper, corpus, prior)
    method = f"{objective.name}, λ {lam}, scope {cfg.scope}; groups by {grouper.name}{groups}"
    unknown = [function.name for function in functions if (function.digest or "").startswith(UNKNOWN)]
    stuck = f"{' and '.join(unknown)} has no source to know it by again: this run cannot be resumed"
    fresh = "" if weight_files(folder) else " (fresh: no weights in the folder)"
    size = f"{12 * parameters / 1e9:.2g} GB each, every {cfg.checkpoint_every} steps, the newest {cfg.keep} kept"
    lines = {
        "data": f"{cfg.data}: {rows:,} rows, {kept:,} {'pieces' if corpus.template == 'text' else 'samples'} kept"
        + "".join(f"; {n:,} {what}" for what, n in counts.items())
        + f"; ignored: {listed(sorted(corpus.ignored), ', ')}" * bool(corpus.ignored),
        "tokens": f"{len(mask):,}, {mask.mean():.1%} supervised; longest sample {lengths[-1] + 1:,}; "
        f"template {corpus.template}",
        "method": method,
        "steps": f"{per_epoch:,} an epoch, {cfg.batch_size} samples each; {steps:,} in all; "
        f"micro-batches of up to {positions:,} tokens",
        "ranks": f"{ranks}, {cfg.shard}" if ranks > 1 else "",
        "model": f"{cfg.model}: {parameters / 1e6:,.1f}M parameters{fresh}, computed in {cfg.dtype}",
        "memory": f"about {sum(memory.values()) / 1e9:.2g} GB of tensors on {'each' if ranks > 1 else 'a'} GPU: "
        + ", ".join(f"{what} {n / 1e9:.2g}" for what, n in memory.items() if n),
        "time": expected(cfg, llama, parameters, corpus, steps, ranks)
        if cfg.dry_run or torch.cuda.is_available()
        else "",
        "saves": f"checkpoints: {size if cfg.checkpoint_every else 'none'}",
        "resume": stuck if unknown else "",
    }
    print("\n".join(f"{name:<8}{told}" for name, told in lines.items() if told))
    needed, free = 12 * parameters * (cfg.keep + 1) if cfg.checkpoint_every else 0, disk_free(cfg.out)
    if needed > free:
        taken = f"{cfg.keep} checkpoints and one being written take {needed / 1e9:.3g} GB"
        cure = "choose an --out on a larger disk, a smaller --keep, or --checkpoint-every 0"
        raise ValueError(f"{cfg.out or 'runs'}: {free / 1e9:.3g} GB free, but {taken}; {cure}")
    return room


def share(cfg, grouper: Named, corpus: Corpus, prior: np.ndarray | None) -> str:
    """How many of the supervised tokens are in which group, where that is known before the first step."""
    eta = f", η {' '.join(f'{eta:g}' for eta in cfg.eta)}: "
    if grouper.name == "none":
        return ""
    if getattr(grouper, "in_step", False):
        return f"{eta}labelled at each step" + f" against {cfg.reference}" * (grouper.name == "rho1")
    if prior is None:
        return f"{eta}{cfg.llmlingua_model} scores the answers"
    group, scored = groups_of_corpus(grouper, cfg.eta, corpus, prior)[corpus.loss_mask], prior.dtype.kind == "f"
    shares = [f"{n / len(group):.1%}" for n in np.bincount(group, minlength=len(cfg.eta) + 1 if scored else 1).tolist()]
    if scored and len(shares) == 2:
        return f"{eta}{shares[1]} of the supervised tokens important"
    how_many = f"{len(shares)} group{'s' * (len(shares) > 1)}"
    return f"{eta if scored else ': '}{how_many}, {listed(shares, ', ')} of the supervised tokens"


def groups_of_corpus(
    grouper: Named, etas: tuple[float, ...], corpus: Corpus, prior: np.ndarray, nats=None
) -> np.ndarray:
    """The group of each token, (tokens,) int; `nats` (tokens,) are needed by a grouper that looks at losses."""
    arrays = {"prior": prior, "loss_mask": corpus.loss_mask, "doc_ids": corpus.doc_ids}
    batch = SimpleNamespace(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    return groupers.labeller(grouper, etas)(None if nats is None else torch.from_numpy(nats), batch).numpy()


def disk_free(out: str | None) -> int:
    """Bytes free for checkpoints where the run folder is, or will be; its present ones will make room."""
    place = Path(out or "runs").absolute()
    held = sum(path.stat().st_size for path in place.glob("checkpoints/step-??????/*")) if out else 0
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free + held


# After it.


def ending(out: Path, model: Llama, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """The picture, what was written, and one greedy answer to the data's first prompt (of text: its first words)."""
    optional("losses.png", lambda: plot_losses(out))
    written = sorted(path.name for path in out.iterdir() if path.name not in ("cache", "lock"))
    print(f"wrote   {', '.join(written)} in {out}")
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):  # sharded: it would take all ranks, in step
        optional("sample", lambda: print(sample(model, tokenizer, corpus)))


def optional(what: str, make: Callable[[], None]) -> None:
    """Do what may fail without harm: the model is written."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a title in letters that the font has not
            make()
    except Exception as e:  # a broken library raises anything
        print(f"no {what}: {first_line(e)}")


def sample(model: Llama, tokenizer: Tokenizer, corpus: Corpus) -> str:
    """The first prompt and the model's greedy answer."""
    ids, kind = corpus.ids[: corpus.starts[1]], corpus.kind[: corpus.starts[1]]
    prompt = ids[:24] if corpus.template == "text" else ids[: int((kind == RESPONSE).argmax())]
    room = min(128, model.cfg.max_position_embeddings - len(prompt))
    answer = generate(model, [prompt.tolist()], room, stop_ids=tokenizer.stop_ids(corpus.template))[0]
    return f"sample  {tokenizer.decode(prompt.tolist()).strip()}\n      → {tokenizer.decode(answer).strip()}"


def plot_losses(out: Path) -> None:
    """losses.png, Figure 2 of the paper for this run: all tokens and each group."""
    try:
        import matplotlib
    except ImportError:
        print('no losses.png: matplotlib is not installed; pip install -e ".[plots]"')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(out / "metrics.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    colours = {"important": "tab:red", "unimportant": "tab:blue", "all": "black"}
    curves = {name: [(row["step"], groups_of(row)[name][0]) for row in rows] for name in groups_of(rows[0])}
    curves = {name: [point for point in points if point[1] is not None] for name, points in curves.items()}
    if sum(map(bool, curves.values())) < 2:
        curves = {}  # one group is all
    curves["all"] = [(row["step"], row["ce"]) for row in rows]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for n, (name, points) in enumerate((name, points) for name, points in curves.items() if points):
        steps, losses = map(np.array, zip(*points))
        window = 2 * (len(points) // 100) + 1  # a running mean over 2 % of the steps, centred; the raw curve behind it
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        colour = colours.get(name, f"C{n}" if len(curves) <= 11 else plt.cm.viridis(n / len(curves)))
        ax.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        ax.plot(
            steps[window // 2 : len(steps) - window // 2],
            smooth,
            color=colour,
            label=name,
            marker="." * (len(points) < 6),
        )
    ax.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    ax.set_title(out.name, parse_math=False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper", fontsize="small") if len(curves) > 7 else ax.legend()
    fig.savefig(out / "losses.png", dpi=120)
    plt.close(fig)
