"""Rows of JSON -> a tokenized corpus -> packed micro-batches, in an order that is a function of (seed, epoch).

    {"conversations": ["Hi", "Hello."]}  ─ parse ─►  [("user", "Hi"), ("assistant", "Hello.")]
      ─ template ─►  BOS │ User: Hi ⏎⏎ Assistant: │  Hello. │ <|end_of_text|>
                          one string, tokenized     apart     one id
      kind             TEMPLATE  PROMPT  TEMPLATE   RESPONSE   END            trained on: RESPONSE and END

A prompt and its template go through the tokenizer as one string, as they do when the model is used; a response is
tokenized apart, so no token straddles the seam. Text never becomes a special token, whatever a row spells.

A corpus is three flat arrays and knows no padding. A batch is a row of whole samples end to end; targets, loss mask and
importance are already shifted, so position i of each speaks of the token that position i predicts.

T positions of a packed row, N samples.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from cache import Arrays, cached, digest, source
from files import download, read_json, read_tensor, weight_files, write_json
from model import Layout

TEMPLATE, PROMPT, RESPONSE, END, SPECIAL = range(5)  # what a piece of text is; SPECIAL is stored as TEMPLATE
TOKENIZED = (TEMPLATE, PROMPT, RESPONSE)  # the others are one token each, given by name
Turns = list[tuple[str, str | None]]  # (role, text); None: this turn is still to be written
Pieces = Iterator[tuple[int, str]]  # (kind, text)


# Rows.


def data_file(name: str) -> Path:
    """The local file behind `--data`: a path as it is, or hf://datasets/ORGANISATION/NAME/FILE, downloaded from the Hub."""
    if not name.startswith("hf://"):
        return Path(name)
    kind, organisation, repository, *path = f"{name[5:]}///".split("/", 3)
    file = "".join(path).rstrip("/")
    if kind != "datasets" or not file:
        raise ValueError(f"{name}: a file on the Hub has the form hf://datasets/ORGANISATION/NAME/FILE")
    return download(f"{organisation}/{repository}", [file], f"{file} --repo-type dataset", "dataset") / file


def fault(e: Exception) -> str:
    return f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)  # else too deep, or too long a number


def text_of(path: Path) -> str:
    """What a text file says, perhaps gzipped, with or without a byte-order mark; ValueError where it is damaged or not UTF-8."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{path}: not a whole gzip file ({e}); is the download complete?") from e
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{raw[e.start]:02x} is not UTF-8; convert the file, for example: iconv -f ENCODING -t utf-8"
        ) from e


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) for each object of a JSON array or of JSON lines, either one perhaps gzipped; `where` is "file:line".

    Raises:
        ValueError: naming the file, and the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data takes one JSON or JSONL file, each also .gz")
    text = text_of(path)
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{path}: item {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{getattr(e, 'lineno', 1)}: not JSON ({fault(e)})") from e
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
            if line.strip():
                try:
                    rows.append((f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{path}:{number}: not JSON ({fault(e)}); expected one object a line, or one array") from e
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__}, expected an object")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def parse(where: str, row: dict) -> tuple[str, Turns]:
    """(format, turns) of one row; the format is "dialogue", "alpaca" or "text".

    Raises:
        ValueError: no known set of fields, or a field of the wrong type.
    """

    def string(value, name: str) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is {type(value).__name__}, expected a string")
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise ValueError(
                f"{where}: {name} holds \\u{ord(value[e.start]):04x}, half of a surrogate pair; was an emoji cut in two?"
            ) from e
        return value

    def tagged(turns: list, name: str, role_key: str, text_key: str) -> Turns:
        out = []
        for i, turn in enumerate(turns):
            known = isinstance(turn, dict) and turn.get(role_key) in [*ROLES]  # a list, because any JSON may stand there
            if not known or text_key not in turn:
                raise ValueError(
                    f"{where}: {name}[{i}] is {json.dumps(turn)[:60]}, expected an object with {role_key} "
                    f"({', '.join(ROLES)}) and {text_key}"
                )
            out.append((ROLES[turn[role_key]], string(turn[text_key], f"{name}[{i}].{text_key}")))
        return out

    for name in ("conversations", "messages"):
        if name in row:
            turns = row[name]
            if not isinstance(turns, list) or not turns:
                raise ValueError(f"{where}: {name} is {json.dumps(turns)[:60]}, expected a list of turns")
            if name == "messages":
                return "dialogue", tagged(turns, name, "role", "content")
            if isinstance(turns[0], dict):
                return "dialogue", tagged(turns, name, "from", "value")
            return "dialogue", [(("user", "assistant")[i % 2], string(t, f"{name}[{i}]")) for i, t in enumerate(turns)]
    if "instruction" in row and "output" in row:
        given = string(row.get("input", ""), "input")
        turns = [("user", string(row["instruction"], "instruction")), ("input", given), ("assistant", string(row["output"], "output"))]
        return "alpaca", [turn for turn in turns if turn != ("input", "")]
    if "prompt" in row and "completion" in row:
        return "dialogue", [("user", string(row["prompt"], "prompt")), ("assistant", string(row["completion"], "completion"))]
    if "text" in row:
        return "text", [("assistant", string(row["text"], "text"))]
    raise ValueError(
        f"{where}: fields {', '.join(map(repr, row)) or 'none'}; expected conversations (LIMA, ShareGPT), messages, instruction and output "
        "(Alpaca), prompt and completion, or text"
    )


# Templates.


def plain(turns: Turns) -> Pieces:
    """Appendix I's form: "User: …", a blank line, "Assistant: …", each answer closed by the end token."""
    for role, text in with_input(turns):
        if role == "assistant":
            yield TEMPLATE, "Assistant:"
            yield from answer(text, " ", "<|end_of_text|>")
        else:
            yield TEMPLATE, f"{role.capitalize()}: "
            yield PROMPT, text
            yield TEMPLATE, "\n\n"


