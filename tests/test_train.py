"""train.py: an exact step however it is cut, a run folder that adds up, and one clear line for every mistake."""

import ast
import dataclasses
import gc
import json
import math
import random
import re
import shlex
import subprocess
import sys
import weakref
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stories260k import SHARED
from tiny import tiny_folder

import checkpoint
import data
import groupers
import train
from model import Layout, Llama, LlamaConfig
from sftgo import sft_go, sft_go_loss

ROWS = [
    {"prompt": f"What is {w}?", "completion": f"It is {w * n}, or so they say, {w} and {n}."}
    for n, w in enumerate(("water", "a long river", "the sun", "bread", "time", "a king", "glass", "the sea", "salt", "an owl", "iron"), 1)
]


def config(folder, rows, *flags):
    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 2 --lr 1e-2 --dtype float32"
    return train.parse_args([*base.split(), *map(str, flags)])


def run(folder, rows, *flags):
    return train.train(config(folder, rows, *flags))


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# The step.


@pytest.fixture
def model_and_corpus(folder, rows):
    cfg = LlamaConfig.from_folder(folder)
    return Llama.from_pretrained(folder, seed=1), data.load_corpus(rows, data.Tokenizer(folder, cfg.vocab_size), "plain", 128)


def gradient(model):
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return grads


def cut(corpus, important, pieces):
    """All samples in `pieces` packed rows of unequal size."""
    edges = [round(len(corpus) * (i / pieces) ** 1.5) for i in range(pieces + 1)]
    return [data.pack(corpus, important, list(range(a, b))) for a, b in zip(edges, edges[1:]) if a < b]


