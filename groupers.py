"""Which tokens are important? A score for every token, then one rule that cuts each sample in two (Eq. 1-2, §3.3).

A static grouper scores the whole corpus once, one float per token, higher is more important; what it cannot judge
(template, begin and end tokens) scores -inf. A loss-dependent one scores inside the step, from detached losses.
`important` turns either kind of score into the two groups.

    grouper     score of a token
    none        no groups: the objective is plain cross-entropy
    random      uniform, drawn once from the seed: what any grouping does by itself
    frequency   1 / its count in the corpus: rare is important
    tfidf       its count in the sample x smooth inverse document frequency: one score per token type and sample
    llmlingua2  the probability that LLMLingua-2's token classifier would keep it when it compresses the answer
    loss        its own loss under the model being trained, at every step
    rho1        that loss less the loss under a frozen reference model: the excess loss of Eq. 9

`python groupers.py --help` shows what they pick.

T tokens of a packed row or of a whole corpus, N samples, V token ids, P word pieces of a classifier's tokenizer.
"""

import importlib.util
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from cache import cached, source
from data import PROMPT, RESPONSE, Batch, Corpus, ragged

GROUPERS = ("none", "random", "frequency", "tfidf", "llmlingua2", "loss", "rho1")
IN_STEP = ("loss", "rho1")  # labelled from the losses of the step
LLMLINGUA2 = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"

Label = Callable[[Tensor, Batch], Tensor]  # (detached nll (T,), batch) -> important (T,) bool


def important(scores: Tensor, loss_mask: Tensor, doc_ids: Tensor, eta: float) -> Tensor:
    """Split each sample's supervised tokens at the percentile eta of their scores.

    Of n supervised tokens, those that reach the k-th highest score are important, k = max(1, (1 - eta) n, rounded half
    up). Equal scores share a group, so the real share is somewhat above 1 - eta; -inf is never important.

    Args:
        scores:    (T,) float, higher is more important.
        loss_mask: (T,) bool, True on the tokens that are trained on.
        doc_ids:   (T,) int64, the sample of each token, 0 ... N - 1.
        eta:       percentile in [0, 1]; 0.9 leaves the bottom 90 % unimportant.

    Returns:
        (T,) bool, False outside `loss_mask`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a percentile in [0, 1]; 0.9 makes the top 10 % important")
    if not scores.shape == loss_mask.shape == doc_ids.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)}, loss_mask {tuple(loss_mask.shape)}, doc_ids {tuple(doc_ids.shape)}: expected one shape"
        )
    at = loss_mask.nonzero().squeeze(1)  # supervised tokens
    score, doc = scores[at].float() + 0.0, doc_ids[at]  # + 0.0: there is one zero
    bits = score.view(torch.int32)
    code = bits ^ (bits >> 31 & 0x7FFFFFFF)  # whole numbers in the order of the floats
    key = (doc << 32) + code  # one sort serves all samples: each by itself, from its lowest score up
    key = key.sort().values if key.is_cuda else torch.from_numpy(np.sort(key.numpy()))  # numpy's is seven times faster here
    n = doc.bincount(minlength=int(doc_ids.max()) + 1 if len(doc_ids) else 0)  # (N,) supervised tokens
    k = ((1 - eta) * n.double() + 0.5 + 1e-9).floor().long().clamp(min=1)  # (N,)
    kth = (n.cumsum(0) - k).clamp(min=0)  # (N,) its place in `key`; unread where n = 0
    threshold = key[kth] - (torch.arange(len(n), device=key.device) << 32) if len(key) else n  # (N,) its code
    verdict = torch.zeros_like(loss_mask)
    verdict[at] = (code >= threshold[doc]) & (score > -torch.inf)
    return verdict


def tfidf(corpus: Corpus) -> np.ndarray:
    """tf x idf, (T,) float32: raw count in the sample times ln((1 + N) / (1 + samples with the token)) + 1.

    A document is a sample's prompt and response text; scikit-learn's `TfidfVectorizer` has the same idf, and its
    normalization of each document would change no rank within it.
    """
    place = np.flatnonzero(judgeable(corpus))
    n = np.diff(np.searchsorted(place, corpus.starts))  # (N,) judged tokens of each sample
    start = np.repeat(corpus.starts[:-1], n)
    # (sample, token id, place in the sample) as one whole number each: a single sort brings equal tokens of a sample together.
    id_bits, place_bits = int(corpus.ids.max()).bit_length(), int(corpus.lengths.max()).bit_length()
    key = np.repeat(np.arange(len(corpus)) << id_bits, n)
    key += corpus.ids[place]
    key <<= place_bits
    key |= place - start
    key.sort()
    place = start + (key & ((1 << place_bits) - 1))
    key >>= place_bits
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))  # where each run of equal (sample, token id) begins
    count, token = np.diff(first, append=len(key)), key[first] & ((1 << id_bits) - 1)
    idf = np.log((1 + len(corpus)) / (1 + np.bincount(token))) + 1  # (V,)
    scores = np.full(len(corpus.ids), -np.inf, np.float32)
    scores[place] = np.repeat((count * idf[token]).astype(np.float32), count)
    return scores


def frequency(corpus: Corpus) -> np.ndarray:
    """Inverse count over the corpus' text, (T,) float32."""
    judged = judgeable(corpus)
    ids = corpus.ids[judged]
    return scatter(judged, 1 / np.bincount(ids)[ids])


def random(corpus: Corpus, seed: int) -> np.ndarray:
    """Uniform in [0, 1), (T,) float32, from a stream of its own, not the one that orders an epoch."""
    judged = judgeable(corpus)
    return scatter(judged, np.random.default_rng((seed, 0, 1)).random(int(judged.sum()), np.float32))


