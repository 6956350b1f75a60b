"""The log-likelihood of each choice after its context, and what follows from it: the one scorer of every benchmark.

A request is a context and a continuation, in tokens. What requests share goes through the model once (`tree.py`): a subject's header
and examples, a question's context, and whole requests that are the same. The head runs on the rows that are scored and no others.
The definitions are the lm-evaluation-harness's; so are the names.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer
from eval.tree import Tree
from model import Llama

BOS = ("never", "auto", "always")
ENCODED_AT_ONCE = 2048  # requests whose texts are tokenized in one call
HEADER = 16  # tokens from which on contexts that begin alike share them
Pair = tuple[bytes, list[int]]  # a context, its ids as big-endian int32 (hashed, sorted and compared as one string), and a continuation
Results = dict[str, list[dict]]  # the metrics of each item, by the harness's name of its task


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
    """Prompts to token ids. A BOS stands in front never, always, or where tokenizer.json puts one (auto)."""

    def __init__(self, tokenizer: Tokenizer, bos: str = "never"):
        self.tokenizer, self.bos = tokenizer, bos
        self.backend = tokenizer.backend
        self.backend.encode_special_tokens = False  # a prompt that spells "<|end_of_text|>" means the token

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

    def pairs(self, requests: list[tuple[str, str]]) -> Iterator[Pair]:
        """(context, continuation) of each request, in tokens.

        White space at the end of a context goes to the continuation. The continuation's tokens are those that the whole has
        beyond as many as the context alone has: where a merge crosses the seam, the two do not join to the whole's tokens.
        After an empty context, which no benchmark here has, the continuation stands after a BOS.
        """
        requests = iter(requests)
        while chunk := list(islice(requests, ENCODED_AT_ONCE)):
            contexts = {context: context.rstrip() for context, _ in chunk}
            ids = dict(zip(contexts, self(list(contexts.values()))))
            alone = iter(self.backend.encode_batch_fast([c for context, c in chunk if not context], add_special_tokens=False))
            for (context, _), whole in zip(chunk, self([context + continuation for context, continuation in chunk])):
                if context:
                    head = ids[context]
                    yield packed(head), whole[len(head) :]
                else:
                    yield packed([self.tokenizer.bos]), next(alone).ids

    def item_pairs(self, items: list[Item]) -> list[Pair]:
        """The pair of each choice of each item, in order."""
        return list(self.pairs((item.context, f" {choice}") for item in items for choice in item.choices))


def packed(ids: list[int]) -> bytes:
    return np.array(ids, ">i4").tobytes()


def unpacked(context: bytes) -> np.ndarray:
    return np.frombuffer(context, ">i4")


# Requests to rows.


@dataclass
class Row:
    """A packed row, as it grows: its tokens by segment, and which of its places score what."""

    tokens: list[np.ndarray] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # the hidden state that predicts
    targets: list[int] = field(default_factory=list)  # the token that it should
    owners: list[int] = field(default_factory=list)  # for which request
    size: int = 0  # tokens in the row
    goes_on: bool = False  # segment 0 is the last row's `keep`: remembered, not in the row
    keep: int | None = None  # the segment that the next row goes on from

    def add(self, tokens: np.ndarray | tuple[int, ...], parent: int) -> int:
        self.tokens.append(np.asarray(tokens, np.int64))
        self.parents.append(parent)
        self.size += len(tokens)
        return len(self.parents) - 1

    def expect(self, at: int, target: int, owners: list[int]) -> None:
        self.at += [at] * len(owners)
        self.targets += [target] * len(owners)
        self.owners += owners

    def next(self, header: int | None) -> "Row":
        """The row after this one, going on from the header in this one's segment `header`."""
        if header is None:
            return Row()
        self.keep = header
        return Row([self.tokens[header]], [-1], goes_on=True)


Question = tuple[bytes, dict[tuple[int, ...], list[int]]]  # a context, and which requests ask for each continuation


def questions(pairs: list[Pair], window: int) -> list[Question]:
    """Each different context with its different continuations and their requests, sorted by the contexts' tokens.

    What is longer than the model's window is cut from the left, before anything is shared.
    """
    found = defaultdict(lambda: defaultdict(list))
    for i, (context, continuation) in enumerate(pairs):
        if not continuation:
            continue  # an empty continuation, whose log-likelihood is 0
        keep = window + 1 - len(continuation)
        if keep < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens: the model reads {window} at most")
        found[context[-4 * keep :]][tuple(continuation)].append(i)
    return sorted(found.items())


def shared(a: bytes, b: bytes) -> int:
    """How many tokens two contexts begin with in common, short of the whole of either."""
    n = min(len(a), len(b)) // 4 - 1
    differ = unpacked(a)[:n] != unpacked(b)[:n]
    return int(differ.argmax()) if differ.any() else n


def families(found: list[Question]) -> Iterator[tuple[int, list[Question]]]:
    """(tokens of a header, the questions that begin with it): neighbours stay together while that saves more tokens."""
    family, header = found[:1], 0
    for question in found[1:]:
        common = shared(family[-1][0], question[0])
        common = min(common, header) if len(family) > 1 else common
        if common >= HEADER and len(family) * common > (len(family) - 1) * header:
            family, header = [*family, question], common
        else:
            yield header, family
            family, header = [question], 0
    if family:
        yield header, family


