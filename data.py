"""Rows of JSON -> a tokenized corpus -> packed micro-batches, in an order that is a function of (seed, epoch).

    {"conversations": ["Hi", "Hello."]}  ─ parse ─►  [("user", "Hi"), ("assistant", "Hello.")]
      ─ template ─►  BOS │ User: Hi ⏎⏎ Assistant: │  Hello. │ <|end_of_text|>
                          one string, tokenized     apart     one id
      kind             TEMPLATE  PROMPT  TEMPLATE   RESPONSE   END            trained on: RESPONSE and END

The tokenizer reads prompt and template as one string, as at generation, and then both with the response. Where the
response would change the prompt's tokens, as by a merge across the boundary, it is read separately. Text never becomes
a special token, even if it spells one. A corpus is flat arrays without padding. A batch is one row of complete samples,
one after the other. Labels are shifted by one: entry i of targets, loss_mask, prior and group describes the token that
position i predicts.

T positions of a packed row, N samples of a corpus, `tokens` tokens of a corpus.
"""

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
from published.turns import Turn, parse
from sftgo import token_nll

TEMPLATE, PROMPT, RESPONSE, END, SPECIAL = range(5)  # piece kinds; END and SPECIAL pieces hold a special token's name
Turns = list[Turn]
Pieces = Iterator[tuple[int, str]]  # (kind, text or a token's name)


# Templates: turns -> pieces.


def plain(turns: Turns) -> Pieces:
    """Appendix I's form: "User: …", a blank line, "Assistant: …", each answer closed by the end token."""
    for turn in with_input(turns):
        if turn.role == "assistant":
            yield TEMPLATE, "Assistant:"
            yield from answer(turn, " ")
        else:
            yield from [(TEMPLATE, f"{turn.role.capitalize()}: "), (PROMPT, turn.text), (TEMPLATE, "\n\n")]


def alpaca(turns: Turns) -> Pieces:
    """Stanford's two prompts: one instruction, perhaps with an input, one answer."""
    instruction, *given, output = turns
    paired = ", paired with an input that provides further context" if given else ""
    yield TEMPLATE, f"Below is an instruction that describes a task{paired}. "
    yield TEMPLATE, "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    yield PROMPT, instruction.text
    for turn in given:
        yield from [(TEMPLATE, "\n\n### Input:\n"), (PROMPT, turn.text)]
    yield TEMPLATE, "\n\n### Response:"
    yield from answer(output)


def llama3(turns: Turns) -> Pieces:
    """Llama 3's chat format. The checkpoint must have trained header tokens; support/ checks it."""
    for turn in with_input(turns):
        yield from [(SPECIAL, "<|start_header_id|>"), (TEMPLATE, turn.role), (SPECIAL, "<|end_header_id|>")]
        yield TEMPLATE, "\n\n"
        if turn.role == "assistant":
            yield from answer(turn._replace(text=turn.text and turn.text.strip()), end="<|eot_id|>")
        else:
            yield from [(PROMPT, turn.text.strip()), (SPECIAL, "<|eot_id|>")]


def text(turns: Turns) -> Pieces:
    """Plain text: every token is trained on."""
    for turn in turns:
        yield from answer(turn)


def answer(turn: Turn, lead: str = "", end: str = "<|end_of_text|>") -> Pieces:
    if turn.text is not None:
        yield from [(RESPONSE if turn.train else PROMPT, lead + turn.text), (END if turn.train else SPECIAL, end)]


def with_input(turns: Turns) -> Turns:
    """Alpaca's input, rendered after the instruction in the same user turn."""
    for i, turn in enumerate(turns):
        if turn.role == "input":
            return [*turns[: i - 1], Turn("user", f"{turns[i - 1].text}\n\n{turn.text}"), *turns[i + 1 :]]
    return turns


TEMPLATES: dict[str, Callable[[Turns], Pieces]] = {"plain": plain, "alpaca": alpaca, "llama3": llama3, "text": text}
AUTO = {"dialogue": "plain", "alpaca": "alpaca", "text": "text"}


