"""support/look.py: what is marked is what is important, numbers that a hand can check, and data that stay text."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from classifiers import MBERT, classifier_folder
from tiny import TEXTS, tiny_folder

import groupers
from data import load_corpus
from model import Llama
from published.tokenizer import Tokenizer
from support import look
from support.llmlingua2 import Classifier, keep_scores
from support.scores import corpus_nll

EVIL = '<script>alert(1)</script> <img src=x onerror="x()"> </section></html> "q" \'a\' & &amp; \x1b[2J\x9b31m 👍🏽 海'
ROWS = [
    {"prompt": "Why?", "completion": TEXTS[0]},
    {"prompt": EVIL, "completion": EVIL},
    {"prompt": "dropped", "completion": ""},
    {"conversations": ["a", "b b b c.", "d", "e f."]},
]


@pytest.fixture
def here(tmp_path):
    """A model with weights, and rows."""
    tiny_folder(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.fixture
def corpus(here):
    return load_corpus(here / "rows.jsonl", Tokenizer(here / "model", 512), "plain", 512)


def by_hand(corpus, important) -> look.View:
    important = np.array(important)
    return look.View("hand", important.astype(np.float32), important, np.where(important, 1.0, 0.5))


@pytest.mark.fast
def test_a_sample_is_shown_as_it_was_written(corpus):
    for sample, row in enumerate((ROWS[0], ROWS[1])):
        prompt, answer = look.pieces(corpus, sample)
        assert prompt == f"User: {row['prompt']}\n\nAssistant:"
        assert "".join(text for _, text in answer) == f" {row['completion']}■"
        assert [place for place, _ in answer] == np.flatnonzero(corpus.loss_mask & (corpus.doc_ids == sample)).tolist()
    prompt, answer = look.pieces(corpus, 2)
    assert prompt == "User: a\n\nAssistant:"
    assert "".join(text for _, text in answer) == " b b b c.■User: d\n\nAssistant: e f.■"


@pytest.mark.fast
def test_marks_are_around_the_important_tokens(corpus):
    _, answer = look.pieces(corpus, 2)
    important = np.zeros(len(corpus.ids), bool)
    length = np.cumsum([len(text) for _, text in answer])
    important[[place for (place, _), end in zip(answer, length) if end <= len(" b b")] + [answer[-1][0]]] = True
    plain = look.marked(corpus, answer, by_hand(corpus, important), colour=False)
    assert plain == "[ b b] b c.■User: d\n\nAssistant: e f.[■]"
    coloured = look.marked(corpus, answer, by_hand(corpus, important), colour=True)
    on, off, dim = "\x1b[1;30;43m", "\x1b[0m", "\x1b[2m"
    assert coloured == f"{on} b b{off} b c.■{dim}User: d\n\nAssistant:{off} e f.{on}■{off}"


@pytest.mark.fast
def test_marked_white_space_is_seen_and_later_bytes_of_a_character_are_not_marked(here):
    rows = [{"prompt": "a", "completion": "b\n\n  👍 c"}]
    (here / "rows.jsonl").write_text(json.dumps(rows[0]))
    corpus = load_corpus(here / "rows.jsonl", Tokenizer(here / "model", 512), "plain", 512)
    _, answer = look.pieces(corpus, 0)
    every = by_hand(corpus, corpus.loss_mask)
    assert look.marked(corpus, answer, every, colour=False).replace("][", "") == "[ b⏎\n⏎\n  👍 c■]"
    important = np.zeros(len(corpus.ids), bool)
    important[[place for place, text in answer if text.isspace() or not text]] = True
    shown = look.marked(corpus, answer, by_hand(corpus, important), colour=False)
    assert "⏎" in shown and "[]" not in shown and "👍 c■" in shown.replace("[", "").replace("]", "")


@pytest.mark.fast
def test_a_piece_of_a_long_text_shows_itself_alone(here, said):
    words = " ".join(f"w{n}" for n in range(60))
    (here / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (words, "short")))
    corpus = load_corpus(here / "rows.jsonl", Tokenizer(here / "model", 512), "text", 12)
    shown = ["".join(text for _, text in look.pieces(corpus, sample)[1]) for sample in range(len(corpus))]
    assert "".join(shown) == f"{words}■short■" and len(corpus) > 10
    assert not any(look.pieces(corpus, sample)[0] for sample in range(len(corpus)))
    assert look.name_of(corpus, 2) == "row 1, piece 3" and look.name_of(corpus, len(corpus) - 1) == "row 2"
    assert said("--template", "text", "--context", 12).count("══ row 1, piece ") == 3
    assert said("--template", "text", "--context", 12, "--row", 1, 2).count("══ row ") == 4


@pytest.mark.fast
def test_the_terminal_obeys_no_control_character_of_the_data(corpus):
    prompt, answer = look.pieces(corpus, 1)
    nothing = by_hand(corpus, np.zeros(len(corpus.ids), bool))
    shown = look.printable(prompt) + look.marked(corpus, answer, nothing, colour=False)
    assert "\x1b" not in shown and "\x9b" not in shown and shown.count("�[2J�31m") == 2
    assert look.printable("a\n\tb") == "a\n\tb"


@pytest.mark.fast
def test_shares_and_overlaps_worked_by_hand(here, corpus):
    supervised = np.flatnonzero(corpus.loss_mask)
    a, b = (np.zeros(len(corpus.ids), bool) for _ in range(2))
    a[supervised[:10]] = b[supervised[5:13]] = True
    first, second = by_hand(corpus, a), by_hand(corpus, b)
    second.name = "other"
    assert look.overlaps(first, [first, second]) == [1, 5 / 10] and look.overlaps(second, [first, second]) == [5 / 8, 1]
    tokenizer = Tokenizer(here / "model", 512)
    lines = look.summary(corpus, [first, second], tokenizer)
    assert lines[0] == f"counted over 3 samples, {len(supervised):,} supervised tokens"
    assert lines[1].startswith(f"  hand       {10 / len(supervised):6.1%} important; most often ")
    assert lines[-2].split() == ["hand", "100%", "50%"] and lines[-1].split() == ["other", "62%", "100%"]
    spelled = [corpus.text[slice(*corpus.spans[i])] for i in supervised[:10]]
    best = max(spelled, key=spelled.count)
    assert f"{best!r} {spelled.count(best) / 10:.1%}" in look.most_picked(corpus, first, tokenizer)


class Page(HTMLParser):
    """Tags with their attributes, and the text of what a reader sees as samples."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside += tag in ("section", "p")

    def handle_endtag(self, tag):
        self.inside -= tag in ("section", "p")

    def handle_data(self, data):
        if self.inside:
            self.text.append(data)


