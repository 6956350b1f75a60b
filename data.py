"""Rows of JSON -> a tokenized corpus -> packed micro-batches, in an order that is a function of (seed, epoch).

    {"conversations": ["Hi", "Hello."]}  ─ parse ─►  [("user", "Hi"), ("assistant", "Hello.")]
      ─ template ─►  BOS │ User: Hi ⏎⏎ Assistant: │  Hello. │ <|end_of_text|>
                          one string, tokenized     apart     one id
      kind             TEMPLATE  PROMPT  TEMPLATE   RESPONSE   END            trained on: RESPONSE and END

The tokenizer reads prompt and template as one string, as at generation. It reads each response separately, so no token
spans the boundary. Text never becomes a special token, even if it spells one. A corpus is flat arrays without padding.
A batch is one row of complete samples, one after the other. Labels are shifted by one: entry i of targets, loss_mask,
prior and group describes the token that position i predicts.

T positions of a packed row, N samples of a corpus, `tokens` tokens of a corpus.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import Llama, Packed
from published.rows import read_rows
from published.tokenizer import Tokenizer
from sftgo import token_nll

TEMPLATE, PROMPT, RESPONSE, END, SPECIAL = range(5)  # piece kinds; END and SPECIAL pieces hold a special token's name
Turns = list[tuple[str, str | None]]  # (role, text); None: the turn that the model will generate
Pieces = Iterator[tuple[int, str]]  # (kind, text or a token's name)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


# Rows.


def parse(where: str, row: dict) -> tuple[str, Turns]:
    """(format, turns) of one row; the format is "dialogue", "alpaca" or "text". `where` names the row in errors."""

    def string(value, name: str) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is {type(value).__name__}, expected a string")
        try:
            value.encode()
        except UnicodeEncodeError as e:
            half = f"{name} holds \\u{ord(value[e.start]):04x}, half of a surrogate pair"
            raise ValueError(f"{where}: {half}; was an emoji cut in two?") from e
        return value

    def pair(prompt: str, answer: str) -> Turns:
        return [("user", string(row[prompt], prompt)), ("assistant", string(row[answer], answer))]

    for name in ("conversations", "messages"):
        if name in row:
            turns, out = row[name], []
            if not isinstance(turns, list) or not turns:
                raise ValueError(f"{where}: {name} is {json.dumps(turns)[:60]}, expected a list of turns")
            for i, turn in enumerate(turns):
                spot = f"{name}[{i}]"
                if isinstance(turns[0], str) and name == "conversations":  # LIMA: the user begins, then they alternate
                    out.append((("user", "assistant")[i % 2], string(turn, spot)))
                    continue
                fields = turn if isinstance(turn, dict) else {}
                key, role = "value" if "value" in fields else "content", fields.get("role", fields.get("from"))
                if not isinstance(role, str) or role not in ROLES:
                    raise ValueError(f"{where}: {spot} is {json.dumps(turn)[:60]}, expected a role: {', '.join(ROLES)}")
                out.append((ROLES[role], string(fields.get(key), f"{spot}.{key}")))
            return "dialogue", out
    if row.keys() >= {"instruction", "output"}:
        user, answer = pair("instruction", "output")
        given = string(row.get("input", ""), "input")
        return "alpaca", [user, ("input", given), answer] if given else [user, answer]
    if row.keys() >= {"prompt", "completion"}:
        return "dialogue", pair("prompt", "completion")
    if "text" in row:
        return "text", [("assistant", string(row["text"], "text"))]
    raise ValueError(
        f"{where}: fields {', '.join(map(repr, row)) or 'none'}; expected conversations (LIMA, ShareGPT), messages, "
        "instruction and output (Alpaca), prompt and completion, or text"
    )


# Templates: turns -> pieces.


def plain(turns: Turns) -> Pieces:
    """Appendix I's form: "User: …", a blank line, "Assistant: …", each answer closed by the end token."""
    for role, content in with_input(turns):
        if role == "assistant":
            yield TEMPLATE, "Assistant:"
            yield from answer(content, " ")
        else:
            yield from [(TEMPLATE, f"{role.capitalize()}: "), (PROMPT, content), (TEMPLATE, "\n\n")]


def alpaca(turns: Turns) -> Pieces:
    """Stanford's two prompts: one instruction, perhaps with an input, one answer."""
    (_, instruction), *given, (_, output) = turns
    paired = ", paired with an input that provides further context" if given else ""
    yield TEMPLATE, f"Below is an instruction that describes a task{paired}. "
    yield TEMPLATE, "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    yield PROMPT, instruction
    for _, content in given:
        yield from [(TEMPLATE, "\n\n### Input:\n"), (PROMPT, content)]
    yield TEMPLATE, "\n\n### Response:"
    yield from answer(output)


