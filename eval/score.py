"""The log-likelihood of each choice after its context, and what follows from it: the one scorer of every benchmark.

A request is a context and a continuation, in tokens. What requests share goes through the model once: `pack.py` lays them into rows,
`tree.py` attends. The head runs on the places that are scored and no others. The definitions and names are the lm-evaluation-harness's.

T tokens of a packed row, P places in it that predict, N predictions, V vocabulary, D model width.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer
from eval.pack import Pair, packed, rows
from eval.tree import Tree
from model import Llama

BOS = ("never", "auto", "always")
ENCODED_AT_ONCE = 2048  # requests whose texts are tokenized in one call
Results = dict[str, list[dict]]  # the metrics of each item, by the harness's name of its task
ALONE = SimpleNamespace(rank=0, size=1, gather=lambda what, value: [value])  # what `checkpoint.World` is without other ranks


@dataclass(frozen=True)
class Item:
    """One question with choices."""

    task: str  # as the harness calls it: mmlu_anatomy, truthfulqa_mc2
    doc_id: int
    context: str
    choices: tuple[str, ...]  # without the blank that stands before each
    gold: int | tuple[int, ...]  # which is right (one beyond the choices: none is), or a 1 for each right one and a 0 for the others
    metrics: tuple[str, ...] = ("acc", "acc_norm")

    def score(self, log_likelihoods: np.ndarray) -> dict[str, float]:
        """The item's metrics, from (choices,) float64 nats; the first of equal maxima wins."""
        if isinstance(self.gold, tuple):
            p = np.exp(log_likelihoods)
            return {"acc": float((p / p.sum())[np.array(self.gold) == 1].sum())}
        lengths = np.array([len(choice) for choice in self.choices])  # characters
        per_character = np.divide(log_likelihoods, lengths, out=np.full(len(lengths), -np.inf), where=lengths > 0)
        picked = {"acc": log_likelihoods.argmax(), "acc_norm": per_character.argmax()}
        return {name: float(picked[name] == self.gold) for name in self.metrics}


def mean(rows: list[dict]) -> dict:
    """n, and each metric's mean and standard error over items; one item has no standard error."""
    out = {"n": len(rows)}
    for name in rows[0]:
        x = np.array([row[name] for row in rows], dtype=np.float64)
        out |= {name: float(x.mean()), f"{name}_stderr": float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None}
    return out


def pooled(parts: list[dict]) -> dict:
    """n, acc and its standard error over the items of several tasks, from the tasks' own."""
    parts = [part for part in parts if part["n"]]
    if not parts:
        return {"n": 0}
    n = np.array([part["n"] for part in parts])
    acc = float((n * [part["acc"] for part in parts]).sum() / n.sum())
    if n.sum() == len(n):
        return {"n": int(n.sum()), "acc": acc, "acc_stderr": None}
    e = np.array([part["acc_stderr"] or 0.0 for part in parts])
    variance = ((n - 1) * n * e**2).sum() / (n.sum() - len(n))
    return {"n": int(n.sum()), "acc": acc, "acc_stderr": math.sqrt(variance / n.sum())}


# Text to tokens.


class Encoder:
    """Prompts to token ids. A BOS stands in front never, always, or where tokenizer.json puts one (auto).

    Raises:
        ValueError: with auto, a tokenizer.json that also puts something behind: then no continuation could be told from its context.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str = "never"):
        self.tokenizer, self.bos = tokenizer, bos
        self.backend = tokenizer.backend
        self.backend.encode_special_tokens = False  # a prompt that spells "<|end_of_text|>" means the token
        if bos == "auto" and self(["a"])[0][-1:] != self.backend.encode("a", add_special_tokens=False).ids[-1:]:
            raise ValueError(f"{tokenizer.folder / 'tokenizer.json'}: puts a token behind every text; score with --bos always or never")

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; one that spells the BOS itself gets no other."""
        found = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=self.bos == "auto")]
        if self.bos == "never":
            return found
        bos, name = self.tokenizer.bos, self.tokenizer.bos_token
        bare = [i for i, text in enumerate(texts) if text.startswith(name)]
        if self.bos == "auto":
            for i, e in zip(bare, self.backend.encode_batch_fast([texts[i] for i in bare], add_special_tokens=False)):
                found[i] = e.ids
            return found
        spelled = set(bare)
        return [ids if i in spelled else [bos, *ids] for i, ids in enumerate(found)]

    def pairs(self, requests: Iterable[tuple[str, str]]) -> Iterator[Pair]:
        """(context, continuation) of each request, in tokens.

        White space at the end of a context goes to the continuation. The continuation's tokens are those that the whole has
        beyond as many as the context alone has: where a merge crosses the seam, the two do not join to the whole's tokens.
        After a context of no tokens, which no benchmark here has, the continuation stands after a BOS.
        """
        requests = iter(requests)
        while chunk := list(islice(requests, ENCODED_AT_ONCE)):
            contexts = {context: context.rstrip() for context, _ in chunk}
            ids = dict(zip(contexts, self(list(contexts.values()))))
            alone = iter(self.backend.encode_batch_fast([c for context, c in chunk if not context], add_special_tokens=False))
            for (context, _), whole in zip(chunk, self([context + continuation for context, continuation in chunk])):
                head, tail = (ids[context], whole[len(ids[context]) :]) if context else ([], next(alone).ids)
                if not head:  # a continuation that begins with the BOS brings its own
                    head, tail = [self.tokenizer.bos], tail[tail[:1] == [self.tokenizer.bos] :]
                yield packed(head), tail

    def item_pairs(self, items: list[Item], name: str = "items") -> list[Pair]:
        """The pair of each choice of each item, in order."""
        requests = [(item.context, f" {choice}") for item in items for choice in item.choices]
        return list(tqdm(self.pairs(requests), f"{name}: tokens", len(requests), unit="choice", disable=None, leave=False))


