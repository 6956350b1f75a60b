"""published/tokenizer.py: training reads text into the ids that transformers gives for OUT/model."""

import json
import random
from functools import cache, partial

import pytest
import tokenizers
from tiny import TEXTS
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import END, RESPONSE, load_corpus, prompt_ids
from published.tokenizer import CHAT_TEMPLATES, Tokenizer

BOS, END_TOKEN, UNK = "<s>", "</s>", "<unk>"
SPECIAL = [UNK, BOS, END_TOKEN, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LETTERS = [chr(c) for c in range(32, 127)]
WORDS = (
    "the sea is salt Rain and rivers 12 345 he's they'd . , ! : ?! \n \n\n \t   é e\u0301 ﬁ Ⅳ 日本 🐙 ß İ #x a".split(
        " "
    )
)


def trained(model, trainer, **parts):
    out = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(out, name, part)
    out.train_from_iterator([*TEXTS * 4, *map(str, range(300))], trainer)
    return out


def bpe(**how):
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False, initial_alphabet=LETTERS, vocab_size=700)
    return trained(models.BPE(unk_token=UNK, **how.pop("model", {})), trainer, **how)


def byte_level(prefix=False, regex=True):
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False, vocab_size=700)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return trained(models.BPE(), trainer, pre_tokenizer=words, decoder=decoders.ByteLevel())


def llama2(scheme):
    """SentencePiece's BPE as a Metaspace, or as transformers converted it: normalizers and no words."""
    made = bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"), model={"byte_fallback": True})
    if scheme == "prepend":
        made.pre_tokenizer = pre_tokenizers.Sequence([])
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "first")
    made.decoder = decoders.Metaspace()
    return made


def unigram():
    trainer = trainers.UnigramTrainer(special_tokens=SPECIAL, unk_token=UNK, show_progress=False, vocab_size=400)
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    return trained(models.Unigram(), trainer, normalizer=normalizers.NFKC(), pre_tokenizer=spaces)


def unigram_in_the_vocabulary():
    """Its special tokens are pieces of the vocabulary, named in the settings alone."""
    file = json.loads(unigram().to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(file | {"added_tokens": []}))


def word_piece(words=pre_tokenizers.BertPreTokenizer):
    trainer = trainers.WordPieceTrainer(special_tokens=SPECIAL, show_progress=False, vocab_size=700)
    lower = normalizers.BertNormalizer(lowercase=True)
    return trained(models.WordPiece(unk_token=UNK), trainer, normalizer=lower, pre_tokenizer=words())


def word_level():
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    return trained(models.WordLevel(unk_token=UNK), trainer, pre_tokenizer=pre_tokenizers.Whitespace())


def flagged(**flags):
    """The special tokens with other flags than usual."""
    file = json.loads(byte_level().to_str())
    file["added_tokens"] = [token | flags for token in file["added_tokens"]]
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def with_begin_and_end():
    made = byte_level(prefix=True)
    ids = [(name, made.token_to_id(name)) for name in (BOS, END_TOKEN)]
    made.post_processor = processors.TemplateProcessing(f"{BOS} $A {END_TOKEN}", f"{BOS} $A {BOS} $B", ids)
    return made


def with_words_added():
    """Tokens that are not special, which text may spell: transformers reads them, and so does training."""
    made = byte_level()
    made.add_tokens([AddedToken("rivers", normalized=False), AddedToken("  ", normalized=False), AddedToken("日本")])
    return made


KINDS = {
    "byte-level BPE": byte_level,
    "byte-level BPE, a blank before": partial(byte_level, prefix=True),
    "byte-level BPE without words": partial(byte_level, regex=False),
    "Llama 2, Metaspace always": partial(llama2, "always"),
    "Llama 2, Metaspace first": partial(llama2, "first"),
    "Llama 2, Metaspace never": partial(llama2, "never"),
    "Llama 2, blank by a normalizer": partial(llama2, "prepend"),
    "Unigram": unigram,
    "Unigram with special pieces": unigram_in_the_vocabulary,
    "WordPiece": word_piece,
    "WordPiece of words between blanks": partial(word_piece, pre_tokenizers.WhitespaceSplit),
    "whole words": word_level,
    "specials that strip what is left of them": partial(flagged, lstrip=True),
    "specials that strip what is right of them": partial(flagged, rstrip=True),
    "specials not marked special": partial(flagged, special=False),
    "BOS and EOS by a post-processor": with_begin_and_end,
    "words added": with_words_added,
}


