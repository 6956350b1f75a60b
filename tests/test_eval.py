"""The scorer against plain loops, the benchmarks' prompts to the last space, generation, and the command."""

import copy
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from benchmarks import DATA, needs_data
from safetensors.torch import load_file, save_file
from stories260k import SHARED
from tiny import tiny_folder

import eval.__main__ as command
from eval import arc_challenge, hellaswag, mathqa, mmlu, openbookqa, results, score, table, truthfulqa
from eval.benchmarks import BENCHMARKS, task_names
from eval.generate import end_tokens, not_greedy, respond, stopped, trimmed
from eval.rows import Row, Source, read_file
from eval.score import Encoder, Item, log_likelihoods, mean, pooled, predict
from eval.sharing import Tree, pack, packed, unpacked
from model import Llama, Packed
from published.tokenizer import Tokenizer
from support.generate import Cached, generate, sample

ROOT = Path(__file__).parents[1]
BASE = ROOT / "demo" / "base"
os.environ.setdefault("NLTK_DATA", str(SHARED / "nltk_data"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model whose window of 64 tokens is soon full, and its tokenizer."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"), max_position_embeddings=64, initializer_range=0.3)
    model = Llama.from_pretrained(folder)
    return model, Tokenizer(folder, model.cfg.vocab_size)


def alone(model: Llama, pairs: list) -> tuple[np.ndarray, list[bool]]:
    """Each (context, continuation) by itself, as the definition says."""
    values, greedy = [], []
    for context, continuation in pairs:
        ids = (unpacked(context).tolist() + continuation)[-(model.cfg.max_position_embeddings + 1) :]
        with torch.no_grad():
            hidden = model(torch.tensor([ids[:-1]]), Packed([len(ids) - 1]))[0]
            log_p = model.lm_head(hidden).log_softmax(-1)[-len(continuation) :]
        values.append(log_p[range(len(continuation)), continuation].sum().item())
        greedy.append(log_p.argmax(-1).tolist() == continuation)
    return np.array(values), greedy


def family(seed: int, vocab: int = 500) -> list:
    """Requests that share headers, contexts and beginnings of continuations; some twice, some beyond the window."""
    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(0, vocab, n).tolist()  # noqa: E731
    pairs = []
    for header in (ids(20), ids(30), ids(3), []):
        for _ in range(7):
            context = header + ids(draw.integers(1, 12))
            begun = ids(draw.integers(0, 4))
            pairs += [(packed(context), begun + ids(draw.integers(1, 5))) for _ in range(3)]
            pairs += [(packed(context), [token]) for token in ids(2)]
    pairs += [
        (packed(ids(80)), ids(3)),
        (packed(ids(64)), ids(1)),
        (packed(ids(63)), ids(2)),
        (packed(ids(5)), ids(64)),
    ]
    return pairs + pairs[:9]


@pytest.fixture(scope="module", params=range(3))
def requests(request, tiny):
    """Such requests, and what each gives by itself."""
    pairs = family(request.param)
    return pairs, *alone(tiny[0], pairs)


@pytest.mark.fast
@pytest.mark.parametrize("max_tokens", [1, 40, 100, 100_000])
def test_shared_beginnings_change_no_score(tiny, requests, max_tokens):
    pairs, expected, wanted = requests
    found, greedy = log_likelihoods(tiny[0], pairs, max_tokens)
    assert np.abs(found - expected).max() < 1e-4
    assert greedy.tolist() == wanted


@pytest.mark.fast
def test_long_headers_and_questions_attend_in_pieces(tmp_path):
    folder = tiny_folder(tmp_path, max_position_embeddings=2048, initializer_range=0.3)
    model, draw = Llama.from_pretrained(folder), np.random.default_rng(0)
    ids = lambda n: draw.integers(0, 500, n).tolist()  # noqa: E731
    header = ids(700)
    contexts = [header + ids(n) for n in (20, 600, 30, 5)]
    pairs = [(packed(context), ids(n)) for context in contexts for n in (1, 4, 90)]
    expected, _ = alone(model, pairs)
    for max_tokens, count in ((900, 2), (100_000, 1)):
        assert len(pack(pairs, 2048, max_tokens)) == count
        found, _ = log_likelihoods(model, pairs, max_tokens)
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.fast
def test_a_header_is_read_once_and_a_repeated_request_costs_nothing(tiny):
    draw = np.random.default_rng(0)
    header = draw.integers(0, 500, 40).tolist()
    pairs = [(packed(header + [n, n + 1]), [letter]) for n in range(50) for letter in (7, 8, 9, 10)]
    for max_tokens in (50, 10_000):
        assert sum(row.size for row in pack(pairs, 64, max_tokens)) == 40 + 50 * 2
    assert sum(row.size for row in pack(pairs + pairs, 64, 50)) == 40 + 50 * 2
    assert all(row.size <= 50 for row in pack(pairs, 64, 50))


class Rank:
    """One of several ranks, each in a thread of this process."""

    def __init__(self, rank: int, size: int, sent: dict, barrier: Barrier):
        self.rank, self.size, self.sent, self.barrier = rank, size, sent, barrier

    def together(self, work):
        self.sent[self.rank] = work()
        self.barrier.wait(900)
        return [self.sent[rank] for rank in range(self.size)]


def on_ranks(size: int, work) -> tuple[list, dict]:
    """What work(rank) returns on each rank, and what each gave to the others."""
    sent, barrier = {}, Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Rank(rank, size, sent, barrier)), range(size))), sent


@pytest.mark.fast
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_items_and_each_has_all_results_in_order(tiny, ranks):
    model, tokenizer = tiny
    encoder = Encoder(tokenizer)
    choices = lambda i: ("a", f"word {i}", "x" * (i % 5))  # noqa: E731
    items = [Item(f"t{i % 2}", i // 2, f"the tide pool number {i // 2}", choices(i), i % 3) for i in range(13)]
    found, sent = on_ranks(ranks, lambda rank: score.score(model, encoder, items, ranks=rank))
    assert found[1:] == found[:-1] and sum(map(len, sent.values())) == len(items), "every item on one rank"
    for one, other in zip(found[0], score.score(model, encoder, items), strict=True):
        assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)
        assert one["metrics"] == other["metrics"]
    prompts = [(f"the water {i}", 5 + i % 2, ()) for i in range(7)]
    texts, sent = on_ranks(ranks, lambda rank: respond(model, encoder, prompts, (), rank))
    assert texts == [respond(model, encoder, prompts, ())] * ranks
    assert all(sent[rank] for rank in range(ranks)), "every rank should have a batch"


@pytest.mark.fast
def test_a_model_of_nan_has_no_score(tmp_path):
    model = Llama.from_pretrained(tiny_folder(tmp_path))
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="2 of 2 log-likelihoods are not finite; has the model diverged"):
        log_likelihoods(model, [(packed([1, 2]), [3]), (packed([1]), [3, 4])])


def plain_varlen(q, k, v, q_ends, k_ends, longest_q, longest_k, *, window_size, return_aux, enable_gqa=True):
    """What torch's variable-length kernel computes, a segment at a time: (T, H, hd), and log-sum-exps (T, H)."""
    assert return_aux.lse and longest_q == q_ends.diff().max() and longest_k == k_ends.diff().max()
    y, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for (a, b), (c, d) in zip(zip(q_ends, q_ends[1:]), zip(k_ends, k_ends[1:])):
        s = torch.einsum("qhd,khd->qhk", q[a:b], k[c:d]) / q.shape[2] ** 0.5
        if window_size == (-1, 0):
            s = s.masked_fill(torch.ones(b - a, d - c).triu(1).bool()[:, None], -torch.inf)
        y[a:b], lse[a:b] = torch.einsum("qhk,khd->qhd", s.softmax(-1), v[c:d]), s.logsumexp(-1)
    return y, lse


