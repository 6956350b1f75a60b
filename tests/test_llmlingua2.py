"""support/llmlingua2.py: the package's own words and probabilities, and characters that find the right token."""

import importlib.util
import json
import random
import re
import shutil
import string
import types

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from classifiers import MBERT, XLMR, classifier_folder
from tiny import TEXTS, VOCAB, tiny_folder

import train
from data import RESPONSE, load_corpus
from groupers import cut
from published.tokenizer import Tokenizer
from support.llmlingua2 import Classifier, keep_scores, span_means
from support import scores
from support.ranks import Ranks
from support.named import named
from support.scores import with_model

WORDS = "rain river carry little salt down sea morning old fisherman walked along shore where small crabs hiding under"
WORDS += " stones"


def prose(words: int, seed: int, stops: bool = True) -> str:
    """Random words, and perhaps a full stop now and then."""
    rng = random.Random(seed)
    out = [rng.choice(WORDS.split()) + (". " if stops and rng.random() < 0.1 else " ") for _ in range(words)]
    return "".join(out).strip() + "."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny classifiers of both kinds, whose tokenizers know every ASCII character."""
    pytest.importorskip("transformers")
    parent = tmp_path_factory.mktemp("classifiers")
    letters = string.ascii_letters + string.digits
    texts = [*TEXTS * 4, " ".join(string.punctuation), letters, letters[::-1]]
    return {kind: classifier_folder(parent, kind, texts) for kind in (MBERT, XLMR)}


@pytest.fixture(scope="module", params=[MBERT, XLMR])
def classifier(request, folders):
    return Classifier(folders[request.param])


# Against the method's own package.


def package_words(folder, texts: list[str]) -> list[tuple[str, float]]:
    """(word, probability) as `llmlingua` itself computes them while it compresses."""
    compressor_module = pytest.importorskip("llmlingua.prompt_compressor", reason='needs pip install -e ".[peers]"')
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    original, free = compressor_module.tiktoken.encoding_for_model, types.SimpleNamespace(encode=lambda word: [0])
    compressor_module.tiktoken.encoding_for_model = lambda name: free  # a download otherwise
    try:
        compressor = compressor_module.PromptCompressor(str(folder), device_map="cpu", use_llmlingua2=True)
    finally:
        compressor_module.tiktoken.encoding_for_model = original
        (
            torch.set_rng_state(states[0]),
            np.random.set_state(states[1]),
            random.setstate(states[2]),
        )  # which it seeds anew
    probabilities, name = [], "_PromptCompressor__token_prob_to_word_prob"
    means = getattr(compressor, name)
    setattr(compressor, name, lambda *a, **k: probabilities.append(means(*a, **k)) or probabilities[-1])
    labelled = compressor.compress_prompt_llmlingua2(
        texts, rate=0.5, return_word_label=True, word_sep="\n", label_sep="\t"
    )
    words = [line.rsplit("\t", 1)[0] for line in labelled["fn_labeled_original_prompt"].split("\n")]
    return list(zip(words, sum(probabilities, []), strict=True))


def our_words(classifier: Classifier, texts: list[str]) -> list[tuple[str, float]]:
    ids, spans, starts = classifier.pieces(texts)
    word = classifier.word_numbers(ids, classifier.windows(ids, starts))
    keep, text = classifier.keep(texts), "".join(texts)
    edges = np.flatnonzero(np.diff(word, prepend=-1, append=word[-1] + 1))
    out = []
    for first, last in zip(edges[:-1], edges[1:] - 1):
        characters = range(spans[first, 0], spans[last, 1])
        values = {keep[c] for c in characters if not text[c].isspace()}
        assert len(values) <= 1, "one word, one probability"
        out.append((text[characters.start : characters.stop].strip(), *values))
    return [pair for pair in out if len(pair) == 2]


PARITY = [
    *TEXTS,
    "Don't stop (yet); he's over-all \"well-read\", isn't he? 3.14, 1,000 and #7!",
    "def f(x):\n    return x[0] + {'a': 1}['a']  # why not?\n\n\nf('b')",
    prose(900, seed=0),
    prose(1500, seed=8),
]


@pytest.mark.parametrize("kind", [MBERT, XLMR])
def test_words_and_probabilities_are_the_packages(folders, kind):
    theirs = package_words(folders[kind], PARITY)
    classifier = Classifier(folders[kind])
    own = our_words(classifier, PARITY)
    assert [word for word, _ in own] == [word for word, _ in theirs if word] and len(own) > 2500
    difference = max(abs(ours - its) for (_, ours), (_, its) in zip(own, (pair for pair in theirs if pair[0])))
    if kind == XLMR:  # the package wraps its windows in [CLS] and [SEP], which XLM-R reads as <unk>
        assert difference > 1e-2
        classifier.cls = classifier.sep = classifier.unk
        imitated = our_words(classifier, PARITY)
        difference = max(abs(ours - its) for (_, ours), (_, its) in zip(imitated, (pair for pair in theirs if pair[0])))
    assert difference <= 1e-5
    assert np.ptp([p for _, p in own]) > 0.5, "probabilities that differ, so that equality says something"


def test_the_package_overfills_a_window_that_a_full_stop_would_end_one_piece_late(folders):
    """Its windows may reach 511 pieces; it then cuts off its own closing token, and all probabilities differ."""
    classifier = Classifier(folders[MBERT])
    found = ((text, *classifier.pieces([text])) for text in (prose(1500, seed) for seed in range(100)))
    text, ids, _, starts = next(of_seed for of_seed in found if classifier.ends_sentence[of_seed[1][510]])
    assert classifier.windows(ids, starts)[0][1] < 510
    theirs, own = package_words(folders[MBERT], [text]), our_words(classifier, [text])
    assert [word for word, _ in own] == [word for word, _ in theirs]
    assert max(abs(ours - its) for (_, ours), (_, its) in zip(own[:400], theirs)) > 1e-2


@pytest.mark.fast
def test_pieces_are_scored_as_transformers_own_encoding_scores_them(classifier):
    """The special tokens are the model's own, whatever stands beside a text in its batch."""
    texts = [*TEXTS, "Yes.", prose(60, seed=2)]
    ids, _, starts = classifier.pieces(texts)
    probabilities = classifier.probabilities(ids, classifier.windows(ids, starts))
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(classifier.folder)
    for text, a, b in zip(texts, starts, starts[1:]):
        encoded = tokenizer(text, return_tensors="pt")  # adds special tokens
        assert encoded.input_ids[0, 1:-1].tolist() == ids[a:b].tolist()
        with torch.no_grad():
            alone = classifier.model(**encoded).logits[0].softmax(-1)[1:-1, 1]
        np.testing.assert_allclose(probabilities[a:b], alone.numpy(), atol=1e-5)