def alpaca(turns: Turns) -> Pieces:
    """Stanford's two prompts: one instruction, perhaps with an input, one answer."""
    (_, instruction), *given, (_, output) = turns
    yield (
        TEMPLATE,
        "Below is an instruction that describes a task" + (", paired with an input that provides further context" if given else ""),
    )
    yield TEMPLATE, ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
    yield PROMPT, instruction
    for _, text in given:
        yield TEMPLATE, "\n\n### Input:\n"
        yield PROMPT, text
    yield TEMPLATE, "\n\n### Response:"
    yield from answer(output, "", "<|end_of_text|>")


def llama3(turns: Turns) -> Pieces:
    """Llama 3's headers; only for checkpoints whose rows for them are trained (`require_trained_headers`)."""
    for role, text in with_input(turns):
        yield SPECIAL, "<|start_header_id|>"
        yield TEMPLATE, role
        yield SPECIAL, "<|end_header_id|>"
        yield TEMPLATE, "\n\n"
        if role == "assistant":
            yield from answer(text and text.strip(), "", "<|eot_id|>")
        else:
            yield PROMPT, text.strip()
            yield SPECIAL, "<|eot_id|>"


def text(turns: Turns) -> Pieces:
    """Plain text: every token is trained on."""
    for _, content in turns:
        yield from answer(content, "", "<|end_of_text|>")


def answer(content: str | None, lead: str, end: str) -> Pieces:
    if content is not None:
        yield RESPONSE, lead + content
        yield END, end