def judgeable(corpus: Corpus) -> np.ndarray:
    """(T,) bool, True on a sample's own text: neither template nor begin nor end tokens."""
    return (corpus.kind == PROMPT) | (corpus.kind == RESPONSE)


def scatter(judged: np.ndarray, scores: np.ndarray) -> np.ndarray:
    out = np.full(len(judged), -np.inf, np.float32)
    out[judged] = scores
    return out


# LLMLingua-2.


def llmlingua2(corpus: Corpus, classifier: "Classifier") -> np.ndarray:
    """Keep probability of each response token, (T,) float32; every assistant turn is read by itself.

    From the classifier's words to the Llama's tokens by way of characters: a token's score is the mean over its
    characters. A byte of a character that is split over tokens counts as the character, in each of them. White space is
    never judged: a token of nothing else scores -inf.
    """
    first, stop = np.flatnonzero(np.diff(corpus.kind == RESPONSE, prepend=False, append=False)).reshape(-1, 2).T  # a turn's tokens
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
    known = ~np.isnan(value)
    owner, value = owner[known], value[known]
    count = np.bincount(owner, minlength=len(spans))
    total = np.bincount(owner, value, minlength=len(spans))
    return np.where(count, total / np.maximum(count, 1), -np.inf)


def need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError('--grouper llmlingua2 runs a BERT by transformers; install it with: pip install -e ".[llmlingua]"')


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
        self.batch_pieces = 32768 if self.device.type == "cuda" else 1024  # padding included; a CPU is slower with more (LOG.md)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a wrong folder gets one line of ours, not its report
        try:
            model, report = AutoModelForTokenClassification.from_pretrained(
                folder, dtype=self.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise ValueError(
                f"{folder}: transformers cannot load a token classifier from here ({(str(e).strip() or repr(e)).splitlines()[0]})"
            ) from e
        finally:
            logging.set_verbosity(verbosity)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{folder}: no trained {missing[0]}; is it an LLMLingua-2 classifier, for example {LLMLINGUA2}?")
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
        self.blank = np.array([piece == "▁" for piece in pieces])  # (V,) a word's beginning, without a character of its own

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def keep(self, texts: list[str]) -> np.ndarray:
        """Probability that the classifier keeps each character, (characters of all texts,) float64; nan: not judged."""
        ids, spans, starts = self.pieces(texts)
        windows = self.windows(ids, starts)
        probability = self.probabilities(ids, windows)
        word = self.word_numbers(ids, windows)
        # A word's probability is the mean of its pieces. A piece out of vocabulary, which the method's package drops, keeps its own.
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
        """Pieces of all texts end to end: ids (P,), their characters of the joined texts (P, 2), where each text starts."""
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
                logits = self.model(**dict(zip(("input_ids", "attention_mask"), on_device))).logits  # (rows, longest + 2, 2)
                keep = logits.float().softmax(-1)[:, 1:-1, 1].cpu().numpy()
                out[ragged(batch[:, 0], length)] = keep[inside]
                bar.update(int(length.sum()))
        return out

    def windows(self, ids: np.ndarray, starts: np.ndarray) -> list[tuple[int, int]]:
        """Each text cut after the last full stop that leaves at most WINDOW pieces, else before a word, else anywhere.

        The method's package cuts at the same stops, but a stop may come 511th there; it then loses its own closing token.
        """
        stops = [np.flatnonzero(self.ends_sentence[ids]) + 1, np.flatnonzero(self.begins[ids])]
        out = []
        for start, end in zip(starts[:-1], starts[1:]):
            while end - start > self.WINDOW:
                latest = (places[np.searchsorted(places, start + self.WINDOW, "right") - 1] for places in stops if len(places))
                stop = next((stop for stop in latest if stop > start), start + self.WINDOW)
                out.append((start, stop))
                start = stop
            if start < end:
                out.append((start, end))
        return out


# From scores to groups.


def score_corpus(grouper: str, corpus: Corpus, seed: int = 0, cache: Path | None = None) -> np.ndarray:
    """Scores of random, frequency or tfidf, (T,) float32, or what an earlier run left of them in the folder `cache`.

    They are kept under the corpus' content and the grouper; eta only enters when they are turned into groups.
    """
    if grouper == "random":
        return random(corpus, seed)
    score = {"tfidf": tfidf, "frequency": frequency}[grouper]
    return cached(cache, "scores", [grouper, corpus.digest, source("groupers")], lambda: ({"scores": score(corpus)}, {}))[0]["scores"]


def label(scores: np.ndarray, corpus: Corpus, eta: float) -> np.ndarray:
    """A static grouper's verdicts, (T,) bool, aligned with `corpus.ids`."""
    return important(*map(torch.from_numpy, (scores, corpus.loss_mask, corpus.doc_ids)), eta).numpy()


def label_corpus(grouper: str, corpus: Corpus, eta: float, seed: int = 0, cache: Path | None = None) -> np.ndarray:
    """Verdicts of random, frequency or tfidf; all False for a grouper that has none, or none before the step."""
    if grouper == "none" or grouper in IN_STEP:
        return np.zeros(len(corpus.ids), bool)
    return label(score_corpus(grouper, corpus, seed, cache), corpus, eta)


def labeller(grouper: str, eta: float) -> Label:
    """The step's own view of the grouper: labels from losses, or those that travelled with the batch.

    For rho1 the batch brings the reference's loss of each token instead (`Batch.known`).
    """
    if grouper == "loss":
        return lambda nll, batch: important(nll, batch.loss_mask, batch.doc_ids, eta)
    if grouper == "rho1":
        return lambda nll, batch: important(nll - batch.known, batch.loss_mask, batch.doc_ids, eta)
    return lambda nll, batch: batch.known


if __name__ == "__main__":
    from look import main  # which imports this file by its name

    main()