@pytest.mark.fast
def test_data_stay_text_on_the_page(here, corpus):
    args = arguments(here, "--grouper", "tfidf,random")
    views = look.views(args, corpus, np.arange(3), Tokenizer(here / "model", 512))
    html = look.page(corpus, [0, 1, 2], views, Tokenizer(here / "model", 512), "<b>title</b>")
    found = Page(html)
    tags = "html meta title style h1 h2 h3 p span b div section table caption tr th td"
    assert {tag for tag, _ in found.tags} == {*tags.split()}
    attributes = {name for _, attributes in found.tags for name in attributes}
    assert attributes == {*"lang charset name content http-equiv class style title".split()}
    text = "".join(found.text)
    assert text.count(f"{EVIL}■") == 2, "once for each grouper"
    assert f"User: {EVIL}\n\nAssistant:" in text and "&lt;b&gt;title" in html
    asks = re.search(r"(src|href)=|url\(|@import|https?:", html.replace("src=x", ""))
    assert not asks, "one file, which asks for no other"


@pytest.mark.fast
def test_every_token_of_an_answer_has_its_score_and_shade(here, corpus):
    (view,) = look.views(arguments(here), corpus, np.arange(3), Tokenizer(here / "model", 512))
    mask, scores = corpus.loss_mask, groupers.tfidf(corpus)
    important = groupers.important(*map(torch.from_numpy, (scores, mask, corpus.doc_ids)), 0.5)
    assert (view.scores == scores).all() and (view.picked == important.numpy()).all()
    assert np.isnan(view.rank[~mask | np.isneginf(view.scores)]).all()
    for sample in range(3):
        mine = mask & (corpus.doc_ids == sample) & (view.scores > -np.inf)
        for place in np.flatnonzero(mine):
            assert view.rank[place] == pytest.approx((view.scores[mine] <= view.scores[place]).mean())
    _, answer = look.pieces(corpus, 0)
    best = max((place for place, _ in answer), key=lambda place: view.scores[place])
    cell = look.token(corpus, best, "x", view)
    title = f"score {view.scores[best]:.4g}, rank 100%"
    assert cell == f'<b style="background:rgb(38 110 190/0.60)" title="{title}">x</b>'
    assert look.token(corpus, answer[-1][0], "■", view) == '<span title="not judged">■</span>'
    assert look.token(corpus, 0, "User", view) == '<span class="prompt">User</span>'
    for place in (0, best, answer[-1][0]):  # a prompt's, a judged and an unjudged token
        assert "&lt;br&gt;&amp;" in look.token(corpus, place, "<br>&", view)