def with_input(turns: Turns) -> Turns:
    """Alpaca's input, told after the instruction in the same user turn."""
    if len(turns) > 1 and turns[1][0] == "input":
        return [("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    return turns


TEMPLATES: dict[str, Callable[[Turns], Pieces]] = {"plain": plain, "alpaca": alpaca, "llama3": llama3, "text": text}
AUTO = {"dialogue": "plain", "alpaca": "alpaca", "text": "text"}

CHAT_TEMPLATES = {  # the same text in Jinja, saved with the model; transformers' apply_chat_template reads it
    "plain": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{{ messages[0]['content'] }}\n\n### Response:"
        "{% for m in messages[1:] %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}


# Tokens.


class Tokenizer:
    """A model folder's tokenizer.json, with the ids that begin and end a document.

    Raises:
        ValueError: no readable tokenizer.json, no begin or end token, or more tokens than the model has embeddings.
    """

    def __init__(self, folder: str | Path, vocab_size: int):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no tokenizer.json here; copy the one the model was trained with")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizers file ({e})") from e
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "<|end_of_text|>" in a row is text, not an end
        self.config = read_json(config) if (config := self.folder / "tokenizer_config.json").is_file() else {}
        size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        if size > vocab_size:
            raise ValueError(f"{path}: ids up to {size - 1}, but the model embeds {vocab_size} tokens; do they belong together?")
        self.bos_token = self._name("bos_token", "<|begin_of_text|>")
        self.end_token = self._name("eos_token", "<|end_of_text|>")
        self.bos, self.end = self.id(self.bos_token), self.id(self.end_token)
        self.raw = path.read_bytes()  # kept, because the folder may be gone when the model is saved

    def _name(self, role: str, llama3: str) -> str:
        """Llama 3's own token where there is one, else what tokenizer_config.json calls it."""
        named = self.config.get(role)
        named = named.get("content") if isinstance(named, dict) else named
        for token in (llama3, named):
            if isinstance(token, str) and self.backend.token_to_id(token) is not None:
                return token
        raise ValueError(f"{self.folder}: no {role}: neither {llama3} nor tokenizer_config.json's {role} ({named}) is in tokenizer.json")

    def id(self, token: str) -> int:
        if token == "<|end_of_text|>" and self.backend.token_to_id(token) is None:
            token = self.end_token
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.folder}: the tokenizer has no {token}; use another --template")
        return found

    def prompt(self, template: str, turns: Turns) -> list[int]:
        """Token ids of a conversation whose last turn, (“assistant”, None), is to be generated."""
        ids, *_ = next(tokenize([list(TEMPLATES[template](turns))], self))
        return ids.tolist()

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def stop_ids(self, template: str) -> list[int]:
        """Every token that ends an answer under `template`."""
        return sorted({self.end, self.id("<|eot_id|>")} if template == "llama3" else {self.end})

    def save(self, folder: str | Path, template: str) -> None:
        """tokenizer.json as it is; tokenizer_config.json with the chat template; generation_config.json with the end tokens."""
        folder = Path(folder)
        (folder / "tokenizer.json").write_bytes(self.raw)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        config |= {"bos_token": self.bos_token, "eos_token": "<|eot_id|>" if template == "llama3" else self.end_token}
        config.pop("chat_template", None)
        if template in CHAT_TEMPLATES:
            config["chat_template"] = CHAT_TEMPLATES[template]
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "generation_config.json", {"bos_token_id": self.bos, "eos_token_id": self.stop_ids(template)})


Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # (ids int32, kind uint8, spans (n, 2) int64) of one document


