"""The one scorer of every benchmark: the log-likelihood of each choice after its context, and the metrics.

A request is a context and a continuation, in tokens; `sharing.py` packs requests into rows. The head runs only on the
hidden states that predict a scored token. Definitions and names are the lm-evaluation-harness's.

T tokens of a packed row, P places in it that predict, N predictions, V vocabulary, D model width.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.sharing import Pair, Tree, pack, packed
from model import Llama
from published.tokenizer import Tokenizer

ENCODED_AT_ONCE = 2048  # requests whose texts are tokenized in one call
Results = dict[str, list[dict]]  # the metrics of each item, by the harness's name of its task
ALONE = SimpleNamespace(rank=0, size=1, together=lambda work: [work()])  # `support.ranks.Ranks` of a single process


@dataclass(frozen=True)
class Item:
    """One question with choices."""

    task: str  # the harness's name: mmlu_anatomy, truthfulqa_mc2
    doc_id: int
    context: str
    choices: tuple[str, ...]  # without the blank before each
    gold: int | tuple[int, ...]  # the right choice (beyond the choices: none is), or of each choice 1 right, 0 wrong
    metrics: tuple[str, ...] = ("acc", "acc_norm")

    @property
    def asked(self) -> dict:
        asked = {"task": self.task, "doc_id": self.doc_id, "prompt": self.context, "gold": self.gold}
        return asked | {"continuations": [f" {choice}" for choice in self.choices]}

    def score(self, log_likelihoods: np.ndarray) -> dict[str, float]:
        """The item's metrics, from (choices,) float64 nats; the first of equal maxima wins."""
        if isinstance(self.gold, tuple):
            p = np.exp(log_likelihoods - log_likelihoods.max())  # however unlikely all of them are
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
        error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
        out |= {name: float(x.mean()), f"{name}_stderr": error}
    return out


def pooled(parts: list[dict]) -> dict:
    """n, acc and its standard error over the items of several tasks, from the tasks' own."""
    parts = [part for part in parts if part["n"]]
    if not parts:
        return {"n": 0}
    n, error = np.array([part["n"] for part in parts]), None
    acc = float((n * [part["acc"] for part in parts]).sum() / n.sum())
    if n.sum() > len(n):
        e = np.array([part["acc_stderr"] or 0.0 for part in parts])
        error = math.sqrt(((n - 1) * n * e**2).sum() / (n.sum() - len(n)) / n.sum())
    return {"n": int(n.sum()), "acc": acc, "acc_stderr": error}


