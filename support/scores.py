"""What a grouper must know of each token before training and takes a model to find out: LLMLingua-2, a reference.

Each rank scores its share of the samples; one sum puts the shares together; one file keeps them.
"""

import hashlib
import shlex
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from tqdm import tqdm

import data
from data import Corpus
from model import Llama, LlamaConfig
from published import weights
from published.config import read_config
from published.digests import of_file
from published.hub import resolve
from published.tokenizer import Tokenizer, require_trained_headers
from published.weights import DTYPES
from support.llmlingua2 import READS, Classifier, keep_scores, need_transformers
from support.named import Named
from support.ranks import Ranks
from support.report import share

MOST_GROUPS = 256  # more than anyone reads in a log; who counts further has probably meant scores


def without_model(grouper: Named, corpus: Corpus, seed: int) -> np.ndarray | None:
    """The prior of a grouper that takes no model, (tokens,) float32, float64 or int64; None for one that does.

    Raises:
        ValueError: what it returned is neither a score nor a group for each token.
    """
    if grouper.digest is None and grouper.name in ("llmlingua2", "rho1"):
        return None
    make = getattr(grouper, "prior", None) if getattr(grouper, "in_step", False) else grouper
    if make is None:  # it looks at the losses alone
        return np.zeros(len(corpus.ids), np.float32)
    for array in (corpus.ids, corpus.kind, corpus.starts, corpus.spans):  # what is trained on is not the grouper's
        if array is not None:
            array.flags.writeable = False
    prior, mask = make(corpus, seed), corpus.loss_mask
    holds = isinstance(prior, np.ndarray) and prior.shape == corpus.ids.shape and prior.dtype.kind in "fiu"
    kinds = f"floats (scores) or integers (groups) in a numpy array {corpus.ids.shape}"
    kinds += "" if isinstance(prior, np.ndarray) else "; a grouper of (nll, prior) has in_step = True"
    kinds += ": .astype(int)" * (getattr(prior, "dtype", None) == bool)
    grouper.expect(prior, holds, kinds)
    if prior.dtype.kind == "f":
        grouper.expect(
            prior, not np.isnan(prior[mask]).any(), f"no nan, as it has for token {first(prior != prior, mask)}"
        )
        wide = make is grouper and prior.dtype.itemsize > 4  # scores that differ stay different
        return prior.astype(np.float64 if wide else np.float32)
    if make is grouper:
        bad = (prior < 0) | (prior >= MOST_GROUPS)
        at = first(bad, mask)
        limits = f"groups 0 … {MOST_GROUPS - 1}; token {at} has {prior[at]}. Scores are floats"
        grouper.expect(prior, not bad[mask].any(), limits)
    return prior.astype(np.int64)


def first(there: np.ndarray, mask: np.ndarray) -> int:
    """The first supervised token of those."""
    return int((there & mask).argmax())


def how_many(grouper: Named, prior: np.ndarray, loss_mask: np.ndarray, etas: tuple[float, ...]) -> int:
    """K, the number of groups."""
    given = prior.dtype.kind == "i" and not getattr(grouper, "in_step", False)
    return int(prior[loss_mask].max()) + 1 if given else len(etas) + 1


def with_model(cfg, grouper: Named, corpus: Corpus, cache: Path, ranks: Ranks) -> np.ndarray:
    """The prior of llmlingua2 or rho1, (tokens,) float32: keep probabilities, or the reference's nats."""
    if grouper.name == "llmlingua2":

        def scorer(folder: Path) -> Callable[[Corpus], np.ndarray]:
            return partial(keep_scores, classifier=Classifier(folder, ranks.device))

        # The libraries that make the pieces and the network. Float32 without TF32 agrees to 1e-5 on every device and
        # under every torch, so neither counts.
        made_by = ["keep probability", version("transformers"), version("tokenizers")]
        scores = shared(cfg.llmlingua_model, scorer, READS, made_by, corpus, cache, ranks)
        print(f"groups  {share(cfg, grouper, corpus, scores).split(': ')[1]}")
        return scores

    def scorer(folder: Path) -> Callable[[Corpus], np.ndarray]:
        return partial(reference_nll, folder, cfg.dtype, ranks.device, max_tokens=cfg.micro_batch_tokens)

    # bfloat16 rounds to 1e-2 nats, and how it does is torch's and the device's.
    made_by = ["nats", cfg.dtype, torch.__version__, ranks.device.type]
    return shared(cfg.reference, scorer, ("config.json", "*.safetensors*"), made_by, corpus, cache, ranks)


def shared(
    name: str, scorer: Callable, reads: tuple, made_by: list[str], corpus: Corpus, cache: Path, ranks: Ranks
) -> np.ndarray:
    """scorer(folder of the model)(corpus), or what an earlier run kept of it; `reads`: files that it depends on."""
    folder, values = resolve(name), np.zeros(len(corpus.ids), np.float32)
    path = cache / ranks.first(lambda: f"{made_by[0].split()[0]}-{fingerprint(folder, reads, corpus, made_by)}.npy")

    def score() -> None:
        samples = np.arange(ranks.rank, len(corpus), ranks.size)
        at = data.ragged(corpus.starts[samples], corpus.lengths[samples])
        values[at] = scorer(folder)(corpus.take(samples)) if len(samples) else 0.0

    kept = read_array(path, corpus) if ranks.rank == 0 else None  # the others need not see the file
    if is_kept := ranks.first(lambda: kept is not None):
        values = values if kept is None else kept
    else:
        ranks.together(score)
    values = ranks.sum(torch.from_numpy(values).to(ranks.device)).cpu().numpy()
    ranks.first(lambda: is_kept or write_array(path, values))
    return values


