"""data.py: rows of every format tokenized as the templates say, cut and packed without losing a target, or refused."""

import gzip
import json
import shutil
import unicodedata
from itertools import groupby

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import save
from stories260k import SHARED
from tiny import VOCAB, tiny_folder

from data import END, PROMPT, RESPONSE, TEMPLATE, Corpus, epoch_order, load_corpus, micro_batches, prompt_ids
from model import Llama
from published.rows import read_rows
from published.turns import parse
from published.tokenizer import CHAT_TEMPLATES, Tokenizer, require_trained_headers

MARKS = {TEMPLATE: "{}", PROMPT: "‹{}›", RESPONSE: "⟦{}⟧", END: "⟪{}⟫"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny_folder(tmp_path_factory.mktemp("tiny")), VOCAB)


@pytest.fixture
def corpus_of(tmp_path, tokenizer):
    """corpus_of(rows, template, context): what load_corpus makes of a file of `rows`."""

    def load(rows, template="auto", context=4096, tokenizer=tokenizer):
        return load_corpus(write(tmp_path / "rows.jsonl", lines(rows)), tokenizer, template, context)

    return load


def write(path, raw: bytes):
    path.write_bytes(raw)
    return path


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def messages(turns) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


def samples(corpus) -> list[list[int]]:
    return [corpus.ids[a:b].tolist() for a, b in zip(corpus.starts, corpus.starts[1:])]


def unscored(corpus) -> np.ndarray:
    return np.zeros(len(corpus.ids), np.float32)


def same(a, b) -> bool:
    names = ("ids", "kind", "starts", "spans", "rows")
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    return arrays and (a.text, a.template, a.counts) == (b.text, b.template, b.counts)


def marked(tokenizer, corpus, i=0) -> str:
    """Sample i as text: ‹prompt›, ⟦response⟧, ⟪end⟫, the rest bare; a special token is [name], one spelt out is not."""
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {id: f"[{token.content[2:-2]}]" for id, token in added.items() if token.special}
    at = range(corpus.starts[i], corpus.starts[i + 1])
    spans = groupby(at, key=lambda t: (int(corpus.kind[t]), corpus.ids[t] in special))
    text = ""
    for (kind, is_special), at in spans:
        ids = [int(corpus.ids[t]) for t in at]
        text += MARKS[kind].format("".join(special[id] for id in ids) if is_special else tokenizer.backend.decode(ids))
    return text


# Rows.