@pytest.mark.fast
def test_losses_are_those_of_the_model_and_rho1_takes_the_references_away(here, corpus):
    phi = tiny_folder(here / "phi", seed=7)
    samples = np.array([0, 2])
    args = arguments(here, "--grouper", "loss,rho1", "--reference", str(phi), "--dtype", "float32")
    loss, rho1 = look.views(args, corpus, samples, Tokenizer(here / "model", 512))
    chosen = corpus.take(samples)
    theta_nll, phi_nll = (corpus_nll(Llama.from_pretrained(name), chosen, 512) for name in (here / "model", phi))
    np.testing.assert_allclose(loss.scores, theta_nll, atol=1e-5)
    np.testing.assert_allclose(rho1.scores, theta_nll - phi_nll, atol=1e-5)
    assert loss.picked.any() and (loss.picked != rho1.picked).any()


@pytest.mark.fast
def test_llmlingua2_reads_only_the_samples_looked_at(here, corpus, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    classifier, read, keep = classifier_folder(tmp_path, MBERT, TEXTS * 4), [], Classifier.keep
    monkeypatch.setattr(Classifier, "keep", lambda self, texts: read.extend(texts) or keep(self, texts))
    samples = np.array([0, 2])
    args = arguments(here, "--grouper", "llmlingua2", "--llmlingua-model", str(classifier))
    (view,) = look.views(args, corpus, samples, Tokenizer(here / "model", 512))
    assert read == [" " + TEXTS[0], " b b b c.", " e f."]
    everything = keep_scores(corpus, Classifier(classifier))
    chosen = corpus.take(samples)
    both = [everything[a:b] for a, b in (corpus.starts[[0, 1]], corpus.starts[[2, 3]])]
    np.testing.assert_allclose(view.scores, np.concatenate(both), atol=1e-5)
    assert 0.3 < view.picked[chosen.loss_mask].mean() < 0.7


@pytest.mark.fast
def test_a_function_of_a_users_file_is_shown_as_ours_are(here, corpus):
    (here / "mine.py").write_text("import numpy as np\ndef long(c, seed): return np.diff(c.spans)[:, 0].astype('f4')\n")
    (view,) = look.views(arguments(here, "--grouper", f"{here / 'mine.py'}:long"), corpus, np.arange(3), None)
    assert (view.scores == np.diff(corpus.spans)[:, 0]).all() and view.picked.any()


def arguments(here, *more):
    return look.parse_args(flags(here, "--eta", 0.5, *more))


def flags(here, *more) -> list[str]:
    return [*map(str, ("--data", here / "rows.jsonl", "--model", here / "model", *more))]


@pytest.fixture
def said(here, monkeypatch, capsys):
    """said(*flags): what the program prints."""

    def run(*more) -> str:
        monkeypatch.setattr(sys, "argv", ["look.py", *flags(here, "--eta", 0.5, *more)])
        look.main()
        return capsys.readouterr().out

    return run


@pytest.mark.fast
def test_the_groups_are_those_of_the_whole_file_though_few_samples_are_looked_at(here, corpus):
    (here / "given.py").write_text("def last(corpus, seed):\n    return 1 + (corpus.doc_ids == len(corpus) - 1)\n")
    (view,) = look.views(arguments(here, "--grouper", f"{here / 'given.py'}:last"), corpus, np.arange(2), None)
    assert view.K == 3 and set(view.group.tolist()) == {0, 1} and look.kind(view) == "in group 0, 1, 2"


@pytest.mark.fast
def test_the_program_prints_samples_and_writes_a_page(here, said):
    out = said("--grouper", "tfidf,frequency", "--html", here / "page.html")
    assert [line for line in out.splitlines() if line[:1] == "═"] == ["══ row 1 ══", "══ row 2 ══", "══ row 4 ══"]
    assert out.count("── tfidf: ") == 3 and "[" in out and "\x1b" not in out
    assert re.search(r"^  frequency +\d+\.\d% important", out, re.M) and f"wrote {here / 'page.html'}" in out
    assert "<h3>frequency</h3>" in (here / "page.html").read_text(encoding="utf-8")
    one = said("--row", 4)
    assert "══ row 4 ══\nUser: a" in one and one.count("══ row") == 1 and "counted over 3 samples" in one
    assert "counted over 2 samples" in said("--row", 4, "--stats", 1)


def test_the_file_runs_from_any_working_directory_and_ends_quietly_where_nobody_reads_on(here):
    command = [sys.executable, Path(look.__file__).resolve(), *flags(here)]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.fast
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--grouper", "tfdif"], "--grouper tfdif: expected one of random, frequency, tfidf"),
        (["--grouper", "none"], "--grouper none: expected one of random"),
        (["--grouper", "rho1"], "--grouper rho1 needs --reference"),
        (["--row", "3"], "row 3 is not among the 3 samples"),
        (["--eta", "9"], "eta is 9.0, expected a percentile"),
        (["--html", "absent/page.html"], "no such folder; create it first"),
        (["--grouper", "tfidf,absent.py:f"], "no such file absent.py"),
        (["--data", "absent"], "absent: no such file"),
        (["--stats", "-1"], "expected at least 0 samples and 2 tokens"),
        (["--context", "1"], "expected at least 0 samples and 2 tokens"),
        (["--grouper", "loss", "--context", "9999"], "has 4096 positions"),
    ],
)
def test_a_mistake_gets_one_line(here, flags, message, monkeypatch, capsys):
    base = ["look.py", "--data", str(here / "rows.jsonl"), "--model", str(here / "model")]
    monkeypatch.setattr(sys, "argv", [*base, *flags])
    with pytest.raises(SystemExit) as e:
        look.main()
    assert message in (e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["rows.jsonl", "model/config.json", "link.html", "notes.html", "model"])