def llama3(turns: Turns) -> Pieces:
    """Llama 3's chat format. The checkpoint must have trained header tokens; support/ checks it."""
    for role, content in with_input(turns):
        yield from [(SPECIAL, "<|start_header_id|>"), (TEMPLATE, role), (SPECIAL, "<|end_header_id|>")]
        yield TEMPLATE, "\n\n"
        if role == "assistant":
            yield from answer(content and content.strip(), end="<|eot_id|>")
        else:
            yield from [(PROMPT, content.strip()), (SPECIAL, "<|eot_id|>")]


def text(turns: Turns) -> Pieces:
    """Plain text: every token is trained on."""
    for _, content in turns:
        yield from answer(content)


def answer(content: str | None, lead: str = "", end: str = "<|end_of_text|>") -> Pieces:
    if content is not None:
        yield from [(RESPONSE, lead + content), (END, end)]


def with_input(turns: Turns) -> Turns:
    """Alpaca's input, rendered after the instruction in the same user turn."""
    if len(turns) > 1 and turns[1][0] == "input":
        return [("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    return turns


TEMPLATES: dict[str, Callable[[Turns], Pieces]] = {"plain": plain, "alpaca": alpaca, "llama3": llama3, "text": text}
AUTO = {"dialogue": "plain", "alpaca": "alpaca", "text": "text"}


def renderer(where: str, found: str, turns: Turns, template: str) -> Callable[[Turns], Pieces]:
    """The template's function; ValueError where it cannot render the row."""
    if (found == "text") != (template == "text"):
        raise ValueError(f"{where}: a row of {found} does not fit --template {template}; use --template {AUTO[found]}")
    roles = [role for role, _ in turns if role != "input"]
    if template == "alpaca" and roles not in (["user", "assistant"], []):
        raise ValueError(f"{where}: {', '.join(roles)}: not one instruction and one answer; use --template plain")
    return TEMPLATES[template]


# Tokens.


@dataclass
class Corpus:
    """N tokenized samples, end to end, and what became of the rows."""

    ids: np.ndarray  # (tokens,) int32
    kind: np.ndarray  # (tokens,) uint8, TEMPLATE, PROMPT, RESPONSE or END
    starts: np.ndarray  # (N + 1,) int64, sample i is starts[i]:starts[i + 1]
    spans: np.ndarray | None = None  # (tokens, 2) int64, each token's characters in `text`: text[start:stop]
    rows: np.ndarray | None = None  # (N,) int64, the row of the file that each sample is from, counted from 1
    text: str = ""  # what the tokenizer read, document after document
    template: str = "plain"
    counts: dict[str, int] = field(default_factory=dict)  # "rows", "kept", and how many were dropped or cut, and why

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def loss_mask(self) -> np.ndarray:
        """(tokens,) bool, True on the tokens that are trained on."""
        return self.kind >= RESPONSE

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def doc_ids(self) -> np.ndarray:
        """(tokens,) int64, the sample each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, samples: np.ndarray) -> "Corpus":
        """A corpus of these samples alone."""
        lengths = self.lengths[samples]
        at = ragged(self.starts[samples], lengths)
        tokens = {"ids": self.ids[at], "kind": self.kind[at], "spans": self.spans[at]}
        return replace(self, **tokens, starts=np.cumsum([0, *lengths]), rows=self.rows[samples])


def load_corpus(path: str | Path, tokenizer: Tokenizer, template: str, context: int) -> Corpus:
    """Read, render, tokenize and cut at `context` tokens.

    A sample longer than `context` loses its end, and with it its end token. Plain text is instead split into several
    samples, each with its own BOS, so every token is trained on once. A ValueError names file and line.
    """
    counts, documents, first = Counter(), {}, None  # documents: number of the row -> its pieces
    rows = read_rows(path)
    for number, (where, row) in enumerate(rows, 1):
        found, turns = parse(where, row)
        if first is None:
            first, template = found, AUTO[found] if template == "auto" else template
        if found != first:
            raise ValueError(f"{where}: a row of {found}, but the file began with {first}; split the file by kind")
        answered = max((i for i, (role, _) in enumerate(turns, 1) if role == "assistant"), default=0)
        render = renderer(where, found, turns[:answered], template)
        if not answered or not all(content.strip() for role, content in turns[:answered] if role == "assistant"):
            counts["dropped: empty response" if answered else "dropped: no response"] += 1
        else:
            counts["unanswered last turns left out"] += answered < len(turns)
            documents[number] = list(render(turns[:answered]))
    whole = tokenize([*documents.values()], tokenizer)
    # One document gives one sample; plain text gives several. Each sample is the BOS and one stretch of the document.
    stretches = -(-(whole.lengths - 1) // (context - 1)) if template == "text" else np.ones(len(whole), np.int64)
    document = np.repeat(np.arange(len(whole)), stretches)  # (samples,) the document of each sample
    begin = whole.starts[document] + 1 + ragged(np.zeros_like(stretches), stretches) * (context - 1)  # (samples,)
    size = np.minimum(whole.starts[document + 1] - begin, context - 1)  # (samples,) tokens after the BOS
    at, starts = ragged(begin - 1, size + 1), np.cumsum([0, *(size + 1)])  # (tokens,) into `whole`; (samples + 1,)
    at[starts[:-1]] = whole.starts[document]
    spans = whole.spans[at]  # (tokens, 2)
    spans[starts[:-1]] = whole.spans[begin, :1]  # the BOS gets an empty span at the start of its sample
    corpus = Corpus(
        whole.ids[at], whole.kind[at], starts, spans, np.array([*documents])[document], whole.text, template
    )
    usable = np.bincount(corpus.doc_ids, corpus.loss_mask, len(corpus)) > 0
    counts["dropped: response cut away"] += len(usable) - usable.sum()
    counts["cut at the context length"] += ((whole.lengths > context)[document] & usable).sum() * (template != "text")
    counts = {what: int(n) for what, n in sorted(counts.items()) if n}
    if not usable.any():
        why = ", ".join(f"{n} {what}" for what, n in counts.items())
        raise ValueError(f"{path}: none of {len(rows)} rows is usable ({why}); each needs a response within --context")
    corpus = corpus if usable.all() else corpus.take(np.flatnonzero(usable))
    return replace(corpus, counts={"rows": len(rows), "kept": len(corpus), **counts})


def tokenize(documents: list[list[tuple[int, str]]], tokenizer: Tokenizer) -> Corpus:
    """Rendered documents -> their tokens, uncut, each with its BOS; some megabytes of text at a time, on all cores."""
    size = np.cumsum([sum(len(s) for _, s in pieces) for pieces in documents])
    numbered = zip(size // 4_000_000, tqdm(documents, "tokenizing", disable=None, leave=False))
    chunks = [
        encode([pieces for _, pieces in chunk], tokenizer) for _, chunk in groupby(numbered, lambda pair: pair[0])
    ]
    ids, kinds, spans, lengths, texts = zip(*(chunks or [encode([], tokenizer)]))
    begin = np.cumsum([0, *map(len, texts)])
    spans, starts = [span + at for span, at in zip(spans, begin)], np.cumsum([0, *chain(*lengths)])
    return Corpus(np.concatenate(ids), np.concatenate(kinds), starts, np.concatenate(spans), text="".join(texts))


def encode(documents: list[list[tuple[int, str]]], tokenizer: Tokenizer) -> tuple:
    """(ids, kinds, spans, tokens of each document, text) of documents end to end; spans are characters of that text."""
    documents = [[*segments([(SPECIAL, tokenizer.bos_token), *pieces])] for pieces in documents]
    parts = [part for document in documents for part in document]
    texts = ["".join(s for kind, s in part if kind < END) for part in parts]  # "" for a token by name
    found = iter(tokenizer.backend.encode_batch([text for text in texts if text], add_special_tokens=False))
    tokens, offsets = [], []
    for part, text in zip(parts, texts):
        encoding = next(found) if text else None
        tokens.append(encoding.ids if text else [tokenizer.id(name) for kind, name in part if kind >= END])
        offsets.append(encoding.offsets if text else [(0, 0)] * len(tokens[-1]))
    count, length = (np.array([*map(len, column)], np.int64) for column in (tokens, texts))  # of each part
    spans = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
    spans += np.repeat(np.cumsum(length) - length, count)[:, None]
    kinds = np.repeat(np.array([part[0][0] for part in parts], np.uint8), count)
    # In a prompt's string, the tokens that hold any character of the row's text are PROMPT, the others TEMPLATE.
    written = [piece for part in parts for piece in part if piece[0] < END]
    is_prompt = np.repeat([kind == PROMPT for kind, _ in written] + [False], [len(s) for _, s in written] + [1])
    before = np.cumsum(is_prompt) - is_prompt  # how many characters of prompts there are before each character
    begin = np.minimum(spans[:, 0], len(before) - 2)
    stop = np.maximum(spans[:, 1], begin + 1)  # a tokenizer may give white space an empty span: see what follows it
    prompt_or_not = np.where(before[stop] > before[begin], PROMPT, TEMPLATE)
    kinds = np.select([kinds == SPECIAL, kinds < RESPONSE], [TEMPLATE, prompt_or_not], kinds).astype(np.uint8)
    ends = np.cumsum([0, *count])[np.cumsum([0, *map(len, documents)])]
    return np.fromiter(chain.from_iterable(tokens), np.int32), kinds, spans, np.diff(ends), "".join(texts)


def segments(pieces: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """What is tokenized together: neighbouring template and prompt pieces; every other piece is by itself."""
    for is_prompt, run in groupby(pieces, key=lambda piece: piece[0] in (TEMPLATE, PROMPT)):
        yield from [list(run)] if is_prompt else ([piece] for piece in run)


def prompt_ids(tokenizer: Tokenizer, template: str, turns: Turns) -> list[int]:
    """Token ids of a conversation whose last turn, ("assistant", None), is to be generated."""
    return tokenize([list(TEMPLATES[template](turns))], tokenizer).ids.tolist()


# Batches.


@dataclass
class Batch:
    """Complete samples in one row. targets, loss_mask, prior and group describe the token that a position predicts."""

    tokens: Tensor  # (1, T) int64, what the model reads
    targets: Tensor  # (T,) int64, the next token of the same sample
    loss_mask: Tensor  # (T,) bool, True where the target is trained on
    prior: Tensor  # (T,) of the target, made before training: its score or its group, or the reference model's nats
    doc_ids: Tensor  # (T,) int64, the sample of each position, 0 ... samples - 1, non-decreasing
    layout: Packed
    group: Tensor | None = None  # (T,) the target's group, once it is decided
    weight: Tensor | None = None  # (T,) the target's weight, where the objective weighs tokens

    def nll(self, model: Llama) -> Tensor:
        """Loss of each supervised target in nats, 0 elsewhere, (T,); the head runs on supervised positions only."""
        hidden, mask = model(self.tokens, self.layout)[0], self.loss_mask  # (T, D), (T,)
        nll = token_nll(hidden[mask], model.lm_head.weight, self.targets[mask])  # (supervised,)
        return nll.new_zeros(mask.shape).masked_scatter(mask, nll)

    def to(self, device) -> "Batch":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if x is not None})


def epoch_order(samples: int, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[np.ndarray]:
    """The sample numbers of each step of an epoch: a function of (seed, epoch), so the same in a resumed run."""
    order = np.random.default_rng((seed, epoch)).permutation(samples)
    return np.split(order, range(batch_size, samples, batch_size))[: samples // batch_size if drop_last else None]


def micro_batches(corpus: Corpus, prior, samples: np.ndarray, max_tokens: int, rank=0, ranks=1) -> list[Batch]:
    """One rank's part of a step: its samples in packed rows of at most `max_tokens` positions.

    All ranks get the same number of rows and about the same number of tokens. `prior` is (tokens,), as `corpus.ids`.
    """
    need = corpus.lengths[samples] - 1  # (samples,) positions; a sample's last token is a target only
    dealt, load = [[] for _ in range(ranks)], np.zeros(ranks, np.int64)  # each rank's rows: [free positions, *samples]
    for i in np.argsort(-need, kind="stable"):  # longest first; to the rank with the lowest load; first row with space
        rows = dealt[least := int(load.argmin())]
        load[least] += need[i]
        row = next((row for row in rows if row[0] >= need[i]), None)
        if row is None:
            rows.append(row := [max_tokens])
        row[0] -= need[i]
        row.append(i)
    batches = [pack(corpus, prior, samples[row[1:]]) for row in dealt[rank]]
    return batches + [blank(corpus, prior) for _ in range(max(map(len, dealt)) - len(batches))]


def pack(corpus: Corpus, prior: np.ndarray, samples: np.ndarray) -> Batch:
    """The samples end to end in one row; targets and what describes them shifted by one."""
    lengths = corpus.lengths[samples] - 1  # (samples,) positions
    at = ragged(corpus.starts[samples], lengths)  # (T,) into the corpus
    return Batch(
        tokens=torch.from_numpy(corpus.ids[at].astype(np.int64))[None],
        targets=torch.from_numpy(corpus.ids[at + 1].astype(np.int64)),
        loss_mask=torch.from_numpy(corpus.kind[at + 1] >= RESPONSE),
        prior=torch.from_numpy(prior[at + 1]),
        doc_ids=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        layout=Packed(lengths.tolist()),
    )


def blank(corpus: Corpus, prior: np.ndarray) -> Batch:
    """A row without supervised tokens: every rank must run equally many forward passes, or collectives would hang."""
    shortest = pack(corpus, prior, corpus.lengths.argmin(keepdims=True))
    nothing = torch.zeros_like(shortest.loss_mask)
    return replace(shortest, loss_mask=nothing, group=nothing)  # a group: no grouper and no weights are asked


def ragged(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, … (length[0] of them), begin[1], …: the indices of many spans in one array."""
    return np.arange(length.sum()) + np.repeat(begin - np.cumsum(length) + length, length)