# The folder's own tokenizer, and its own special tokens.


def changed(folder, path, name: str, change) -> str:
    """A copy of a folder at `path` in which change(…) was made to the object of a JSON file."""
    shutil.copytree(folder, path)
    value = json.loads((path / name).read_text(encoding="utf-8"))
    change(value)
    (path / name).write_text(json.dumps(value), encoding="utf-8")
    return path


LOWER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": True}
OWN = {  # what a tokenizer.json may hold, though the class that tokenizer_config.json names would do without
    "as it is": lambda x: None,
    "other letters": lambda x: x.update(normalizer={"type": "Replace", "pattern": {"String": "r"}, "content": "s"}),
    "lower case, no accents": lambda x: x.update(normalizer=LOWER | {"lowercase": True}),
    "no normalizer": lambda x: x.update(normalizer=None),
    "no blank before a text": lambda x: x.update(
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    ),
    "split at each digit": lambda x: x.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    "no pre-tokenizer": lambda x: x.update(pre_tokenizer=None),
}


@pytest.mark.fast
@pytest.mark.parametrize("own", OWN)
def test_pieces_are_those_of_the_folders_own_tokenizer_json(classifier, tmp_path, own):
    folder = changed(classifier.folder, tmp_path / "own", "tokenizer.json", OWN[own])
    plain, read = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), Classifier(folder)
    texts = [*ODD.values(), *TEXTS, "CAFE\u0301 Ⅳ ½ 2024 ﬁne ｗｉｄｅ", ""]
    ids, spans, starts = read.pieces(texts)
    shift = np.cumsum([0, *map(len, texts)])
    for text, at, a, b in zip(texts, shift, starts, starts[1:]):
        encoded = plain.encode(text, add_special_tokens=False)
        assert ids[a:b].tolist() == encoded.ids
        assert all(spans[i, 0] - at == begin for i, (begin, _) in zip(range(a, b), encoded.offsets))


