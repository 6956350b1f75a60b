"""LLMLingua-2 (Pan et al., Findings of ACL 2024) as a grouper: the keep probability of each response token.

T tokens of a corpus, V word pieces of the classifier's vocabulary, P pieces of all texts.
"""

import importlib.util
import string
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from data import RESPONSE, Corpus, ragged

LLMLINGUA2 = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"


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


class Classifier:
    """A published LLMLingua-2 token classifier (Pan et al., Findings of ACL 2024), mBERT or XLM-R; label 1 is "keep".

    Raises:
        ValueError: transformers is not installed, or the folder holds no such classifier.
    """

    WINDOW = 510  # pieces it reads at a time, besides its own two special tokens

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        need_transformers()
        from transformers import AutoModelForTokenClassification, AutoTokenizer
        from transformers.utils import logging

        self.device = torch.device(device)
        self.batch_pieces = (
            32768 if self.device.type == "cuda" else 1024
        )  # padding included; a CPU is slower with more (LOG.md)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a wrong folder gets one line of ours, not its report
        try:
            model, report = AutoModelForTokenClassification.from_pretrained(
                folder, dtype=self.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as e:
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise ValueError(f"{folder}: transformers cannot load a token classifier from here ({reason})") from e
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
        self.backend = tokenizers.Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())  # ours alone to set
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "[SEP]" in an answer is text
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        if model.config.model_type == "bert":
            begins = [not piece.startswith("##") for piece in pieces]
        else:  # as in the method's own package, a run of punctuation that stands so in string.punctuation is a word
            begins = [piece.startswith("▁") or piece in string.punctuation for piece in pieces]
        self.begins = np.array(begins)  # (V,) bool, True on pieces that begin a word
        self.ends_sentence = np.array([piece == "." for piece in pieces])  # (V,)
        self.blank = np.array(
            [piece == "▁" for piece in pieces]
        )  # (V,) a word's beginning, without a character of its own

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def keep(self, texts: list[str]) -> np.ndarray:
        """Probability that the classifier keeps each character, (characters of all texts,) float64; nan: not judged."""
        ids, spans, starts = self.pieces(texts)
        windows = self.windows(ids, starts)
        probability = self.probabilities(ids, windows)
        word = self.word_numbers(ids, windows)
        # A word's probability is the mean of its pieces. An unknown piece, which llmlingua drops, keeps its own.
        unknown = ids == self.tokenizer.unk_token_id
        count, total = np.bincount(word, ~unknown), np.bincount(word, np.where(unknown, 0, probability))
        mean = (total / np.maximum(count, 1)).astype(np.float32)[word]  # float32: a mean of equal ones is then exact
        probability = np.where(unknown, probability, mean)
        length = spans[:, 1] - spans[:, 0]
        character, text = ragged(spans[:, 0], length), "".join(texts)
        count = np.bincount(character, minlength=len(text))
        total = np.bincount(character, np.repeat(probability, length), minlength=len(text))
        judged = (count > 0) & ~np.strings.isspace(np.frombuffer(text.encode("utf-32-le"), "<U1"))
        return np.where(judged, total / np.maximum(count, 1), np.nan)

    def pieces(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces of all texts end to end: ids (P,), their characters of the joined texts (P, 2), each text's start."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        starts = np.cumsum([0, *map(len, encodings)])
        ids = np.concatenate([np.zeros(0, np.int64), *(np.array(e.ids, np.int64) for e in encodings)])
        shift = np.cumsum([0, *map(len, texts)])
        spans = [np.array(e.offsets, np.int64).reshape(-1, 2) + at for e, at in zip(encodings, shift)]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        spans[:, 1] = np.where(self.blank[ids], spans[:, 0], spans[:, 1])
        return ids, spans, starts

    def word_numbers(self, ids: np.ndarray, windows: list[tuple[int, int]]) -> np.ndarray:
        """(P,) which word each piece is of; none straddles two windows."""
        begins = self.begins[ids]
        begins[[start for start, _ in windows]] = True
        return begins.cumsum() - 1

    @torch.no_grad()
    def probabilities(self, ids: np.ndarray, windows: list[tuple[int, int]]) -> np.ndarray:
        """softmax(logits)[..., 1] of each piece, (P,) float32, from windows batched by length."""
        windows = sorted(windows, key=lambda window: window[0] - window[1])  # longest first
        tokenizer, out = self.tokenizer, np.zeros(len(ids), np.float32)
        with tqdm(total=len(ids), desc="llmlingua2", unit="piece", unit_scale=True, disable=None, leave=False) as bar:
            while windows:
                longest = windows[0][1] - windows[0][0]
                rows = max(1, self.batch_pieces // (longest + 2))
                batch, windows = np.array(windows[:rows]), windows[rows:]
                length = batch[:, 1] - batch[:, 0]
                inside = np.arange(longest) < length[:, None]  # (rows, longest)
                tokens = np.full((len(batch), longest + 2), tokenizer.pad_token_id)
                tokens[:, 0] = tokenizer.cls_token_id
                tokens[:, 1:-1][inside] = ids[ragged(batch[:, 0], length)]
                tokens[np.arange(len(batch)), length + 1] = tokenizer.sep_token_id
                mask = np.arange(longest + 2) < length[:, None] + 2
                on_device = (torch.from_numpy(x).to(self.device) for x in (tokens, mask))
                logits = self.model(
                    **dict(zip(("input_ids", "attention_mask"), on_device))
                ).logits  # (rows, longest + 2, 2)
                keep = logits.float().softmax(-1)[:, 1:-1, 1].cpu().numpy()
                out[ragged(batch[:, 0], length)] = keep[inside]
                bar.update(int(length.sum()))
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