def tokenize(documents: list[list[tuple[int, str]]], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Rendered documents -> the tokens of each, with its BOS; the tokenizer runs on all cores.

    Spans are characters of the document's text (`written`), first and one past the last; a begin or end token's is empty.
    """
    documents = [list(segments(pieces)) for pieces in documents]
    strings = [written(segment) for document in documents for segment in document if segment[0][0] in TOKENIZED]
    encodings = iter(tokenizer.backend.encode_batch(strings, add_special_tokens=False))
    for document in documents:
        parts, at = [([tokenizer.bos], TEMPLATE, np.zeros((1, 2), np.int64))], 0
        for segment in document:
            kind, piece = segment[0]
            if kind in TOKENIZED:
                encoding = next(encodings)
                spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
                parts.append((encoding.ids, RESPONSE if kind == RESPONSE else prompt_kinds(spans, segment), at + spans))
                at += len(written(segment))
            else:
                parts.append(([tokenizer.id(piece)], END if kind == END else TEMPLATE, np.full((1, 2), at)))
        ids, kinds, spans = zip(*parts)
        kinds = [np.broadcast_to(np.asarray(kind, np.uint8), len(i)) for kind, i in zip(kinds, ids)]
        yield np.concatenate([np.asarray(i, np.int32) for i in ids]), np.concatenate(kinds), np.concatenate(spans)


def written(pieces: list[tuple[int, str]]) -> str:
    """What a tokenizer reads of rendered pieces: all but the tokens given by name."""
    return "".join(piece for kind, piece in pieces if kind in TOKENIZED)


def segments(pieces: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """What is tokenized together: neighbouring template and prompt pieces; every other piece is by itself."""
    for is_prompt, run in groupby(pieces, key=lambda piece: piece[0] in (TEMPLATE, PROMPT)):
        yield from [list(run)] if is_prompt else ([piece] for piece in run)


def prompt_kinds(spans: np.ndarray, pieces: list[tuple[int, str]]) -> np.ndarray:
    """Kinds of one prompt string's tokens: those that hold any character of the row's text are PROMPT, the others TEMPLATE."""
    kind = np.full(len(spans), TEMPLATE, np.uint8)
    begin, stop = spans.T  # all bytes of one character share its span
    start = 0
    for piece_kind, piece in pieces:
        end = start + len(piece)
        if piece_kind == PROMPT:
            inside = np.flatnonzero((begin < end) & (stop > start))
            if len(inside):
                kind[inside[0] : inside[-1] + 1] = PROMPT
        start = end
    return kind


@dataclass
class Corpus:
    """N tokenized samples, end to end, and what became of the rows."""

    ids: np.ndarray  # (tokens,) int32
    kind: np.ndarray  # (tokens,) uint8, TEMPLATE, PROMPT, RESPONSE or END
    starts: np.ndarray  # (N + 1,) int64, sample i is starts[i]:starts[i + 1]
    template: str
    counts: dict[str, int] = field(default_factory=dict)  # "rows", "kept", and a line for each thing that befell some
    text: str = ""  # what the tokenizer read, document after document
    spans: np.ndarray | None = None  # (tokens, 2) int64, each token's characters in `text`, first and one past the last
    rows: np.ndarray | None = None  # (N,) int64, the row of the file that each sample is from, counted from 1

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def loss_mask(self) -> np.ndarray:
        """(tokens,) bool, True on the tokens that are trained on."""
        return self.kind >= RESPONSE

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def take(self, samples: np.ndarray) -> "Corpus":
        """A corpus of these samples alone."""
        lengths = self.lengths[samples]
        at = ragged(self.starts[samples], lengths)
        per_token = {name: getattr(self, name)[at] for name in ("ids", "kind", "spans")}
        return replace(self, **per_token, starts=np.cumsum([0, *lengths]), rows=self.rows[samples])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text and its tokens."""
        return digest({name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}, self.text)

    @property
    def doc_ids(self) -> np.ndarray:
        """(tokens,) int64, the sample each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)


def load_corpus(path: str | Path, tokenizer: Tokenizer, template: str, context: int, cache: Path | None = None) -> Corpus:
    """Tokenize a data file, or read what an earlier run left in the folder `cache`.

    Raises:
        ValueError: naming file and line; also when no row is usable.
    """
    path = Path(path)

    def make() -> tuple[Arrays, dict]:
        corpus = build_corpus(path, tokenizer, template, context)
        arrays = {name: getattr(corpus, name) for name in ("ids", "kind", "starts", "spans", "rows")}
        return arrays | {"text": np.frombuffer(corpus.text.encode(), np.uint8)}, {"template": corpus.template, "counts": corpus.counts}

    if not path.is_file():
        make()  # which says what is wrong
    digests = [hashlib.sha256(raw).hexdigest() for raw in (path.read_bytes(), tokenizer.raw)]
    key = [*digests, source("data"), tokenizer.bos, tokenizer.end, template, context]  # this file too: it holds the templates
    arrays, about = cached(cache, "tokens", key, make)
    return Corpus(**arrays | {"text": arrays["text"].tobytes().decode()}, **about)


def build_corpus(path: Path, tokenizer: Tokenizer, template: str, context: int) -> Corpus:
    """Read, render, tokenize and cut.

    A sample is cut at `context` tokens, from its end; an end token that is cut away stays away. Plain text is cut into
    pieces instead, each with a BOS of its own, so that every token of it is trained on once.
    """
    rows = read_rows(path)
    template, documents, numbers, counts = render(rows, template)
    samples, origins, texts, at = [], [], [], 0
    with tqdm(total=len(documents), desc="tokenizing", unit="row", disable=None, leave=False) as bar:
        for chunk in chunks(documents, characters=4_000_000):
            for document, (ids, kind, spans) in zip(chunk, tokenize(chunk, tokenizer)):
                spans += at
                texts.append(written(document))
                at += len(texts[-1])
                if template == "text":
                    samples += cut(ids, kind, spans, context)
                elif (kind[:context] >= RESPONSE).any():
                    samples.append((ids[:context], kind[:context], spans[:context]))
                    counts["cut at the context length"] += len(ids) > context
                else:
                    counts["dropped: response cut away"] += 1
                origins += [numbers[len(texts) - 1]] * (len(samples) - len(origins))
            bar.update(len(chunk))
    counts = {what: n for what, n in sorted(counts.items()) if n}
    if not samples:
        why = ", ".join(f"{n} {what}" for what, n in counts.items())
        raise ValueError(f"{path}: none of {len(rows)} rows is usable ({why}); each needs a response, within --context {context} tokens")
    ids, kind, spans = map(np.concatenate, zip(*samples))
    starts = np.cumsum([0, *(len(sample[0]) for sample in samples)])
    counts = {"rows": len(rows), "kept": len(samples), **counts}
    return Corpus(ids, kind, starts, template, counts, "".join(texts), spans, np.array(origins))


def render(rows: list[tuple[str, dict]], template: str) -> tuple[str, list[list[tuple[int, str]]], list[int], Counter]:
    """(template, documents, numbers, counts): usable rows as pieces of text under the template; which they are; how many are not."""
    counts, documents, numbers, first = Counter(), [], [], None
    for number, (where, row) in enumerate(rows, 1):
        found, turns = parse(where, row)
        if first is None:
            first, template = found, AUTO[found] if template == "auto" else template
        if found != first:
            raise ValueError(f"{where}: a row of {found}, but the file began with {first}; split the file by kind")
        answered = max((i for i, (role, _) in enumerate(turns, 1) if role == "assistant"), default=0)
        require_fit(where, found, turns[:answered], template)
        if not answered:
            counts["dropped: no response"] += 1
        elif not all(content.strip() for role, content in turns[:answered] if role == "assistant"):
            counts["dropped: empty response"] += 1
        else:
            counts["unanswered last turns left out"] += answered < len(turns)
            documents.append(list(TEMPLATES[template](turns[:answered])))
            numbers.append(number)
    return template, documents, numbers, counts


def require_fit(where: str, found: str, turns: Turns, template: str) -> None:
    """Raise where a row cannot be told in the template."""
    if (found == "text") != (template == "text"):
        raise ValueError(f"{where}: a row of {found} does not fit --template {template}; use --template {AUTO[found]}")
    roles = [role for role, _ in turns]
    if template == "alpaca" and roles[:1] + [r for r in roles[1:] if r != "input"] not in (["user", "assistant"], []):
        raise ValueError(f"{where}: {', '.join(roles)}: --template alpaca holds one instruction and one answer; use --template plain")


def require_trained_headers(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse the llama3 template on a base model, whose embedding rows for the headers are far shorter than the median, or all alike."""
    files = weight_files(folder)
    if not files:
        return  # fresh weights: every row is untrained alike
    if "model.embed_tokens.weight" not in files:
        raise ValueError(f"{folder}: no model.embed_tokens.weight among the tensors; is this the published (Hub) layout?")
    rows = read_tensor(files["model.embed_tokens.weight"], "model.embed_tokens.weight").float()  # (V, D)
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    found = rows[[tokenizer.id(token) for token in headers]]  # (3, D)
    norms, median = found.norm(dim=1), float(rows.norm(dim=1).median())
    alike = float(torch.nn.functional.cosine_similarity(found, found.roll(1, 0)).min())
    if norms.min() < median / 2 or alike > 0.95:  # a tied head's softmax pushes every row it never meets along one line
        raise ValueError(
            f"{folder}: this base model never trained {', '.join(headers)}: their embeddings have norms from {norms.min():.3g} (median row "
            f"{median:.3g}) and cosines above {alike:.2f} to each other, and at fine-tuning's learning rates they never will be trained; "
            "use --template plain, or an instruction-tuned checkpoint"
        )


def cut(ids: np.ndarray, kind: np.ndarray, spans: np.ndarray, context: int) -> list[Tokens]:
    """A long text as pieces of at most `context` tokens, each with the BOS that `ids` begins with."""
    pieces = []
    for i in range(1, len(ids), context - 1):
        piece = slice(i, i + context - 1)
        bos_spans = np.full((1, 2), spans[i, 0])  # an empty one, where the piece begins
        pieces.append(tuple(map(np.concatenate, ((ids[:1], ids[piece]), (kind[:1], kind[piece]), (bos_spans, spans[piece])))))
    return pieces


def chunks(documents: list, characters: int) -> Iterator[list]:
    """Runs of documents with about so many characters: enough to feed every core, little enough to hold."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += sum(len(piece) for _, piece in document)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# Batches.


@dataclass
class Batch:
    """Whole samples end to end in one row of T positions; every field but `tokens` speaks of the token predicted there."""

    tokens: Tensor  # (1, T) int64, what the model reads
    targets: Tensor  # (T,) int64, the next token of the same sample
    loss_mask: Tensor  # (T,) bool, True where the target is trained on
    known: Tensor  # (T,) what the labeller is told of the target: a static grouper's verdict (bool), or rho1's reference nats
    doc_ids: Tensor  # (T,) int64, 0 ... samples - 1, never falling
    layout: Layout

    def to(self, device) -> "Batch":
        """The same batch on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "layout"}
        return Batch(**tensors, layout=self.layout.to(device))