@pytest.mark.fast
def test_a_tokenizer_json_that_cuts_and_pads_cuts_and_pads_nothing(classifier, tmp_path):
    own = tokenizers.Tokenizer.from_file(str(classifier.folder / "tokenizer.json"))
    own.enable_truncation(8)
    own.enable_padding(length=64)
    folder = shutil.copytree(classifier.folder, tmp_path / "cuts")
    own.save(str(folder / "tokenizer.json"))
    texts = ["Yes.", prose(60, seed=1)]
    assert all(map(np.array_equal, Classifier(folder).pieces(texts), classifier.pieces(texts)))


@pytest.mark.fast
@pytest.mark.parametrize("way", ["as objects", "in special_tokens_map.json", "nowhere", "null", "not marked special"])
def test_special_tokens_are_found_wherever_the_folder_names_them(classifier, tmp_path, way):
    folder = tmp_path / "folder"

    def rename(tokenizer):  # so that the usual names do not do
        text = json.dumps(tokenizer)
        for name, other in (("[CLS]", "[BEGIN]"), ("<s>", "<begin>")):
            text = text.replace(json.dumps(name), json.dumps(other))
        tokenizer.clear()
        tokenizer.update(json.loads(text))
        if way == "not marked special":
            for token in tokenizer["added_tokens"]:
                token["special"] = False

    keep = way in ("nowhere", "null")
    changed(classifier.folder, folder, "tokenizer.json", (lambda x: None) if keep else rename)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = {name: value for name, value in config.items() if name.endswith("_token")}
    new = names | ({} if keep else {"cls_token": {"[CLS]": "[BEGIN]", "<s>": "<begin>"}[names["cls_token"]]})
    if way == "as objects":
        new = {name: {"content": value, "lstrip": False, "special": True} for name, value in new.items()}
    new = {} if way == "nowhere" else dict.fromkeys(new) if way == "null" else new
    aside = way == "in special_tokens_map.json"
    (folder / "tokenizer_config.json").write_text(json.dumps({} if aside else new))
    if aside:
        (folder / "special_tokens_map.json").write_text(json.dumps(new))
    read = Classifier(folder)
    for role in ("cls", "sep", "pad", "unk"):
        assert getattr(read, role) == getattr(classifier, role)
    texts = ["Rain and rivers.", "a [SEP] </s> [BEGIN] <begin> b"]
    assert not {read.cls, read.sep, read.pad} & set(read.pieces(texts)[0].tolist())
    np.testing.assert_array_equal(read.keep(texts[:1]), classifier.keep(texts[:1]))


@pytest.mark.fast
def test_a_character_that_the_normalizer_joins_to_the_one_before_it_is_judged_as_that(folders):
    classifier = Classifier(folders[XLMR])
    for text in ("e\u0301t cafe\u0301.", "ｶﾞ 가", "a\u0323\u0301 b"):
        keep = classifier.keep(["no", text])[2:]
        assert not np.isnan(keep[[not c.isspace() for c in text]]).any()
    assert keep[0] == keep[1] == keep[2]
    assert np.isnan(classifier.keep(["ab", "\x01c"])[2]), "never of the text before"


# Precision.