# Scores.


@torch.inference_mode()
def log_likelihoods(model: Llama, pairs: list[Pair], max_tokens: int | None = None, name: str = "scoring") -> tuple[np.ndarray, np.ndarray]:
    """Σ log p(token) of each request's continuation after its context, and whether greedy decoding would write it.

    Args:
        pairs: requests in tokens; of one too long for the model's window, the left end is not read.
        max_tokens: of a packed row; None: 4,096 on a CPU, 65,536 on a GPU.

    Returns:
        (requests,) float64 nats, and (requests,) bool. Softmax and sum run in float32 and above, whatever the model's dtype.

    Raises:
        ValueError: a continuation longer than the model's window; scores that are not finite.
    """
    device = model.lm_head.weight.device
    plan = rows(pairs, model.cfg.max_position_embeddings, max_tokens or (4_096 if device.type == "cpu" else 65_536))
    score = torch.zeros(len(pairs), dtype=torch.float64)
    wrong = torch.zeros(len(pairs), dtype=torch.float64)  # tokens that greedy decoding would not write
    memory = None
    with tqdm(desc=name, total=sum(row.questions for row in plan), unit="item", disable=None, leave=False) as bar:
        for row in plan:
            tree = Tree([len(tokens) for tokens in row.tokens], row.parents, memory if row.goes_on else None, row.keep, device)
            tokens = torch.from_numpy(np.concatenate(row.tokens[row.goes_on :]))[None].to(device)  # (1, T)
            hidden = model(tokens, tree.layout())[0]  # (T, D)
            memory = tree.kept
            log_p, greedy = predict(hidden, model.lm_head.weight, row.at, row.targets)
            owners = torch.tensor(row.owners)
            score.index_add_(0, owners, log_p.double().cpu())
            wrong.index_add_(0, owners, (~greedy).double().cpu())
            bar.update(row.questions)
    if bad := int((~score.isfinite()).sum()):
        raise ValueError(
            f"{name}: {bad:,} of {len(pairs):,} log-likelihoods are not finite; has the model diverged? Its weights hold nan or inf"
        )
    return score.numpy(), (wrong == 0).numpy()


def predict(hidden: Tensor, head: Tensor, at: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
    """log p(target) after the hidden state at each place, and whether the target has the highest logit.

    Args:
        hidden: (T, D); head: (V, D); at, targets: (N,) places in the row and token ids. Several targets at a place share its logits.

    Returns:
        (N,) float32 nats, (N,) bool. Logits are float32 whatever the dtype of the hidden states: in bfloat16 many would be equal.
    """
    device = hidden.device
    places, which = torch.tensor(at).unique(return_inverse=True)  # (P,), (N,)
    order = which.argsort(stable=True)
    which, target = which[order].to(device), torch.tensor(targets)[order].to(device)
    log_p, greedy = torch.empty(len(at), device=device), torch.empty(len(at), dtype=torch.bool, device=device)
    head = head if device.type == "cuda" else head.float()  # (V, D)
    hidden, chunk = hidden[places.to(device)], max(128, 2 ** (20 if device.type == "cpu" else 27) // len(head))
    for start in range(0, len(places), chunk):
        logits = matmul(hidden[start : start + chunk], head)  # (chunk, V)
        mine = slice(*torch.searchsorted(which, torch.tensor([start, start + chunk], device=device)).tolist())
        row = which[mine] - start
        highest, best = logits.max(1)  # (chunk,)
        greedy[mine] = best[row] == target[mine]
        target_logit = logits[row, target[mine]]
        log_sum_exp = highest + logits.sub_(highest[:, None]).exp_().sum(1).log()  # (chunk,), in place: logits are the largest thing here
        log_p[mine] = target_logit - log_sum_exp[row]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return log_p[back], greedy[back]


def matmul(x: Tensor, head: Tensor) -> Tensor:
    """x headᵀ, (P, D) and (V, D) -> (P, V) float32."""
    if x.dtype == torch.float32 or head.dtype == torch.float32:
        return x.float() @ head.float().T
    return torch.mm(x, head.T, out_dtype=torch.float32)


def score(
    model: Llama, encoder: Encoder, items: list[Item], max_tokens: int | None = None, world=ALONE, name: str = "scoring"
) -> list[dict]:
    """What each item gives: the choices' log-likelihoods, whether each is the greedy one, and the metrics.

    Ranks of a `world` share the items, those of one `doc_id` on one rank; rank 0 gets all of it, the others an empty list.
    """
    mine = [item for item in items if item.doc_id % world.size == world.rank]
    values, greedy = log_likelihoods(model, encoder.item_pairs(mine, name), max_tokens, name)
    out, begin = [], 0
    for item in mine:
        here = slice(begin, begin := begin + len(item.choices))
        out.append({"loglikelihoods": values[here].tolist(), "greedy": greedy[here].tolist(), "metrics": item.score(values[here])})
    parts = [iter(part) for part in world.gather(name, out)]
    return [next(parts[item.doc_id % world.size]) for item in items] if parts else []


def by_task(items: list, scored: list[dict]) -> Results:
    """The items' metrics by task, in the items' order."""
    out = defaultdict(list)
    for item, row in zip(items, scored, strict=True):
        out[item.task].append(row["metrics"])
    return out