def reference_nll(folder: Path, dtype: str, device, corpus: Corpus, max_tokens: int) -> np.ndarray:
    """`corpus_nll` of a model folder.

    Raises:
        ValueError: a loss is not finite.
    """
    nats = corpus_nll(Llama.from_pretrained(folder, DTYPES[dtype], DTYPES[dtype], device), corpus, max_tokens)
    if bad := int((~np.isfinite(nats)).sum()):
        found = f"the losses of {bad:,} of {corpus.loss_mask.sum():,} tokens are nan or infinite"
        raise ValueError(f"{folder}: {found}; are its weights damaged?")
    return nats


@torch.no_grad()
def corpus_nll(model: Llama, corpus: Corpus, max_tokens: int) -> np.ndarray:
    """Nats of each supervised token of a corpus, (tokens,) float32, 0 elsewhere; in packed rows of `max_tokens`."""
    nats, places = np.zeros(len(corpus.ids), np.float32), np.arange(len(corpus.ids))
    chunks = [np.arange(i, min(i + 256, len(corpus))) for i in range(0, len(corpus), 256)]
    for samples in tqdm(chunks, "losses", disable=None, leave=False):
        for batch in data.micro_batches(corpus, places, samples, max_tokens):
            nll = batch.to(model.lm_head.weight.device).nll(model).cpu()
            nats[batch.prior[batch.loss_mask].numpy()] = nll[batch.loss_mask].numpy()  # prior: its place in the corpus
    return nats


def prepare(cfg, folder: Path) -> tuple[LlamaConfig, Tokenizer]:
    """The model's configuration and tokenizer; refuses, before the data are read, what would only fail later."""
    llama = LlamaConfig(**read_config(folder))
    with torch.device("meta"):
        files = weights.fitting(Llama(llama), folder, cfg.fresh)
    if files and cfg.fresh:
        raise ValueError(f"--fresh is for a config alone, but {cfg.model} has weights; leave one of them out")
    tokenizer = Tokenizer(folder, llama.vocab_size)
    if cfg.context > llama.max_position_embeddings:
        room = f"{llama.max_position_embeddings} positions (max_position_embeddings)"
        raise ValueError(f"--context {cfg.context}: {cfg.model} has {room}")
    if cfg.template == "llama3":
        require_trained_headers(folder, tokenizer)
    if cfg.grouper == "rho1":
        check_reference(cfg.reference, cfg.model, tokenizer, cfg.context)
    if cfg.grouper == "llmlingua2":
        need_transformers()
        resolve(cfg.llmlingua_model)
    return llama, tokenizer


def how_to_reference(argv: list[str]) -> str:
    """What to run for Rho-1, given the flags of a run without a reference: first its reference φ, then θ."""
    flags = []  # each with its values
    for word in argv:
        flags = [*flags[:-1], [*flags[-1], word]] if flags and not word.startswith("--") else [*flags, [word]]

    def run(without: str) -> str:
        kept = [
            flag for flag in flags if flag[0].partition("=")[0] not in ("--dry-run", "--no-dry-run", *without.split())
        ]
        return shlex.join(["train.py", *(word for flag in kept for word in flag)])

    plain = "--grouper none --objective cross_entropy"
    return (
        "--grouper rho1 needs --reference, a model trained on data of the same domain. Train one, then the run:\n"
        f"  python {run('--reference --out --grouper --objective')} {plain} --out runs/reference\n"
        f"  python {run('--reference')} --reference runs/reference/model"
    )


def check_reference(reference: str, model: str, tokenizer: Tokenizer, context: int) -> None:
    """Refuse a reference whose losses could not be compared with the model's, token by token."""
    folder = resolve(reference)
    config = read_config(folder)
    try:
        with torch.device("meta"):
            weights.fitting(Llama(LlamaConfig(**config)), folder)
    except ValueError as e:
        raise ValueError(f"--reference {e}") from e
    if Tokenizer(folder, config["vocab_size"]).backend.get_vocab() != tokenizer.backend.get_vocab():
        reason = f"its tokenizer is not that of {model}; losses of other tokens cannot be compared"
        raise ValueError(f"--reference {reference}: {reason}")
    if context > (room := config.get("max_position_embeddings", 2048)):
        raise ValueError(f"--context {context}: the reference {reference} has {room} positions")


def fingerprint(folder: Path, reads: tuple[str, ...], corpus: Corpus, made_by: list[str]) -> str:
    """SHA-256 of all that scores depend on: files of a model folder, a corpus, and how they are made; shortened."""
    sha = hashlib.sha256(f"{made_by} {corpus.text}".encode())
    for path in sorted({path for pattern in reads for path in folder.glob(pattern) if path.is_file()}):
        sha.update(f"{path.name} {of_file(path)}".encode())
    for array in (corpus.ids, corpus.kind, corpus.starts, corpus.spans):
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()[:24]


def read_array(path: Path, corpus: Corpus) -> np.ndarray | None:
    """The scores of a corpus kept there; None where there are none, or none of use."""
    try:
        found = np.load(path) if path.is_file() else None
        if found is not None and (found.dtype != np.float32 or found.shape != corpus.ids.shape):
            raise ValueError(f"{found.dtype} {found.shape}, expected float32 {corpus.ids.shape}")
        lowest = -np.inf if path.name.startswith("keep") else np.finfo(np.float32).min  # -inf: not judged
        if found is not None and not ((found >= lowest) & (found < np.inf)).all():
            raise ValueError("nan or infinite scores")
    except (ValueError, EOFError, OSError) as e:
        print(f"{path}: damaged ({e}); made again")
        return None
    return found


def write_array(path: Path, values: np.ndarray) -> None:
    """Complete under its name or not at all; two writers at once do no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{uuid4().hex}.part.npy")
    np.save(part, values)
    part.replace(path)