def test_a_page_is_never_written_over_another_file(here, name, monkeypatch, capsys):
    (here / "link.html").symlink_to(here / "rows.jsonl")
    (here / "notes.html").write_text('<!doctype html><html lang="en"><meta charset="utf-8"><title>mine</title>')
    path = here / name
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SystemExit):
        look.parse_args(flags(here, "--html", path))
    assert ("a folder" if before is None else "is no page of support.look") in capsys.readouterr().err
    assert before is None or path.read_bytes() == before


@pytest.mark.fast
def test_a_page_of_its_own_and_an_empty_file_are_written_anew(here, said):
    (here / "page.html").touch()
    for _ in range(2):
        assert "wrote" in said("--html", here / "page.html", "--stats", 1)
    assert (here / "page.html").read_text(encoding="utf-8").startswith(look.PAGE)


@pytest.mark.fast
def test_ranks_and_views_leave_the_global_random_state_alone(here, corpus):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    look.views(arguments(here, "--grouper", "random,loss"), corpus, np.arange(3), Tokenizer(here / "model", 512))
    assert torch.equal(before[0], torch.get_rng_state()) and (np.random.get_state()[1] == before[1]).all()


@pytest.mark.fast
@pytest.mark.parametrize("damaged", ["model", "phi"])
def test_losses_that_are_not_finite_are_one_line_and_no_page(here, monkeypatch, capsys, damaged):
    phi = tiny_folder(here / "phi")
    Llama.from_pretrained(phi, seed=7).save_pretrained(phi)
    tensors = safetensors.torch.load_file(here / damaged / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38  # finite, but not what it makes of the next one
    tensors["model.embed_tokens.weight"] *= 1e4
    safetensors.torch.save_file(tensors, here / damaged / "model.safetensors", {"format": "pt"})
    more = ("--grouper", "loss,rho1", "--reference", phi, "--html", here / "page.html", "--context", 64)
    monkeypatch.setattr(sys, "argv", ["look", *flags(here, *more)])
    with pytest.raises(SystemExit) as e:
        look.main()
    assert re.fullmatch(
        r"error: \S+: the losses of [\d,]+ of [\d,]+ tokens are nan or infinite; are its .*", str(e.value)
    )
    assert f"{here / damaged}: the" in str(e.value)
    assert capsys.readouterr().out == "" and not (here / "page.html").exists()