@pytest.mark.fast
@pytest.mark.parametrize("remembered", [False, True])
def test_the_gpu_s_way_to_attend_is_the_cpu_s(remembered):
    """Level by level and joined by log-sum-exp, with a stand-in for the kernel, against masks."""
    torch.manual_seed(0)
    lengths, parents = [9, 5, 3, 1, 4, 6, 2, 7, 8], [-1, 0, 1, 1, 0, 0, 5, -1, 7]
    T = sum(lengths) - 9 * remembered

    def turned(*args, **kwargs):
        y, lse = plain_varlen(*args, **kwargs)
        return y, lse.T  # (H, T), as FlashAttention has it

    for heads in (4, 8):
        q, k, v = torch.randn(1, heads, T, 8), torch.randn(1, heads // 2, T, 8), torch.randn(1, heads // 2, T, 8)
        memory = [(torch.randn(1, heads // 2, 9, 8), torch.randn(1, heads // 2, 9, 8))] if remembered else None
        expected = Tree(lengths, parents, memory).attend(q, k, v)
        for kernel in (plain_varlen, turned):
            tree = Tree(lengths, parents, memory)
            tree.by_masks = lambda q, k, v, tree=tree, kernel=kernel: tree.by_levels(q, k, v, kernel)
            assert torch.allclose(tree.attend(q, k, v), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the variable-length attention kernel")
def test_on_a_gpu_bfloat16_scores_are_the_cpu_s(tmp_path):
    folder = tiny_folder(tmp_path, head_dim=64, max_position_embeddings=64)
    pairs = family(0)
    expected, _ = log_likelihoods(Llama.from_pretrained(folder), pairs)
    model = Llama.from_pretrained(folder, torch.bfloat16, torch.bfloat16, "cuda")
    for max_tokens in (40, 10_000):
        assert np.abs(log_likelihoods(model, pairs, max_tokens)[0] - expected).max() < 0.1
    exact = Llama.from_pretrained(folder, device="cuda")
    assert np.abs(log_likelihoods(exact, pairs, 100)[0] - expected).max() < 1e-3


@pytest.mark.fast
def test_predictions_are_float32_whatever_the_hidden_states_are():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 16), 3 * torch.randn(300, 16)
    at, targets = [8, 0, 0, 3, 3, 3], [1, 2, 2, 299, 5, 0]
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype), head.to(dtype)
        log_p = (h.double() @ w.double().T).log_softmax(1)
        found, greedy = predict(h, w, torch.tensor(at), torch.tensor(targets))
        assert found.dtype == torch.float32
        assert (found - log_p[at, targets]).abs().max() < 1e-4, "the rounding of bfloat16 logits would be 0.06 and more"
    hidden, head = torch.randn(300, 16), torch.randn(20_000, 16)  # chunks of 128 places
    at, targets = torch.randint(300, (900,)).tolist(), torch.randint(20_000, (900,)).tolist()
    log_p = (hidden @ head.T).log_softmax(1)
    targets[:100] = log_p[at[:100]].argmax(1).tolist()
    found, greedy = predict(hidden, head, torch.tensor(at), torch.tensor(targets))
    assert (found - log_p[at, targets]).abs().max() < 1e-4
    assert greedy.tolist() == (log_p[at].argmax(1) == torch.tensor(targets)).tolist() and greedy[:100].all()


# Metrics.


@pytest.mark.fast
def test_the_first_of_equal_choices_wins_and_lengths_count_characters():
    item = Item("t", 0, "c", ("éé", "abcd", ""), 0)
    assert item.score(np.array([-2.0, -2.0, -9.0])) == {"acc": 1.0, "acc_norm": 0.0}
    assert item.score(np.array([-2.0, -4.0, -9.0]))["acc_norm"] == 1.0  # -1 a character each
    assert Item("t", 0, "c", ("a", ""), 1).score(np.array([-5.0, -1.0])) == {
        "acc": 1.0,
        "acc_norm": 0.0,
    }  # an empty choice never wins there
    assert Item("t", 0, "c", ("a", "b"), 4).score(np.array([-5.0, -1.0])) == {"acc": 0.0, "acc_norm": 0.0}
    shares = Item("t", 0, "c", ("a", "b", "c"), (0, 1, 1), ("acc",)).score(np.log([0.5, 0.2, 0.1]))
    assert shares["acc"] == pytest.approx(0.3 / 0.8)


@pytest.mark.fast
def test_standard_errors_are_those_of_the_mean():
    one, two = [{"acc": float(x)} for x in (1, 0, 0, 1, 1)], [{"acc": float(x)} for x in (0, 0, 1)]
    a, b = mean(one), mean(two)
    assert a == {"n": 5, "acc": 0.6, "acc_stderr": pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / 5**0.5)}
    both = pooled([a, {"n": 0}, b])
    variance = (4 * 5 * a["acc_stderr"] ** 2 + 2 * 3 * b["acc_stderr"] ** 2) / (8 - 2)
    assert both == {"n": 8, "acc": 0.5, "acc_stderr": pytest.approx((variance / 8) ** 0.5)}
    assert mean([{"acc": 1.0}])["acc_stderr"] is None
    assert pooled([mean([{"acc": 1.0}])])["acc_stderr"] is None


# Text to tokens.


@pytest.mark.fast
def test_a_bos_stands_where_it_is_asked_for_and_never_twice(tiny):
    _, tokenizer = tiny
    bos, text = tokenizer.bos, tokenizer.bos_token
    plain, auto, always = (Encoder(tokenizer, mode)(["hello", f"{text}hello"]) for mode in ("never", "auto", "always"))
    assert plain[0][0] != bos and plain[1] == [bos, *plain[0]]
    assert auto == always == [[bos, *plain[0]], [bos, *plain[0]]]


@pytest.mark.fast
def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path, tiny):
    folder = tiny_folder(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    _, tokenizer = tiny
    names = [tokenizer.bos_token, tokenizer.end_token]
    pieces = [
        {"SpecialToken": {"id": names[0], "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": names[1], "type_id": 0}},
    ]
    known = {name: {"id": name, "ids": [tokenizer.id(name)], "tokens": [name]} for name in names}
    raw["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": known}
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    ending = Tokenizer(folder, 512)
    with pytest.raises(ValueError, match="tokenizer.json: puts a token behind every text"):
        Encoder(ending, "auto")
    assert Encoder(ending, "always")(["a"]) == Encoder(tokenizer, "always")(["a"])


@pytest.mark.fast
def test_the_seam_is_cut_by_the_context_s_own_tokens(tiny):
    _, tokenizer = tiny
    encoder = Encoder(tokenizer)
    encode = lambda text: encoder([text])[0]  # noqa: E731
    split = lambda context, continuation: next(encoder.pairs([(context, continuation)]))  # noqa: E731
    context, continuation = split("the water \n", " was")
    assert unpacked(context).tolist() == encode("the water")
    assert continuation == encode("the water \n was")[len(encode("the water")) :]
    merged = ("the wat", "er and")  # "er" ends in the context's last token
    assert encode("".join(merged))[:3] != encode(merged[0]) and len(encode(merged[0])) == 3
    context, continuation = split(*merged)
    assert (
        unpacked(context).tolist() == encode(merged[0])
        and continuation == encode("".join(merged))[len(encode(merged[0])) :]
    )
    for swallowed in (("th", "e"), ("the", "")):
        with pytest.raises(ValueError, match="item 3, choice 2: this tokenizer leaves .* no token of its own"):
            list(encoder.pairs([("the", " water"), swallowed], ["first", "item 3, choice 2"]))
    for nothing in ("", "  ", "\n\n"):
        assert split(nothing, " a") == (packed([tokenizer.bos]), encode(f"{nothing} a"))
    assert split("", f"{tokenizer.bos_token} a") == (packed([tokenizer.bos]), encode(" a"))
    texts = [(f"context {i}", f" choice {i}") for i in range(2 * score.ENCODED_AT_ONCE // 1000)] * 900
    assert list(encoder.pairs(texts))[-1] == split(*texts[-1])


# The benchmarks, on rows made up for it.
QUESTION = {"question": {"stem": "s", "choices": [{"text": f"t{x}", "label": x} for x in "ABCD"]}, "answerKey": "A"}


def given(tmp_path, monkeypatch, source: Source, rows: list[dict], module, name: str) -> Path:
    """A data folder that holds these rows as the whole split."""
    folder = tmp_path / source.folder
    folder.mkdir(exist_ok=True)
    (folder / source.file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(module, name, Source(source.folder, source.file, source.repository, source.pattern, len(rows)))
    return tmp_path


@pytest.mark.fast
def test_mmlu_prompts(tmp_path, monkeypatch):
    def row(question, answer):
        return {
            "question": question,
            "subject": "high_school_biology",
            "choices": ["a ", "b", "c", "d"],
            "answer": answer,
        }

    data = given(tmp_path, monkeypatch, mmlu.TEST, [row(" What? \n", 2)], mmlu, "TEST")
    given(tmp_path, monkeypatch, mmlu.DEV, [row(f"Q{i}", i % 4) for i in range(6)], mmlu, "DEV")
    header = "The following are multiple choice questions (with answers) about high school biology.\n\n"
    block = "{}\nA. a \nB. b\nC. c\nD. d\nAnswer:"
    (item,) = mmlu.load(data, 0)
    assert item == Item(
        "mmlu_high_school_biology", 0, header + block.format("What?"), ("A", "B", "C", "D"), 2, ("acc",)
    )
    shots = "".join(block.format(f"Q{i}") + " " + "ABCD"[i % 4] + "\n\n" for i in range(5))
    assert mmlu.load(data, 5)[0].context == header + shots + block.format("What?")


@pytest.mark.fast
def test_mmlu_is_summed_over_items_not_over_subjects():
    rows = {
        "mmlu_anatomy": [{"acc": 1.0}] * 3,
        "mmlu_astronomy": [{"acc": 0.0}],
        "mmlu_virology": [{"acc": 0.0}, {"acc": 1.0}],
    }
    found = mmlu.summarize(rows)
    assert (
        found["acc"] == 4 / 6
        and found["categories"]["STEM"]["acc"] == 3 / 4
        and found["categories"]["humanities"] == {"n": 0}
    )
    assert {name: part["n"] for name, part in found["subjects"].items()} == {
        "anatomy": 3,
        "astronomy": 1,
        "virology": 2,
    }
    assert [len(subjects) for subjects in mmlu.CATEGORIES.values()] == [19, 13, 12, 13] and len(mmlu.SUBJECTS) == 57


@pytest.mark.fast
@pytest.mark.parametrize("hub", [False, True])
def test_arc_and_openbookqa_prompts(tmp_path, monkeypatch, hub):
    def row(stem, name, key):
        choices = [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")]
        if hub:
            return {
                name: stem,
                "choices": {"text": [t for t, _ in choices], "label": [n for _, n in choices]},
                "answerKey": key,
            }
        return {"question": {"stem": stem, "choices": [{"text": t, "label": n} for t, n in choices]}, "answerKey": key}

    data = given(tmp_path, monkeypatch, arc_challenge.TEST, [row(" Why? ", "question", "2")], arc_challenge, "TEST")
    assert arc_challenge.load(data) == [
        Item("arc_challenge", 0, "Question:  Why? \nAnswer:", ("one", "two", "three", "four"), 1)
    ]
    given(tmp_path, monkeypatch, openbookqa.TEST, [row("The sun is ", "question_stem", " 3")], openbookqa, "TEST")
    assert openbookqa.load(data) == [Item("openbookqa", 0, "The sun is ", ("one", "two", "three", "four"), 2)]


@pytest.mark.fast
def test_hellaswag_prompts(tmp_path, monkeypatch):
    endings = ["goes [step] on  there.", "b [title] c", " d", "e [x]"]
    rows = [
        {
            "activity_label": "Rowing",
            "ctx_a": "[header] How to row [title] Sit. ",
            "ctx_b": "the Man and Bob",
            "endings": endings,
            "label": "3",
        },
        {"activity_label": "Rowing", "ctx": "A man sits. He looks up. the Man and Bob", "endings": endings, "label": 3},
        {"activity_label": "Rowing", "ctx": "A man sits. He looks up.", "endings": endings, "label": 3},
    ]
    data = given(tmp_path, monkeypatch, hellaswag.VALIDATION, rows, hellaswag, "VALIDATION")
    hub, local, ended = hellaswag.load(data)
    assert hub.context == "Rowing: How to row. Sit. The man and bob"
    assert hub.choices == ("goes on there.", "b. c", "d", "e ") and hub.gold == 3
    assert local.context == "Rowing: A man sits. He looks up. The man and bob"
    assert ended.context == "Rowing: A man sits. He looks up."


@pytest.mark.fast
@pytest.mark.parametrize(
    "options, found",
    [
        (
            "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these",
            ("38", "27.675", "30", "data inadequate", "none of these"),
        ),
        ("a ) 1 , b ) 3 , 4 , c ) 5 , d ) 6 , e ) 7 , 8", ("1", "3", "5", "6", "7 , 8")),
        ("['a ) 24', 'b ) 120', 'c ) 625', 'd ) 720', 'e ) 1024']", ("24'", "120'", "625'", "720'", "1024']")),
    ],
)
def test_mathqa_options(options, found):
    assert mathqa.choices(options) == found


@pytest.mark.fast
def test_truthfulqa_prompts(tmp_path, monkeypatch):
    rows = [{"question": "Why? ", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "c": 1, "b": 0}},
            {"question": "How?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
             "mc2_targets": {"choices": ["b", "a"], "labels": [0, 1]}}]  # fmt: skip
    data = given(tmp_path, monkeypatch, truthfulqa.CHOICE, rows, truthfulqa, "CHOICE")
    one, two, _, four = truthfulqa.load_choice(data)
    assert one.context == two.context == truthfulqa.PRIMER + "\n\nQ: Why? \nA:" and (one.choices, one.gold) == (
        ("a", "b"),
        0,
    )
    assert two.gold == (1, 1, 0) and four.choices == ("b", "a") and four.gold == (0, 1)
    for wrong in ({"a": 0, "b": 0}, {"choices": ["a"], "labels": [1, 0]}, {}, {"b": 0, "a": 1}):
        given(tmp_path, monkeypatch, truthfulqa.CHOICE, [rows[0] | {"mc1_targets": wrong}], truthfulqa, "CHOICE")
        with pytest.raises(
            ValueError, match=r"mc_task\.json:1: mc1_targets: (expected answers|the right answer is number 2)"
        ):
            truthfulqa.load_choice(data)
    assert truthfulqa.PRIMER.startswith("Q: What is human life expectancy in the United States?\nA: Human")
    assert truthfulqa.PRIMER.endswith(
        "\n\nQ: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain."
    )


@needs_data
def test_the_whole_test_sets_are_read():
    counts = {
        name: len(BENCHMARKS[name].load(DATA))
        for name in ("mmlu", "mathqa", "arc_challenge", "openbookqa", "hellaswag", "truthfulqa_mc")
    }
    assert counts == {
        "mmlu": 14042,
        "mathqa": 2985,
        "arc_challenge": 1172,
        "openbookqa": 500,
        "hellaswag": 10042,
        "truthfulqa_mc": 2 * 817,
    }


# Generation.


def attended_one_by_one(lengths, tokens, q, k, v):
    """(B, T, H, hd) queries, (B, T, K, hd) keys and values of whole texts, read as prompts of these lengths and then a
    token at a time -> (B, H, tokens, hd), in their type and on their device."""
    rows = lambda x: torch.cat([row[:n] for row, n in zip(x, lengths)]).transpose(0, 1)[None]  # noqa: E731
    cache, out = Cached(lengths, max(lengths) + tokens, q.device), []
    cache.attend(rows(q), rows(k), rows(v))
    for n in range(tokens):
        position = torch.tensor(lengths, device=q.device) + n
        cache.grow(position)
        last = [torch.stack([row[at] for row, at in zip(x, position)]).unsqueeze(2) for x in (q, k, v)]
        out.append(cache.attend(*last))
    return torch.cat(out, 2)


@pytest.mark.fast
def test_a_token_attends_to_all_before_it_and_to_itself_however_the_cache_grows():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 140, 6, 8), torch.randn(3, 140, 2, 8), torch.randn(3, 140, 2, 8)
    lengths, tokens = [2, 125, 60], 8  # 128 slots are full after three tokens
    found = attended_one_by_one(lengths, tokens, q, k, v)
    for row, n in enumerate(lengths):
        text = [x[row : row + 1, : n + tokens].transpose(1, 2) for x in (q, k, v)]
        expected = Packed([n + tokens]).attend(*text)[0, :, n:]
        assert torch.allclose(found[row], expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its attention under a mask")
def test_on_a_gpu_a_token_attends_to_the_same():
    torch.manual_seed(0)
    lengths, tokens = [2, 125, 60], 8
    for heads in (24, 32):
        q, k, v = torch.randn(3, 140, heads, 128), torch.randn(3, 140, 8, 128), torch.randn(3, 140, 8, 128)
        expected = attended_one_by_one(lengths, tokens, q, k, v)
        for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            found = attended_one_by_one(lengths, tokens, *(x.to("cuda", dtype) for x in (q, k, v)))
            assert (found.float().cpu() - expected).abs().max() < most


@pytest.mark.fast
def test_batches_of_any_size_write_the_same_and_stop_at_their_strings(tiny):
    model, tokenizer = tiny
    encoder = Encoder(tokenizer)
    texts = ["Once upon", "The water in the pool was", "Why is the sea salt?", "a", "He said that it's what " * 9]
    free = respond(model, encoder, [(text, 12, ()) for text in texts], ())
    stop = next(character for character in free[1] if character.strip())
    prompts = [(text, 12 - 5 * (i == 0), (stop,) * (i % 2)) for i, text in enumerate(texts)]
    one_by_one = [respond(model, encoder, [prompt], ())[0] for prompt in prompts]
    for cached_tokens in (1, 300, 10_000):
        assert respond(model, encoder, prompts, (), cached_tokens=cached_tokens) == one_by_one
    assert one_by_one[1:] == [trimmed(text, (stop,) * (i % 2)) for i, text in enumerate(free)][1:]
    assert free[0].startswith(one_by_one[0]) and len(one_by_one[0]) < len(free[0]) and len({*one_by_one}) > 3


@pytest.mark.fast
def test_rows_that_have_ended_leave_the_batch_and_change_no_other(tiny):
    model, _ = tiny
    prompts = [[3 + i, 40, 7 * i % 300] for i in range(8)]
    limits = {tuple(generate(model, [p], 10)[0][:n]) for n, p in zip((1, 1, 2, 2, 2, 3, 9, 10), prompts)}
    seen = []

    def ended(new):
        seen.append(len(new))
        return tuple(new) in limits

    found = generate(model, prompts, 10, ended=ended)
    assert found == [generate(model, [p], 10, ended=lambda new: tuple(new) in limits)[0] for p in prompts]
    assert len({len(row) for row in found}) > 2
    assert len(seen) == sum(map(len, found)), "one that has ended is asked no more"


@pytest.mark.fast
def test_stop_strings_are_found_across_tokens():
    pieces = {0: "a", 1: "\n", 2: "\nb", 3: "END", 4: " of"}

    ended = partial(stopped, decode=lambda ids: "".join(pieces[i] for i in ids))
    assert ended([0, 1, 2], ("\n\n",)) and not ended([0, 1, 0, 2], ("\n\n",)) and not ended([0, 1, 2], ())
    assert ended([0] * 30 + [3, 4], ("x", "END of")) and not ended([3, 0, 4], ("END of",))
    assert trimmed("one. two", (".", "e", "")) == "on"
    assert trimmed("\n\nrest", ("\n\n",)) == ""


@pytest.mark.fast
def test_prompts_are_cut_from_the_left_to_leave_room(tiny):
    model, tokenizer = tiny
    encoder = Encoder(tokenizer)
    text = "the water in the pool was warm and " * 9
    kept = encoder([text])[0][-(64 - 40) :]
    (expected,) = generate(model, [kept], 40)
    assert respond(model, encoder, [(text, 40, ())], ()) == [
        trimmed(tokenizer.decode(expected), (tokenizer.end_token,))
    ]
    with pytest.raises(ValueError, match="up to 64 new tokens leave no room for a prompt in this model's window of 64"):
        respond(model, encoder, [("a", 64, ())], ())


@pytest.mark.fast
def test_what_ends_a_text_is_the_generation_config_s(tmp_path, tiny):
    _, tokenizer = tiny
    assert end_tokens(tmp_path, tokenizer) == (tokenizer.end,)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    assert end_tokens(tmp_path, tokenizer) == (5, 6)
    path.write_text(json.dumps({"repetition_penalty": 1.2}))
    with pytest.raises(ValueError, match="repetition_penalty is 1.2"):
        end_tokens(tmp_path, tokenizer)


# The command, on the real files.


def run(
    *flags: str, cwd: Path, program: tuple[str, ...] = ("-m", "eval"), ranks: int = 0
) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if program[0] != "-m":
        del environment["PYTHONPATH"]
    command = [sys.executable, *launch, *program, *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Calls the command in this process, in a folder of the test's own; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eval", *flags])
        command.main()
        return capsys.readouterr().out

    return call


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@needs_data
def test_the_command_scores_resumes_and_changes_nothing_that_it_has(tmp_path, here, capsys):
    flags = ("--model", str(BASE), "--data", str(DATA), "--limit", "2", "--samples", "items.jsonl")
    first = run("--tasks", "arc_challenge,mmlu", *flags, cwd=tmp_path, program=(str(ROOT / "eval"),))
    assert first.returncode == 0, first.stderr
    assert re.search(r"^arc_challenge +2 +\d+\.\d +\d+\.\d +acc \d+\.\d\d ± \d+\.\d\d, acc_norm", first.stdout, re.M)
    assert "3.4M parameters in bfloat16" in first.stdout and "results go to eval-base-limit-2.json" in first.stdout
    before = json.loads((tmp_path / "eval-base-limit-2.json").read_text())
    assert before["tasks"]["mmlu"]["n"] == 2 * 57 and len(before["tasks"]["mmlu"]["subjects"]) == 57
    assert before["tasks"]["mmlu"]["made"]["versions"]["torch"] == torch.__version__
    assert before["tasks"]["mmlu"]["made"]["samples"] == str(tmp_path / "items.mmlu.jsonl")
    kept = {name: (tmp_path / f"items.{name}.jsonl").read_bytes() for name in ("arc_challenge", "mmlu")}
    assert "already has arc_challenge\n" in here("--tasks", "arc_challenge,openbookqa", *flags)
    after = json.loads((tmp_path / "eval-base-limit-2.json").read_text())
    assert after["tasks"].pop("openbookqa")["n"] == 2 and after == before
    assert kept == {name: (tmp_path / f"items.{name}.jsonl").read_bytes() for name in kept}
    files = {f"items.{name}.jsonl": 2 * (57 if name == "mmlu" else 1) for name in (*kept, "openbookqa")}
    here_now = {path.name for path in tmp_path.iterdir()} - {".eval-base-limit-2.json.lock"}  # with an older filelock
    assert here_now == {"eval-base-limit-2.json", *files}
    assert {name: len(json_lines(tmp_path / name)) for name in files} == files
    row = json_lines(tmp_path / "items.arc_challenge.jsonl")[0]
    asked = {"task", "doc_id", "prompt", "gold", "continuations"}
    assert row.keys() == asked | {"loglikelihoods", "greedy", "metrics"} and row["prompt"].startswith("Question: ")
    assert all(choice.startswith(" ") for choice in row["continuations"])
    table.main(["eval-base-limit-2.json"])
    assert "| base | as given | 1 |" in capsys.readouterr().out


@needs_data
def test_two_ranks_give_one_process_s_results(tmp_path, here):
    pytest.importorskip("sacrebleu", reason='scores generations with sacrebleu: pip install -e ".[harness]"')
    pytest.importorskip("rouge_score", reason='scores generations with rouge-score: pip install -e ".[harness]"')
    flags = ("--model", str(BASE), "--data", str(DATA), "--limit", "5", "--dtype", "float32")
    flags += ("--tasks", "arc_challenge,truthfulqa_mc,truthfulqa_gen,openbookqa")
    here(*flags, "--out", "0.json", "--samples", "0.jsonl")
    done = run(*flags, "--out", "2.json", "--samples", "2.jsonl", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    found = []
    for ranks in (0, 2):
        lines = [line for path in sorted(tmp_path.glob(f"{ranks}.*.jsonl")) for line in json_lines(path)]
        values = [line.pop("loglikelihoods", []) for line in lines]
        metrics = [list(line.pop("metrics").values()) for line in lines]
        tasks = json.loads((tmp_path / f"{ranks}.json").read_text())["tasks"]
        found.append((lines, list(tasks), values + metrics))
    assert found[0][:2] == found[1][:2], "same items, in the same order, with the same answers"
    for one, two in zip(found[0][2], found[1][2], strict=True):
        assert one == pytest.approx(two, abs=1e-4)


# Bad input: one line, before the model is read.


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the command; returns its one line of complaint. Reading weights would be a failure of its own."""

    def read_weights(*args, **kwargs):
        raise AssertionError("the model was read before the mistake was found")

    monkeypatch.setattr(Llama, "from_pretrained", read_weights)
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eval", *flags])
        with pytest.raises(SystemExit) as e:
            command.main()
        assert isinstance(e.value.code, str) and "\n" not in e.value.code
        return e.value.code

    return call


@pytest.mark.fast
def test_unknown_tasks_are_refused_with_the_nearest_names(refused):
    assert refused("--model", "m", "--tasks", "helaswag") == "error: --tasks helaswag: no such task; nearest: hellaswag"
    assert "nearest: truthfulqa_mc, truthfulqa_gen" in refused("--model", "m", "--tasks", "mmlu,truthfulqa")
    assert "names no task" in refused("--model", "m", "--tasks", ",")
    assert "--limit 0" in refused("--model", "m", "--limit", "0")
    assert task_names("MMLU, ifeval,mmlu") == ["mmlu", "ifeval"] and len(task_names("all")) == 9


@pytest.mark.fast
def test_missing_truncated_and_foreign_files_are_refused(refused, tmp_path):
    flags = ("--model", str(BASE), "--tasks", "openbookqa", "--data", "d")
    assert "d: no such folder" in refused(*flags)
    folder = tmp_path / "d" / "openbookqa"
    folder.mkdir(parents=True)
    told = refused(*flags)
    assert "openbookqa: no test.jsonl" in told and "python -m eval.download --tasks openbookqa --to d" in told
    row = QUESTION
    whole = "".join(json.dumps(row) + "\n" for _ in range(500))
    (folder / "test.jsonl").write_text(whole[: len(whole) // 2 + 9])
    assert "test.jsonl:" in refused(*flags) and "not JSON" in refused(*flags)
    (folder / "test.jsonl").write_text("".join(line + "\n" for line in whole.split("\n")[:300]))
    assert "300 rows, but the benchmark has 500" in refused(*flags)
    (folder / "test.jsonl").unlink()
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(whole.encode())[:-20])
    assert "test.jsonl.gz: a damaged gzip file" in refused(*flags)
    (folder / "test.jsonl.gz").unlink()
    for wrong, said in (
        ({"prompt": "x"}, "expected choices (dict), but the row has prompt"),
        (row | {"answerKey": "E"}, "answerKey is 'E', expected one of A"),
        (row | {"question": {"stem": 3, "choices": row["question"]["choices"]}}, "expected stem (str), but it is 3"),
        (row | {"question": {"stem": "s", "choices": ["t"]}}, "expected text (str)"),
    ):
        (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [row] * 499 + [wrong]))
        assert said in (told := refused(*flags)) and "test.jsonl:500" in told


@pytest.mark.fast
def test_a_model_folder_without_tokenizer_or_another_model_s_results_are_refused(refused, tmp_path, monkeypatch):
    row = QUESTION
    data = given(tmp_path, monkeypatch, openbookqa.TEST, [row], openbookqa, "TEST")
    flags = ("--tasks", "openbookqa", "--data", str(data))
    bare = tiny_folder(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "no tokenizer.json here" in refused("--model", str(bare), *flags)
    assert "no such folder" in refused("--model", "./nowhere", *flags)
    about = {"model": "m", "fingerprint": results.fingerprint(BASE), "tasks": {}}
    about["settings"] = {"bos": "never", "dtype": "bfloat16", "limit": None}
    (tmp_path / "r.json").write_text(json.dumps(about | {"fingerprint": "other"}))
    assert "holds another model's results (m)" in refused("--model", str(BASE), *flags, "--out", "r.json")
    (tmp_path / "r.json").write_text(json.dumps(about))
    told = refused("--model", str(BASE), *flags, "--out", "r.json", "--bos", "always")
    assert "holds results with bos never, now always" in told
    (tmp_path / "r.json").write_text("{")
    assert "r.json: not readable as JSON" in refused("--model", str(BASE), *flags, "--out", "r.json")
    (tmp_path / "r.json").write_text(json.dumps({"tasks": 3}))
    assert "r.json: not a result" in refused("--model", str(BASE), *flags, "--out", "r.json")
    for out in ("x", "x.openbookqa"):
        assert "also --samples" in refused("--model", str(BASE), *flags, "--out", out, "--samples", "./x")
    assert "a folder" in refused("--model", str(BASE), *flags, "--out", "bare")
    bare.rename(tmp_path / "model")
    assert f"its model is {tmp_path / 'model'}" in refused("--model", str(tmp_path), *flags)


@pytest.mark.fast
def test_samples_are_never_written_over_another_file(refused, tmp_path, monkeypatch):
    row = QUESTION
    data = given(tmp_path, monkeypatch, openbookqa.TEST, [row], openbookqa, "TEST")
    flags = ("--model", str(BASE), "--tasks", "openbookqa", "--data", str(data), "--samples", "s.jsonl")
    (tmp_path / "s.openbookqa.jsonl").write_text("mine\n")
    assert "s.openbookqa.jsonl: exists; choose another --samples" in refused(*flags, "--out", "new/e.json")
    about = {"model": "m", "fingerprint": results.fingerprint(BASE)}
    about["settings"] = {"bos": "never", "dtype": "bfloat16", "limit": None}
    for made in ({}, {"samples": str(tmp_path / "t.openbookqa.jsonl")}):
        (tmp_path / "r.json").write_text(json.dumps(about | {"tasks": {"openbookqa": {"n": 1, "made": made}}}))
        assert "r.json: has openbookqa without" in refused(*flags, "--out", "r.json")
    (tmp_path / "r.json").write_text(json.dumps(about | {"tasks": {"mmlu": {"n": 1}}}))
    assert "s.openbookqa.jsonl: exists" in refused(*flags, "--out", "r.json")
    assert (tmp_path / "s.openbookqa.jsonl").read_text() == "mine\n"


@pytest.mark.fast
def test_odd_fields_are_refused_where_they_stand(tmp_path):
    assert Row("f:1", {"correct": "c"}).index("correct", tuple("abcde")) == 2
    with pytest.raises(ValueError, match="f:1: correct is 'bc', expected one of a, b"):
        Row("f:1", {"correct": "bc"}).index("correct", tuple("abcde"))
    for wrong in (
        {"labels": [1, 0]},
        {"choices": ["a", "b"]},
        {"choices": ["a"], "labels": None},
        {"choices": 3, "labels": [1]},
        {"a": [1]},
    ):
        with pytest.raises(ValueError, match="^f:1: mc1_targets: expected "):
            truthfulqa.targets(Row("f:1", {"mc1_targets": wrong}), "mc1_targets")
    path = tmp_path / "a.csv"
    path.write_text('Question\n"' + "x" * 200_000)
    with pytest.raises(ValueError, match="a.csv: not CSV .*quotation mark"):
        read_file(path)


def test_ifeval_is_refused_a_window_it_cannot_answer_in(refused, tmp_path):
    pytest.importorskip(
        "lm_eval", reason="IFEval's checks are the lm-evaluation-harness's: pip install -e \".[harness]\""
    )
    if not (DATA / "ifeval").is_dir():
        pytest.skip(f"needs the benchmarks in {DATA} (SFTGO_SHARED)")
    folder = tiny_folder(tmp_path / "tiny", max_position_embeddings=1024)
    told = refused("--model", str(folder), "--tasks", "ifeval", "--data", str(DATA))
    assert "ifeval: up to 1,280 new tokens leave no room" in told


@needs_data
def test_what_stops_one_rank_stops_both(tmp_path):
    wrong = run("--model", str(BASE), "--tasks", "mmlu", "--data", "nowhere", cwd=tmp_path, ranks=2)
    assert wrong.returncode != 0 and wrong.stderr.count("nowhere: no such folder") == 1, "rank 0 reports for all"
    bare = tiny_folder(tmp_path / "bare")
    (bare / "model.safetensors").write_bytes(b"no tensors")
    done = run(
        "--model", str(bare), "--data", str(DATA), "--tasks", "openbookqa", "--limit", "2", cwd=tmp_path, ranks=2
    )
    assert done.returncode != 0 and "model.safetensors: a damaged safetensors file" in done.stderr


def put_empty(data: Path, benchmark: str) -> None:
    for source in BENCHMARKS[benchmark].sources:
        (data / source.folder).mkdir(parents=True)
        (data / source.folder / source.file).touch()


@pytest.mark.parametrize(
    "benchmark, package, said",
    [("truthfulqa_gen", "sacrebleu", "sacrebleu"), ("ifeval", "langdetect", "lm-evaluation-harness")],
)
def test_a_missing_extra_is_named_with_its_command(refused, tmp_path, benchmark, package, said, monkeypatch):
    put_empty(tmp_path / "d", benchmark)
    from eval import ifeval

    ifeval.checks.cache_clear(), truthfulqa.metrics.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    told = refused("--model", str(BASE), "--tasks", benchmark, "--data", "d")
    assert said in told and 'pip install -e ".[harness]"' in told
    assert "or score the others: --tasks mmlu,mmlu_5shot" in told


def test_missing_punkt_tab_is_said_with_the_command_that_fetches_it(refused, tmp_path, monkeypatch):
    put_empty(tmp_path / "d", "ifeval")
    nltk = pytest.importorskip("nltk", reason='IFEval splits sentences with nltk: pip install -e ".[harness]"')
    pytest.importorskip("langdetect", reason='IFEval guesses languages with langdetect: pip install -e ".[harness]"')
    from eval import ifeval

    ifeval.checks.cache_clear()
    monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
    told = refused("--model", str(BASE), "--tasks", "ifeval", "--data", "d")
    assert "python -m nltk.downloader punkt_tab" in told


# What other people's files, models and data do.


def changed(tmp_path, factor: float, name="model") -> Path:
    """demo/base with the weight of its last norm multiplied."""
    folder = tmp_path / name
    shutil.copytree(BASE, folder)
    tensors = load_file(BASE / "model.safetensors")
    tensors["model.norm.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.fast
@pytest.mark.parametrize(
    "nats", [[-800.0, -801.0, -802.0], [-5.0, -6.0, -7.0], [-1e30, -1e30, -2e30], [0.0, -1e4, -1e5]]
)
def test_mc2_is_finite_however_unlikely_all_answers_are(nats):
    item = Item("truthfulqa_mc2", 0, "Q", ("a", "b", "c"), (1, 0, 0), ("acc",))
    p = np.exp(np.array(nats) - max(nats))
    assert item.score(np.array(nats))["acc"] == pytest.approx(p[0] / p.sum(), rel=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_token_is_told_from_logits_that_are_not_finite(odd, temperature):
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, odd, 0.0], [50.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, temperature, 0.5, generator).tolist() == [1, -1, 0]


@pytest.mark.fast
def test_a_model_of_nan_writes_nothing(tiny):
    model, tokenizer = tiny
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"logits are not finite \(prompt 1, new token 1\)"):
            generate(broken, [[3, 4], [5]], 4, temperature)
    with pytest.raises(ValueError, match="^ifeval: the model's logits are not finite"):
        respond(broken, Encoder(tokenizer), [("a", 4, ())], (), name="ifeval")


@pytest.mark.fast
def test_a_sequence_that_has_ended_may_turn_to_nan(tiny):
    class Late(torch.nn.Module):
        """The head of a model, nan for row 0 from the second token on."""

        def __init__(self, head):
            super().__init__()
            self.weight, self.calls = head.weight, 0

        def forward(self, hidden):
            logits = hidden @ self.weight.T
            self.calls += 1
            logits[0] = float("nan") if self.calls > 1 and len(logits) == 3 else logits[0]
            return logits

    model, _ = tiny
    prompts, broken = [[3], [4], [5]], copy.deepcopy(model)
    broken.lm_head = Late(model.lm_head)
    first = generate(model, prompts[:1], 1)[0]
    ended = lambda new: new == first and len(new) == 1  # noqa: E731
    found = generate(broken, prompts, 3, ended=ended)
    assert found == generate(model, prompts, 3, ended=ended) and len(found[0]) == 1


@pytest.mark.fast
@pytest.mark.parametrize("stop", ["問題：", "سۇئال:", "प्रश्न:", "\n\n", "👩‍👩‍👧", "é\u0301x"])
def test_stop_strings_are_found_where_every_token_is_a_byte(stop):
    decode = lambda ids: bytes(ids).decode(errors="replace")  # noqa: E731
    ids = list(f"Yes, {'ß' * 30} {stop}".encode())
    assert [stopped(ids[:i], (stop, "never"), decode) for i in range(len(ids) + 1)] == [False] * len(ids) + [True]


@pytest.mark.fast
def test_neutral_settings_are_greedy_and_others_are_named(tmp_path, tiny):
    neutral = {"num_beams": 1, "do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "length_penalty": 2.0}
    neutral |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "bad_words_ids": []}
    assert not_greedy(neutral | {"early_stopping": True, "diversity_penalty": 0.0, "forced_bos_token_id": None}) == []
    odd = {"num_beams": 4, "min_new_tokens": 5, "suppress_tokens": [3], "repetition_penalty": 1.1, "penalty_alpha": 0.6}
    assert sorted(not_greedy(neutral | odd)) == sorted(odd)
    for name, value in odd.items():
        (tmp_path / "generation_config.json").write_text(json.dumps(neutral | {name: value}))
        with pytest.raises(ValueError, match=f"{name} is .*plain greedy"):
            end_tokens(tmp_path, tiny[1])


@pytest.mark.fast
@pytest.mark.parametrize(
    "change, said",
    [
        ({"stem": "half \ud83d"}, r"question.stem holds \ud83d, half of a surrogate pair"),
        ({"choices": [{"text": "\udc00 x", "label": x} for x in "ABCD"]}, r"question.choices[0].text holds \udc00"),
        ({"\ud83d": 1}, r"a name in question holds \ud83d"),
        ({"choices": [{"text": x, "label": x} for x in "ABC"]}, "3 choices, expected 4"),
        ({"choices": [{"text": x, "label": x} for x in "ABCDE"]}, "5 choices, expected 4"),
        ({"choices": [{"text": x, "label": x} for x in "AABC"]}, "one label twice among A, A, B, C"),
        ({"choices": [{"text": x.strip("B"), "label": x} for x in "ABCD"]}, "choice 1 of 4 is empty"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_with_its_line(tmp_path, monkeypatch, change, said):
    rows = [QUESTION, QUESTION | {"question": QUESTION["question"] | change}]
    data = given(tmp_path, monkeypatch, openbookqa.TEST, rows, openbookqa, "TEST")
    with pytest.raises(ValueError, match=re.escape(f"test.jsonl:2: {said}")):
        openbookqa.load(data)


@pytest.mark.fast
def test_other_benchmarks_count_their_choices_too(tmp_path, monkeypatch):
    row = {"activity_label": "Row", "ctx": "A man sits.", "endings": ["a", "b", "c"], "label": 0}
    data = given(tmp_path, monkeypatch, hellaswag.VALIDATION, [row], hellaswag, "VALIDATION")
    with pytest.raises(ValueError, match="hellaswag_val.jsonl:1: 3 choices, expected 4"):
        hellaswag.load(data)
    given(
        tmp_path,
        monkeypatch,
        hellaswag.VALIDATION,
        [row | {"endings": ["a", "b", "[x]", "d"]}],
        hellaswag,
        "VALIDATION",
    )
    with pytest.raises(ValueError, match="choice 2 of 4 is empty"):
        hellaswag.load(data)
    two = {"question": {"stem": "s", "choices": QUESTION["question"]["choices"][:2]}, "answerKey": "A"}
    given(tmp_path, monkeypatch, arc_challenge.TEST, [two], arc_challenge, "TEST")
    with pytest.raises(ValueError, match="2 choices, expected 3 or 4 or 5"):
        arc_challenge.load(data)
    with pytest.raises(ValueError, match="f:1: mc2_targets: expected answers, each with a label 0 or 1, and both"):
        truthfulqa.targets(Row("f:1", {"mc2_targets": {"a": 1, "b": 1}}), "mc2_targets")


@needs_data
@pytest.mark.parametrize("place", ["data/{0}", "{0}"])
def test_mmlu_is_read_as_it_was_released(tmp_path, place):
    for split, source in (("test", mmlu.TEST), ("dev", mmlu.DEV)):
        folder = tmp_path / "mmlu" / place.format(split)
        folder.mkdir(parents=True)
        for subject, rows in mmlu.by_subject(source.read(DATA)).items():
            with open(folder / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as f:
                lines = [[x.get("question"), *x.strings("choices"), "ABCD"[int(x.fields["answer"])]] for x in rows]
                csv.writer(f).writerows(lines)
    assert BENCHMARKS["mmlu_5shot"].load(tmp_path) == BENCHMARKS["mmlu_5shot"].load(DATA)
    (folder / "anatomy_dev.csv").write_text('Which?,a,b,c,d,"A",more\n')
    with pytest.raises(ValueError, match=r"abstract_algebra_dev.csv and 56 more: 281 rows.*has 285"):
        mmlu.DEV.read(tmp_path)
    with pytest.raises(ValueError, match=r"anatomy_dev.csv: row 1: 7 cells, expected question"):
        mmlu.adapted(read_file(folder / "anatomy_dev.csv", mmlu.CSV)[0])
    (folder / "anatomy_dev.csv").write_text("Which?,a,b,c,A\n")
    with pytest.raises(ValueError, match=r"anatomy_dev.csv: row 1: answer is 'None'"):
        mmlu.adapted(read_file(folder / "anatomy_dev.csv", mmlu.CSV)[0])


@pytest.mark.fast
@pytest.mark.parametrize("source", [truthfulqa.CHOICE, truthfulqa.ANSWERS])
def test_truthfulqa_s_newer_release_is_called_by_its_name(tmp_path, source):
    (tmp_path / "truthfulqa").mkdir()
    head, row = ("Question,Best Answer\n", "q,a\n") if source.file.endswith(".csv") else ("", '{"question": "q"}\n')
    (tmp_path / "truthfulqa" / source.file).write_text(head + 790 * row)
    with pytest.raises(
        ValueError, match=r"790 rows, but the benchmark has 817; this is the release of 2025; .*Move it"
    ):
        source.read(tmp_path)


@pytest.mark.fast
def test_one_command_fetches_all_that_is_missing(refused, tmp_path):
    told = refused("--model", "m", "--tasks", "openbookqa,mmlu_5shot,truthfulqa_mc", "--data", "no where")
    command = "python -m eval.download --tasks openbookqa,mmlu_5shot,truthfulqa_mc --to 'no where'"
    assert "no where: no such folder" in told and told.endswith(command)
    put_empty(tmp_path / "d", "openbookqa")
    told = refused("--model", "m", "--tasks", "openbookqa,mmlu_5shot,hellaswag", "--data", "d")
    assert "d/mmlu: no dev.jsonl" in told and told.endswith("eval.download --tasks mmlu_5shot,hellaswag --to d")


@pytest.mark.fast
@pytest.mark.parametrize(
    "flags, said",
    [
        (["--modle", "x"], "required: --model; no flag --modle; nearest: --model"),
        (["--model", "x", "--task", "mmlu"], "unrecognized arguments: --task mmlu; nearest: --tasks"),
        (["--model", "x", "--sample=s.jsonl"], "--sample=s.jsonl; nearest: --samples"),
        (["--model", "x", "--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flags, said, capsys):
    with pytest.raises(SystemExit):
        command.parse_args(flags)
    assert said in capsys.readouterr().err


@pytest.fixture
def about(tmp_path):
    """The results of a model before its first task."""
    settings = {"bos": "never", "dtype": "bfloat16", "limit": None}
    return lambda print: {"model": "m", "fingerprint": print, "run": None, "settings": settings, "tasks": {}}


def summary(n: int) -> dict:
    return {"n": n, "made": {}}


@pytest.mark.fast
def test_commands_at_once_lose_nothing_of_each_other(tmp_path, about, capsys):
    out, mine, theirs, other = tmp_path / "r.json", about("f"), about("f"), about("another")
    assert results.record(out, mine, "mmlu", summary(1), None, []) == out
    assert results.record(out, theirs, "mathqa", summary(2), None, []) == out
    samples = tmp_path / "s.jsonl"
    assert results.record(out, mine, "mathqa", summary(3), samples, [{"x": 1}]) == out and not samples.exists()
    assert "another command has written mathqa" in capsys.readouterr().out
    kept = results.read(out)["tasks"]
    assert {name: x["n"] for name, x in kept.items()} == {"mmlu": 1, "mathqa": 2}
    second = results.record(out, other, "ifeval", summary(4), None, [])
    assert second == tmp_path / "r-2.json" and "results go to" in capsys.readouterr().out
    assert results.read(out)["tasks"] == kept and [*results.read(second)["tasks"]] == ["ifeval"]
    with ThreadPoolExecutor(8) as pool:
        write = lambda i: results.record(tmp_path / "many.json", about("f"), f"t{i}", summary(i), None, [])  # noqa: E731
        list(pool.map(write, range(16)))
    assert len(results.read(tmp_path / "many.json")["tasks"]) == 16


@pytest.mark.fast
def test_samples_belong_to_their_results_by_content(tmp_path, about):
    out, mine, path = tmp_path / "r.json", about("f"), tmp_path / "s.mmlu.jsonl"
    path.write_text("of another command, made since\n")
    results.record(out, mine, "mmlu", summary(1), path, [{"x": 1}])
    assert path.read_text() == "of another command, made since\n"
    written = tmp_path / "s.mmlu-2.jsonl"
    assert written.read_text() == '{"x": 1}\n' and mine["tasks"]["mmlu"]["made"]["samples"] == str(written)
    assert results.earlier(out, about("f"), {"mmlu": written})["tasks"].keys() == {"mmlu"}
    moved = written.rename(tmp_path / "moved.jsonl")
    assert results.earlier(out, about("f"), {"mmlu": moved})["tasks"].keys() == {"mmlu"}
    for wrong in (path, written):
        with pytest.raises(ValueError, match="has mmlu without"):
            results.earlier(out, about("f"), {"mmlu": wrong})
    moved.write_text('{"x": 2}\n')
    with pytest.raises(ValueError, match="has mmlu without"):
        results.earlier(out, about("f"), {"mmlu": moved})
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.record(out, mine, "mathqa", summary(1), tmp_path / "n.jsonl", [{"x": float("nan")}])


@pytest.mark.fast
def test_a_try_has_a_results_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = lambda *flags: command.paths(command.parse_args(["--model", str(BASE), *flags]))[0].name  # noqa: E731
    assert name() == "eval-base.json" and name("--limit", "60") == "eval-base-limit-60.json"
    assert name("--limit", "60", "--out", "r.json") == "r.json"
    run = tmp_path / "run"
    shutil.copytree(BASE, run / "model")
    (run / "config.json").write_text(json.dumps({"config": {"seed": 0}}))
    found = command.paths(command.parse_args(["--model", str(run / "model"), "--limit", "5"]))[0]
    assert found == run / "eval-limit-5.json"


@needs_data
def test_responses_outlive_a_judge_that_breaks(tmp_path, here, monkeypatch):
    pytest.importorskip("rouge_score", reason='scores generations with rouge-score: pip install -e ".[harness]"')
    pytest.importorskip("sacrebleu", reason='scores generations with sacrebleu: pip install -e ".[harness]"')
    flags = ("--model", str(BASE), "--data", str(DATA), "--limit", "2", "--tasks", "truthfulqa_gen", "--out", "r.json")
    judge = truthfulqa.judge

    def breaks(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(truthfulqa, "judge", breaks)
    with pytest.raises(ZeroDivisionError):
        here(*flags)
    (kept,) = tmp_path.glob("r.truthfulqa_gen-*.responses.json")
    responses = json.loads(kept.read_text())["responses"]
    monkeypatch.setattr(truthfulqa, "judge", judge)
    monkeypatch.setattr("eval.generate.respond", lambda *args, **kwargs: pytest.fail("written a second time"))
    assert f"truthfulqa_gen: judging the responses in {kept.name}" in here(*flags, "--samples", "s.jsonl")
    assert [row["response"] for row in json_lines(tmp_path / "s.truthfulqa_gen.jsonl")] == responses
    assert not kept.exists()


def test_an_answer_that_a_measure_fails_on_counts_as_wrong_and_is_counted(monkeypatch):
    pytest.importorskip("sacrebleu")
    real, true = truthfulqa.measure, "The sea is salt and wide."
    monkeypatch.setattr(truthfulqa, "measure", lambda a, r: real(a, r) if a != "deep" else 1 / 0)
    rows = [truthfulqa.judge([true], ["Nobody knows what it is."], answer) for answer in ("deep", true)]
    found = truthfulqa.summarize_answers({"truthfulqa_gen": rows})
    assert found["checks_failed"] == 1 and found["n"] == 2 and found["bleu_acc"] == found["rouge1_acc"] == 0.5
    assert "1 responses broke a check" in results.line("truthfulqa_gen", 2, found, 1.0)


@needs_data
def test_a_check_that_breaks_on_one_response_is_not_followed_and_counted(monkeypatch):
    pytest.importorskip("lm_eval", reason="IFEval's checks are the lm-evaluation-harness's")
    from eval import ifeval

    prompts = [p for p in ifeval.load(DATA) if "detectable_format:json_format" in p.judge.args[1]][:2]
    place = prompts[0].judge.args[1].index("detectable_format:json_format")
    deep = prompts[0].judge("[" * 100_000)
    assert deep["inst_level_strict_acc"][place] is False and deep["checks_failed"] == 1
    for text in ("", "{", '{"a": ' * 50_000, "```json\n" + "[" * 100_000):
        assert prompts[0].judge(text)["inst_level_loose_acc"][place] is False
    good = prompts[1].judge('{"a": 1}')
    assert "checks_failed" not in good
    found = BENCHMARKS["ifeval"].summarize({"ifeval": [deep, good]})
    assert found["checks_failed"] == 1 and "1 responses broke a check" in results.line("ifeval", 2, found, 1.0)

    class Odd:
        def check_following(self, text):
            raise KeyError(text)

    failed = []
    assert ifeval.holds(Odd(), ["a", "", "b"], failed) is False and len(failed) == 2


@needs_data
def test_ifeval_s_arguments_are_tried_when_they_are_read(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="IFEval's checks are the lm-evaluation-harness's")
    from eval import ifeval

    row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"no": 3}]}
    data = given(tmp_path, monkeypatch, ifeval.TRAIN, [row], ifeval, "TRAIN")
    with pytest.raises(ValueError, match=r"input_data.jsonl:1: punctuation:no_comma does not take \{'no': 3\}"):
        ifeval.load(data)


@needs_data
def test_a_try_and_a_sure_model_leave_json_only(tmp_path, here):
    model = changed(tmp_path, 10)
    here(
        "--model", str(model), "--data", str(DATA), "--limit", "60", "--tasks", "truthfulqa_mc", "--samples", "s.jsonl"
    )
    assert (tmp_path / "eval-model-limit-60.json").is_file()
    for path in (tmp_path / "s.truthfulqa_mc.jsonl", tmp_path / "eval-model-limit-60.json"):
        assert not re.search(r"\bNaN\b|Infinity", path.read_text())
    worst = min(max(row["loglikelihoods"]) for row in json_lines(tmp_path / "s.truthfulqa_mc.jsonl"))
    assert worst < -745, "exp of all of them is 0"


@pytest.mark.fast
def test_nobody_reading_on_and_a_terminal_without_plus_minus_end_nothing(tmp_path):
    code = "from eval import say; say('± 1'); say('x' * 100_000); say('more'); open('end', 'w').close()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert done.stdout.read(7) == rb"\xb1 1" + b"\n"
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == 0 and (tmp_path / "end").exists()