def epoch_order(samples: int, batch_size: int, seed: int, epoch: int, drop_last: bool) -> list[np.ndarray]:
    """The sample numbers of each step of an epoch: a function of (seed, epoch) alone, so a resumed run meets the same ones."""
    order = np.random.default_rng((seed, epoch)).permutation(samples)
    stop = samples - samples % batch_size if drop_last else samples
    return [order[i : min(i + batch_size, stop)] for i in range(0, stop, batch_size)]


def micro_batches(corpus: Corpus, known: np.ndarray, samples: np.ndarray, max_tokens: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """One rank's part of a step's samples, as few packed rows of at most `max_tokens` positions.

    Every rank gets nearly the same number of tokens, and the same number of rows: blank ones fill up.

    Args:
        known: (tokens,) any type, aligned with `corpus.ids`; see `Batch`.
    """
    need = corpus.lengths[samples] - 1  # positions: a sample's last token is only ever a target
    rows = [first_fit(need, part, max_tokens) for part in deal(need, ranks)]
    batches = [pack(corpus, known, samples[row]) for row in rows[rank]]
    return batches + [blank(corpus, known) for _ in range(max(map(len, rows)) - len(batches))]


def deal(need: np.ndarray, ranks: int) -> list[list[int]]:
    """Which samples each rank gets: longest first, each to the rank that has least so far."""
    hands, load = [[] for _ in range(ranks)], np.zeros(ranks, np.int64)
    for i in np.argsort(-need, kind="stable"):
        rank = int(load.argmin())
        hands[rank].append(i)
        load[rank] += need[i]
    return hands


def first_fit(need: np.ndarray, samples: list[int], max_tokens: int) -> list[list[int]]:
    """Samples, longest first, each into the first row that it fits."""
    rows, room = [], []
    for i in samples:
        row = next((r for r, left in enumerate(room) if left >= need[i]), None)
        if row is None:
            rows, room, row = [*rows, []], [*room, max_tokens], len(rows)
        rows[row].append(i)
        room[row] -= need[i]
    return rows


def blank(corpus: Corpus, known: np.ndarray) -> Batch:
    """A row of one token that is not trained on, for a rank that has fewer rows than another and must still take part."""
    batch = pack(corpus, known, [0])
    nowhere = torch.zeros(1, dtype=torch.bool)
    return Batch(batch.tokens[:, :1], batch.targets[:1], nowhere, batch.known[:1], batch.doc_ids[:1], Layout.packed([1]))


def pack(corpus: Corpus, known: np.ndarray, samples: list[int]) -> Batch:
    """The samples end to end in one row; targets, and what is known of them, shifted by one."""
    lengths = corpus.lengths[samples] - 1  # (samples,) positions
    at = ragged(corpus.starts[samples], lengths)  # (T,) into the corpus
    return Batch(
        tokens=torch.from_numpy(corpus.ids[at].astype(np.int64))[None],
        targets=torch.from_numpy(corpus.ids[at + 1].astype(np.int64)),
        loss_mask=torch.from_numpy(corpus.kind[at + 1] >= RESPONSE),
        known=torch.from_numpy(known[at + 1]),
        doc_ids=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        layout=Layout.packed(lengths.tolist()),
    )


def ragged(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, … (length[0] of them), begin[1], …: the places of many spans in one array."""
    return np.arange(length.sum()) + np.repeat(begin - np.cumsum(length) + length, length)