class Encoder:
    """Prompts to token ids, with a BOS in front never, always, or where tokenizer.json puts one (auto)."""

    def __init__(self, tokenizer: Tokenizer, bos: str = "never"):
        self.tokenizer, self.bos, self.backend = tokenizer, bos, tokenizer.backend
        if bos == "auto" and self(["a"])[0][-1:] != self.bare("a")[-1:]:
            file = tokenizer.folder / "tokenizer.json"
            raise ValueError(f"{file}: puts a token behind every text; score with --bos always or never")

    def bare(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; a text that spells the BOS itself gets no other."""
        found = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=self.bos == "auto")]
        for i, text in enumerate(texts if self.bos != "never" else ()):
            if text.startswith(self.tokenizer.bos_token):
                found[i] = self.bare(text)
            elif self.bos == "always":
                found[i] = [self.tokenizer.bos, *found[i]]
        if (largest := max(map(max, filter(None, found)), default=0)) >= self.tokenizer.vocab_size:
            raise ValueError(self.tokenizer.unembedded(largest))
        return found

    def pairs(self, requests: list[tuple[str, str]], names: list[str] | None = None) -> Iterator[Pair]:
        """(context, continuation) of each request, in tokens.

        White space at the end of a context moves to the continuation. The continuation's tokens are tokens(context +
        continuation)[len(tokens(context)):]; if a merge spans the boundary, the two parts do not concatenate to
        tokens(context + continuation). A context without tokens, which no benchmark here has, becomes a BOS.
        A continuation without a token of its own would be certain: ValueError with the request's name.
        """
        for start in range(0, len(requests), ENCODED_AT_ONCE):
            chunk = requests[start : start + ENCODED_AT_ONCE]
            contexts = list(dict.fromkeys(context for context, _ in chunk))
            ids = dict(zip(contexts, self([context.rstrip() for context in contexts])))
            both_ids = self(["".join(request) for request in chunk])
            for i, ((context, continuation), both) in enumerate(zip(chunk, both_ids), start):
                head, tail = ids[context], both[len(ids[context]) :]
                if not context:
                    head, tail = [], self.bare(continuation)
                if not head:  # a continuation that begins with the BOS brings its own
                    head, tail = [self.tokenizer.bos], tail[tail[:1] == [self.tokenizer.bos] :]
                if not tail:
                    found = f"this tokenizer leaves {continuation!r} no token of its own after {context[-20:]!r}"
                    raise ValueError(f"{names[i] if names else f'request {i}'}: {found}; it cannot be scored")
                yield packed(head), tail


@torch.inference_mode()
def log_likelihoods(model: Llama, pairs: list[Pair], max_tokens=None, name="scoring") -> tuple[np.ndarray, np.ndarray]:
    """Σ log p(token) of each request's continuation after its context, and whether greedy decoding would write it.

    A request too long for the model's window loses its left end. `max_tokens` of a packed row: None is 4,096 on a CPU,
    65,536 on a GPU. Returns (requests,) float64 nats and (requests,) bool. Softmax and sum run in float32 and above.
    """
    device = model.lm_head.weight.device
    plan = pack(pairs, model.cfg.max_position_embeddings, max_tokens or (4_096 if device.type == "cpu" else 65_536))
    score, wrong = torch.zeros(2, len(pairs), dtype=torch.float64)  # wrong: tokens that greedy would not write
    memory = None
    for row in tqdm(plan, name, unit="row", disable=None, leave=False):
        memory = memory if row.continued else None
        tree = Tree([*map(len, row.tokens)], row.parents, memory, row.keep, device)
        tokens = torch.from_numpy(np.concatenate(row.tokens[row.continued :]))[None].to(device)  # (1, T)
        at, targets, owners = torch.tensor(row.predictions).T  # (N,) each
        log_p, greedy = predict(model(tokens, tree)[0], model.lm_head.weight, at, targets)
        memory = tree.kept
        score.index_add_(0, owners, log_p.double().cpu())
        wrong.index_add_(0, owners, (~greedy).double().cpu())
    if bad := int((~score.isfinite()).sum()):
        raise ValueError(f"{name}: {bad:,} of {len(pairs):,} log-likelihoods are not finite; has the model diverged?")
    return score.numpy(), (wrong == 0).numpy()


def predict(hidden: Tensor, head: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) after the hidden state at each place, and whether the target has the highest logit.

    (T, D) hidden, (V, D) head, (N,) places in the row and token ids, both on the CPU -> (N,) float32 nats, (N,) bool.
    Logits are always float32: in bfloat16 many would be equal.
    """
    device, float32 = hidden.device, torch.float32 in (hidden.dtype, head.dtype) or not hidden.is_cuda
    places, which, counts = at.unique(return_inverse=True, return_counts=True)  # (P,), (N,), (P,)
    ends = [0, *counts.cumsum(0).tolist()]  # of each place's predictions in `order`
    places, which, order, targets = (x.to(device) for x in (places, which, which.argsort(), targets))
    log_p, greedy = torch.empty(len(at), device=device), torch.empty(len(at), dtype=torch.bool, device=device)
    hidden, head = hidden[places], head.float() if float32 else head  # (P, D), (V, D)
    chunk = max(128, 2 ** (27 if hidden.is_cuda else 20) // len(head))
    for start in range(0, len(places), chunk):
        x = hidden[start : start + chunk]
        logits = x.float() @ head.T if float32 else torch.mm(x, head.T, out_dtype=torch.float32)  # (chunk, V)
        mine = order[ends[start] : ends[min(start + chunk, len(places))]]  # the predictions from these places
        row, target = which[mine] - start, targets[mine]
        highest, best = logits.max(1)  # (chunk,)
        greedy[mine] = best[row] == target
        target_logit = logits[row, target]
        log_sum_exp = highest + logits.sub_(highest[:, None]).exp_().sum(1).log()  # (chunk,), in place to save memory
        log_p[mine] = target_logit - log_sum_exp[row]
    return log_p, greedy


def score(
    model: Llama, encoder: Encoder, items: list[Item], max_tokens=None, ranks=ALONE, name="scoring"
) -> list[dict]:
    """Each item's log-likelihoods, greedy flags and metrics, on every rank; the items of one `doc_id` share a rank."""

    def work() -> list[dict]:
        mine = [item for item in items if item.doc_id % ranks.size == ranks.rank]
        asked = [(item.context, choice) for item in mine for choice in item.asked["continuations"]]
        names = [f"{item.task}: item {item.doc_id}, choice {i}" for item in mine for i in range(len(item.choices))]
        pairs = tqdm(encoder.pairs(asked, names), f"{name}: tokens", len(asked), disable=None, leave=False)
        found, out = log_likelihoods(model, list(pairs), max_tokens, name), []
        ends = np.cumsum([len(item.choices) for item in mine])[:-1]
        for item, values, greedy in zip(mine, *(np.split(x, ends) for x in found)):
            scores = {"loglikelihoods": values.tolist(), "greedy": greedy.tolist()}
            out.append(scores | {"metrics": item.score(values)})
        return out

    parts = [iter(part) for part in ranks.together(work)]
    return [next(parts[item.doc_id % ranks.size]) for item in items]


def by_task(items: list, scored: list[dict]) -> Results:
    """The items' metrics by task, in the items' order."""
    out = defaultdict(list)
    for item, row in zip(items, scored, strict=True):
        out[item.task].append(row["metrics"])
    return out