@cache
def built(kind: str) -> str:
    return KINDS[kind]().to_str()


def folder_of(path, file: str, **settings):
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(file, encoding="utf-8")
    named = {"bos_token": BOS, "eos_token": END_TOKEN, "unk_token": UNK, "tokenizer_class": "LlamaTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(named | settings))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8192}))
    return path


def said(random) -> str:
    joint = random.choice(["", " ", " "])
    return joint.join(random.choices(WORDS, k=random.randint(1, 8))) or "x"


def talk(random, template) -> list[tuple[str, str]]:
    turns = [("system", said(random))] * random.randint(0, 1) * (template != "alpaca")
    for _ in range(1 if template == "alpaca" else random.randint(1, 3)):
        turns += [("user", said(random)), ("assistant", said(random).strip() and said(random) + "x")]
    return [(role, text or "x") for role, text in turns]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_ids_are_those_of_the_exported_chat_template(tmp_path, kind, template):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(folder_of(tmp_path / "m", built(kind), add_bos_token=True, legacy=False), 8192)
    if kind == "Unigram with special pieces" and template == "llama3":
        with pytest.raises(ValueError, match=r"start_header_id\|> would not be read as a token: added_tokens lacks it"):
            prompt_ids(ours, template, [("user", "Hi"), ("assistant", None)])
        return
    folder_of(tmp_path / "out", built(kind))
    ours.save(tmp_path / "out", template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")

    def rendered(turns, **how):
        messages = [{"role": role, "content": text} for role, text in turns]
        return theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"]

    seeds, same = random.Random(kind + template), 0
    for _ in range(40):
        turns = talk(seeds, template)
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        (tmp_path / "row.json").write_text(json.dumps(row))
        prompt = prompt_ids(ours, template, [*turns[:-1], ("assistant", None)])
        assert prompt == rendered(turns[:-1], add_generation_prompt=True), turns
        corpus = load_corpus(tmp_path / "row.json", ours, template, 4096)
        apart = any("apart" in name for name in corpus.counts)
        assert (corpus.ids.tolist() == rendered(turns)) is not apart, turns
        same += not apart
        if len(turns) == 2:  # of one exchange, training's prompt is generation's
            assert corpus.ids[: len(prompt)].tolist() == prompt and corpus.kind[len(prompt)] == RESPONSE
    # GPT-2 divides two line ends where a letter follows: there no whole begins with the prompt of generation.
    assert same or (template == "llama3" and "ByteLevel" in built(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_special_token(tmp_path, kind):
    ours = Tokenizer(folder_of(tmp_path / "m", built(kind)), 8192)
    spelt = " ".join(SPECIAL) + "".join(SPECIAL)
    (tmp_path / "row.json").write_text(
        json.dumps({"messages": [{"role": "user", "content": spelt}] * 2 + [{"role": "assistant", "content": spelt}]})
    )
    corpus = load_corpus(tmp_path / "row.json", ours, "plain", 4096)
    special = [i for i in corpus.ids if ours.backend.id_to_token(int(i)) in SPECIAL[1:]]
    assert special == [ours.bos, ours.end] == [corpus.ids[0], corpus.ids[-1]]
    assert corpus.kind[-1] == END and (corpus.kind[:-1] != END).all()
    assert [corpus.text[a:b] for a, b in corpus.spans[[0, -1]]] == ["", ""] and spelt in corpus.text


def test_an_answer_that_would_merge_with_its_prompt_is_read_apart_without_a_blank(tmp_path):
    """ ":Yes" is a token here, so "Response:" and "Yes" meet in it; the tokenizer puts a blank before what it reads."""
    made = llama2("always")
    made.add_tokens([AddedToken(":Yes", normalized=False)])
    ours = Tokenizer(folder_of(tmp_path / "m", made.to_str()), 8192)
    (tmp_path / "row.json").write_text(json.dumps({"instruction": "Is it?", "output": "Yes."}))
    corpus = load_corpus(tmp_path / "row.json", ours, "auto", 4096)
    assert corpus.counts["with an answer read apart, which would change its prompt's tokens"] == 1
    answer = [ours.backend.id_to_token(int(i)) for i in corpus.ids[corpus.kind == RESPONSE]]
    assert "".join(answer) == "Yes." and corpus.kind[-1] == END
    assert "".join(corpus.text[a:b] for a, b in corpus.spans[corpus.kind == RESPONSE]) == "Yes."


def test_no_merge_makes_a_special_token_of_text(tmp_path):
    pieces = ["<s>", "<", "/", "s", ">", "</", "s>", "</s>", "a", "▁"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    made = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.add_special_tokens(["<s>", "</s>"])
    ours = Tokenizer(folder_of(tmp_path / "m", made.to_str()), 8192)
    (tmp_path / "row.json").write_text(json.dumps({"text": "a</s>a"}))
    read = load_corpus(tmp_path / "row.json", ours, "auto", 64).ids.tolist()
    assert [pieces[i] for i in read] == ["<s>", "a", "</", "s>", "a", "</s>"]


def test_a_token_that_only_the_settings_name_is_not_made_of_text_and_flags_of_transformers_4_are_the_files(tmp_path):
    made = byte_level(prefix=True)
    made.add_tokens([AddedToken("rivers", normalized=False)])
    ours = Tokenizer(folder_of(tmp_path / "m", made.to_str(), pad_token={"content": "rivers"}), 8192)
    (tmp_path / "row.json").write_text(json.dumps({"text": "rivers"}))
    corpus = load_corpus(tmp_path / "row.json", ours, "auto", 64)
    assert made.token_to_id("rivers") not in corpus.ids and len(corpus.ids) >= 3
    ours.save(tmp_path / "m", "plain")
    saved = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert saved["add_prefix_space"] is True and saved["pad_token"] == "rivers" and "legacy" not in saved


def test_a_special_token_that_the_template_writes_as_text_is_refused(tmp_path):
    made = byte_level()
    made.add_special_tokens(["Assistant:"])
    ours = Tokenizer(folder_of(tmp_path / "m", made.to_str()), 8192)
    with pytest.raises(ValueError, match="'Assistant:' is a special token here, and the template writes it as text"):
        prompt_ids(ours, "plain", [("user", "Hi"), ("assistant", None)])
    assert prompt_ids(ours, "alpaca", [("user", "Hi"), ("assistant", None)])


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
NOT_RENDERED = {
    "a tool's turn": ([USER, {"role": "tool", "content": "3"}], {}),
    "a tool call": ([USER, ANSWER | {"content": "", "tool_calls": [{"function": {"name": "f"}}]}], {}),
    "reasoning": ([USER, ANSWER | {"reasoning_content": "Hm"}], {}),
    "tools": ([USER], {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
    "no content": ([USER | {"content": None}], {}),
    "a number": ([USER | {"content": 5}], {}),
    "no parts": ([USER | {"content": []}], {}),
    "a picture": ([USER | {"content": [{"type": "image_url", "text": "cap"}]}], {}),
}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_exported_template_raises_where_it_would_drop_something_and_reads_parts(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(folder_of(tmp_path / "m", built("byte-level BPE")), 8192)
    ours.save(tmp_path / "m", template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for name, (messages, how) in NOT_RENDERED.items():
        with pytest.raises(Exception, match="this model knows|no turns of role|content ") as e:
            theirs.apply_chat_template(messages, tokenize=False, **how)
        assert type(e.value).__name__ == "TemplateError", name
    for generate in (True, False):
        how = {"tokenize": False, "add_generation_prompt": generate}
        text = theirs.apply_chat_template([USER], **how)
        assert theirs.apply_chat_template([USER | {"content": PARTS}], **how) == text
        assert text.rstrip().endswith(("Assistant:", "### Response:", "assistant<|end_header_id|>")) is generate
    more = [[{"role": "system", "content": "x"}, USER], [USER, ANSWER, USER]]
    for messages in more if template == "alpaca" else ():
        with pytest.raises(Exception, match="one user turn and at most one answer"):
            theirs.apply_chat_template(messages, tokenize=False)


UNREADABLE = {
    "only between blanks": (partial(flagged, single_word=True), {}, r"<s> would not be read beside a letter"),
    "no token of that name": (byte_level, {"eos_token": "<end>"}, "no eos_token: neither"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_tokenizer_that_cannot_keep_the_promise_is_refused_when_it_is_loaded(tmp_path, name):
    make, settings, message = UNREADABLE[name]
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer(folder_of(tmp_path / "m", make().to_str(), **settings), 8192)
    assert "\n" not in str(e.value)