SWITCHES = {  # what a caller may have set, by torch's older names and its newer ones
    "none": lambda: None,
    "older": lambda: torch.set_float32_matmul_precision("medium"),
    "older, on CUDA": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, on a CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


def switches() -> list:
    """All that torch says of them; it refuses to answer by the older names where only the newer ones were set."""
    out = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            out.append(ask())
        except RuntimeError:
            out.append("refused")
    return out


@pytest.fixture
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.fast
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_classifier_computes_in_float32_and_leaves_torchs_switches_as_they_were(
    folders, tmp_path, monkeypatch, restored, switch
):
    halves = changed(folders[MBERT], tmp_path / "halves", "config.json", lambda x: x.update(dtype="bfloat16"))
    classifier, seen = Classifier(halves), []
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    SWITCHES[switch]()
    before, forward = switches(), classifier.model.forward
    monkeypatch.setattr(classifier.model, "forward", lambda **given: seen.append(switches()) or forward(**given))
    keep = classifier.keep(TEXTS)
    assert seen and all(found == ["ieee", "ieee", "highest", False] for found in seen) and switches() == before
    monkeypatch.setattr(classifier.model, "forward", lambda **given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        classifier.keep(TEXTS)
    assert switches() == before
    np.testing.assert_array_equal(keep, Classifier(folders[MBERT]).keep(TEXTS))


# Windows.


@pytest.mark.fast
def test_windows_end_at_a_full_stop_else_before_a_word_and_hold_every_piece_once(classifier):
    texts = [prose(2000, seed=3), prose(1400, seed=4, stops=False), "x" * 1, "Short.", "", "a" * 3000 + " end."]
    ids, spans, starts = classifier.pieces(texts)
    windows, text = classifier.windows(ids, starts), "".join(texts)
    pieces = [classifier.backend.id_to_token(i) for i in ids]
    begins = [piece.startswith("▁") or piece == "." for piece in pieces]
    if classifier.model.config.model_type == "bert":
        begins = [not piece.startswith("##") for piece in pieces]
    assert [place for a, b in windows for place in range(a, b)] == list(range(len(ids)))
    kinds = set()
    for a, b in windows:
        (text_end,) = [end for start, end in zip(starts, starts[1:]) if start <= a < end]
        room = range(a + 1, min(a + 510, text_end) + 1)  # where it may end
        after_stop = [i for i in room if text[spans[i - 1, 0] : spans[i - 1, 1]].strip() == "."]
        before_word = [i for i in room if i < text_end and begins[i]]
        kind, expected = "anywhere", [a + 510]
        if text_end - a <= 510:
            kind, expected = "end", [text_end]
        elif after_stop or before_word:
            kind, expected = ("stop", after_stop[-1:]) if after_stop else ("word", before_word[-1:])
        assert [b] == expected
        kinds.add(kind)
    assert len(windows) > 10 and kinds >= {"stop", "word", "end"}
    if classifier.model.config.model_type == "xlm-roberta":  # mBERT reads a word of 3,000 letters as one unknown piece
        assert "anywhere" in kinds


@pytest.mark.fast
def test_a_window_may_be_full(folders):
    classifier = Classifier(folders[MBERT])
    ids, _, starts = classifier.pieces(["a " * 509 + ". b c", "a " * 515])
    assert starts.tolist() == [0, 512, 1027]
    assert classifier.windows(ids, starts) == [(0, 510), (510, 512), (512, 1022), (1022, 1027)]


@pytest.mark.fast
def test_a_long_answer_is_scored_window_by_window(classifier):
    text = prose(2000, seed=5)
    ids, _, starts = classifier.pieces([text])
    windows = classifier.windows(ids, starts)
    probabilities = classifier.probabilities(ids, windows)
    for a, b in windows:
        alone = torch.tensor([[classifier.cls, *ids[a:b], classifier.sep]])
        with torch.no_grad():
            keep = classifier.model(input_ids=alone).logits[0].softmax(-1)[1:-1, 1]
        np.testing.assert_allclose(probabilities[a:b], keep.numpy(), atol=1e-5)


# Every character is judged, and finds its token.

ODD = {
    "emoji": "Yes 👍🏽, fine 👩‍👩‍👧 — ok 🇩🇪!",
    "CJK": "海はなぜ塩辛い？ 雨と川 salt 물",
    "accents": "Ça coûte cher à l’été; naïve Zoë e\u0301te\u0301.",
    "code": "def f(x):\n\tif x:\n\t\treturn {'k': [1, 2]}\n    # ok\n",
    "runs of spaces": "a    b \n\n\n  c\t\td  ",
    "only one letter": "a",
    "ligature and width": "ﬁne ｗｉｄｅ ½ ™",
    "2,000 words": prose(2000, seed=6),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", ODD)
def test_every_character_but_white_space_is_judged(classifier, name):
    text = ODD[name]
    keep = classifier.keep([text])
    judged = ~np.isnan(keep)
    assert len(keep) == len(text)
    space = np.array([c.isspace() for c in text])
    assert not judged[space].any()
    left_out = {c for c, was in zip(text, judged | space) if not was}
    assert left_out <= {"\u200d"}, "only what the classifier's normalizer deletes, a zero-width joiner"
    assert ((keep[judged] > 0) & (keep[judged] < 1)).all()
    assert (keep[judged] == keep[judged].astype(np.float32)).all(), "so that a mean over equal ones is exactly that"


@pytest.mark.fast
def test_what_the_classifiers_normalizer_deletes_is_not_judged(folders):
    assert np.isnan(Classifier(folders[MBERT]).keep(["a \x01 b"])).tolist() == [False, True, True, True, False]


@pytest.mark.fast
def test_an_answer_that_spells_a_special_token_is_text(folders, classifier):
    """Also where the vocabulary of unigrams has "</s>" as a piece."""
    for text in ("Use [SEP] or [PAD] and [UNK].", "Use </s> or <pad>, a</s>b <s><unk></s>"):
        ids, spans, _ = classifier.pieces([text])
        assert not {0, 1, 2, 3} & set(ids.tolist())
        assert {*range(len(text))} == {c for a, b in spans for c in range(a, b)} | {
            i for i, c in enumerate(text) if c == " "
        }
    words = [word for word, _ in our_words(Classifier(folders[MBERT]), ["Use [SEP] or [PAD] and [UNK]."])]
    assert words[1:4] == ["[", "SEP", "]"]


@pytest.mark.fast
def test_a_word_cut_by_a_full_window_is_a_word_in_each(folders):
    classifier, text = Classifier(folders[XLMR]), "rain " + "x" * 1500
    ids, spans, starts = classifier.pieces([text])
    windows = classifier.windows(ids, starts)
    word = classifier.word_numbers(ids, windows)
    inside = [start for start, _ in windows[2:]]
    assert inside and all(word[i] == word[i - 1] + 1 for i in inside)
    keep, own = classifier.keep([text]), classifier.probabilities(ids, windows)
    a, b = windows[-1]
    assert keep[spans[b - 1, 0]] == pytest.approx(own[a:b].mean(), abs=1e-6)


@pytest.mark.fast
def test_empty_and_blank_texts_disturb_nobody(classifier):
    alone = classifier.keep(["Rain and rivers."])
    among = classifier.keep(["", "Rain and rivers.", "", "  \n ", ""])
    np.testing.assert_allclose(among[: len(alone)], alone, atol=1e-5)
    assert np.isnan(among[len(alone) :]).all() and len(among) == len(alone) + 4
    assert classifier.keep([]).shape == classifier.keep([""]).shape == (0,)


@pytest.mark.fast
def test_a_piece_out_of_vocabulary_keeps_its_own_probability_and_stays_out_of_its_words_mean(classifier):
    text = "water一ing water"  # the character is in neither vocabulary
    ids, spans, starts = classifier.pieces([text])
    windows = classifier.windows(ids, starts)
    own, word = classifier.probabilities(ids, windows), classifier.word_numbers(ids, windows)
    unknown = np.flatnonzero(ids == classifier.unk)
    assert len(unknown) == 1 and text[slice(*spans[unknown[0]])] == "一"
    keep = classifier.keep([text])
    assert keep[5] == own[unknown[0]]
    first = [i for i in range(len(ids)) if word[i] == 0 and i != unknown[0]]
    assert keep[0] == pytest.approx(own[first].mean(), abs=1e-6)


class Alphabet:
    """A classifier that keeps a letter by its code point."""

    def keep(self, texts):
        return np.array([np.nan if c.isspace() else ord(c) / 0x110000 for text in texts for c in text])


def tokens_characters(corpus, tokenizer, sample: int) -> list[set[int]]:
    """For each response token of a sample, the characters of its answer that it holds a byte of; without offsets."""
    unicode_of_byte = {}  # byte-level BPE writes bytes as printable characters
    spare = 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        unicode_of_byte[chr(byte if printable else spare)] = byte
        spare += not printable
    a, b = corpus.starts[sample], corpus.starts[sample + 1]
    pieces = [tokenizer.backend.id_to_token(int(i)) for i in corpus.ids[a:b][corpus.kind[a:b] == RESPONSE]]
    raw = b"".join(bytes(unicode_of_byte[c] for c in piece) for piece in pieces)
    character_of_byte = [at for at, c in enumerate(raw.decode()) for _ in c.encode()]
    out, start = [], 0
    for piece in pieces:
        out.append(set(character_of_byte[start : start + len(piece)]))
        start += len(piece)
    return out


@pytest.mark.fast
@pytest.mark.parametrize("trim", [False, True], ids=["", "offsets without spaces, as Llama 3's"])
def test_a_token_scores_the_mean_of_its_characters(tmp_path, trim):
    folder = tiny_folder(tmp_path / "model")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": trim, "use_regex": False}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(folder, VOCAB)
    rows = [{"prompt": "Käse 🧀?", "completion": text} for text in ODD.values()]
    rows.append({"conversations": ["Hi 你好", "Yes 👍.", "And?", "  No, no.\n"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(tmp_path / "rows.jsonl", tokenizer, "plain", 4096)
    scores = keep_scores(corpus, Alphabet())
    assert len(corpus) == len(rows) and np.isneginf(scores[corpus.kind != RESPONSE]).all()
    split = blank = 0
    for sample, row in enumerate(rows):
        text = "".join(f" {text}" for text in row.get("conversations", ["", row.get("completion")])[1::2])
        a, b = corpus.starts[sample], corpus.starts[sample + 1]
        mine = scores[a:b][corpus.kind[a:b] == RESPONSE]
        holders = tokens_characters(corpus, tokenizer, sample)
        assert len(holders) == len(mine)
        for score, characters in zip(mine, holders):
            values = [ord(text[c]) / 0x110000 for c in characters if not text[c].isspace()]
            blank += not values
            assert score == pytest.approx(np.mean(values)) if values else np.isneginf(score)
        split += sum(a == b and len(a) == 1 for a, b in zip(holders, holders[1:]))
    assert split > 10 and blank > 3, "characters split over tokens, and tokens of white space alone, did occur"


@pytest.mark.fast
def test_a_cut_answer_is_read_as_far_as_the_context_leaves_it(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    tokenizer = Tokenizer(folder, VOCAB)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": ODD["emoji"] * 9}))
    corpus, read = load_corpus(tmp_path / "rows.jsonl", tokenizer, "plain", 60), []
    classifier = types.SimpleNamespace(keep=lambda texts: read.extend(texts) or Alphabet().keep(texts))
    scores = keep_scores(corpus, classifier)
    assert len(read) == 1 and (" " + ODD["emoji"] * 9).startswith(read[0]) and len(read[0]) > 5
    assert np.isfinite(scores[-1]) or tokenizer.decode([int(corpus.ids[-1])]).isspace()


@pytest.mark.fast
def test_span_means_leave_out_what_is_not_judged():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_array_equal(
        span_means(values, np.array([[0, 2], [1, 2], [0, 4], [2, 2]])), [1, -np.inf, 3, -np.inf]
    )
    third = np.float32(0.1)
    one_word = np.full(7, third, np.float64)
    means = span_means(one_word, np.array([[0, 1], [1, 4], [4, 7]]))
    assert len(set(means.tolist())) == 1, "tokens of one word score the same, to the bit"


# As train.py asks for it.


@pytest.fixture
def corpus_and_folder(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    rows = [{"prompt": "Why?", "completion": text} for text in TEXTS] + [{"conversations": ["a", "b c.", "d", "e f."]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_corpus(tmp_path / "rows.jsonl", Tokenizer(folder, VOCAB), "plain", 512), folder


def important_tokens(scores, corpus, eta) -> torch.Tensor:
    mask, doc_ids = torch.from_numpy(corpus.loss_mask), torch.from_numpy(corpus.doc_ids)
    return cut(torch.from_numpy(scores), mask, doc_ids, (eta,))


@pytest.mark.fast
def test_the_global_random_state_is_as_before(folders, corpus_and_folder):
    corpus, _ = corpus_and_folder
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for kind in folders:
        assert important_tokens(keep_scores(corpus, Classifier(folders[kind])), corpus, 0.7).any()
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.fixture
def scored(folders, corpus_and_folder, tmp_path, monkeypatch):
    """scored(classifier, *flags): the scores that a run with these flags begins with, and whether it made them."""
    (corpus, folder), calls, keep = corpus_and_folder, [], Classifier.keep
    monkeypatch.setattr(Classifier, "keep", lambda self, texts: calls.append(texts) or keep(self, texts))

    def score(classifier, *flags):
        calls.clear()
        base = f"--model {folder} --data {tmp_path / 'rows.jsonl'} --context 512 --grouper llmlingua2"
        cfg = train.parse_args([*base.split(), "--llmlingua-model", str(classifier), *map(str, flags)])
        return with_model(cfg, named("llmlingua2", "--grouper"), corpus, tmp_path / "cache", Ranks()), bool(calls)

    return score


@pytest.mark.fast
def test_scores_are_reused_for_another_eta_or_seed(folders, corpus_and_folder, scored):
    corpus, _ = corpus_and_folder
    first, read = scored(folders[MBERT], "--eta", 0.3)
    assert read and np.array_equal(first, keep_scores(corpus, Classifier(folders[MBERT])))
    for flags in (("--eta", 0.9), ("--eta", 0.3, 0.9), ("--seed", 1)):
        again, read = scored(folders[MBERT], *flags)
        assert not read and np.array_equal(again, first)
    assert important_tokens(first, corpus, 0.3).sum() > important_tokens(first, corpus, 0.9).sum()


@pytest.mark.fast
def test_scores_are_made_again_where_a_file_that_they_depend_on_is_another(folders, scored, tmp_path):
    folder = shutil.copytree(folders[XLMR], tmp_path / "xlmr")
    scored(folders[MBERT])
    assert scored(folder)[1] and not scored(folder)[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert scored(folder)[1] and not scored(folder)[1]
    own = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(own | {"normalizer": {"type": "Lowercase"}}))
    assert scored(folder)[1] and not scored(folder)[1]
    (folder / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<s>"}))
    assert scored(folder)[1] and not scored(folder)[1]
    for name in ("vocab.txt", "README.md", "pytorch_model.bin", "training_args.json"):
        (folder / name).write_text("read by nobody")
    assert not scored(folder)[1]
    assert not scored(shutil.copytree(folder, tmp_path / "elsewhere"))[1], "its content counts, not its place"


@pytest.mark.fast
@pytest.mark.parametrize("library, remade", [("transformers", True), ("tokenizers", True), ("torch", False)])
def test_scores_are_made_again_under_another_release_of_what_makes_pieces_and_network(
    folders, scored, monkeypatch, library, remade
):
    scored(folders[MBERT])
    known = scores.version
    monkeypatch.setattr(scores, "version", lambda name: "0.0.1" if name == library else known(name))
    monkeypatch.setattr(torch, "__version__", "0.0.1" if library == "torch" else torch.__version__)
    assert scored(folders[MBERT])[1] == remade


DAMAGE = {
    "nan": lambda kept: np.where(np.arange(len(kept)) == 7, np.nan, kept).astype(np.float32),
    "infinite": lambda kept: np.full_like(kept, np.inf),
    "of another type": lambda kept: kept.astype(np.float64),
    "of another shape": lambda kept: kept[:-1],
}


@pytest.mark.fast
@pytest.mark.parametrize("damage", DAMAGE)
def test_kept_scores_that_are_damaged_are_made_again(folders, scored, tmp_path, capsys, damage):
    first, _ = scored(folders[MBERT])
    (path,) = (tmp_path / "cache").iterdir()
    assert np.isneginf(first).any(), "which is no damage: it was not judged"
    np.save(path, DAMAGE[damage](first))
    capsys.readouterr()
    again, read = scored(folders[MBERT])
    assert read and np.array_equal(again, first) and np.array_equal(np.load(path), first)
    assert capsys.readouterr().out.startswith(f"{path}: damaged (")
    assert not scored(folders[MBERT])[1]


# Mistakes.


@pytest.mark.fast
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_probabilities_that_are_not_finite_are_refused_and_nothing_is_kept(folders, scored, tmp_path, value):
    folder = shutil.copytree(folders[MBERT], tmp_path / "damaged")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["classifier.weight"][:] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged: [\d,]+ of [\d,]+ keep probabilities are nan; are") as e:
        scored(folder)
    assert "\n" not in str(e.value) and not (tmp_path / "cache").exists()


@pytest.mark.fast
def test_without_transformers_the_message_names_the_install_command(monkeypatch, folders):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('install it with: pip install -e ".[llmlingua]"')):
        Classifier(folders[MBERT])


@pytest.mark.fast
def test_nothing_in_a_classifiers_folder_is_executed(tmp_path, folders, monkeypatch):
    shutil.copytree(folders[MBERT], tmp_path / "evil")
    config = json.loads((folders[MBERT] / "config.json").read_text())
    names = {"AutoConfig": "evil.C", "AutoModelForTokenClassification": "evil.M"}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    (tmp_path / "evil" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()")
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    with pytest.raises(ValueError, match="cannot load a token classifier from here"):
        Classifier(tmp_path / "evil")
    assert not (tmp_path / "executed").exists()


@pytest.mark.fast
def test_a_folder_that_is_no_such_classifier_is_refused(tmp_path, folders, corpus_and_folder):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[MBERT])
    three = transformers.BertForTokenClassification(transformers.BertConfig(num_labels=3, **shape))
    bad = {
        "headless": (transformers.BertModel(transformers.BertConfig(**shape)), "no trained classifier"),
        "three labels": (three, "bert with 3 labels"),
    }
    for name, (model, message) in bad.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            Classifier(tmp_path / name)
    with pytest.raises(ValueError, match="no trained score.bias"):
        Classifier(corpus_and_folder[1])
    torch.save({}, tmp_path / "headless" / "pytorch_model.bin")
    (tmp_path / "headless" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load a token classifier from here"):
        Classifier(tmp_path / "headless")
    cut = shutil.copytree(folders[MBERT], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((folders[MBERT] / "model.safetensors").read_bytes()[:-9])
    other = changed(folders[MBERT], tmp_path / "other", "config.json", lambda x: x.update(hidden_size=64))
    for folder in (cut, other):
        with pytest.raises(ValueError, match=r"from here \(.*\); is the download complete, and all of one model\?$"):
            Classifier(folder)


@pytest.mark.fast
def test_a_tokenizer_that_is_none_or_another_models_is_refused(tmp_path, classifier):
    lone = shutil.copytree(classifier.folder, tmp_path / "lone")
    (lone / "tokenizer.json").unlink()
    (lone / "vocab.txt").write_text("[PAD]")
    bad = shutil.copytree(classifier.folder, tmp_path / "bad")
    (bad / "tokenizer.json").write_text('{"model": {}}')
    other = shutil.copytree(classifier.folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((tiny_folder(tmp_path / "llama") / "tokenizer.json").read_text())
    for folder, message in (
        (lone, "lone: no tokenizer.json here; copy the one published with the classifier"),
        (bad, "bad/tokenizer.json: not a tokenizers file"),
        (other, r"other/tokenizer.json: no cls_token such as (\[CLS\]|<s>); is it the classifier's own\?"),
    ):
        with pytest.raises(ValueError, match=message) as e:
            Classifier(folder)
        assert "\n" not in str(e.value)
    classifier = Classifier(classifier.folder)
    classifier.model.config.vocab_size = 100
    with pytest.raises(ValueError, match=r"tokenizer.json gives id \d+, but the network embeds 100 pieces"):
        classifier.keep(TEXTS)
