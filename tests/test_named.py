"""Objectives and groupers of one's own, from FILE.py:NAME or from Python: they train, resume and are known again by
their content, and every mistake is one line.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import groupers
import sftgo
import train
from support import report
from support.named import Named, named, source

ROOT = Path(train.__file__).parent
sys.path.append(str(ROOT / "examples"))
from group_dro import GroupDRO  # noqa: E402

MINE = '''"""Three groups by length; the groups are weighed by how high their means are."""

import numpy as np
import torch


def length(corpus, seed):
    return np.diff(corpus.spans)[:, 0].astype(np.float32)


def soft_worst(nats, tokens, lam):
    means = nats / tokens.clamp(min=1)
    weights = torch.where(tokens > 0, means, -torch.inf).detach().softmax(0)
    return (1 - lam) * nats.sum() / tokens.sum() + lam * (weights * means).sum()


def plain(nats, tokens, lam):
    return nats.sum() / tokens.sum()


plain.constant_price = lambda lam: True


def excess(nll, prior):
    return nll - prior


excess.in_step = True
excess.prior = lambda corpus, seed: np.diff(corpus.spans)[:, 0].astype(np.float32)


def hardest(nll, prior):
    assert not prior.any()
    return nll


hardest.in_step = True


def parity(corpus, seed):
    return corpus.ids % 2


def one(corpus, seed):
    return np.zeros(len(corpus.ids), np.uint8)


class Counting:
    """Cross-entropy times the number of steps so far, at most 3 of them."""

    def __init__(self):
        self.steps = 1

    def __call__(self, nats, tokens, lam):
        return self.steps * nats.sum() / tokens.sum()

    def update(self, nats, tokens):
        assert nats.dtype == torch.float64 and not nats.requires_grad
        self.steps = min(self.steps + 1, 3)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


counting = Counting()
NUMBER = 3
'''


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine" / "mine.py"
    path.parent.mkdir()
    path.write_text(MINE)
    return path


def config(folder, rows, *flags):
    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --lr 1e-2"
    return train.parse_args(
        [*base.split(), *"--dtype float32 --max-steps 3 --checkpoint-every 0".split(), *map(str, flags)]
    )


def result(out):
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, load_file(out / "model" / "model.safetensors")


def run(folder, rows, out, *flags, **objects):
    train.train(config(folder, rows, "--out", out, *flags), **objects)
    return result(out)


def same(a, b):
    (rows, weights), (others, other_weights) = a, b
    timed = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    strip = lambda rows: [{k: x for k, x in row.items() if k not in timed} for row in rows]  # noqa: E731
    return strip(rows) == strip(others) and all(torch.equal(w, other_weights[name]) for name, w in weights.items())


MANY = "--micro-batch-tokens", 127  # a batch is several micro-batches


def test_a_users_grouper_and_objective_train_three_groups(folder, rows, mine, tmp_path):
    groups = "--grouper", f"{mine}:length", "--eta", 0.5, 0.9
    metrics, weights = run(folder, rows, tmp_path / "a", *groups, "--objective", f"{mine}:soft_worst")
    assert len(metrics) == 3
    for row in metrics:
        means, counts = map(torch.tensor, zip(*row["groups"]))
        assert len(means) == 3 and (counts > 0).all()
        assert row["ce"] == pytest.approx(float((means * counts).sum() / counts.sum()), abs=1e-5)
        soft = float((means.softmax(0) * means).sum())
        assert row["loss"] == pytest.approx(0.1 * row["ce"] + 0.9 * soft, abs=1e-5)
    assert metrics[0]["lam"] == 0.9

    others, other_weights = run(folder, rows, tmp_path / "b", *groups)
    assert others[0]["groups"] == metrics[0]["groups"], "the same groups under sft_go"
    assert others[0]["loss"] == pytest.approx(0.1 * others[0]["ce"] + 0.9 * max(m for m, _ in others[0]["groups"]))
    assert any(not torch.equal(w, other_weights[name]) for name, w in weights.items())


def test_an_objective_that_says_its_price_is_constant_trains_as_cross_entropy_does(folder, rows, mine, tmp_path):
    many = "--grouper", "tfidf", *MANY
    metrics, weights = run(folder, rows, tmp_path / "a", *many, "--objective", f"{mine}:plain")
    others, other_weights = run(folder, rows, tmp_path / "b", *many, "--objective", "cross_entropy")
    assert [row["loss"] for row in metrics] == [row["loss"] for row in others]
    assert all(torch.equal(w, other_weights[name]) for name, w in weights.items())


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
def test_scores_made_in_a_step_are_those_of_the_grouper_that_does_the_same(folder, rows, mine, tmp_path, scope):
    flags = "--scope", scope, *MANY, "--eta", 0.3, 0.8
    ours = run(folder, rows, tmp_path / "a", *flags, "--grouper", "loss")
    theirs = run(folder, rows, tmp_path / "b", *flags, "--grouper", f"{mine}:hardest")
    assert same(ours, theirs)
    other = run(folder, rows, tmp_path / "c", *flags, "--grouper", f"{mine}:excess")
    assert not same(ours, other), "what its own prior() returned counts"


@pytest.mark.parametrize("name, K", [("parity", 2), ("one", 1)])
def test_integers_are_the_groups_themselves_whatever_eta_is(folder, rows, mine, tmp_path, capsys, name, K):
    metrics, _ = run(folder, rows, tmp_path / "a", "--grouper", f"{mine}:{name}", "--eta", 0.2, *MANY)
    said = capsys.readouterr().out
    assert f"mine.py:{name}: {K} group" in said and "η" not in said.split("method")[1].splitlines()[0]
    assert same((metrics, {}), (run(folder, rows, tmp_path / "b", "--grouper", f"{mine}:{name}", *MANY)[0], {}))
    for row in metrics:
        if K == 2:
            assert "groups" not in row and row["important_tokens"] > 20 < row["unimportant_tokens"]
        else:  # one group: the worst of all is all
            assert row["groups"] == [[row["ce"], row["important_tokens"]]] and row["loss"] == pytest.approx(row["ce"])


def test_without_a_grouper_the_log_has_two_groups_whatever_eta_is(folder, rows, tmp_path):
    metrics, _ = run(folder, rows, tmp_path / "a", "--grouper", "none", "--eta", 0.2, 0.8)
    assert all("groups" not in row and row["important"] is None and row["unimportant"] for row in metrics)


# From Python.


def soft_worst(nats, tokens, lam):
    means = nats / tokens.clamp(min=1)
    weights = torch.where(tokens > 0, means, -torch.inf).detach().softmax(0)
    return (1 - lam) * nats.sum() / tokens.sum() + lam * (weights * means).sum()


def length(corpus, seed):
    return np.diff(corpus.spans)[:, 0].astype(np.float32)


class Steep:
    def __init__(self, power):
        self.power = power

    def __call__(self, nats, tokens, lam):
        return (nats.sum() / tokens.sum()) ** self.power


class Base:
    def __call__(self, nats, tokens, lam):
        return nats.sum() / tokens.sum()


class Heir(Steep):
    pass


class OtherHeir(Base):
    def __init__(self, power):
        self.power = power


def test_objects_from_python_train_as_the_same_functions_of_a_file_do(folder, rows, mine, tmp_path):
    flags = "--eta", 0.5, 0.9, *MANY
    names = "--grouper", f"{mine}:length", "--objective", f"{mine}:soft_worst"
    by_file = run(folder, rows, tmp_path / "a", *flags, *names)
    by_name = run(folder, rows, tmp_path / "b", *flags, objective=f"{mine}:soft_worst", grouper=f"{mine}:length")
    by_object = run(folder, rows, tmp_path / "c", *flags, objective=soft_worst, grouper=length)
    assert same(by_file, by_name) and same(by_file, by_object)
    about = json.loads((tmp_path / "c" / "config.json").read_text())
    assert about["config"]["objective"] == "test_named:soft_worst" and about["config"]["grouper"] == "test_named:length"
    assert all(len(digest) == 64 for digest in about["digests"].values()) and len(about["digests"]) == 4


@pytest.mark.fast
def test_one_of_ours_given_as_the_function_is_the_same_run(folder, rows):
    cfg = train.Config(**vars(config(folder, rows)) | {"objective": sftgo.important_only, "grouper": groupers.loss})
    assert (cfg.objective, cfg.grouper) == ("important_only", "loss")
    with pytest.raises(ValueError, match="rho1 needs --reference"):
        train.Config(**vars(config(folder, rows)) | {"grouper": groupers.rho1})


@pytest.mark.fast
def test_an_object_is_known_by_its_source_and_by_what_was_set_on_it():
    def digest(given):
        return named(given, "--objective").digest

    def scaled(by):
        return lambda nats, tokens, lam: by * nats.sum() / tokens.sum()

    assert digest(Steep(2)) == digest(Steep(2)) != digest(Steep(3)) and len(digest(Steep(2))) == 64
    assert digest(scaled(1)) == digest(scaled(1)) != digest(scaled(2))
    assert digest(soft_worst) != digest(scaled(1))
    here = {}
    exec("def f(nats, tokens, lam):\n    return nats.sum()", here)
    assert digest(here["f"]) != digest(here["f"]), "no source: nothing is known to be the same"
    assert digest(scaled(object())) != digest(scaled(object()))

    def wrapped(by):
        @functools.wraps(soft_worst)
        def wrapper(nats, tokens, lam):
            return by * soft_worst(nats, tokens, lam)

        return wrapper

    assert digest(wrapped(1)) == digest(wrapped(1)) != digest(wrapped(2))
    assert digest(Heir(2)) != digest(Steep(2)) and digest(Heir(2)) != digest(OtherHeir(2))
    assert source({"a", "b", "c"}) == source({"c", "a", "b"})


def test_without_source_a_run_says_at_once_that_it_cannot_be_resumed_and_is_not(folder, rows, tmp_path, capsys):
    here = {}
    exec("def f(nats, tokens, lam):\n    return nats.sum() / tokens.sum()", here)
    cfg = config(folder, rows, "--out", tmp_path / "a")
    train.train(cfg, objective=here["f"])
    plan, _ = capsys.readouterr().out.split("run     ")
    assert "has no source to know it by again: this run cannot be resumed" in plan
    with pytest.raises(ValueError, match="holds a run with another objective"):
        train.train(cfg, objective=here["f"])


# The record.


def test_a_run_is_known_by_the_content_of_the_file_and_not_by_its_place(folder, rows, mine, tmp_path, capsys):
    out = tmp_path / "out"
    run(folder, rows, out, "--objective", f"{mine}:plain")
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["objective"] == f"{mine}:plain" and [*about["digests"]] == ["objective", "data", "model"]
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text(MINE)
    capsys.readouterr()
    train.train(config(folder, rows, "--objective", f"{elsewhere}:plain", "--out", out))
    assert "already finished" in capsys.readouterr().out
    for flags in (("--objective", f"{mine}:soft_worst"), (), ("--objective", "cross_entropy")):
        with pytest.raises(ValueError, match="holds a run with another objective"):
            train.train(config(folder, rows, *flags, "--out", out))
    mine.write_text(MINE + "# changed\n")
    with pytest.raises(ValueError, match="another objective .*plain with content .*, now plain with content") as e:
        train.train(config(folder, rows, "--objective", f"{mine}:plain", "--out", out))
    assert "\n" not in str(e.value)


def test_the_papers_command_does_not_take_a_hacked_run_for_its_own(folder, rows, mine, tmp_path):
    """Commit dedf155: a hacked loss left no trace in the run folder, and this said "already finished"."""
    run(folder, rows, tmp_path / "out", "--objective", f"{mine}:soft_worst")
    with pytest.raises(ValueError, match="another objective"):
        run(folder, rows, tmp_path / "out")


# A state.


def test_a_state_moves_once_a_step_and_begins_anew_in_each_run(folder, rows, mine, tmp_path):
    """Commit dedf155 called the objective twice a step, so that a state in it moved twice."""
    flags = "--objective", f"{mine}:counting", "--grouper", "none", "--lr", 1e-9
    for out in ("a", "b"):
        metrics, _ = run(folder, rows, tmp_path / out, *flags, *MANY)
        assert [round(row["loss"] / row["ce"], 5) for row in metrics] == [1, 2, 3]


def test_a_functions_state_begins_anew_in_each_run_too(folder, rows, tmp_path):
    def f(nats, tokens, lam):
        return f.n * nats.sum() / tokens.sum()

    f.n, f.state_dict = 1, lambda: {"n": f.n}
    f.update = lambda nats, tokens: setattr(f, "n", f.n + 1)
    f.load_state_dict = lambda state: setattr(f, "n", state["n"])
    for out in ("a", "b"):
        metrics, _ = run(folder, rows, tmp_path / out, "--lr", 1e-9, objective=f)
        assert [round(row["loss"] / row["ce"], 5) for row in metrics] == [1, 2, 3]


def test_a_given_object_is_not_changed_by_the_run(folder, rows, tmp_path):
    objective = GroupDRO(1.0)
    run(folder, rows, tmp_path / "a", objective=objective)
    assert objective.log_weights == 0


@pytest.mark.parametrize("name", ["state", "weights"])
def test_a_run_that_stops_and_resumes_is_the_uninterrupted_one(folder, rows, tmp_path, monkeypatch, name):
    objective, grouper = {"state": (GroupDRO(1.0), length), "weights": (Weighted(), "loss")}[name]
    flags = "--max-steps", 6, "--checkpoint-every", 2, *MANY
    whole = run(folder, rows, tmp_path / "whole", *flags, objective=objective, grouper=grouper)

    def stop(*args):
        if args[5] == 5:
            raise KeyboardInterrupt
        return update(*args)

    update = train.update
    monkeypatch.setattr(train, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, rows, tmp_path / "parts", *flags, objective=objective, grouper=grouper)
    monkeypatch.setattr(train, "update", update)
    newest = tmp_path / "parts" / "checkpoints" / "step-000004"
    assert (newest / "objective.pt").is_file() == (name == "state")
    resumed = run(folder, rows, tmp_path / "parts", *flags, objective=objective, grouper=grouper)
    assert [row["step"] for row in resumed[0]] == [*range(1, 7)] and same(whole, resumed)


def test_a_state_that_could_not_be_loaded_again_is_refused(folder, rows, tmp_path):
    class Wrong(GroupDRO):
        def state_dict(self):
            return {"log_weights": Path("x")}

    with pytest.raises(ValueError, match="state_dict.. holds something else; only tensors"):
        run(folder, rows, tmp_path / "a", "--checkpoint-every", 1, objective=Wrong(1.0))
    assert not (tmp_path / "a" / "metrics.jsonl").exists(), "before the first step, not after hours"


# Weights.


class Weighted:
    """An objective of weighted nats whose price is not constant."""

    def __call__(self, nats, tokens, lam):
        full = tokens > 0
        means = nats[full] / tokens[full]
        return means.softmax(0) @ means

    def weigh(self, nll, batch):
        return nll.square() / 30 + batch.targets % 2


def test_weights_change_the_loss_but_not_what_is_logged_of_the_model(folder, rows, tmp_path):
    flags = "--lam-max", 0, "--grouper", "loss", *MANY
    plain, _ = run(folder, rows, tmp_path / "a", *flags)
    for half in (0.5, 1.0):
        weighted = Half(half)
        metrics, _ = run(folder, rows, tmp_path / f"b{half}", *flags, objective=weighted)
        for name in ("ce", "important", "unimportant", "important_tokens"):
            assert metrics[0][name] == pytest.approx(plain[0][name], rel=1e-6)
        assert metrics[0]["loss"] == pytest.approx(half * plain[0]["ce"], rel=1e-6)
        assert metrics[0]["grad_norm"] == pytest.approx(half * plain[0]["grad_norm"], rel=1e-5)


class Half:
    def __init__(self, weight):
        self.weight = weight

    def constant_price(self, lam):
        return True

    def __call__(self, nats, tokens, lam):
        return nats.sum() / tokens.sum()

    def weigh(self, nll, batch):
        return torch.full_like(nll, self.weight)


@pytest.mark.parametrize("constant", [True, False])
def test_weights_are_made_once_for_each_micro_batch_from_losses_without_a_gradient(folder, rows, tmp_path, constant):
    calls = []

    def objective(nats, tokens, lam):
        return nats.sum() / tokens.sum()

    def weigh(nll, batch):
        calls.append((nll.requires_grad, id(batch.targets)))
        return torch.ones_like(nll, requires_grad=True)

    objective.weigh, objective.constant_price = weigh, lambda lam: constant
    run(folder, rows, tmp_path / "a", "--max-steps", 1, "--batch-size", 11, *MANY, objective=objective)
    assert len(calls) == len({place for _, place in calls}) > 2 and not any(grad for grad, _ in calls)


SUMS = []


def test_a_state_moves_by_the_weighted_sums_that_the_loss_is_made_of(folder, rows, tmp_path):
    SUMS.clear()
    metrics, _ = run(folder, rows, tmp_path / "a", *MANY, objective=HalfWithState(0.5))
    assert [float(nats.sum() / tokens.sum()) for nats, tokens in SUMS] == pytest.approx(
        [row["loss"] for row in metrics]
    )
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["ce"] / 2)


class HalfWithState(Half):
    def update(self, nats, tokens):
        SUMS.append((nats, tokens))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("pieces", [(), MANY])
def test_what_changes_its_arguments_in_place_changes_no_number_of_the_step(folder, rows, tmp_path, pieces):
    def clean(nats, tokens, lam):
        return (nats / tokens.clamp(min=1)).square().sum()

    def dirty(nats, tokens, lam):
        return nats.div_(tokens.clamp_(min=1)).square().sum()

    clean.weigh, dirty.weigh = lambda nll, batch: (-nll).exp(), lambda nll, batch: nll.neg_().exp_()
    a = run(folder, rows, tmp_path / "a", *pieces, "--grouper", "none", objective=clean)
    b = run(folder, rows, tmp_path / "b", *pieces, "--grouper", "none", objective=dirty)
    assert same(a, b)


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
def test_an_objective_gets_float64_in_both_scopes(folder, rows, tmp_path, scope):
    def f(nats, tokens, lam):
        assert nats.dtype == tokens.dtype == torch.float64
        return nats.sum() / tokens.sum()

    run(folder, rows, tmp_path / "a", "--scope", scope, "--max-steps", 1, *MANY, objective=f)


@pytest.mark.fast
def test_a_grouper_cannot_write_into_the_data(folder, rows, mine):
    mine.write_text("def f(corpus, seed):\n    corpus.ids[:] = 5\n    return corpus.ids\n")
    with pytest.raises(
        ValueError, match=r"mine.py:f: ValueError: assignment destination is read-only \(.*mine.py, line 2"
    ):
        train.train(config(folder, rows, "--grouper", f"{mine}:f", "--dry-run"))


@pytest.mark.fast
def test_a_grouper_in_the_place_of_none_needs_an_objective(folder, rows, capsys):
    cfg = config(folder, rows, "--grouper", "none", "--dry-run")
    with pytest.raises(ValueError, match="give the objective, too"):
        train.train(cfg, grouper="tfidf")
    train.train(cfg, grouper="tfidf", objective="sft_go")
    assert "sft_go, λ 0.9, scope step; groups by tfidf" in capsys.readouterr().out


@pytest.mark.fast
def test_optional_functions_are_checked_for_their_arguments_at_once(mine):
    objective = GroupDRO(1.0)
    objective.update = lambda nats: None
    with pytest.raises(
        ValueError, match=r"its update: <lambda>\(nats\) cannot be called with \(nats, tokens\): too many"
    ):
        named(objective, "--objective")


@pytest.mark.fast
def test_a_file_that_exits_is_an_error(mine):
    mine.write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(ValueError, match="SystemExit while it was imported"):
        named(f"{mine}:f", "--objective")


@pytest.mark.fast
@pytest.mark.parametrize("means, worst", [((1.0, 3.0, 2.0), 1), ((3.0, 1.0, 3.0), 2), ((1.0, 0.5, None), 0)])
def test_the_worst_of_several_groups_is_named_and_on_a_tie_the_last(means, worst):
    tokens = torch.tensor([4.0 if mean else 0.0 for mean in means])
    row = report.group_means(tokens * torch.tensor([mean or 0.0 for mean in means]), tokens)
    assert row["worst"] == f"group {worst}" and [mean for mean, _ in row["groups"]] == list(means)


@pytest.mark.fast
def test_an_object_of_length_zero_is_an_object(folder, rows, capsys):
    class Empty(Steep):
        def __len__(self):
            return 0

    train.train(config(folder, rows, "--dry-run"), objective=Empty(2))
    assert "Empty, λ 0.9" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has load_state_dict but no state_dict"):
        objective = Steep(2)
        objective.load_state_dict = print
        named(objective, "--objective")


# Mistakes.


@pytest.mark.fast
def test_a_file_that_both_flags_name_is_run_once(folder, rows, mine, tmp_path):
    mine.write_text(f"{MINE}\nwith open({str(tmp_path / 'runs')!r}, 'a') as f:\n    f.write('once ')\n")
    config(folder, rows, "--grouper", f"{mine}:length", "--objective", f"{mine}:soft_worst")
    assert (tmp_path / "runs").read_text() == "once "


@pytest.mark.fast
@pytest.mark.parametrize("flag", ["--grouper", "--objective"])
@pytest.mark.parametrize(
    "name, text, message",
    [
        ("absent.py:f", None, "no such file .*absent.py"),
        ("mine.py:", MINE, "mine.py has no function"),
        ("mine.py:shorter", MINE, "mine.py has no function shorter"),
        ("mine.py:NUMBER", MINE, r"mine.py has no function NUMBER \(it is int\)"),
        ("mine.py:Counting", MINE, r"a class; name an object of it: NAME = Counting\(…\)"),
        ("mine.py", MINE, "expected one of .*, or FILE.py:NAME"),
        ("mine.py:f", "def f(:\n", r"SyntaxError while it was imported \(.*mine.py, line 1\)"),
        ("mine.py:f", "1 / 0\n", r"ZeroDivisionError while it was imported"),
        ("mine.py:f", "import absent_library\n", "No module named 'absent_library'"),
        (
            "mine.py:f",
            "def f(nats): pass\n",
            r"f\(nats\) cannot be called with \(\w+, .*\): too many positional arguments",
        ),
        ("mine.py:f", "def f(a, b, c, d): pass\n", r"cannot be called with .*: missing a required argument: '[cd]'"),
        ("mine.txt:f", "def f(): pass\n", r"not a Python file \(its name must end in .py\)"),
        (":f", None, "expected one of"),
    ],
)
def test_a_mistake_in_the_name_or_the_file_is_one_clear_error(folder, rows, tmp_path, flag, name, text, message):
    file = tmp_path / name.split(":")[0]
    if text:
        file.write_text(text)
    given = f"{tmp_path}/{name}" if file.suffix else name
    with pytest.raises(ValueError, match=f"^{flag} .*{message}") as e:
        config(folder, rows, flag, given)
    assert "\n" not in str(e.value)


@pytest.mark.fast
def test_an_update_without_a_way_to_save_its_state_is_refused_at_once(folder, rows, mine):
    mine.write_text("def f(nats, tokens, lam):\n    return nats.sum()\n\n\nf.update = lambda nats, tokens: None\n")
    message = "has update but no load_state_dict and no state_dict: a resumed run would lose its state"
    with pytest.raises(ValueError, match=message):
        config(folder, rows, "--objective", f"{mine}:f")


@pytest.mark.fast
def test_an_attribute_that_is_no_function_and_an_object_that_cannot_be_copied_are_refused_at_once(mine):
    mine.write_text("def f(nats, tokens, lam):\n    return nats.sum()\n\n\nf.constant_price = True\n")
    with pytest.raises(ValueError, match="f: its constant_price is bool, expected a function"):
        named(f"{mine}:f", "--objective")
    objective = Steep(2)
    objective.lines = (line for line in "ab")
    with pytest.raises(ValueError, match="a copy of it, and it cannot be copied .*generator"):
        named(objective, "--objective")


@pytest.mark.fast
@pytest.mark.parametrize(
    "returned, found",
    [
        ("np.zeros(3)", r"float64 \(3,\), expected floats \(scores\) or integers \(groups\)"),
        ("np.zeros((len(c.ids), 2))", r"float64 \(\d+, 2\)"),
        ("c.loss_mask", r"bool \(\d+,\)"),
        ("[0.0] * len(c.ids)", "list"),
        ("__import__('torch').zeros(len(c.ids))", "torch.float32"),
        ("None", "NoneType"),
        ("np.full(len(c.ids), np.nan)", r"float64 \(\d+,\), expected no nan, as it has for token \d+"),
        ("np.arange(len(c.ids)) % 2 - 1", r"int64 \(\d+,\), expected groups 0 … 255; token \d+ has -1"),
        ("np.arange(len(c.ids)) + 256", r"expected groups 0 … 255; token \d+ has \d+. Scores are floats"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(.*mine.py, line 5\)"),
    ],
)
def test_a_grouper_that_returns_anything_but_a_score_or_group_for_each_token_is_refused(
    folder, rows, mine, returned, found
):
    mine.write_text(f"import numpy as np\n\n\ndef f(c, seed):\n    return {returned}\n")
    out = mine.parent / "out"
    with pytest.raises(ValueError, match=rf"^--grouper .*mine.py:f: .*{found}") as e:
        train.train(config(folder, rows, "--grouper", f"{mine}:f", "--out", out))
    assert "\n" not in str(e.value) and not out.exists()


@pytest.mark.fast
def test_what_is_nan_or_no_group_outside_the_answers_does_not_matter(folder, rows, mine):
    mine.write_text("import numpy as np\n\n\ndef f(c, seed):\n    return np.where(c.loss_mask, 1.0, np.nan)\n")
    train.train(config(folder, rows, "--grouper", f"{mine}:f", "--dry-run"))
    mine.write_text("import numpy as np\n\n\ndef f(c, seed):\n    return np.where(c.loss_mask, c.ids % 3, -9)\n")
    train.train(config(folder, rows, "--grouper", f"{mine}:f", "--dry-run"))


STEP_MISTAKES = {  # what stands in the file, and the line that the first step gives
    "a float": ("def f(nats, tokens, lam):\n    return 2.0", "returned float, expected a tensor ()"),
    "a vector": (
        "def f(nats, tokens, lam):\n    return nats / tokens",
        "returned torch.float64 (2,), expected a tensor ()",
    ),
    "nothing": ("def f(nats, tokens, lam):\n    pass", "returned NoneType, expected a tensor ()"),
    "no gradient": ("def f(nats, tokens, lam):\n    return nats.detach().sum()", "carries no gradient of nats"),
    "another's gradient": (
        "def f(nats, tokens, lam):\n    return __import__('torch').ones((), requires_grad=True) * 2",
        "carries no gradient of nats",
    ),
    "raises": ("def f(nats, tokens, lam):\n    return nats[7]", "IndexError: index 7 is out of bounds"),
    "not finite": ("def f(nats, tokens, lam):\n    return nats.sum() * float('inf')", "f made it of finite losses"),
    "a gradient that is not": (
        "def f(nats, tokens, lam):\n    return nats.sum() + (0 * nats.sum()).sqrt()",
        "f made it of finite losses",
    ),
    "a price of nan called constant": (
        "def f(n, t, lam):\n    return (0 * n.sum()).sqrt()\n\n\nf.constant_price = lambda lam: True",
        "calls its price constant, but a nat of its groups costs nan",
    ),
    "nan weights where the objective does not look": (
        "def f(nats, tokens, lam):\n    return nats[0] / tokens[0]\n\n\n"
        "f.weigh = lambda nll, batch: 1.0 - 2 * batch.group.float()",
        "made it by weights that are below 0 or not finite",
    ),
    "a library's frame": (
        "import torch\n\n\ndef f(nats, tokens, lam):\n    return torch.einsum('ij->i', nats)",
        "mine.py, line 5)",
    ),
    "a lie": (
        "def f(nats, tokens, lam):\n    return (nats / tokens).max()\n\n\nf.constant_price = lambda lam: True",
        "calls its price constant, but a nat of its groups costs",
    ),
    "negative weights": (
        "def f(n, t, lam):\n    return n.sum() / t.sum()\n\n\nf.weigh = lambda nll, batch: -nll",
        "made it by weights that are below 0 or not finite",
    ),
    "weights of nan": (
        "def f(n, t, lam):\n    return n.sum() / t.sum()\n\n\nf.weigh = lambda nll, batch: nll / 0 * 0",
        "made it by weights that are below 0 or not finite",
    ),
    "weights of another shape": (
        "def f(n, t, lam):\n    return n.sum() / t.sum()\n\n\nf.weigh = lambda nll, batch: nll[:3]",
        "returned torch.float32 (3,), expected floats in a tensor (",
    ),
}
IN_STEP = {
    "scores of another shape": ("def f(nll, prior):\n    return nll[:3]", "expected floats in a tensor ("),
    "integers in a step": ("def f(nll, prior):\n    return nll.int()", "returned torch.int32 ("),
    "an array": ("def f(nll, prior):\n    return nll.numpy()", "returned float32 ("),
    "scores of nan": ("def f(nll, prior):\n    return nll / 0 * 0", "mine.py:f: a score of nan"),
}


@pytest.mark.parametrize("mistake", [*STEP_MISTAKES, *IN_STEP])
def test_a_mistake_that_only_a_step_shows_stops_the_first_one_with_one_line(folder, rows, mine, tmp_path, mistake):
    text, message = (STEP_MISTAKES | IN_STEP)[mistake]
    flag = "--grouper" if mistake in IN_STEP else "--objective"
    mine.write_text(text + "\nf.in_step = True\n" * (mistake in IN_STEP))
    with pytest.raises(ValueError) as e:
        run(folder, rows, tmp_path / "out", flag, f"{mine}:f", "--max-steps", 1)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out" / "model").exists()


def test_labels_that_are_no_group_are_refused_where_the_sums_are_read_too(folder, rows, tmp_path, monkeypatch):
    """On a GPU `group_sums` does not look, because it would have to wait: the step does."""
    sums = train.group_sums
    monkeypatch.setattr(train, "group_sums", lambda nll, group, mask, K: sums(nll, group, mask & (group < K), K))
    monkeypatch.setattr(
        groupers, "labeller", lambda *a: lambda nll, batch: (batch.prior if nll is None else nll * 0 + 2).int()
    )
    with pytest.raises(ValueError, match="^step 1: the grouper gave labels outside 0 … 1, or scores of nan"):
        run(folder, rows, tmp_path / "out", "--grouper", "loss")


# Other people's files.


def test_sftgo_works_in_a_folder_that_has_modules_of_the_names_of_ours(tmp_path):
    for name in ("model", "data", "train", "groupers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('theirs')\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # as a package that is installed: behind the working directory
    command = [sys.executable, "-c", "import sftgo; print(sftgo.lam_at(0, 1, 0.5, 0))"]
    assert subprocess.check_output(command, cwd=tmp_path, env=env) == b"0.5\n"


@pytest.mark.fast
@pytest.mark.parametrize("neighbour", ["model.py", "train.py", "support/__init__.py", "sftgo.py"])
def test_a_neighbour_that_has_the_name_of_one_of_our_modules_is_refused_by_name(mine, neighbour):
    other = mine.parent / neighbour
    other.parent.mkdir(exist_ok=True)
    other.touch()
    with pytest.raises(
        ValueError, match=f"{neighbour.split('/')[0]} beside it has the name of a module of this program"
    ):
        named(f"{mine}:plain", "--objective")


@pytest.mark.fast
def test_a_folder_of_data_and_files_of_other_names_are_no_obstacle(mine):
    (mine.parent / "data").mkdir()
    (mine.parent / "test_model.py").touch()
    assert isinstance(named(f"{mine}:plain", "--objective"), Named)


def test_a_users_file_imports_its_neighbours_behind_all_else(folder, rows, mine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tabnanny", raising=False)
    (mine.parent / "my_losses.py").write_text("def plain(nats, tokens, lam):\n    return nats.sum() / tokens.sum()\n")
    (mine.parent / "tabnanny.py").write_text("raise SystemExit('a neighbour was found before the library')\n")
    (mine.parent / "tfidf_too.py").write_text("from groupers import tfidf\n")
    mine.write_text("import tabnanny\nfrom my_losses import plain\nfrom tfidf_too import tfidf\n")
    train.train(config(folder, rows, "--objective", f"{mine}:plain", "--grouper", f"{mine}:tfidf", "--dry-run"))
    assert f"{mine}:plain, λ" in capsys.readouterr().out


@pytest.mark.fast
def test_a_dataclass_in_a_users_file_can_be_an_objective(mine):
    mine.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Scaled:\n"
        "    by: float\n\n    def __call__(self, nats, tokens, lam):\n        return self.by * nats.sum()\n\n\n"
        "f = Scaled(2.0)\n"
    )
    objective = named(f"{mine}:f", "--objective")
    assert objective(torch.ones(2), torch.ones(2), 0.0) == 4 and {f.name for f in fields(objective.function)} == {"by"}