def renderer(where: str, found: str, turns: Turns, template: str) -> Callable[[Turns], Pieces]:
    """The template's function; ValueError where it cannot render the row."""
    if (found == "text") != (template == "text"):
        raise ValueError(f"{where}: a row of {found} does not fit --template {template}; use --template {AUTO[found]}")
    roles = [turn.role for turn in turns if turn.role != "input"]
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
    ignored: frozenset[str] = frozenset()  # fields of the rows that change nothing

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
    counts, documents, first, ignored = Counter(), {}, None, set()  # documents: number of the row -> its pieces
    rows = read_rows(path)
    for number, (where, row) in enumerate(rows, 1):
        found, turns, unread = parse(where, row)
        ignored |= unread
        if first is None:
            first, template = found, AUTO[found] if template == "auto" else template
        if found != first:
            raise ValueError(f"{where}: a row of {found}, but the file began with {first}; split the file by kind")
        learnt = [i for i, turn in enumerate(turns, 1) if turn.role == "assistant" and turn.train]
        used = turns[: max(learnt, default=0)]
        render = renderer(where, found, used, template)
        if not learnt or not all(turns[i - 1].text.strip() for i in learnt):
            asked = any(turn.role == "assistant" for turn in turns)
            why = "empty response" if learnt else "no response is trained on" if asked else "no response"
            counts[f"dropped: {why}"] += 1
        else:
            counts["last turns without an answer to train on left out"] += len(used) < len(turns)
            documents[number] = list(render(used))
    whole = tokenize([*documents.values()], tokenizer)
    counts.update(whole.counts)
    if (at := whole.ids >= tokenizer.vocab_size).any():
        number = [*documents][whole.doc_ids[at.argmax()]]
        raise ValueError(f"{rows[number - 1][0]}: {tokenizer.unembedded(whole.ids[at.argmax()])}")
    # One document gives one sample; plain text gives several. Each sample is the BOS and one stretch of the document.
    stretches = -(-(whole.lengths - 1) // (context - 1)) if template == "text" else np.ones(len(whole), np.int64)
    document = np.repeat(np.arange(len(whole)), stretches)  # (samples,) the document of each sample
    begin = whole.starts[document] + 1 + ragged(np.zeros_like(stretches), stretches) * (context - 1)  # (samples,)
    size = np.minimum(whole.starts[document + 1] - begin, context - 1)  # (samples,) tokens after the BOS
    at, starts = ragged(begin - 1, size + 1), np.cumsum([0, *(size + 1)])  # (tokens,) into `whole`; (samples + 1,)
    at[starts[:-1]] = whole.starts[document]
    spans = whole.spans[at]  # (tokens, 2)
    spans[starts[:-1]] = whole.spans[begin, :1]  # the BOS gets an empty span at the start of its sample
    row_of = np.array([*documents])[document]
    corpus = Corpus(whole.ids[at], whole.kind[at], starts, spans, row_of, whole.text, template)
    usable = np.bincount(corpus.doc_ids, corpus.loss_mask, len(corpus)) > 0
    counts["dropped: response cut away"] += len(usable) - usable.sum()
    counts["cut at the context length"] += ((whole.lengths > context)[document] & usable).sum() * (template != "text")
    counts = {what: int(n) for what, n in sorted(counts.items()) if n}
    if not usable.any():
        why = ", ".join(f"{n} {what}" for what, n in counts.items())
        needed = "each needs a response to train on, within --context"
        raise ValueError(f"{path}: none of {len(rows)} rows is usable ({why}); {needed}")
    corpus = corpus if usable.all() else corpus.take(np.flatnonzero(usable))
    return replace(corpus, counts={"rows": len(rows), "kept": len(corpus), **counts}, ignored=frozenset(ignored))


def tokenize(documents: list[list[tuple[int, str]]], tokenizer: Tokenizer) -> Corpus:
    """Rendered documents -> their tokens, uncut, each with its BOS; some megabytes of text at a time, on all cores."""
    size = np.cumsum([sum(len(s) for _, s in pieces) for pieces in documents])
    numbered = zip(size // 4_000_000, tqdm(documents, "tokenizing", disable=None, leave=False))
    together = groupby(numbered, lambda pair: pair[0])
    chunks = [encode([pieces for _, pieces in chunk], tokenizer) for _, chunk in together]
    ids, kinds, spans, lengths, apart, texts = zip(*(chunks or [encode([], tokenizer)]))
    begin = np.cumsum([0, *map(len, texts)])
    spans, starts = [span + at for span, at in zip(spans, begin)], np.cumsum([0, *chain(*lengths)])
    counts = {"with an answer read apart, which would change its prompt's tokens": sum(apart)}
    ids, kinds, spans = (np.concatenate(parts) for parts in (ids, kinds, spans))
    return Corpus(ids, kinds, starts, spans, text="".join(texts), counts=counts)


def encode(documents: list[list[tuple[int, str]]], tokenizer: Tokenizer) -> tuple:
    """Documents end to end: (ids, kinds, spans, tokens of each, how many have an answer read apart, text); spans are
    characters of that text."""
    tokenizer.check_template({s for pieces in documents for kind, s in pieces if kind == TEMPLATE})
    bos = (SPECIAL, tokenizer.bos_token)
    parts = [(i, *part) for i, pieces in enumerate(documents) for part in seams([bos, *pieces])]
    befores = ["".join(spelt(before, tokenizer)) for *_, before, _ in parts]
    wholes = [before + "".join(spelt(part[-1], tokenizer)) for before, part in zip(befores, parts)]
    prompts = tokenizer.reader.encode_batch_fast(befores, add_special_tokens=False)
    encodings = tokenizer.reader.encode_batch(wholes, add_special_tokens=False)
    ids, offsets, apart = [], [], set()
    count = np.zeros((len(parts), 2), np.int64)  # tokens of each part: before its answer, and of that
    for i, (prompt, encoding) in enumerate(zip(prompts, encodings)):
        (document, known, *_), n, tokens, at = parts[i], len(prompt), encoding.ids, encoding.offsets
        if tokens[:n] != prompt.ids:
            tokens, at = read_apart(befores[i], wholes[i][len(befores[i]) :], tokenizer)
            apart.add(document)
        ids.append(tokens[known:])
        offsets.append(at[known:])
        count[i] = n - known, len(tokens) - n
    ids = np.fromiter(chain.from_iterable(ids), np.int32)
    spans = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
    spans += np.repeat(np.cumsum([0, *map(len, wholes)])[:-1], count.sum(1))[:, None]
    # Of each character: what it is of, and how many of the text's and of its prompts' there are before it.
    pieces = [piece for *_, before, answered in parts for piece in before + answered]
    kinds = np.array([kind for kind, _ in pieces] + [SPECIAL], np.uint8)
    of = np.repeat(kinds, [*map(len, spelt(pieces, tokenizer)), 1])
    text_before, prompt_before = (np.cumsum(x) - x for x in (of < END, of == PROMPT))
    begin = np.minimum(spans[:, 0], len(of) - 2)
    stop = np.maximum(spans[:, 1], begin + 1)  # a tokenizer may give white space an empty span: see what follows it
    # A token that holds any character of a row's prompt is PROMPT.
    is_prompt = (prompt_before[stop] > prompt_before[begin]) & ~np.isin(ids, [*tokenizer.special.values()])
    kinds = np.where(is_prompt, PROMPT, TEMPLATE).astype(np.uint8)
    kinds[np.repeat(np.tile([False, True], len(parts)), count.ravel())] = RESPONSE
    kinds[count.sum(1).cumsum()[count[:, 1] > 0] - 1] = END
    lengths = np.bincount([part[0] for part in parts], count.sum(1), len(documents)).astype(np.int64)
    return ids, kinds, text_before[spans], lengths, len(apart), "".join(s for kind, s in pieces if kind < END)


def spelt(pieces: list[tuple[int, str]], tokenizer: Tokenizer) -> list[str]:
    """Pieces as strings for `tokenizer.reader`."""
    return [tokenizer.written(s) if kind >= END else s for kind, s in pieces]


def read_apart(before: str, answered: str, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, spans) of two strings end to end, each read by itself."""
    first = tokenizer.reader.encode(before, add_special_tokens=False)
    second = tokenizer.apart.encode(answered, add_special_tokens=False)
    n = len(before)
    return first.ids + second.ids, first.offsets + [(a + n, b + n) for a, b in second.offsets]


def seams(pieces: list[tuple[int, str]]) -> Iterator[tuple[int, list, list]]:
    """(0 or 1, what stands before an answer, the answer with its end), in turn.

    The second begins, where the first is 1, with the end of the answer before: what is read depends on its neighbours.
    """
    known, before = 0, []
    for is_answer, run in groupby(pieces, key=lambda piece: piece[0] in (RESPONSE, END)):
        if not is_answer:
            before += run
            continue
        answer = list(run)
        yield known, before, answer
        known, before = 1, [(SPECIAL, answer[-1][1])]
    if len(before) > known:
        yield known, before, []


def prompt_ids(tokenizer: Tokenizer, template: str, turns: list[tuple[str, str | None]]) -> list[int]:
    """Token ids of a conversation whose last turn, ("assistant", None), is to be generated."""
    turns = [Turn(role, said, train=False) for role, said in turns]
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


def micro_batches(corpus: Corpus, prior, samples, max_tokens: int, rank=0, ranks=1, groups=None) -> list[Batch]:
    """One rank's part of a step: its samples in packed rows of at most `max_tokens` positions.

    All ranks get the same number of rows and about the same number of tokens. `prior` is (tokens,), as `corpus.ids`; so
    are `groups`, where they are known.
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
    batches = [pack(corpus, prior, samples[row[1:]], groups) for row in dealt[rank]]
    return batches + [blank(corpus, prior) for _ in range(max(map(len, dealt)) - len(batches))]


def pack(corpus: Corpus, prior: np.ndarray, samples: np.ndarray, groups: np.ndarray | None = None) -> Batch:
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
        group=None if groups is None else torch.from_numpy(groups[at + 1]),
    )


def blank(corpus: Corpus, prior: np.ndarray) -> Batch:
    """A row without supervised tokens: every rank must run equally many forward passes, or collectives would hang."""
    shortest = pack(corpus, prior, corpus.lengths.argmin(keepdims=True))
    nothing = torch.zeros_like(shortest.loss_mask)
    return replace(shortest, loss_mask=nothing, group=nothing, weight=nothing)  # no grouper and no weights are asked


def ragged(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, … (length[0] of them), begin[1], …: the indices of many spans in one array."""
    return np.arange(length.sum()) + np.repeat(begin - np.cumsum(length) + length, length)