@pytest.mark.fast
@pytest.mark.parametrize("worst", ["max", "important"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grouper", ["tfidf", "loss", "rho1"])
def test_any_cut_into_micro_batches_gives_the_gradient_of_the_whole_step(model_and_corpus, grouper, lam, worst):
    model, corpus = model_and_corpus
    important = groupers.label_corpus(grouper, corpus, 0.7, 0)
    if grouper == "rho1":
        important = train.corpus_nll(Llama(model.cfg).init_weights(seed=9), corpus, 512)
    label, objective = groupers.labeller(grouper, 0.7), partial(sft_go, lam=lam, worst=worst)

    (whole,) = cut(corpus, important, 1)  # the definition: one batch, full logits, one graph
    hidden = model(whole.tokens, whole.layout)[0]
    nll = F.cross_entropy(model.lm_head(hidden), whole.targets, reduction="none")
    loss, stats = sft_go_loss(nll, label(nll.detach(), whole), whole.loss_mask, lam, worst)
    assert abs(stats["important"] - stats["unimportant"]) > 1e-5
    loss.backward()
    expected = gradient(model)

    for pieces in (1, 2, 3, 7):
        batches = cut(corpus, important, pieces)
        assert len(batches) == pieces
        nats, tokens = train.step(model, batches, objective, label)
        assert abs(objective(nats, tokens) - loss) < 1e-5
        assert (gradient(model) - expected).abs().max() <= 1e-6 * (1 + expected.abs().max())
        if lam == 0:  # prices known beforehand: no probe, the same gradient
            again = train.step(model, batches, objective, label, probe=False)
            assert torch.allclose(again[0], nats) and torch.equal(again[1], tokens)
            assert (gradient(model) - expected).abs().max() <= 1e-6 * (1 + expected.abs().max())


@pytest.mark.fast
@pytest.mark.parametrize("worst", ["important", "max"])
def test_rho1_is_what_a_plain_loop_over_samples_and_tokens_makes_of_equation_9(model_and_corpus, worst):
    model, corpus = model_and_corpus
    reference, eta = Llama(model.cfg).init_weights(seed=9), 0.55

    def sample_nll(model, sample):  # a sample alone, full logits
        ids = torch.from_numpy(corpus.ids[corpus.starts[sample] : corpus.starts[sample + 1]].astype(np.int64))
        hidden = model(ids[None, :-1], Layout.packed([len(ids) - 1]))[0]
        return F.cross_entropy(model.lm_head(hidden), ids[1:], reduction="none")

    groups = {False: [], True: []}
    for sample in range(len(corpus)):
        nll = sample_nll(model, sample)
        with torch.no_grad():
            excess = (nll - sample_nll(reference, sample)).tolist()
        supervised = np.flatnonzero(corpus.kind[corpus.starts[sample] + 1 : corpus.starts[sample + 1]] >= data.RESPONSE).tolist()
        k = max(1, math.floor((1 - eta) * len(supervised) + 0.5))
        chosen = sorted(supervised, key=lambda i: excess[i])[-k:]
        for i in supervised:
            groups[i in chosen].append(nll[i])
    means = {important: torch.stack(of).mean() for important, of in groups.items()}
    assert abs(means[True] - means[False]) > 1e-3
    expected = means[True] if worst == "important" else max(means.values())
    expected.backward()
    by_hand = gradient(model)

    known = train.corpus_nll(reference, corpus, 300)
    for pieces in (1, 3):
        batches = cut(corpus, known, pieces)
        nats, tokens = train.step(model, batches, partial(sft_go, lam=1.0, worst=worst), groupers.labeller("rho1", eta))
        assert tokens.tolist() == [len(groups[False]), len(groups[True])]
        assert (gradient(model) - by_hand).abs().max() < 1e-6
        assert float(sft_go(nats, tokens, 1.0, worst)) == pytest.approx(float(expected.detach()), abs=1e-5)


@pytest.mark.fast
def test_a_model_that_is_its_own_reference_has_no_excess_at_all(model_and_corpus):
    model, corpus = model_and_corpus
    known = train.corpus_nll(model, corpus, 4096)  # 11 samples in one row: the packing of the step below
    (batch,) = data.micro_batches(corpus, known, np.arange(len(corpus)), 4096)
    with torch.no_grad():
        nll = train.batch_nll(model, batch)
    assert ((nll - batch.known)[batch.loss_mask] == 0).all() and known[corpus.loss_mask].all()
    assert torch.equal(groupers.labeller("rho1", 0.55)(nll, batch), batch.loss_mask), "equal scores share a group: all important"


@pytest.mark.fast
def test_without_a_probe_each_micro_batch_is_run_once(model_and_corpus):
    model, corpus = model_and_corpus
    batches = cut(corpus, np.zeros(len(corpus.ids), bool), 3)
    calls = []
    model.register_forward_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    train.step(model, batches, partial(sft_go, lam=0.0), groupers.labeller("none", 0.9), probe=False)
    assert calls == [True] * 3
    calls.clear()
    train.step(model, batches, partial(sft_go, lam=0.5), groupers.labeller("none", 0.9))
    assert calls == [False] * 3 + [True] * 3
    calls.clear()
    train.step(model, batches[:1], partial(sft_go, lam=0.5), groupers.labeller("none", 0.9))
    assert calls == [True]


@pytest.mark.fast
def test_scope_micro_batch_is_the_token_weighted_mean_of_each_cuts_own_loss(model_and_corpus):
    model, corpus = model_and_corpus
    important = groupers.label_corpus("tfidf", corpus, 0.7, 0)
    batches, label = cut(corpus, important, 3), groupers.labeller("tfidf", 0.7)
    total = sum(int(b.loss_mask.sum()) for b in batches)
    for lam in (0.0, 0.7):
        expected = 0.0
        for b in batches:
            loss, _ = sft_go_loss(train.batch_nll(model, b), b.known, b.loss_mask, lam)
            expected = expected + loss * b.loss_mask.sum() / total
        expected.backward()
        by_hand = gradient(model)
        _, _, loss = train.micro_batch_step(model, batches, partial(sft_go, lam=lam), label)
        assert abs(loss - expected) < 1e-5
        micro = gradient(model)
        assert (micro - by_hand).abs().max() < 1e-6
        train.step(model, batches, partial(sft_go, lam=lam), label)
        assert torch.allclose(micro, gradient(model), atol=1e-6) == (lam == 0), "exact for cross-entropy, only like it otherwise"


class Unigram(torch.nn.Module):
    """A bias over ten tokens, in the shape `batch_nll` expects of a model."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(1, 10, bias=False)
        torch.nn.init.zeros_(self.lm_head.weight)

    def forward(self, tokens, layout):
        return torch.ones(*tokens.shape, 1)


@pytest.mark.fast
def test_training_follows_the_objective_it_is_given():
    targets = torch.tensor([3, 3, 3, 7, 3, 3, 3, 3])  # one important seven among threes
    batch = data.Batch(
        targets[None], targets, torch.ones(8, dtype=torch.bool), targets == 7, torch.zeros(8, dtype=torch.int64), Layout.packed([8])
    )
    learnt = {}
    for name, objective in {
        "ce": lambda nats, tokens: nats.sum() / tokens.sum(),
        "only important": lambda nats, tokens: nats[1] / tokens[1],
    }.items():
        model = Unigram()
        for _ in range(20):
            train.step(model, [batch], objective, lambda nll, batch: batch.known)
            with torch.no_grad():
                model.lm_head.weight -= model.lm_head.weight.grad
            model.zero_grad()
        learnt[name] = int(model.lm_head.weight.argmax())
    assert learnt == {"ce": 3, "only important": 7}


@pytest.mark.fast
def test_a_prompt_token_moves_no_weight(model_and_corpus):
    model, corpus = model_and_corpus
    (batch,) = cut(corpus, np.zeros(len(corpus.ids), bool), 1)
    train.step(model, [batch], partial(sft_go, lam=0.5), groupers.labeller("none", 0.9))
    before = gradient(model)
    batch.targets = torch.where(batch.loss_mask, batch.targets, (batch.targets + 1) % model.cfg.vocab_size)
    train.step(model, [batch], partial(sft_go, lam=0.5), groupers.labeller("none", 0.9))
    assert torch.equal(gradient(model), before)


@pytest.mark.fast
def test_learning_rate_warms_up_from_above_zero_and_goes_to_zero():
    rates = [train.lr_at(t, 10, 1.0, "cosine", 0.25) for t in range(10)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0] and rates[3] == 1.0  # ceil(2.5) steps of warm-up
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] == pytest.approx((1 + math.cos(math.pi * 6 / 7)) / 2)
    assert [train.lr_at(t, 4, 2.0, "linear", 0.0) for t in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert {train.lr_at(t, 4, 2.0, "constant", 0.0) for t in range(4)} == {2.0}
    assert (
        train.lr_at(6, 100, 1.0, "cosine", 0.07)
        == train.lr_at(7, 100, 1.0, "cosine", 0.07)
        == 1.0
        > train.lr_at(5, 100, 1.0, "cosine", 0.07)
    )


@pytest.mark.fast
def test_weight_decay_is_on_matrices_only(model_and_corpus, folder, rows):
    decayed, kept = train.adamw(model_and_corpus[0], config(folder, rows, "--weight-decay", 0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.ndim == 2 for p in decayed["params"])
    assert kept["weight_decay"] == 0.0 and len(kept["params"]) == 5 and all(p.ndim == 1 for p in kept["params"])


# Whole runs.


def test_a_run_overfits_its_rows_and_its_log_adds_up(folder, rows, tmp_path, capsys):
    out = run(
        folder, rows, "--out", tmp_path / "out", "--epochs", 40, "--grouper", "tfidf", "--eta", 0.7, "--lam-max", 0.9, "--lam-min", 0.2
    )
    log = metrics(out)
    assert [row["step"] for row in log] == list(range(1, 121)) and log[-1]["epoch"] == 39
    assert log[-1]["ce"] < 1.0 < log[0]["ce"] / 5
    for i, row in enumerate(log):
        assert row["lam"] == pytest.approx(max(0.9 * (1 - i / 120), 0.2))
        assert row["loss"] == pytest.approx((1 - row["lam"]) * row["ce"] + row["lam"] * max(row["important"], row["unimportant"]), rel=1e-9)
        n1, n0 = row["important_tokens"], row["unimportant_tokens"]
        assert row["ce"] == pytest.approx((n1 * row["important"] + n0 * row["unimportant"]) / (n0 + n1))
        assert row["worst"] == ("important" if row["important"] >= row["unimportant"] else "unimportant")
    assert sum(row["important_tokens"] + row["unimportant_tokens"] for row in log[:3]) == sum(
        row["important_tokens"] + row["unimportant_tokens"] for row in log[3:6]
    )
    names = "step epoch loss ce important unimportant important_tokens unimportant_tokens worst lam lr grad_norm tokens seconds tokens_per_second peak_memory_bytes"
    assert list(log[0]) == names.split()
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["eta"] == 0.7 and about["versions"]["torch"] == torch.__version__
    assert (out / "losses.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "11 rows, 11 samples kept" in said and "120 in all" in said and "of the supervised tokens important" in said and "sample" in said


def test_the_saved_model_is_what_transformers_loads(folder, rows, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = run(folder, rows, "--out", tmp_path / "out", "--save-dtype", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    ours = Llama.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    ids = torch.tensor(
        tokenizer.apply_chat_template([{"role": "user", "content": "What is water?"}], add_generation_prompt=True)["input_ids"]
    )
    hidden = ours(ids[None], Layout.packed([len(ids)]))
    assert (ours.lm_head(hidden) - theirs(ids[None]).logits).abs().max() <= 1e-4
    assert theirs.generation_config.eos_token_id == [ours.cfg.raw["eos_token_id"]]
    new = theirs.generate(ids[None], max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert [t for t in new if t != ours.cfg.raw["eos_token_id"]] == ours.generate(
        [ids.tolist()], 12, stop_ids=(ours.cfg.raw["eos_token_id"],)
    )[0]


def test_the_same_seed_gives_the_same_run_and_micro_batches_change_only_rounding(folder, rows, tmp_path):
    def losses(name, *flags):
        return [row["loss"] for row in metrics(run(folder, rows, "--out", tmp_path / name, "--epochs", 7, "--eta", 0.7, *flags))]

    first = losses("a")
    assert losses("b") == first
    assert losses("c", "--seed", 1) != first
    assert len(first) == 21 and losses("d", "--micro-batch-tokens", 127) == pytest.approx(first, abs=1e-5)
    assert losses("e", "--grouper", "loss") == pytest.approx(losses("f", "--grouper", "loss", "--micro-batch-tokens", 127), abs=1e-5)


def test_the_seed_orders_the_samples_and_draws_the_random_groups(folder, rows, tmp_path):
    Llama.from_pretrained(folder).save_pretrained(folder)  # the same weights for every seed

    def first(name, *flags):
        return metrics(run(folder, rows, "--out", tmp_path / name, "--max-steps", 1, *flags))[0]

    assert first("a", "--seed", 0)["ce"] != pytest.approx(first("b", "--seed", 1)["ce"], abs=1e-5)
    whole = ("--batch-size", 11, "--grouper", "random", "--eta", 0.5)
    a, b = (first(f"random{seed}", "--seed", seed, *whole) for seed in (0, 1))
    assert a["ce"] == pytest.approx(b["ce"], abs=1e-6) and a["important"] != pytest.approx(b["important"], abs=1e-5)


def test_the_seed_draws_the_fresh_weights(folder, rows, tmp_path):
    flags = ("--batch-size", 11, "--max-steps", 1, "--lam-max", 0)  # one batch of all samples: their order does not matter
    a, b = (metrics(run(folder, rows, "--out", tmp_path / str(seed), "--seed", seed, *flags))[0]["loss"] for seed in (0, 1))
    assert a != pytest.approx(b, abs=1e-4)


def test_lambda_zero_only_watches_the_groups(folder, rows, tmp_path):
    plain = metrics(run(folder, rows, "--out", tmp_path / "plain", "--grouper", "none"))
    watched = metrics(run(folder, rows, "--out", tmp_path / "watched", "--lam-max", 0, "--eta", 0.7))
    assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in watched], abs=1e-6)
    assert all(row["important"] is None and row["important_tokens"] == 0 and row["loss"] == pytest.approx(row["ce"]) for row in plain)
    assert all(row["important_tokens"] > 0 for row in watched)


def test_bf16_compute_stays_near_fp32_and_a_tiny_rate_still_moves_the_master_weights(folder, rows, tmp_path):
    def final(name, *flags):
        return metrics(run(folder, rows, "--out", tmp_path / name, "--epochs", 5, "--lr", "1e-3", *flags))[-1]["ce"]

    assert final("a", "--dtype", "bfloat16") == pytest.approx(final("b"), abs=0.05)
    before = Llama.from_pretrained(folder, seed=0)
    out = run(folder, rows, "--out", tmp_path / "c", "--lr", "1e-7", "--dtype", "bfloat16", "--save-dtype", "float32", "--max-steps", 1)
    after = Llama.from_pretrained(out / "model")
    moved = (after.model.layers[0].mlp.up_proj.weight - before.model.layers[0].mlp.up_proj.weight).abs()
    assert 0 < moved.max() < 1e-6, "bf16 weights would have swallowed a step of 1e-7"


EFFECTS = {  # each flag, against a run without it: what of the log or of the weights must differ
    "--scope micro_batch": "loss",
    "--lam-max 0.3": "loss",
    "--lam-min 0": "loss",
    "--eta 0.4": "loss",
    "--grouper random": "loss",
    "--lr 0.02": "weights",
    "--schedule linear": "weights",
    "--warmup-ratio 0.5": "weights",
    "--weight-decay 0.9": "weights",
    "--betas 0.5 0.6": "weights",
    "--eps 0.1": "weights",
    "--clip 0.01": "weights",
    "--clip 0": "weights",
    "--context 24": "first loss",
    "--batch-size 3": "first loss",
    "--template llama3": "first loss",
    "--dtype bfloat16": "first loss",
}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """A short run that each flag is compared with: (folder, rows, losses, weights)."""
    here = tmp_path_factory.mktemp("unchanged")
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return here, *losses_and_weights(tiny_folder(here / "tiny"), here / "rows.jsonl", here / "out")


def losses_and_weights(folder, rows, out, *flags):
    run(folder, rows, "--out", out, "--micro-batch-tokens", 127, "--eta", 0.7, "--save-dtype", "float32", *flags)
    weights = Llama.from_pretrained(out / "model").model.layers[0].mlp.up_proj.weight.detach()
    return [row["loss"] for row in metrics(out)], weights


@pytest.mark.parametrize("flag", EFFECTS)
def test_a_flag_changes_what_it_says(unchanged, tmp_path, flag):
    here, losses, weights = unchanged
    other_losses, other_weights = losses_and_weights(here / "tiny", here / "rows.jsonl", tmp_path / "out", *flag.split())
    assert not torch.allclose(other_weights, weights, rtol=0, atol=1e-6)
    if EFFECTS[flag] == "first loss":
        assert other_losses[0] != pytest.approx(losses[0], abs=1e-5)
    elif EFFECTS[flag] == "weights":  # the optimizer's business: the first loss is that of the same weights
        assert other_losses[0] == losses[0] and other_losses[-1] != losses[-1]
    else:
        assert other_losses[0] != pytest.approx(losses[0], abs=1e-5) or flag == "--lam-min 0" and other_losses[-1] != losses[-1]


def test_clip_0_clips_nothing(unchanged, tmp_path):
    here, *_ = unchanged
    free, wide = (losses_and_weights(here / "tiny", here / "rows.jsonl", tmp_path / c, "--clip", c) for c in ("0", "1e9"))
    assert free[0] == wide[0] and torch.equal(free[1], wide[1])


def test_worst_important_trains_the_important_group_whichever_is_higher(folder, rows, tmp_path):
    for worst in ("important", "max"):
        log = metrics(
            run(
                folder,
                rows,
                "--out",
                tmp_path / worst,
                "--grouper",
                "random",
                "--eta",
                0.5,
                "--lam-max",
                1,
                "--epochs",
                8,
                "--worst",
                worst,
            )
        )
        assert {row["worst"] for row in log} == {"important", "unimportant"}
        assert all(row["loss"] == pytest.approx(row["important" if worst == "important" else row["worst"]]) for row in log)


def test_each_epoch_has_its_own_order(folder, rows, tmp_path, monkeypatch):
    asked = []
    order = data.epoch_order
    monkeypatch.setattr(data, "epoch_order", lambda n, size, seed, epoch, drop: asked.append(epoch) or order(n, size, seed, epoch, drop))
    log = metrics(run(folder, rows, "--out", tmp_path / "out", "--epochs", 3, "--lr", "1e-12", "--lam-max", 0))
    assert asked[1:] == [0, 1, 2]  # the first is the plan's
    assert len({tuple(row["tokens"] for row in log[i : i + 3]) for i in (0, 3, 6)}) == 3


def test_plain_sft_pays_for_one_forward(folder, rows, tmp_path, monkeypatch):
    calls = []
    forward = Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda *a: calls.append(torch.is_grad_enabled()) or forward(*a))
    monkeypatch.setattr(train, "print_sample", lambda *a: None)
    flags = ("--micro-batch-tokens", 127, "--max-steps", 1, "--batch-size", 11)
    run(folder, rows, "--out", tmp_path / "a", "--grouper", "none", *flags)
    pieces = len(calls)
    run(folder, rows, "--out", tmp_path / "b", "--lam-max", 0, *flags)
    assert pieces > 1 and calls == 2 * pieces * [True]
    run(folder, rows, "--out", tmp_path / "c", *flags)
    assert calls[2 * pieces :] == pieces * [False] + pieces * [True]


def test_max_steps_and_drop_last_set_the_number_of_steps(folder, rows, tmp_path):
    assert len(metrics(run(folder, rows, "--out", tmp_path / "a", "--max-steps", 2))) == 2
    assert len(metrics(run(folder, rows, "--out", tmp_path / "c", "--max-steps", 100))) == 6
    log = metrics(run(folder, rows, "--out", tmp_path / "b", "--drop-last"))
    assert [row["epoch"] for row in log] == [0, 0, 1, 1], "11 samples in batches of 4 without the last 3"
    assert log[-1]["lr"] > 0


def test_dry_run_prints_the_plan_before_it_loads_a_weight_and_writes_nothing(folder, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Llama, "from_pretrained", None)
    before = sorted(tmp_path.rglob("*"))
    assert run(folder, rows, "--dry-run", "--out", tmp_path / "out") is None
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == ["data", "tokens", "groups", "steps", "model", "memory", "saves"]
    assert said["data"].endswith("rows.jsonl: 11 rows, 11 samples kept") and said["steps"].startswith(
        "3 an epoch, 4 samples each; 6 in all;"
    )
    assert said["groups"].startswith("tfidf, η 0.9: ") and "M parameters (fresh: no weights in the folder)" in said["model"]
    assert sorted(tmp_path.rglob("*")) == before
    cfg = LlamaConfig.from_folder(folder)
    corpus = data.load_corpus(rows, data.Tokenizer(folder, cfg.vocab_size), "plain", 128)
    important = groupers.label_corpus("tfidf", corpus, 0.9, 0)
    assert f" {important.sum() / corpus.loss_mask.sum():.1%} of the supervised tokens important" in said["groups"]
    positions = sum(sorted(corpus.lengths - 1)[-4:])  # the longest batch, which fits into one micro-batch
    assert f"micro-batches of up to {positions} tokens" in said["steps"]
    parameters = sum(p.numel() for p in Llama(cfg).parameters())
    needed = train.memory_needed(cfg, parameters, int(positions), 4)
    assert said["memory"].startswith(
        f"about {sum(needed.values()) / 1e9:.2g} GB of tensors: weights, gradients, AdamW {needed['weights, gradients, AdamW'] / 1e9:.2g}"
    )
    assert needed["logits"] == cfg.vocab_size * (positions * (4 + 2 * 4) + (4 + 2 * 4) * cfg.hidden_size)


def test_plain_text_trains_and_gives_its_own_sample(folder, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The sea is wide and the sea is deep. " * 30}) + "\n")
    out = run(folder, tmp_path / "text.jsonl", "--out", tmp_path / "out", "--lam-max", 0, "--context", 32, "--micro-batch-tokens", 64)
    assert "pieces" in capsys.readouterr().out
    assert "chat_template" not in json.loads((out / "model" / "tokenizer_config.json").read_text())


# Run folders.


def test_a_finished_run_says_so_and_any_other_folder_is_refused(folder, rows, tmp_path, capsys):
    out = run(folder, rows, "--out", tmp_path / "out")
    weights = (out / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run(folder, rows, "--out", out) == out
    assert capsys.readouterr().out == f"{out}: this run is already finished; nothing to do\n"
    with pytest.raises(ValueError, match=r"holds a run with another lr \(lr 0.01, now 0.02\); choose another --out, or --overwrite"):
        run(folder, rows, "--out", out, "--lr", 0.02)
    (out / "model").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="unfinished run of this configuration; --resume auto goes on with it"):
        run(folder, rows, "--out", out, "--resume", "never")
    run(folder, rows, "--out", out)  # from its last checkpoint, with no step left to do
    assert (out / "model" / "model.safetensors").read_bytes() == weights and len(metrics(out)) == 6
    (out / "mine.txt").write_text("mine")
    run(folder, rows, "--out", out, "--overwrite", "--lr", 0.02)
    assert (out / "model" / "model.safetensors").read_bytes() != weights and (out / "mine.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    (foreign / "model").mkdir()
    for theirs in (None, "{}", '{"config": "x"}', '{"config": {"lr": 1}}', '["config"]', "not JSON"):
        if theirs is not None:
            (foreign / "config.json").write_text(theirs)
        for flags in ([], ["--overwrite"]):
            with pytest.raises(ValueError, match="not a run of this program|expected an object|not readable as JSON"):
                run(folder, rows, "--out", foreign, *flags)
    assert sorted(p.name for p in foreign.iterdir()) == ["config.json", "model", "thesis.txt"]
    with pytest.raises(ValueError, match="a file, expected a folder"):
        run(folder, rows, "--out", foreign / "thesis.txt")


def test_a_run_never_removes_the_model_or_data_it_reads(folder, rows, tmp_path):
    out = run(folder, rows, "--out", tmp_path / "out", "--max-steps", 1)
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="--model .* lies in it"):
        run(out / "model", rows, "--out", out, "--overwrite")
    (out / "rows.jsonl").write_bytes(rows.read_bytes())
    with pytest.raises(ValueError, match="--data .* lies in it"):
        run(folder, out / "rows.jsonl", "--out", out, "--overwrite")
    assert sorted(out.rglob("*")) == sorted([*before, out / "rows.jsonl"])
    assert len(metrics(run(out / "model", rows, "--out", tmp_path / "next", "--max-steps", 2))) == 2


def test_a_run_never_removes_the_reference_it_reads(folder, rows, tmp_path):
    out = run(folder, rows, "--grouper", "none", "--max-steps", 1, "--out", tmp_path / "phi")
    with pytest.raises(ValueError, match="--reference .* lies in it; choose another --out"):
        run(folder, rows, "--grouper", "rho1", "--reference", out / "model", "--out", out, "--overwrite")
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.fast
def test_a_dry_run_does_not_score_with_a_classifier(folder, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(groupers, "score_corpus", None)
    (tmp_path / "classifier").mkdir()
    run(folder, rows, "--grouper", "llmlingua2", "--llmlingua-model", tmp_path / "classifier", "--dry-run")
    assert f"{tmp_path / 'classifier'} will score the answers" in capsys.readouterr().out
    monkeypatch.setattr(data, "load_corpus", None)
    with pytest.raises(ValueError, match="nowhere: no such folder"):  # before the data are read
        run(folder, rows, "--grouper", "llmlingua2", "--llmlingua-model", tmp_path / "nowhere")


def test_overwrite_follows_no_link(folder, rows, tmp_path):
    out = run(folder, rows, "--out", tmp_path / "out", "--max-steps", 1)
    (out / "model").rename(tmp_path / "elsewhere")
    (out / "model").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / "model.safetensors").read_bytes()
    run(folder, rows, "--out", out, "--max-steps", 1, "--overwrite", "--lr", 1)
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == before and not (out / "model").is_symlink()


def test_weights_that_end_up_not_finite_are_not_saved(folder, rows, tmp_path):
    with pytest.raises(ValueError, match="the last update left weights that are not finite; no model written"):
        run(folder, rows, "--out", tmp_path / "out", "--lr", "1e39", "--max-steps", 1)
    assert not (tmp_path / "out" / "model").exists()


def test_of_two_runs_that_start_on_one_folder_the_second_is_refused(folder, rows, tmp_path):
    cfg = config(folder, rows, "--out", tmp_path / "out")
    out = checkpoint.claim(cfg)
    (out / "metrics.jsonl").write_text("the first one's")
    with pytest.raises(ValueError, match="another run is at work in it"):
        checkpoint.claim(cfg)
    assert (out / "metrics.jsonl").read_text() == "the first one's"
    checkpoint.HELD.clear()  # the first one ends
    with pytest.raises(ValueError, match=r"another run took it in the meantime \(lr differs\)"):
        checkpoint.claim(config(folder, rows, "--out", tmp_path / "out", "--lr", 0.5))
    checkpoint.HELD.clear()
    assert checkpoint.claim(cfg) == out
    checkpoint.HELD.clear()


def test_a_run_needs_no_git_and_no_matplotlib(folder, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = run(folder, rows, "--out", tmp_path / "out", "--max-steps", 1)
    assert json.loads((out / "config.json").read_text())["git_commit"] is None
    assert 'no losses.png: matplotlib is not installed; pip install -e ".[plots]"' in capsys.readouterr().out


def test_the_picture_is_drawn_when_a_group_is_mostly_empty(tmp_path):
    rows = [{"step": i + 1, "ce": 1.0, "unimportant": None if i else 1.0, "important": 1.0} for i in range(200)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint.plot_losses(tmp_path)
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_without_out_each_run_takes_the_next_free_folder(folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(run(folder, rows, "--max-steps", 1)) for _ in range(2)] == ["runs/run-1", "runs/run-2"]


@pytest.mark.fast
def test_the_data_are_read_once(folder, rows, monkeypatch):
    calls, load = [], data.load_corpus
    monkeypatch.setattr(data, "load_corpus", lambda *args: calls.append(args) or load(*args))
    run(folder, rows, "--dry-run")
    assert len(calls) == 1


def test_a_second_run_reads_the_tokens_of_the_first(folder, rows, tmp_path, monkeypatch):
    run(folder, rows, "--out", tmp_path / "a", "--cache", tmp_path / "cache", "--max-steps", 1)
    monkeypatch.setattr(data, "tokenize", None)
    run(folder, rows, "--out", tmp_path / "b", "--cache", tmp_path / "cache", "--max-steps", 1)
    assert not (tmp_path / "a" / "cache").exists()


# Mistakes.


def said_by_main(capsys, monkeypatch, *argv):
    """(exit code, stderr) of the program as a shell would see it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        train.main()
    if isinstance(e.value.code, str):  # the interpreter prints it and exits with 1
        return 1, e.value.code
    return e.value.code, capsys.readouterr().err


MISTAKES = {
    "eta": (["--eta", "90"], r"--eta 90\.0: expected a percentile"),
    "lambda": (["--lam-max", "0.5", "--lam-min", "0.9"], "expected 0 <= lam_min <= lam_max <= 1"),
    "lambda above one": (["--lam-max", "1.5"], "lam_max <= 1"),
    "context": (["--context", "999999", "--micro-batch-tokens", "999999"], "has 4096 positions"),
    "micro-batch": (
        ["--micro-batch-tokens", "64"],
        "--micro-batch-tokens 64 cannot hold --context 128: lower --context, or raise it",
    ),
    "batch size": (["--batch-size", "0"], "expected at least 1"),
    "lr": (["--lr", "0"], "expected lr > 0"),
    "warm-up": (["--warmup-ratio", "1"], r"ratio in \[0, 1\)"),
    "betas": (["--betas", "0.9", "1"], "expected betas"),
    "worst": (["--grouper", "none", "--worst", "important"], "needs important tokens"),
    "too large": (["--micro-batch-tokens", "99999999999999999999"], "whole number of 2.31 or more"),
    "too large a seed": (["--seed", str(2**64)], "whole number of 2.31 or more"),
    "unknown grouper": (["--grouper", "tfdif"], "invalid choice: 'tfdif'"),
    "unknown flag": (["--etaa", "0.9"], "unrecognized arguments: --etaa"),
    "not a number": (["--epochs", "many"], "invalid int value"),
    "unknown recipe": (["--recipe", "lima"], "invalid choice: 'lima'"),
    "no such data": (["--data", "absent.jsonl"], r"absent\.jsonl: no such file"),
    "no such model": (["--model", "absent"], "absent: no such folder"),
    "template": (["--template", "text"], "does not fit --template text"),
    "drop-last": (["--drop-last", "--batch-size", "64"], "make no full batch of 64"),
    "reference": (["--reference", "phi"], "--reference is for --grouper rho1 alone, not tfidf"),
    "cache": (["--cache", __file__], "test_train.py: a file, expected a folder"),
    "model is a file": (["--model", __file__], "test_train.py: a file, expected a model folder"),
}


@pytest.mark.fast
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(folder, rows, tmp_path, capsys, monkeypatch, mistake):
    flags, message = MISTAKES[mistake]
    out = tmp_path / "out"
    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --out {out}".split()
    code, said = said_by_main(capsys, monkeypatch, *base, *flags)
    assert code in (1, 2)
    assert re.search(message, said), said
    assert "Traceback" not in said and (code == 2 or "\n" not in said)
    assert not out.exists() or [path.name for path in out.iterdir()] == ["cache"]


@pytest.mark.fast
def test_overwrite_without_out_is_an_error(capsys, monkeypatch):
    assert "--overwrite needs --out" in said_by_main(capsys, monkeypatch, "--overwrite")[1]


@pytest.mark.fast
def test_half_a_pair_of_model_and_data_is_an_error(capsys, monkeypatch, rows):
    assert "--model is missing" in said_by_main(capsys, monkeypatch, "--data", rows)[1]
    assert "--data is missing" in said_by_main(capsys, monkeypatch, "--model", "x")[1]


def test_a_loss_that_is_not_finite_stops_before_the_update(folder, rows, tmp_path, capsys, monkeypatch):
    model = Llama.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(folder)
    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --dtype float32 --out {tmp_path / 'out'}"
    _, said = said_by_main(capsys, monkeypatch, *base.split())
    assert said.startswith("error: step 1: loss is nan (important nan, unimportant nan)") and "Not updated" in said
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == "" and not (tmp_path / "out" / "model").exists()


def test_a_full_disk_while_saving_is_one_line_and_leaves_no_model(folder, rows, tmp_path):
    out = tmp_path / "out"
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import train; train.main()"  # weights need 140 kB
    flags = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --max-steps 1 --out {out} --cache {tmp_path / 'cache'} --save-dtype float32 --checkpoint-every 0"
    done = subprocess.run(
        [sys.executable, "-c", limit, *flags.split()], cwd=Path(train.__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: .*model\.safetensors\.part: cannot be written \(.*\); is the disk full\?$", done.stderr, re.M), done.stderr
    assert (out / "metrics.jsonl").exists() and not (out / "model").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(folder, rows, tmp_path, monkeypatch):
    def poison(model, *rest, **more):
        totals = real(model, *rest, **more)
        model.model.norm.weight.grad[0] = math.inf
        return totals

    real = train.step
    monkeypatch.setattr(train, "step", poison)
    with pytest.raises(ValueError, match="step 1: loss is .* gradient norm (inf|nan). Not updated"):
        run(folder, rows, "--out", tmp_path / "out")


# Rho-1.


def test_rho1_trains_against_a_reference_that_is_gone_by_then(folder, rows, tmp_path, monkeypatch):
    reference = run(folder, rows, "--grouper", "none", "--out", tmp_path / "reference") / "model"
    alive, dead_when_asked, load = [], [], Llama.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        dead_when_asked.extend(model() is None for model in alive)
        model = load(cls, *args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Llama, "from_pretrained", classmethod(watched))
    flags = ["--grouper", "rho1", "--eta", 0.55, "--reference", reference, "--cache", tmp_path / "cache"]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = metrics(run(folder, rows, *flags, "--worst", "important", "--lam-max", 1, "--out", tmp_path / "a"))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1]).all()
    assert len(alive) == 2 and dead_when_asked == [True], "the reference first, then, without it, the model"
    assert all(row["loss"] == pytest.approx(row["important"]) and row["lam"] == 1 for row in first)
    assert (
        0.4
        < sum(row["important_tokens"] for row in first) / sum(row["important_tokens"] + row["unimportant_tokens"] for row in first)
        < 0.5
    )

    again = metrics(run(folder, rows, *flags, "--worst", "important", "--lam-max", 1, "--out", tmp_path / "b"))
    assert len(alive) == 3, "the reference's losses were kept"
    assert [row["loss"] for row in again] == [row["loss"] for row in first]
    kept = list((tmp_path / "cache").glob("reference-*"))
    assert len(kept) == train.PARTS
    for path in kept:
        path.unlink()
    on_the_fly = metrics(run(folder, rows, *flags, "--worst", "important", "--lam-max", 1, "--out", tmp_path / "c"))
    assert [row["loss"] for row in on_the_fly] == [row["loss"] for row in first]

    eq3 = metrics(run(folder, rows, *flags, "--out", tmp_path / "d"))
    assert eq3[0]["important"] == pytest.approx(first[0]["important"], abs=1e-5), "the same groups, in Eq. 3"
    other = metrics(run(folder, rows, *flags, "--reference", tmp_path / "a" / "model", "--out", tmp_path / "e"))
    assert abs(other[0]["important"] - eq3[0]["important"]) > 1e-3, "another reference, other groups"
    assert eq3[0]["loss"] == pytest.approx(0.1 * eq3[0]["ce"] + 0.9 * max(eq3[0]["important"], eq3[0]["unimportant"]), abs=1e-5)


@pytest.mark.fast
def test_rho1_without_a_reference_says_which_two_commands_to_run(capsys, monkeypatch, folder, rows, tmp_path):
    spaced = (tmp_path / "my rows.jsonl").resolve()
    rows.rename(spaced)
    small = [
        "--context",
        "128",
        "--micro-batch-tokens",
        "512",
        "--batch-size",
        "4",
        "--max-steps",
        "1",
        "--drop-last",
        "--betas",
        "0.8",
        "0.9",
    ]
    base = ["--model", folder, "--data", spaced, *small, "--worst", "important", "--lam-max", "1"]
    code, said = said_by_main(capsys, monkeypatch, *base, "--grouper", "rho1")
    assert code == 1 and "--grouper rho1 needs --reference" in said
    commands = re.findall(r"python train\.py (.*)", said)
    assert len(commands) == 2 and all(f"--model {folder} --data '{spaced}'" in command for command in commands)
    monkeypatch.chdir(tmp_path)
    for command in commands:  # as they are printed
        train.train(train.parse_args(shlex.split(command)))
    assert metrics("runs/reference")[0]["important"] is None and metrics("runs/run-1")[0]["loss"] == metrics("runs/run-1")[0]["important"]
    said = said_by_main(capsys, monkeypatch, "--recipe", "alpaca-8b-rho1", "--eta", "0.3", "--data", "my data")[1]
    assert "--recipe alpaca-8b-sft --data 'my data' --out runs/reference" in said
    assert "--recipe alpaca-8b-rho1 --data 'my data' --eta 0.3 --reference runs/reference/model" in said
    assert "--recipe demo --grouper none --out" in said_by_main(capsys, monkeypatch, "--grouper", "rho1")[1]


@pytest.mark.fast
def test_a_reference_that_cannot_be_compared_is_refused_before_anything_runs(folder, rows, tmp_path, capsys, monkeypatch):
    def said(reference, *more):
        flags = [
            "--model",
            folder,
            "--data",
            rows,
            "--context",
            128,
            "--out",
            tmp_path / "out",
            "--grouper",
            "rho1",
            "--reference",
            reference,
        ]
        return said_by_main(capsys, monkeypatch, *flags, *more)[1]

    cfg = LlamaConfig.from_folder(folder)
    assert "no weights in the folder" in said(tiny_folder(tmp_path / "empty"))
    other = tiny_folder(tmp_path / "other")
    Llama(cfg).init_weights(0).save_pretrained(other)
    raw = json.loads((other / "tokenizer.json").read_text())
    first, second, *_ = raw["model"]["vocab"]
    vocab = raw["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    assert "its tokenizer is not that of" in said(other)
    short = tiny_folder(tmp_path / "short", max_position_embeddings=64)
    Llama(LlamaConfig.from_folder(short)).init_weights(0).save_pretrained(short)
    assert "has 64 positions" in said(short)
    assert "no such folder" in said(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


# Configuration.


@pytest.mark.fast
def test_every_flag_is_read_by_the_code_and_shown_by_help(capsys):
    tree = ast.parse(Path(train.__file__).read_text() + Path(checkpoint.__file__).read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"
    }
    assert {f.name for f in fields(train.Config)} <= read
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    said = capsys.readouterr().out
    for f in fields(train.Config):
        assert "--" + f.name.replace("_", "-") in said
    assert "(default: 0.9 0.95)" in said and "%%" not in said and "SUPPRESS" not in said


@pytest.mark.fast
def test_flags_override_the_recipe_and_the_recipe_the_defaults():
    demo = train.parse_args([])
    assert demo.recipe == "demo" and demo.context == 1024 and demo.batch_size == 8 and demo.weight_decay == 0.1
    assert demo.lam_max == demo.lam_min == 0.9 and demo.betas == (0.9, 0.95)
    other = train.parse_args(["--recipe", "demo", "--batch-size", "3", "--betas", "0.8", "0.9", "--drop-last"])
    assert other.batch_size == 3 and other.betas == (0.8, 0.9) and other.drop_last and other.lr == demo.lr
    assert train.parse_args(["--epochs", "9"]).recipe == "demo"
    assert train.parse_args(["--model", "a", "--data", "b"]).context == 4096


@pytest.mark.fast
@pytest.mark.parametrize("D, F, heads", [(256, 512, 4), (256, 1024, 8), (512, 1536, 8)])
def test_the_memory_estimate_is_near_what_backward_keeps(D, F, heads):
    sizes = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=heads // 2)
    cfg = LlamaConfig(vocab_size=64, head_dim=D // heads, **sizes)
    model = Llama(cfg, compute_dtype=torch.bfloat16)
    T, kept = 900, {}
    layout = Layout.packed([300] * 3)

    def keep(t):
        if t.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in model.parameters()}:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model(torch.zeros(1, T, dtype=torch.int64), layout)
    assert hidden.requires_grad
    estimate = train.memory_needed(cfg, 1, T, 2)["activations"]
    assert 0.9 < estimate / sum(kept.values()) < 1.1

    hidden.float().sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = [s for p in model.parameters() for s in (p, p.grad, *(v for v in optimizer.state[p].values() if v.shape)) if s is not None]
    held, parameters = sum(s.nbytes for s in states), sum(p.numel() for p in model.parameters())
    head = model.lm_head.weight.numel()  # it has no gradient here, because no loss was taken
    assert train.memory_needed(cfg, parameters, T, 2)["weights, gradients, AdamW"] == held + 12 * head


def test_the_memory_estimate_with_recomputed_activations_is_near_what_a_forward_leaves():
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    cfg = LlamaConfig(vocab_size=64, num_hidden_layers=6, **sizes)
    model = Llama(cfg, compute_dtype=torch.bfloat16)
    model.recompute = True
    T, kept = 900, {}
    layout, parameters = Layout.packed([300] * 3), {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model(torch.zeros(1, T, dtype=torch.int64), layout)
    for o in gc.get_objects():  # the blocks' inputs are held by closures, where no hook sees them
        if isinstance(o, torch.Tensor) and id(o) not in before and o.untyped_storage().data_ptr():
            keep(o)
    assert hidden.requires_grad
    one_layer = [train.memory_needed(dataclasses.replace(cfg, num_hidden_layers=n), 1, T, 2)["activations"] for n in (1, 2)]
    estimate = train.memory_needed(cfg, 1, T, 2, recompute=True)["activations"] - (
        one_layer[1] - one_layer[0]
    )  # which backward makes again
    assert 0.9 < estimate / sum(kept.values()) < 1.1


@pytest.mark.fast
def test_over_ranks_the_plan_splits_what_fsdp_splits():
    cfg = LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(cfg).parameters())
    assert parameters == 3_212_749_824  # Llama-3.2-3B
    one, eight = train.memory_needed(cfg, parameters, 4096, 2), train.memory_needed(cfg, parameters, 4096, 2, ranks=8)
    assert eight["weights, gradients, AdamW"] == one["weights, gradients, AdamW"] // 8 == 2 * parameters
    assert eight["activations"] == one["activations"] and "gathered" not in one
    embedding, block = 128256 * 3072, 3072 * (2 * 3072 + 2 * 1024 + 3 * 8192)
    readme = (Path(train.__file__).parent / "README.md").read_text(encoding="utf-8")
    larger = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128,
    )  # fmt: skip
    with torch.device("meta"):
        of_8b = sum(p.numel() for p in Llama(larger).parameters())
    for config_, count, name in ((cfg, parameters, "3B"), (larger, of_8b, "8B")):
        for n, where in ((1, "one GPU"), (8, "each of eight")):
            parts, full = (train.memory_needed(config_, count, 4096, 2, n, recompute) for recompute in (False, True))
            state = parts["weights, gradients, AdamW"] / 4
            cells = [state, state, 2 * state, parts["activations"], full["activations"], parts["logits"], parts.get("gathered", 0)]
            row = " | ".join(f"{cell / 1e9:.1f}" if cell else "" for cell in cells)
            assert f"| {name}, {where} | {row}".rstrip() + " |" in readme
    for config_, count, label in ((cfg, parameters, "Llama-3.2-3B (3.21 billion)"), (larger, of_8b, "Llama-3.1-8B (8.03 billion)")):
        for tokens, head in ((4096, label), (8192, "")):
            totals = [sum(train.memory_needed(config_, count, tokens, 2, n, full).values()) / 1e9 for n in (1, 8) for full in (False, True)]
            assert f"| {head} | {tokens:,} | ".replace("|  |", "| |") + " | ".join(f"{total:.0f}" for total in totals) + " |" in readme
    assert eight["gathered"] == pytest.approx(2 * 2 * (embedding + 2 * block) + 4 * embedding, rel=1e-3)


# Real data.


def test_the_loss_of_a_lima_batch_is_the_number_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    lima = SHARED / "data" / "lima" / "train.jsonl.gz"
    if not lima.is_file():
        pytest.skip(f"{lima} is absent; set SFTGO_SHARED to the folder that has data/lima")
    base = Path(train.__file__).parent / "demo" / "base"
    model = Llama.from_pretrained(base)
    corpus = data.load_corpus(lima, data.Tokenizer(base, model.cfg.vocab_size), "auto", 1024)
    samples = data.epoch_order(len(corpus), 64, 0, 0, False)[0]
    batches = data.micro_batches(corpus, np.zeros(len(corpus.ids), bool), samples, 8192)
    assert len(batches) > 1
    with torch.no_grad():
        nats = sum(float(train.batch_nll(model, batch).double().sum()) for batch in batches)
    tokens = sum(int(batch.loss_mask.sum()) for batch in batches)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    longest = int(corpus.lengths[samples].max())
    ids, labels = torch.zeros(64, longest, dtype=torch.int64), torch.full((64, longest), -100)
    for row, i in enumerate(samples):
        span = slice(corpus.starts[i], corpus.starts[i + 1])
        sample, mask = torch.from_numpy(corpus.ids[span].astype(np.int64)), torch.from_numpy(corpus.loss_mask[span])
        ids[row, : len(sample)] = sample
        labels[row, : len(sample)] = torch.where(mask, sample, -100)
    with torch.no_grad():
        total = 0.0
        for rows in range(0, 64, 8):  # transformers averages over what it is given: weigh its means by their counts
            part = labels[rows : rows + 8]
            total += float(theirs(ids[rows : rows + 8], labels=part).loss) * int((part[:, 1:] != -100).sum())
    assert tokens == int((labels[:, 1:] != -100).sum())
    assert nats / tokens == pytest.approx(total / tokens, abs=1e-5)