def cost(question: Question) -> int:
    """Tokens that the model reads for it."""
    return len(question[0]) // 4 + sum(len(continuation) - 1 for continuation in question[1])


def rows(pairs: list[Pair], window: int, max_tokens: int, rank: int = 0, ranks: int = 1) -> list[Row]:
    """This rank's packed rows, of at most `max_tokens` tokens (but for a single longer question); the longest questions first."""
    groups = [(header, sorted(family, key=cost, reverse=True)) for header, family in families(questions(pairs, window))]
    out, n = [Row()], 0
    for header, family in sorted(groups, key=lambda group: cost(group[1][0]), reverse=True):
        above = None  # the header's segment in this row
        for question in family:
            n += 1
            if n % ranks != rank:
                continue
            context = unpacked(question[0])
            if out[-1].size and out[-1].size + cost(question) - (header if above is not None else 0) > max_tokens:
                out.append(out[-1].next(above))
                above = None if above is None else 0
            row = out[-1]
            if header and above is None:
                above = row.add(context[:header], -1)
            ask(row, context[header:], question[1], -1 if above is None else above)
    return [row for row in out if row.size]


def ask(row: Row, context: np.ndarray, continuations: dict, parent: int) -> None:
    """Put a question into the row: the context's last state predicts every first token, a continuation's own states the others."""
    segment = row.add(context, parent)
    last = row.size - 1
    tails = defaultdict(list)  # continuations that differ in their last token only share the rest
    for continuation, owners in continuations.items():
        row.expect(last, continuation[0], owners)
        if len(continuation) > 1:
            tails[continuation[:-1]].append((continuation, owners))
    for tail, found in tails.items():
        begin = row.size
        row.add(tail, segment)
        for continuation, owners in found:
            for j, target in enumerate(continuation[1:]):
                row.expect(begin + j, target, owners)


# Scores.


@torch.inference_mode()
def log_likelihoods(
    model: Llama, pairs: list[Pair], max_tokens: int | None = None, world=None, name: str = "scoring"
) -> tuple[np.ndarray, np.ndarray]:
    """Σ log p(token) of each request's continuation after its context, and whether greedy decoding would write it.

    Args:
        pairs: requests in tokens; of one too long for the model's window, the left end is not read.
        max_tokens: of a packed row; None: 4,096 on a CPU, 65,536 on a GPU.
        world: ranks that share the rows; rank 0 gets all scores, the others their own.

    Returns:
        (requests,) float64 nats, and (requests,) bool. Softmax and sum run in float32 and above, whatever the model's dtype.

    Raises:
        ValueError: a continuation longer than the model's window.
    """
    device = model.lm_head.weight.device
    max_tokens = max_tokens or (4_096 if device.type == "cpu" else 65_536)
    rank, ranks = (0, 1) if world is None else (world.rank, world.size)
    plan = rows(pairs, model.cfg.max_position_embeddings, max_tokens, rank, ranks)
    score = torch.zeros(len(pairs), dtype=torch.float64)
    wrong = torch.zeros(len(pairs), dtype=torch.float64)  # tokens that greedy decoding would not write
    memory = None
    with tqdm(total=sum(len(set(row.owners)) for row in plan), desc=name, unit="choice", disable=None, leave=False) as bar:
        for row in plan:
            tree = Tree([len(tokens) for tokens in row.tokens], row.parents, memory if row.goes_on else None, row.keep)
            tokens = torch.from_numpy(np.concatenate(row.tokens[row.goes_on :]))[None].to(device)  # (1, T)
            hidden = model(tokens, tree.layout(device))[0]  # (T, D)
            memory = tree.kept
            owners = torch.tensor(row.owners)
            log_p, greedy = predict(hidden, model.lm_head.weight, row.at, row.targets)
            score.index_add_(0, owners, log_p.double().cpu())
            wrong.index_add_(0, owners, (~greedy).double().cpu())
            bar.update(len(set(row.owners)))
    parts = [] if world is None else world.gather(name, [score.tolist(), wrong.tolist()])
    score, wrong = np.sum(parts, axis=0) if parts else (score.numpy(), wrong.numpy())
    return score, wrong == 0


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
    if x.dtype == torch.float32 or x.device.type == "cpu":
        return x.float() @ head.float().T
    return torch.mm(x, head.T, out_dtype=torch.float32)


def score(
    model: Llama, encoder: Encoder, items: list[Item], max_tokens: int | None = None, world=None, name: str = "scoring"
) -> list[dict]:
    """What each item gives: the choices' log-likelihoods, whether each is the greedy one, and the metrics."""
    values, greedy = log_likelihoods(model, encoder.item_pairs(items), max_tokens, world, name)
    out, begin = [], 0
    for item in items:
        mine = slice(begin, begin := begin + len(item.choices))
        out.append({"loglikelihoods": values[mine].tolist(), "greedy": greedy[mine].tolist(), "metrics": item.score(values[mine])})
    return out


def by_task(items: list, scored: list[dict]) -> Results:
    """The items' metrics by task, in the items' order."""
    out = defaultdict(list)
    for item, row in zip(items, scored):
        out[item.task].append(row["metrics"])
    return out
