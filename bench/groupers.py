"""Time the groupers against what people would otherwise use, in one run, on one thread.

    python bench/groupers.py                    tfidf and llmlingua2, a few minutes on two cores
    python bench/groupers.py --one tfidf        Alpaca's token ids, against scikit-learn's TfidfVectorizer on the same
    python bench/groupers.py --one llmlingua2   mBERT's shape, random weights, against the llmlingua package with them
    python bench/groupers.py --one xlmr         XLM-R large's shape, random weights, fp32: pieces per second on a GPU

TF-IDF is timed from token ids to a score for each token, LLMLingua-2 from texts to a probability for each character.
The llmlingua package has no call that ends there: its time includes dropping words and writing the rest, as it is used.
`llmlingua` needs `pip install -e ".[peers]"`, scikit-learn `".[test]"`. The package's tiktoken, which it would
download, is replaced by one that costs nothing.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHARED = Path(os.environ.get("SFTGO_SHARED", ROOT.parent / "shared"))

import numpy as np
import torch
from classifiers import MBERT, SHAPES, XLMR, classifier_folder

import groupers
from data import RESPONSE, Corpus, load_corpus
from published.files import write_json
from published.rows import read_rows
from published.tokenizer import Tokenizer
from support.llmlingua2 import Classifier


def timed(work, repeats: int) -> tuple[float, float]:
    """(processor seconds, wall seconds), the median of some runs."""
    cpu, wall = [], []
    for _ in range(repeats):
        began, began_wall = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - began_wall)
    return statistics.median(cpu), statistics.median(wall)


def tokenizer_of(folder: Path) -> Tokenizer:
    """GPT-NeoX's 50k vocabulary, the nearest to Llama 3's at hand, as a model folder's tokenizer."""
    (folder / "tokenizer.json").write_bytes((SHARED / "tokenizers" / "gpt-neox-20b" / "tokenizer.json").read_bytes())
    write_json(folder / "tokenizer_config.json", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    return Tokenizer(folder, 50_432)


def tfidf() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(Path(folder))
    corpus = load_corpus(SHARED / "data" / "alpaca" / "alpaca_data.json.gz", tokenizer, "alpaca", 4096)
    mask, docs = torch.from_numpy(corpus.loss_mask), torch.from_numpy(corpus.doc_ids)
    judged = groupers.judgeable(corpus)
    documents = [corpus.ids[a:b][judged[a:b]].tolist() for a, b in zip(corpus.starts, corpus.starts[1:])]
    counts = f"{len(corpus.ids):,} tokens, {judged.sum():,} counted, {mask.sum():,} supervised"
    print(f"tfidf       Alpaca, GPT-NeoX's tokenizer: {len(corpus):,} samples, {counts}")

    def grouped() -> torch.Tensor:
        return groupers.important(torch.from_numpy(groupers.tfidf(corpus)), mask, docs, 0.9)

    def matrix() -> tuple:
        vectorizer = TfidfVectorizer(analyzer=lambda ids: ids, norm=None)
        return vectorizer, vectorizer.fit_transform(documents)

    def per_token() -> list[list[float]]:
        vectorizer, rows = matrix()
        column = vectorizer.vocabulary_
        spans = zip(rows.indptr, rows.indptr[1:])
        scores = (dict(zip(rows.indices[a:b].tolist(), rows.data[a:b].tolist())) for a, b in spans)
        return [[score[column[i]] for i in ids] for score, ids in zip(scores, documents)]

    theirs = np.concatenate(per_token())
    np.testing.assert_allclose(groupers.tfidf(corpus)[judged], theirs, rtol=1e-6)
    (ours, _), (both, _) = timed(lambda: groupers.tfidf(corpus), 7), timed(grouped, 7)
    (alone, _), (each, _) = timed(matrix, 3), timed(per_token, 3)
    print(f"            a score for each token {ours:.3f} s, and groups {both:.3f} s")
    by_token = f"read out by token {each:.3f} s ({each / ours:.1f}x)"
    print(f"            TfidfVectorizer's matrix {alone:.3f} s ({alone / ours:.1f}x), {by_token}")


def answers(corpus: Corpus, pieces: int, rng: np.random.Generator) -> list[str]:
    """Answers drawn from a corpus until they have about so many tokens."""
    out, tokens = [], 0
    for sample in rng.permutation(len(corpus)):
        a, b = corpus.starts[sample : sample + 2]
        response = a + np.flatnonzero(corpus.kind[a:b] == RESPONSE)
        out.append(corpus.text[corpus.spans[response[0], 0] : corpus.spans[response[-1], 1]])
        tokens += len(response)
        if tokens >= pieces:
            return out
    return out


def package(folder: Path):
    """The llmlingua package's compressor, with a tiktoken that is free."""
    import llmlingua.prompt_compressor as module

    module.tiktoken.encoding_for_model = lambda name: types.SimpleNamespace(encode=lambda word: [0])
    return module.PromptCompressor(str(folder), device_map="cpu", use_llmlingua2=True)


def llmlingua2(pieces: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(Path(folder))
        for name, path in (("Alpaca", "alpaca/alpaca_data.json.gz"), ("LIMA", "lima/train.jsonl.gz")):
            corpus = load_corpus(SHARED / "data" / path, tokenizer, "auto", 4096)
            texts = answers(corpus, pieces, np.random.default_rng(0))
            place = Path(folder) / name
            place.mkdir()
            classifier = Classifier(classifier_folder(place, MBERT, texts, 30_000, SHAPES[MBERT]))
            ids, _, starts = classifier.pieces(texts)
            ours, ours_wall = timed(lambda: classifier.keep(texts), 3)
            classifier = None  # its memory
            compressor = package(place / MBERT)
            theirs, theirs_wall = timed(lambda: compressor.compress_prompt_llmlingua2(texts, rate=0.5), 1)
            rate, package_rate = len(ids) / ours_wall, len(ids) / theirs_wall
            what = f"{len(texts):,} answers, {len(ids):,} pieces (median {int(np.median(np.diff(starts)))})"
            speed = f"{rate:,.0f} pieces/s, the package {package_rate:,.0f}: {rate / package_rate:.1f}x"
            print(f"llmlingua2  {name}: {what}; {speed} (processor time {theirs / ours:.1f}x)")


def xlmr(pieces: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = [row["conversations"][1] for _, row in read_rows(SHARED / "data" / "lima" / "train.jsonl.gz")]
    with tempfile.TemporaryDirectory() as folder:
        classifier = Classifier(classifier_folder(folder, XLMR, texts, 30_000, SHAPES[XLMR]), device)
    ids, _, starts = classifier.pieces(texts)
    windows = [window for window in classifier.windows(ids, starts) if window[1] <= pieces]
    read = sum(b - a for a, b in windows)
    classifier.probabilities(ids, windows)  # warms up
    _, wall = timed(lambda: classifier.probabilities(ids, windows), 3)
    print(f"xlmr        LIMA's answers, {read:,} pieces on {device}, float32: {read / wall:,.0f} pieces/s")


def main() -> None:
    intro, _, rest = __doc__.partition("\n\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("groupers.py", None, intro, rest, formatter_class=shape, allow_abbrev=False)
    parser.add_argument("--one", choices=("tfidf", "llmlingua2", "xlmr"), help="time this alone")
    pieces = "tokens a classifier reads (default: 8,000; a GPU takes more)"
    parser.add_argument("--pieces", type=int, default=8_000, metavar="N", help=pieces)
    args = parser.parse_args()
    if not (SHARED / "data").is_dir():
        sys.exit(f"error: {SHARED}: no data here; set SFTGO_SHARED to the folder that has data/lima and data/alpaca")
    torch.set_num_threads(1)
    if args.one in (None, "tfidf"):
        tfidf()
    if args.one in (None, "llmlingua2"):
        llmlingua2(args.pieces)
    if args.one == "xlmr":
        xlmr(args.pieces)


if __name__ == "__main__":
    main()
