"""LLMLingua-2 (Pan et al., Findings of ACL 2024) as a grouper: the keep probability of each response token.

T tokens of a corpus, V word pieces of the classifier's vocabulary, P pieces of all texts.
"""

import importlib.util
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError
from tokenizers import Regex, pre_tokenizers
from tqdm import tqdm

from data import RESPONSE, Corpus, ragged
from published.files import read_json

LLMLINGUA2 = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json")  # where special tokens are; the first file counts
READS = ("config.json", "*.safetensors*", "tokenizer.json", *NAMED_IN)  # of a folder, all that scores depend on
SPECIAL = {  # what each architecture calls them where the folder does not say
    "bert": {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"},
    "xlm-roberta": {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"},
}


def keep_scores(corpus: Corpus, classifier: "Classifier") -> np.ndarray:
    """Keep probability of each response token, (T,) float32; every assistant turn is read by itself.

    From the classifier's words to the Llama's tokens by way of characters: a token's score is the mean over its
    characters. If a character is split over several tokens, each of them gets that character's score. White space gets
    no score, so a token of nothing else scores -inf.
    """
    first, stop = (
        np.flatnonzero(np.diff(corpus.kind == RESPONSE, prepend=False, append=False)).reshape(-1, 2).T
    )  # of each turn's tokens
    begin, end = corpus.spans[first, 0], corpus.spans[stop - 1, 1]
    keep = classifier.keep([corpus.text[a:b] for a, b in zip(begin, end)])  # (characters of all turns,)
    token = ragged(first, stop - first)
    turn_shift = np.cumsum(end - begin) - end  # from a character of the corpus to one of `keep`
    spans = corpus.spans[token] + np.repeat(turn_shift, stop - first)[:, None]
    scores = np.full(len(corpus.ids), -np.inf, np.float32)
    scores[token] = span_means(keep, spans)
    return scores


def span_means(values: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Mean of `values` over each span (begin, end), leaving out nan; -inf where nothing is left."""
    length = spans[:, 1] - spans[:, 0]
    owner, value = np.repeat(np.arange(len(spans)), length), values[ragged(spans[:, 0], length)]
    judged = ~np.isnan(value)
    owner, value = owner[judged], value[judged]
    count = np.bincount(owner, minlength=len(spans))
    total = np.bincount(owner, value, minlength=len(spans))
    return np.where(count, total / np.maximum(count, 1), -np.inf)


def need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            '--grouper llmlingua2 runs a BERT by transformers; install it with: pip install -e ".[llmlingua]"'
        )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 matrices are computed in float32: no TF32, on a CPU no bfloat16, whatever was set before."""
    parts, legacy = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), "highest"
    was = [part.fp32_precision for part in parts]
    with suppress(RuntimeError):  # raised where only `parts` were set: torch has an older and a newer switch
        legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for part, precision in zip(parts, was):
            part.fp32_precision = precision


class Classifier:
    """A published LLMLingua-2 token classifier (Pan et al., Findings of ACL 2024), mBERT or XLM-R; label 1 is "keep".

    The pieces are those of the folder's own tokenizer.json; transformers, whose releases build tokenizers differently,
    makes the network alone. It runs in exact float32, so probabilities agree to 1e-5 between devices.

    Raises:
        ValueError: transformers is not installed, or the folder holds no such classifier.
    """

    WINDOW = 510  # pieces it reads at a time, besides its own two special tokens

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        need_transformers()
        from transformers import AutoModelForTokenClassification
        from transformers.utils import logging

        self.folder, self.device = Path(folder), torch.device(device)
        self.batch_pieces = (
            32768 if self.device.type == "cuda" else 1024
        )  # padding included; a CPU is slower with more (LOG.md)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a wrong folder gets one line of ours, not its report
        try:
            model, report = AutoModelForTokenClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as e:
            reason = f"{(str(e).strip() or repr(e)).splitlines()[0]}); is the download complete, and all of one model?"
            raise ValueError(f"{folder}: transformers cannot load a token classifier from here ({reason}") from e
        finally:
            logging.set_verbosity(verbosity)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{folder}: no trained {missing[0]}; is it an LLMLingua-2 classifier, for example {LLMLINGUA2}?"
            )
        if model.config.model_type not in ("bert", "xlm-roberta") or model.config.num_labels != 2:
            found = f"a {model.config.model_type} with {model.config.num_labels} labels"
            raise ValueError(f"{folder}: {found}, expected LLMLingua-2's bert or xlm-roberta with 2")
        self.model = model.to(self.device).eval()
        self.backend = self.own_tokenizer(model.config)
        size = max(self.backend.get_vocab().values()) + 1
        pieces = [self.backend.id_to_token(i) or "" for i in range(size)]
        if model.config.model_type == "bert":
            begins = [not piece.startswith("##") for piece in pieces]
        else:  # as in the method's own package, a run of punctuation that stands so in string.punctuation is a word
            begins = [piece.startswith("▁") or piece in string.punctuation for piece in pieces]
        self.begins = np.array(begins)  # (V,) bool, True on pieces that begin a word
        self.ends_sentence = np.array([piece == "." for piece in pieces])  # (V,)
        self.blank = np.array(
            [piece == "▁" for piece in pieces]
        )  # (V,) a word's beginning, without a character of its own

    def own_tokenizer(self, config) -> tokenizers.Tokenizer:
        """The folder's tokenizer.json; sets the ids `cls`, `sep`, `pad` and `unk`."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no tokenizer.json here; copy the one published with the classifier")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizers file ({e})") from e
        backend.no_truncation()
        backend.no_padding()
        configs, special = [read_json(file) for name in NAMED_IN if (file := self.folder / name).is_file()], []
        for role, usual in SPECIAL[config.model_type].items():
            named = [config.get(f"{role}_token") for config in configs]
            named = [*(x.get("content") if isinstance(x, dict) else x for x in named), usual]
            known = [x for x in named if isinstance(x, str) and backend.token_to_id(x) is not None]
            if not known:
                raise ValueError(f"{path}: no {role}_token such as {usual}; is it the classifier's own?")
            setattr(self, role, backend.token_to_id(known[0]))
            special += known[:1]
        # "[SEP]" in an answer is text. A vocabulary of unigrams would still have it whole, so it is cut in two.
        backend.add_special_tokens(special)
        backend.encode_special_tokens = True
        inside = Regex("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in special))
        steps = [backend.pre_tokenizer, pre_tokenizers.Split(inside, "merged_with_previous")]
        backend.pre_tokenizer = pre_tokenizers.Sequence([step for step in steps if step])
        return backend

    def keep(self, texts: list[str]) -> np.ndarray:
        """Probability that the classifier keeps each character, (characters of all texts,) float32; nan: not judged."""
        ids, spans, starts = self.pieces(texts)
        windows = self.windows(ids, starts)
        probability = self.probabilities(ids, windows)
        word = self.word_numbers(ids, windows)
        # A word's probability is the mean of its pieces. An unknown piece, which llmlingua drops, keeps its own.
        unknown = ids == self.unk
        count, total = np.bincount(word, ~unknown), np.bincount(word, np.where(unknown, 0, probability))
        mean = (total / np.maximum(count, 1)).astype(np.float32)[word]  # float32: a mean of equal ones is then exact
        probability = np.where(unknown, probability, mean)
        length = spans[:, 1] - spans[:, 0]
        character, text = ragged(spans[:, 0], length), "".join(texts)
        count = np.bincount(character, minlength=len(text))
        total = np.bincount(character, np.repeat(probability, length), minlength=len(text))
        space = np.strings.isspace(np.frombuffer(text.encode("utf-32-le"), "<U1"))
        out = np.where((count > 0) & ~space, total / np.maximum(count, 1), np.nan).astype(np.float32)
        begins = np.cumsum([0, *map(len, texts)])
        for at in np.setdiff1d(np.flatnonzero((count == 0) & ~space), begins):
            out[at] = out[at - 1]  # the normalizer joins it to the one before it, as an accent to its letter
        return out

    def pieces(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces of all texts end to end: ids (P,), their characters of the joined texts (P, 2), each text's start."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        starts = np.cumsum([0, *map(len, encodings)])
        ids = np.concatenate([np.zeros(0, np.int64), *(np.array(e.ids, np.int64) for e in encodings)])
        shift = np.cumsum([0, *map(len, texts)])
        spans = [np.array(e.offsets, np.int64).reshape(-1, 2) + at for e, at in zip(encodings, shift)]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        spans[:, 1] = np.where(self.blank[ids], spans[:, 0], spans[:, 1])
        if (top := max(ids.max(initial=0), self.cls, self.sep, self.pad)) >= (size := self.model.config.vocab_size):
            raise ValueError(f"{self.folder}: tokenizer.json gives id {top}, but the network embeds {size} pieces")
        return ids, spans, starts

    def word_numbers(self, ids: np.ndarray, windows: list[tuple[int, int]]) -> np.ndarray:
        """(P,) which word each piece is of; none straddles two windows."""
        begins = self.begins[ids]
        begins[[start for start, _ in windows]] = True
        return begins.cumsum() - 1

    @torch.no_grad()
    @exact_float32()
    def probabilities(self, ids: np.ndarray, windows: list[tuple[int, int]]) -> np.ndarray:
        """softmax(logits)[..., 1] of each piece, (P,) float32, from windows batched by length.

        Raises:
            ValueError: one is not finite.
        """
        windows = sorted(windows, key=lambda window: window[0] - window[1])  # longest first
        out = np.zeros(len(ids), np.float32)
        with tqdm(total=len(ids), desc="llmlingua2", unit="piece", unit_scale=True, disable=None, leave=False) as bar:
            while windows:
                longest = windows[0][1] - windows[0][0]
                rows = max(1, self.batch_pieces // (longest + 2))
                batch, windows = np.array(windows[:rows]), windows[rows:]
                length = batch[:, 1] - batch[:, 0]
                inside = np.arange(longest) < length[:, None]  # (rows, longest)
                tokens = np.full((len(batch), longest + 2), self.pad)
                tokens[:, 0] = self.cls
                tokens[:, 1:-1][inside] = ids[ragged(batch[:, 0], length)]
                tokens[np.arange(len(batch)), length + 1] = self.sep
                mask = np.arange(longest + 2) < length[:, None] + 2
                on_device = (torch.from_numpy(x).to(self.device) for x in (tokens, mask))
                logits = self.model(
                    **dict(zip(("input_ids", "attention_mask"), on_device))
                ).logits  # (rows, longest + 2, 2)
                keep = logits.softmax(-1)[:, 1:-1, 1].cpu().numpy()
                out[ragged(batch[:, 0], length)] = keep[inside]
                bar.update(int(length.sum()))
        if bad := int((~np.isfinite(out)).sum()):
            found = f"{bad:,} of {len(out):,} keep probabilities are nan"
            raise ValueError(f"{self.folder}: {found}; are the classifier's weights damaged?")
        return out

    def windows(self, ids: np.ndarray, starts: np.ndarray) -> list[tuple[int, int]]:
        """Each text cut after the last full stop that leaves at most WINDOW pieces, else before a word, else anywhere.

        llmlingua also cuts at full stops, but allows a 511th piece, which pushes out its closing [SEP].
        """
        stops = [np.flatnonzero(self.ends_sentence[ids]) + 1, np.flatnonzero(self.begins[ids])]
        out = []
        for start, end in zip(starts[:-1], starts[1:]):
            while end - start > self.WINDOW:
                latest = (
                    places[np.searchsorted(places, start + self.WINDOW, "right") - 1] for places in stops if len(places)
                )
                stop = next((stop for stop in latest if stop > start), start + self.WINDOW)
                out.append((start, stop))
                start = stop
            if start < end:
                out.append((start, end))
        return out