LINE = "the\u2028sea"  # U+2028 ends a line for str.splitlines, not for JSON
TURNS = [("user", LINE), ("assistant", "Rain. 🐙"), ("user", "Sure?"), ("assistant", "Yes.")]
SYSTEM, SHAREGPT = [("system", "He said")], {"user": "human", "assistant": "gpt"}
FORMATS = {
    "LIMA": ({"conversations": [text for _, text in TURNS], "source": "x"}, TURNS),
    "ShareGPT": ({"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in TURNS]}, TURNS),
    "messages": ({"messages": messages(TURNS)}, TURNS),
    "messages with system": ({"messages": messages(SYSTEM + TURNS)}, SYSTEM + TURNS),
    "prompt and completion": ({"prompt": LINE, "completion": "Rain."}, [("user", LINE), ("assistant", "Rain.")]),
    "Alpaca": ({"instruction": LINE, "input": "", "output": "Rain."}, [("user", LINE), ("assistant", "Rain.")]),
    "Alpaca without the field": ({"instruction": LINE, "output": "Rain."}, [("user", LINE), ("assistant", "Rain.")]),
    "Alpaca with input": (
        {"instruction": LINE, "input": "3", "output": "4"},
        [("user", LINE), ("input", "3"), ("assistant", "4")],
    ),
    "text": ({"text": LINE}, [("assistant", LINE)]),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_arrays_and_lines_gzipped_or_not(tmp_path, tokenizer, name):
    row, turns = FORMATS[name]
    assert [turn[:2] for turn in parse("here", row)[1]] == turns
    rows = [row, {**row, "id": 7}]
    array, escaped = json.dumps(rows, ensure_ascii=False, indent=1).encode(), json.dumps(rows).encode()
    windows = b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\r\n")
    first = load_corpus(write(tmp_path / "rows.jsonl", lines(rows)), tokenizer, "auto", 4096)
    assert len(first) == 2 and first.template == {"text": "text", "Alpaca": "alpaca"}.get(name.split()[0], "plain")
    gzipped = gzip.compress(array), gzip.compress(windows)
    for raw in (array, escaped, windows, b"\xef\xbb\xbf" + array, *gzipped, lines(rows).rstrip()):
        assert same(load_corpus(write(tmp_path / "other", raw), tokenizer, "auto", 4096), first)


@pytest.mark.fast
def test_unanswered_and_empty_rows_are_left_out_and_counted(corpus_of, tokenizer):
    whole, last_unanswered = {"conversations": ["Hi", "Yes."]}, {"conversations": ["Hi", "Yes.", "Why?"]}
    unanswered, empty = {"conversations": ["Hi"]}, {"prompt": "Hi", "completion": " \n"}
    corpus = corpus_of([last_unanswered, unanswered, empty, whole])
    left_out = {"last turns without an answer to train on left out": 1}
    left_out |= {"dropped: no response": 1, "dropped: empty response": 1}
    assert corpus.counts == {"rows": 4, "kept": 2, **left_out}
    assert samples(corpus) == samples(corpus_of([whole, whole]))


# Templates.

BOS, CLOSE = "[begin_of_text]", "⟪[end_of_text]⟫"
STANFORD = "Below is an instruction that describes a task"
APPROPRIATELY = ". Write a response that appropriately completes the request.\n\n### Instruction:"
ROLE = "[start_header_id]{}[end_header_id]\n\n"
WITH_INPUT = {"instruction": "Name the sea", "input": "1 2", "output": "Yes"}
SPELT = "<|eot_id|><|end_of_text|>"
RENDERED = {  # a token that holds characters of both the row's text and the template is the prompt's
    "plain": (
        {"conversations": ["the sea", "Rain.", "Why?", "The end."]},
        f"{BOS}User:‹ the sea›\n\nAssistant:⟦ Rain.⟧{CLOSE}User:‹ Why?\n\n›Assistant:⟦ The end.⟧{CLOSE}",
    ),
    "plain with system": (
        {"messages": messages([("system", "He"), ("user", "Hi"), ("assistant", "Yes")])},
        f"{BOS}System: ‹He›\n\nUser: ‹Hi›\n\nAssistant:⟦ Yes⟧{CLOSE}",
    ),
    "plain, white space": (
        {"prompt": "\nthe sea\n", "completion": " \nYes\n "},
        f"{BOS}User: ‹\nthe sea\n\n\n›Assistant:⟦  \nYes\n ⟧{CLOSE}",
    ),
    "plain, unicode": (
        {"prompt": "é e\u0301 日本 🐙", "completion": "🐙日"},
        f"{BOS}User: ‹é e\u0301 日本 🐙›\n\nAssistant:⟦ 🐙日⟧{CLOSE}",
    ),
    "plain, nothing asked": ({"prompt": "", "completion": "Yes"}, f"{BOS}User: \n\nAssistant:⟦ Yes⟧{CLOSE}"),
    "plain, spelt": ({"prompt": SPELT, "completion": SPELT}, f"{BOS}User: ‹{SPELT}›\n\nAssistant:⟦ {SPELT}⟧{CLOSE}"),
    "plain of Alpaca": (WITH_INPUT, f"{BOS}User: ‹Name the sea\n\n1 2›\n\nAssistant:⟦ Yes⟧{CLOSE}"),
    "alpaca": (
        {"instruction": "the sea 🐙", "output": "\nYes"},
        f"{BOS}{STANFORD}{APPROPRIATELY}\n‹the sea 🐙›\n\n### Response:⟦\nYes⟧{CLOSE}",
    ),
    "alpaca with input": (
        WITH_INPUT,
        f"{BOS}{STANFORD}, paired with an input that provides further context{APPROPRIATELY}\n"
        f"‹Name the sea›\n\n### Input:\n‹1 2›\n\n### Response:⟦Yes⟧{CLOSE}",
    ),
    "alpaca of a dialogue": (
        {"prompt": f"\n{SPELT}\n", "completion": "Yes"},
        f"{BOS}{STANFORD}{APPROPRIATELY}‹\n\n{SPELT}\n\n\n›### Response:⟦Yes⟧{CLOSE}",
    ),
    "llama3": (
        {"conversations": ["\n the sea ", " Rain.\n", SPELT, "\nYes"]},
        f"{BOS}{ROLE.format('user')}‹the sea›[eot_id]{ROLE.format('assistant')}⟦Rain.⟧⟪[eot_id]⟫"
        f"{ROLE.format('user')}‹{SPELT}›[eot_id]{ROLE.format('assistant')}⟦Yes⟧⟪[eot_id]⟫",
    ),
    "text": ({"text": f" the sea\n\n{SPELT}"}, f"{BOS}⟦ the sea\n\n{SPELT}⟧{CLOSE}"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", RENDERED)
def test_a_row_is_rendered_and_labelled_exactly_as_its_template_says(corpus_of, tokenizer, name):
    row, expected = RENDERED[name]
    template = name.replace(",", "").split()[0]
    corpus = corpus_of([row, row], template)
    assert [marked(tokenizer, corpus, i) for i in range(2)] == [expected, expected]
    assert (
        corpus.template == template
        and corpus.ids.dtype == np.int32
        and corpus.doc_ids.tolist() == sorted(corpus.doc_ids)
    )

    assert tokenizer.backend.encode("the").ids[0] == tokenizer.bos, "this tokenizer would add a second BOS by itself"
    assert samples(corpus)[0].count(tokenizer.bos) == 1
    answers = len([role for role, *_ in parse("", row)[1] if role == "assistant"])
    assert (corpus.kind == END).sum() == 2 * answers and corpus.loss_mask[corpus.starts[1:] - 1].all()
    assert set(corpus.ids[corpus.kind == END].tolist()) <= set(tokenizer.stop_ids(template))

    if template != "text":  # what generation is given is what training saw
        prompt = prompt_ids(tokenizer, template, [*(turn[:2] for turn in parse("", row)[1][:-1]), ("assistant", None)])
        assert samples(corpus)[0][: len(prompt)] == prompt
        assert corpus.kind[len(prompt)] == RESPONSE and corpus.kind[len(prompt) - 1] != RESPONSE


@pytest.mark.fast
def test_no_token_straddles_the_seam_before_a_response(corpus_of, tokenizer):
    ids = samples(corpus_of([{"instruction": "Why?", "output": "Yes"}]))[0]
    jointly = tokenizer.backend.encode(tokenizer.decode(ids), add_special_tokens=False).tokens
    assert jointly[-1] == ":Yes", "tokenized as one string, the colon and the answer merge"
    apart = [tokenizer.backend.id_to_token(id) for id in ids]
    assert apart[-4] == ":" and "".join(apart[-3:-1]) == "Yes"


@pytest.mark.fast
def test_a_tokenizer_file_that_pads_with_the_end_token_and_truncates_changes_nothing(tmp_path, corpus_of, tokenizer):
    other = tiny_folder(tmp_path / "padding")
    backend = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    backend.enable_padding(length=50, pad_id=tokenizer.end, pad_token=tokenizer.end_token)
    backend.enable_truncation(5)
    backend.save(str(other / "tokenizer.json"))
    rows = [{"prompt": "the sea", "completion": "Rain and rivers carry a little salt."}] * 3
    corpus = corpus_of(rows, tokenizer=Tokenizer(other, VOCAB))
    assert same(corpus, corpus_of(rows))
    batch = micro_batches(corpus, unscored(corpus), np.arange(3), 1000)[0]
    assert (batch.targets[batch.loss_mask] == tokenizer.end).sum() == 3


@pytest.mark.fast
def test_llama3_is_refused_where_its_tokens_were_never_trained(tmp_path, tokenizer):
    require_trained_headers(tiny_folder(tmp_path / "bare", seed=None), tokenizer)  # fresh: all are untrained alike
    folder = tiny_folder(tmp_path / "m")
    require_trained_headers(folder, tokenizer)
    for token in ("<|start_header_id|>", "<|eot_id|>"):
        model = Llama.from_pretrained(folder)
        with torch.no_grad():
            model.model.embed_tokens.weight[tokenizer.id(token)] *= 0.01
        model.save_pretrained(tmp_path / token)
        with pytest.raises(ValueError, match="this base model never trained .* --template plain"):
            require_trained_headers(tmp_path / token, tokenizer)
    write(folder / "model.safetensors", save({"tok_embeddings.weight": np.zeros((VOCAB, 32))}))  # Meta's layout
    with pytest.raises(ValueError, match="model.embed_tokens.weight"):
        require_trained_headers(folder, tokenizer)


# What is saved with the model.


@pytest.mark.fast
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_saved_chat_template_gives_transformers_our_token_ids(tmp_path, tokenizer, corpus_of, template):
    transformers = pytest.importorskip("transformers")
    Llama.from_pretrained(tokenizer.folder).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model", template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    stops = ["<|end_of_text|>", "<|eot_id|>"][: 1 + (template == "llama3")]
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [theirs.convert_tokens_to_ids(t) for t in stops],
    }
    assert theirs.eos_token == stops[-1] and theirs.bos_token == "<|begin_of_text|>"

    def rendered(turns, **how):
        return theirs.apply_chat_template(messages(turns), return_dict=True, **how)["input_ids"]

    turns = [("user", "\nWhy is the sea salt? 🐙\n"), ("assistant", "Rain.\n\nYes 日")]
    turns += [] if template == "alpaca" else [("user", "the end"), ("assistant", "The end.")]
    turns = turns if template == "alpaca" else [("system", "He said"), *turns]
    for stop in [i for i, (role, _) in enumerate(turns) if role == "assistant"]:
        ours = prompt_ids(tokenizer, template, [*turns[:stop], ("assistant", None)])
        assert rendered(turns[:stop], add_generation_prompt=True) == ours
    assert rendered(turns) == samples(corpus_of([{"messages": messages(turns)}], template))[0]

    again = Tokenizer(tmp_path / "model", VOCAB)  # a saved folder is a model folder
    assert (again.bos, again.end, again.raw) == (tokenizer.bos, tokenizer.end, tokenizer.raw)
    again.save(tmp_path / "model", "text")
    assert "chat_template" not in json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())


# Length.


@pytest.mark.fast
def test_a_sample_is_cut_from_its_end_and_no_end_token_is_faked(corpus_of, tokenizer):
    short = {"prompt": "a", "completion": "Y"}
    long = {"conversations": ["the sea was warm and small", "Rain.", "Why?", "The pool was warm."]}
    (a, b), kinds = samples(corpus_of([short, long])), corpus_of([long]).kind
    answer = int(np.argmax(kinds == RESPONSE))
    assert len(a) <= answer < len(b)
    for context in range(len(a), len(b) + 1):
        corpus = corpus_of([short, long], context=context)
        assert samples(corpus) == [a, b[:context]][: len(corpus)]
        kind = np.concatenate([corpus_of([short]).kind, kinds[:context]])
        assert np.array_equal(corpus.kind, kind[: len(corpus.ids)])
        assert (len(corpus) == 2) == (context > answer)
        assert corpus.counts.get("dropped: response cut away", 0) == 2 - len(corpus) == 2 - corpus.counts["kept"]
        is_cut = answer < context < len(b)
        assert ("cut at the context length" in corpus.counts) == is_cut, "a dropped row is not counted twice"


@pytest.mark.fast
def test_long_text_is_cut_into_pieces_that_together_train_on_each_token_once(corpus_of, tokenizer):
    rows = [{"text": "Rain and rivers carry a little salt down to the sea.\n\n"}, {"text": "Yes"}]
    whole = samples(corpus_of(rows))
    for context in range(2, len(whole[0]) + 1):
        corpus = corpus_of(rows, context=context)
        pieces = samples(corpus)
        assert all(piece[0] == tokenizer.bos and 1 < len(piece) <= context for piece in pieces)
        body = [id for piece in pieces for id in piece[1:]]
        assert body == whole[0][1:] + whole[1][1:] and body.count(tokenizer.end) == 2 and tokenizer.bos not in body
        assert np.array_equal(~corpus.loss_mask, np.isin(np.arange(len(corpus.ids)), corpus.starts))


# Batches.


@pytest.mark.fast
def test_each_token_knows_its_characters_and_each_sample_its_row(corpus_of):
    rows = [
        {"conversations": ["Ça va 👍?", "Oui, 海.", "And\n\nthen", "  No."]},
        {"conversations": ["never answered"]},
        {"conversations": ["b", "c d e."]},
    ]
    corpus = corpus_of(rows)
    assert corpus.rows.tolist() == [1, 3]
    assert (
        corpus.text
        == "User: Ça va 👍?\n\nAssistant: Oui, 海.User: And\n\nthen\n\nAssistant:   No.User: b\n\nAssistant: c d e."
    )
    for sample, answers in enumerate([[" Oui, 海.", "   No."], [" c d e."]]):
        a, b = corpus.starts[sample : sample + 2]
        kind, spans = corpus.kind[a:b], corpus.spans[a:b]
        assert (spans[kind == END, 0] == spans[kind == END, 1]).all() and spans[0, 0] == spans[0, 1]
        edges = np.flatnonzero(np.diff(kind == RESPONSE)) + 1
        turns = [corpus.text[spans[i, 0] : spans[j - 1, 1]] for i, j in edges.reshape(-1, 2)]
        assert turns == answers
        for i, j in edges.reshape(-1, 2):  # without a gap; the bytes of one character share its place
            assert all(
                now == before or now[0] == before[1]
                for before, now in zip(spans[i : j - 1].tolist(), spans[i + 1 : j].tolist())
            )


@pytest.mark.fast
def test_some_samples_taken_by_themselves_keep_what_is_theirs(corpus_of):
    rows = [{"prompt": f"Why {n}?", "completion": f"Because of {n} 👍." * n} for n in range(1, 6)]
    corpus, alone = corpus_of(rows), corpus_of(rows[3:4])
    taken = corpus.take(np.array([3, 1]))
    assert len(taken) == 2 and taken.rows.tolist() == [4, 2]
    assert samples(taken) == [samples(corpus)[3], samples(corpus)[1]]
    assert samples(taken)[0] == samples(alone)[0] and taken.kind[: taken.starts[1]].tolist() == alone.kind.tolist()
    texts = [[c.text[a:b] for a, b in c.spans[: c.starts[1]]] for c in (taken, alone)]
    assert texts[0] == texts[1]


@pytest.mark.fast
def test_pieces_of_a_long_text_keep_their_row_and_their_characters(corpus_of):
    rows = [{"text": "one two three four five six seven"}, {"text": "eight"}]
    corpus = corpus_of(rows, context=6)
    assert (
        set(corpus.rows.tolist()) == {1, 2} and corpus.rows.tolist() == sorted(corpus.rows.tolist()) and len(corpus) > 3
    )
    read = "".join(corpus.text[a:b] for a, b in corpus.spans)
    assert read == "".join(row["text"] for row in rows)


@pytest.mark.fast
def test_the_order_of_an_epoch_is_a_permutation_made_from_seed_and_epoch():
    orders = {(s, e): epoch_order(10, 4, s, e, drop_last=False) for s in range(3) for e in range(3)}
    for (seed, epoch), steps in orders.items():
        assert [len(step) for step in steps] == [4, 4, 2] and sorted(np.concatenate(steps)) == list(range(10))
        np.random.seed(epoch)  # nothing global has a say
        for drop_last in (False, True):
            again = epoch_order(10, 4, seed, epoch, drop_last)
            assert len(again) == 3 - drop_last and all(map(np.array_equal, again, steps))
    assert len({tuple(np.concatenate(steps)) for steps in orders.values()}) == 9
    assert len(epoch_order(8, 4, 0, 0, False)) == len(epoch_order(8, 4, 0, 0, True)) == 2
    assert epoch_order(3, 4, 0, 0, True) == []


@pytest.mark.fast
def test_micro_batches_hold_each_sample_once_with_targets_and_scores_shifted_together(corpus_of, tokenizer):
    words = "the sea was warm and small crabs were hiding under stones".split()
    turns = [[f"Why {i}?", " ".join(words[: i % 11 + 1]), "Sure?", "Yes."][: 4 if i % 3 else 2] for i in range(23)]
    corpus = corpus_of([{"conversations": texts} for texts in turns])
    prior = corpus.ids.astype(np.float32) / 2  # a score that can be told from the target itself
    number = {tuple(ids): i for i, ids in enumerate(samples(corpus))}
    most = int(corpus.lengths.max() - 1)
    for max_tokens in (most, 2 * most, 10_000):
        supervised = ends = 0
        for step in epoch_order(len(corpus), 5, seed=1, epoch=0, drop_last=False):
            met = []
            batches = micro_batches(corpus, prior, step, max_tokens)
            for batch in batches:
                T = len(batch.targets)
                assert T <= max_tokens and batch.tokens.shape == batch.layout.positions.shape == (1, T)
                assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool
                assert torch.equal(batch.prior, batch.targets / 2) and batch.group is None
                assert torch.equal(batch.doc_ids, torch.repeat_interleave(torch.tensor(batch.layout.lengths)))
                at = 0
                for length in batch.layout.lengths:
                    span = slice(at, at + length)
                    inputs, targets = batch.tokens[0, span].tolist(), batch.targets[span].tolist()
                    assert inputs[1:] == targets[:-1], "position i predicts the token at i + 1"
                    sample = number[*inputs, targets[-1]]  # whole, and no target from a neighbour
                    mask = corpus.loss_mask[corpus.starts[sample] + 1 : corpus.starts[sample + 1]]
                    assert np.array_equal(batch.loss_mask[span], mask)
                    assert batch.layout.positions[0, span].tolist() == list(range(length))
                    met, at = [*met, sample], at + length
                assert at == T
                supervised += int(batch.loss_mask.sum())
                ends += int((batch.targets[batch.loss_mask] == tokenizer.end).sum())
            assert sorted(met) == sorted(step)
            tokens = sorted(len(batch.targets) for batch in batches)
            assert len(tokens) == 1 or tokens[0] + tokens[1] > max_tokens, "two rows that would have fitted into one"
        assert supervised == corpus.loss_mask.sum() and ends == sum(len(texts) // 2 for texts in turns)


@pytest.mark.fast
def test_the_nats_of_a_batch_are_cross_entropy_where_it_is_trained_on_and_0_elsewhere(corpus_of, tokenizer):
    corpus = corpus_of([{"prompt": "Why?", "completion": "Rain " * n} for n in (1, 4, 2)])
    (batch,) = micro_batches(corpus, unscored(corpus), np.arange(3), 1000)
    model = Llama.from_pretrained(tokenizer.folder, seed=1)
    nll = batch.nll(model)
    logits = model.lm_head(model(batch.tokens, batch.layout))[0]
    full = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    torch.testing.assert_close(nll, full * batch.loss_mask)
    assert not nll[~batch.loss_mask].any() and nll.shape == batch.targets.shape
    blank = micro_batches(corpus, unscored(corpus), np.arange(1), 1000, rank=1, ranks=2)[0]
    empty = blank.nll(model)
    empty.sum().backward()
    assert not empty.any() and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.fast
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_ranks_of_a_step_share_its_samples_and_have_equally_many_rows(corpus_of, ranks):
    rows = [{"prompt": "Why?", "completion": "word " * (1 + 7 * n % 23)} for n in range(13)]
    corpus = corpus_of(rows)
    places = np.arange(len(corpus.ids))
    for samples in (np.arange(13), np.array([3, 5, 8]), np.array([4])):
        parts = [micro_batches(corpus, places, samples, 120, rank, ranks) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        everything = [batch for part in parts for batch in part]
        trained = np.sort(np.concatenate([batch.prior[batch.loss_mask].numpy() for batch in everything]))
        expected = [i for s in samples for i in range(corpus.starts[s], corpus.starts[s + 1]) if corpus.loss_mask[i]]
        assert trained.tolist() == sorted(expected), "each supervised token on one rank, once"
        for batch in everything:
            positions = batch.tokens.numel()
            assert positions <= 120 and (batch.loss_mask.any() or positions == corpus.lengths.min() - 1)


@pytest.mark.parametrize(
    "path, batch_size, most", [("lima/train.jsonl.gz", 64, 1.02), ("alpaca/alpaca_data.json.gz", 32, 1.08)]
)
def test_eight_ranks_get_nearly_the_same_number_of_tokens(path, batch_size, most):
    rows = read_rows(shared(f"data/{path}"))[:3000]
    lengths = [sum(len(turn.text) for turn in parse(*row)[1]) // 4 + 2 for row in rows]  # a Llama 3 token has about 4
    lengths = np.array(lengths)
    starts = np.cumsum([0, *lengths])
    corpus = Corpus(np.zeros(starts[-1], np.int32), np.full(starts[-1], RESPONSE, np.uint8), starts)
    prior, uneven = unscored(corpus), []
    for step in epoch_order(len(corpus), batch_size, 0, 0, drop_last=True)[:30]:
        parts = [micro_batches(corpus, prior, step, 8192, rank, 8) for rank in range(8)]
        loads = [sum(int(batch.loss_mask.sum()) for batch in part) for part in parts]
        uneven.append(max(loads) / np.mean(loads))
    assert np.mean(uneven) <= most


# Bad input.

ROW = b'{"prompt": "Hi", "completion": "Yes"}\n'
BAD = {  # the file, what is said of it, and perhaps --template and --context
    "no such file": (None, "no such file"),
    "empty": (b"", "no rows"),
    "empty array": (b"[]", "no rows"),
    "line cut short": (
        ROW + b'{"prompt": "Hi',
        r"rows\.jsonl:2: not JSON \(.* at column 12\); expected one object a line",
    ),
    "array cut short": (b'[{"text": "a"},\n{"text": ', r"rows\.jsonl:2: not JSON"),
    "Latin-1": (ROW + b'{"text": "caf\xe9"}', r"rows\.jsonl:2: byte 0xe9 is not UTF-8; .*iconv"),
    "half a surrogate pair": (ROW + b'{"prompt": "Hi", "completion": "\\ud83d"}', r"rows\.jsonl:2: .*surrogate"),
    "gzip cut short": (gzip.compress(ROW * 99)[:-12], "a damaged gzip file"),
    "gzip damaged": (gzip.compress(ROW)[:12] + b"\xff" * 40, "a damaged gzip file"),
    "a number": (ROW + b"3\n", r"rows\.jsonl:2: int, expected an object"),
    "array of strings": (b'["a"]', r"item 1: str, expected an object"),
    "unknown fields": (
        b'{"ask": 1}',
        "fields .?ask.?; expected conversations .*messages, instruction and output .*completion, or text",
    ),
    "field name of two lines": (b'{"a\\nb": 1}', "; expected conversations"),
    "turns that are numbers": (
        b'{"conversations": [1, 2]}',
        r":1: conversations\[0\] is 1, expected a role",
    ),
    "no turns": (b'{"conversations": []}', r"conversations is \[\], expected a list"),
    "turns as a string": (b'{"messages": "Hi"}', 'messages is "Hi", expected a list'),
    "output null": (b'{"instruction": "a", "output": null}', "fields 'instruction'; expected conversations"),
    "text a list": (b'{"text": ["a"]}', "text is list"),
    "no role": (
        b'{"messages": [{"content": "a"}]}',
        r'messages\[0\] is \{"content": "a"\}, expected a role: human',
    ),
    "unknown role": (
        b'{"conversations": [{"from": "x", "value": "a"}]}',
        r"conversations\[0\] is .* expected a role",
    ),
    "role a list": (
        b'{"messages": [{"role": ["user"], "content": "a"}]}',
        r"messages\[0\] is .* expected a role",
    ),
    "content a list": (b'{"messages": [{"role": "user", "content": []}]}', r"messages\[0\]\.content is list"),
    "two kinds": (
        ROW + b'{"text": "a"}',
        r"rows\.jsonl:2: a row of text, but the file began with dialogue; split the file",
    ),
    "all empty": (b'{"prompt": "Hi", "completion": ""}\n' * 3, "none of 3 rows is usable .*3 dropped: empty response"),
    "all unanswered": (b'{"conversations": ["Hi"]}', "none of 1 rows is usable .*1 dropped: no response"),
    "all cut away": (ROW, "none of 1 rows is usable .*1 dropped: response cut away.*within --context", "auto", 4),
    "text to a dialogue's template": (
        b'{"text": "a"}',
        ":1: a row of text does not fit --template plain; use --template text",
        "plain",
    ),
    "dialogue as text": (ROW, ":1: a row of dialogue does not fit --template text; use --template plain", "text"),
    "two turns to alpaca": (
        ROW + b'{"conversations": ["a", "b", "c", "d"]}',
        ":2: .* not one instruction and one answer; use --template plain",
        "alpaca",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_gets_one_clear_error(tmp_path, tokenizer, fault):
    raw, message, *given = BAD[fault]
    template, context = (*given, *("auto", 4096)[len(given) :])
    path = tmp_path / "rows.jsonl"
    if raw is not None:
        write(path, raw)
    with pytest.raises(ValueError, match=message) as e:
        load_corpus(path, tokenizer, template, context)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)


def _replace(name, old, new):
    def edit(folder):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return edit


BAD_TOKENIZERS = {
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "m: no tokenizer.json here"),
    "garbage": (lambda folder: write(folder / "tokenizer.json", b"{"), r"tokenizer\.json: not a tokenizers file"),
    "another model's": (lambda folder: None, r"begin_of_text\|>' is token 504, but the model embeds 500 tokens"),
    "no begin token": (
        _replace("tokenizer.json", "<|begin_of_text|>", "<|begin|>"),
        r"m: no bos_token: .*<\|begin_of_text\|>",
    ),
    "no end token": (_replace("tokenizer.json", "<|end_of_text|>", "<|end|>"), r"m: no eos_token: .*<\|end_of_text\|>"),
    "no <|eot_id|>": (
        _replace("tokenizer.json", "<|eot_id|>", "<|eot|>"),
        r"m: the tokenizer has no <\|eot_id\|>; use another --template",
    ),
    "settings cut short": (
        lambda folder: write(folder / "tokenizer_config.json", b"{"),
        r"tokenizer_config\.json: not readable as JSON",
    ),
    "settings a list": (lambda folder: write(folder / "tokenizer_config.json", b"[]"), r"tokenizer_config\.json: "),
}


@pytest.mark.fast
@pytest.mark.parametrize("fault", BAD_TOKENIZERS)
def test_a_bad_tokenizer_gets_one_clear_error(tmp_path, fault):
    break_it, message = BAD_TOKENIZERS[fault]
    folder = tiny_folder(tmp_path / "m")
    break_it(folder)
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer(folder, 500 if fault == "another model's" else VOCAB).stop_ids("llama3")
    assert "\n" not in str(e.value)


# Real data.


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; set SFTGO_SHARED to the folder that has it")
    return SHARED / name


@pytest.fixture
def neox(tmp_path):
    """GPT-NeoX's tokenizer: 50,277 tokens; one special token, here in the long spelling, is both begin and end."""
    shutil.copy(shared("tokenizers/gpt-neox-20b/tokenizer.json"), tmp_path)
    end = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": end}, "eos_token": end}))
    return Tokenizer(tmp_path, 50_432)


def test_lima_is_kept_whole_and_exactly_its_answers_are_trained_on(neox):
    path = shared("data/lima/train.jsonl.gz")
    corpus = load_corpus(path, neox, "auto", 100_000)
    assert corpus.counts == {"rows": 1030, "kept": 1030, "last turns without an answer to train on left out": 1}
    dialogues = [row["conversations"] for _, row in read_rows(path)]
    for i, turns in enumerate(dialogues):
        sample = slice(corpus.starts[i], corpus.starts[i + 1])
        text = neox.backend.decode(corpus.ids[sample][corpus.loss_mask[sample]], skip_special_tokens=False)
        expected = "".join(f" {answer}{neox.end_token}" for answer in turns[1::2])
        assert text == unicodedata.normalize("NFC", expected), f"row {i + 1}"  # this tokenizer normalizes
        asked = neox.decode(
            corpus.ids[sample][corpus.kind[sample] == PROMPT]
        )  # perhaps with white space of the template's
        expected = " ".join(turns[: len(turns) // 2 * 2 : 2])
        assert "".join(asked.split()) == "".join(unicodedata.normalize("NFC", expected).split()), f"row {i + 1}"
    assert (corpus.kind == END).sum() == sum(len(turns) // 2 for turns in dialogues)


def test_alpaca_loses_only_its_28_empty_answers(tmp_path, neox):
    rows = read_rows(shared("data/alpaca/alpaca_data.json.gz"))
    empty = [not parse(where, row)[1][-1].text.strip() for where, row in rows]
    assert len(rows) == 52_002 and sum(empty) == 28
    at = empty.index(True)
    part = write(tmp_path / "part.jsonl", lines(row for _, row in rows[at - 100 : at + 100]))
    corpus, n = load_corpus(part, neox, "auto", 4096), sum(empty[at - 100 : at + 100])
    assert corpus.template == "alpaca"
    apart = {"with an answer read apart, which would change its prompt's tokens": 4}
    assert corpus.counts == {"rows": 200, "kept": 200 - n, "dropped: empty response": n, **apart}


def test_a_file_too_large_for_one_call_of_the_tokenizer_reads_as_its_rows_do(corpus_of, tokenizer):
    rows = [{"prompt": "Why?", "completion": f"{n}" + " salt" * (400_000 if n == 1 else 500)} for n in range(4)]
    corpus, alone = corpus_of(rows * 2), [corpus_of([row]) for row in rows] * 2
    assert len(corpus.text) > 4_000_000
    assert np.array_equal(corpus.ids, np.concatenate([one.ids for one in alone]))
    assert np.array_equal(corpus.kind, np.concatenate([one.kind for one in alone]))
    assert np.array_equal(corpus.lengths, np.concatenate([one.lengths for one in alone]))
    for i in (0, 3, 4, 7):
        a, b = corpus.starts[i : i + 2]
        read = "".join(corpus.text[slice(*span)] for span in corpus.spans[a:b])
        assert read == f"User: Why?\n\nAssistant: {rows[i % 4]['completion']}"
