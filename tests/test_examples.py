"""examples/: each one trains the demo for a few steps and has the effect it claims; a saboteur of each lacks it."""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from model import Llama
from published.tokenizer import Tokenizer
from sftgo import sft_go
from support.named import named
from support.scores import corpus_nll

ROOT = Path(train.__file__).parent
EXAMPLES, DEMO, ROWS = ROOT / "examples", ROOT / "demo" / "base", ROOT / "demo" / "instructions.jsonl"
COMMANDS = {  # of each example's docstring
    path.stem: re.search(r"^ *python train\.py (.+)$", path.read_text(), re.M) for path in sorted(EXAMPLES.glob("*.py"))
}
STEPS, BATCH, LAM = 2, 12, 0.6
FLAGS = f"--recipe demo --dtype float32 --max-steps {STEPS} --lr 3e-3 --lam-max {LAM} --micro-batch-tokens 511"
FLAGS += f" --context 512 --batch-size {BATCH} --checkpoint-every 0"  # two or more micro-batches a step


def trained(tmp_path, file, *more, name=None):
    """metrics.jsonl of the demo under the flags of the docstring of examples/<name>.py, with `file` in its place."""
    name = name or file.stem
    flags = COMMANDS[name][1].replace(f"examples/{name}.py", str(file)).split()
    out = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
    train.train(train.parse_args([*FLAGS.split(), *flags, *more, "--out", str(out)]))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    return rows


def groups(row):
    """The groups of a line of the log, without empty ones: [mean, tokens] of each."""
    both = [[row["unimportant"], row["unimportant_tokens"]], [row["important"], row["important_tokens"]]]
    return [group for group in row.get("groups", both) if group[1]]


def near(a, b):
    return a == pytest.approx(b, abs=2e-4)


@functools.cache
def corpus():
    return data.load_corpus(ROWS, Tokenizer(DEMO, 8192), "auto", 512)


# What each one claims: (metrics, the run's folder for more runs, the file).


def softmax(rows, tmp_path, file):
    for row in rows:
        means = [mean for mean, _ in groups(row)]
        weights = [math.exp(mean) for mean in means]
        soft = sum(w * mean for w, mean in zip(weights, means)) / sum(weights)
        assert len(means) == 3 and near(row["loss"], (1 - LAM) * row["ce"] + LAM * soft)
    nats, tokens = torch.tensor([2.0, 9.0, 0.0]), torch.tensor([2.0, 3.0, 0.0])  # means 1, 3 and none
    prices = train.price(lambda n, t: named(f"{file}:softmax", "--objective")(n, t, 1.0), nats, tokens)
    share = 1 / (1 + math.e**-2)  # the weights have no gradient of their own
    assert torch.allclose(prices, torch.tensor([(1 - share) / 2, share / 3, 0.0], dtype=torch.float64))


def cvar(rows, tmp_path, file):
    for row in rows:
        left = whole = 0.3 * sum(count for _, count in groups(row))
        total = 0.0
        for mean, count in sorted(groups(row), reverse=True):
            taken = min(left, count)
            total, left = total + taken * mean, left - taken
        assert len(groups(row)) == 5 and near(row["loss"], (1 - LAM) * row["ce"] + LAM * total / whole)


def group_dro(rows, tmp_path, file):
    log_q = [0.0] * 3
    for row in rows:
        log_q = [q + 0.1 * mean for q, (mean, _) in zip(log_q, groups(row), strict=True)]  # multiplicative, then normed
        weights = [math.exp(q) for q in log_q]
        mixed = sum(w * mean for w, (mean, _) in zip(weights, groups(row))) / sum(weights)
        assert near(row["loss"], (1 - LAM) * row["ce"] + LAM * mixed)


def dft(rows, tmp_path, file):
    plain = trained(tmp_path, file, "--objective", "cross_entropy", name="dft")
    assert near(rows[0]["ce"], plain[0]["ce"]) and near(rows[0]["important"], plain[0]["important"])
    assert not near(rows[-1]["ce"], plain[-1]["ce"]), "another loss was trained"
    model, whole = Llama.from_pretrained(DEMO), corpus()
    samples = data.epoch_order(len(whole), BATCH, 0, 0)[0]
    (batch,) = data.micro_batches(whole, np.zeros(len(whole.ids), np.float32), samples, 9999)
    nll = batch.nll(model)[batch.loss_mask]
    loss = ((-nll.detach()).exp() * nll).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert near(rows[0]["loss"], float(loss.detach())) and rows[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def classes(rows, tmp_path, file):
    whole, counts = corpus(), [0, 0, 0]
    found = named(f"{file}:classes", "--grouper")(whole, 0)
    for i in np.flatnonzero(whole.loss_mask):
        a, b = whole.spans[i]
        word = (
            whole.text[max(0, b - 99) : b].split(" ")[-1].split("\n")[-1]
        )  # what stands before the token's end, back to white space
        last = whole.text[b - 1 : b] if b > a else ""
        expected = 2 if last.isdecimal() and last.isascii() else 1 if last.strip() and word[:1] in UPPER else 0
        assert found[i] == expected, whole.text[a - 20 : b]
        counts[expected] += 1
    assert min(counts) > 5
    logged = np.sum([[count for _, count in row["groups"]] for row in rows], 0)
    samples = np.concatenate(data.epoch_order(len(whole), BATCH, 0, 0)[:STEPS])
    there = whole.loss_mask & np.isin(whole.doc_ids, samples)
    assert logged.tolist() == np.bincount(found[there], minlength=3).tolist()


UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def shuffled(rows, tmp_path, file):
    real = trained(tmp_path, file, "--grouper", "tfidf", name="shuffled")
    assert [row["important_tokens"] for row in rows] == [row["important_tokens"] for row in real]
    assert not near(rows[0]["important"], real[0]["important"]), "other tokens"
    whole = corpus()
    before, after = (named(name, "--grouper")(whole, 0) for name in ("tfidf", f"{file}:shuffled"))
    for a, b in zip(whole.starts, whole.starts[1:]):
        mask = whole.loss_mask[a:b]
        assert np.array_equal(np.sort(before[a:b][mask]), np.sort(after[a:b][mask])), "dealt within the sample"
    nats, mask = corpus_nll(Llama.from_pretrained(DEMO), whole, 4096), whole.loss_mask
    gaps = []
    for scores in (before, after):
        group = train.groupers.cut(*map(torch.from_numpy, (scores, mask, whole.doc_ids)), (0.9,)).numpy() == 1
        gaps.append(abs(nats[group].mean() - nats[mask & ~group].mean()))
    assert gaps[1] < 0.15 < gaps[0], "over the corpus, a random group is like the rest"


CLAIMS = [softmax, cvar, group_dro, dft, classes, shuffled]
SABOTEURS = {  # what is written in the place of what
    "softmax of nothing": ("softmax", "means.detach().softmax(0)", "(0 * means).softmax(0)"),
    "a gradient through the weights": ("softmax", "means.detach().softmax(0)", "means.softmax(0)"),
    "the best tokens": ("cvar", "descending=True", "descending=False"),
    "another share": ("cvar", "ALPHA * tokens.sum()", "0.5 * tokens.sum()"),
    "never moved": ("group_dro", "self.log_weights = self.moved(nats, tokens)", "pass"),
    "moved twice": ("group_dro", "= self.moved(nats, tokens)", "= 2 * self.moved(nats, tokens)"),
    "moved away from the worst": ("group_dro", "+ self.rate", "- self.rate"),
    "no weights": ("dft", "(-nll).exp()", "nll * 0 + 1"),
    "the square root of the probability": ("dft", "(-nll).exp()", "(-nll / 2).exp()"),
    "classes exchanged": ("classes", "[2, 1], 0)", "[1, 2], 0)"),
    "the character before": ("classes", "corpus.spans[:, 1] - 1", "corpus.spans[:, 1] - 2"),
    "nothing dealt": ("shuffled", "scores[at] = scores[at[dealt]]", "pass"),
    "dealt over samples": ("shuffled", "random(len(at)), sample)", "random(len(at)), 0 * sample)"),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_an_example_does_what_it_says(claim, tmp_path):
    file = EXAMPLES / f"{claim.__name__}.py"
    claim(trained(tmp_path, file), tmp_path, file)


@pytest.mark.parametrize("saboteur", SABOTEURS)
def test_an_example_that_is_wrong_is_noticed(saboteur, tmp_path):
    name, right, wrong = SABOTEURS[saboteur]
    text, file = (EXAMPLES / f"{name}.py").read_text(), tmp_path / f"{name}.py"
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    claim = next(claim for claim in CLAIMS if claim.__name__ == name)
    with pytest.raises(AssertionError):
        claim(trained(tmp_path, file), tmp_path, file)


@pytest.mark.fast
def test_every_example_is_short_and_named_in_the_readme_of_examples():
    said = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in said and 10 <= len(path.read_text().splitlines()) <= 40, path.name
    assert {claim.__name__ for claim in CLAIMS} == {name for name, command in COMMANDS.items() if command}


# Other people's trainers.

PROGRAM = '''
"""Two steps of each example's trainer: what each process was given, its loss, the gradient of both together."""
import importlib, json, os, sys
import torch
from transformers import TrainerCallback

cases, folder, rows = json.loads(sys.argv[1]), *sys.argv[2:]
settings = dict(max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=3, seed=5)
settings |= dict(learning_rate=0.0, max_grad_norm=0.0, report_to="none", save_strategy="no", use_cpu=True)


def watched(of, seen, grads):
    class Watched(of):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            seen.append((self.state.global_step, inputs["input_ids"].tolist(), float(loss.detach())))
            return loss

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            grads.append({n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()})

    return Watched, Watch()


for examples, name, out in cases:
    sys.path[0] = examples
    for module in ("hf_trainer", "labelled", "trl_sft"):
        sys.modules.pop(module, None)
    example, seen, grads = importlib.import_module(name), [], []
    example.SFTGO, watch = watched(example.SFTGO, seen, grads)
    if name == "hf_trainer":
        model = example.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        args = example.TrainingArguments(out, remove_unused_columns=False, **settings)
        ready = example.samples(rows, folder, model.config.vocab_size)
        trainer = example.SFTGO(model, args, example.collate, ready)
    else:
        trainer = example.trainer(folder, rows, output_dir=out, **settings)
    trainer.add_callback(watch)
    trainer.train()
    torch.save({"seen": seen, "grads": grads}, f"{out}/rank{os.environ.get('RANK', 0)}.pt")
'''
TRAINERS = [("hf_trainer", 1), ("hf_trainer", 2), ("trl_sft", 2)]  # each on so many ranks
WITHOUT = {("hf_trainer", 1): "* share ", ("trl_sft", 2): "* self.accelerator.num_processes"}  # a saboteur's loss


def missing(name):
    """What an example imports that is not installed; the extra `peers` has it."""
    needed = {"hf_trainer": ("accelerate",), "trl_sft": ("trl", "datasets")}[name]
    return [package for package in needed if not importlib.util.find_spec(package)]


@pytest.fixture(scope="module")
def trained_by_others(tmp_path_factory):
    """trained_by_others(name, ranks, wrong): what each rank saw. All cases of a number of ranks run in one start."""
    pytest.importorskip("transformers")
    here = tmp_path_factory.mktemp("trainers")
    (here / "program.py").write_text(PROGRAM)

    def sabotaged(name, ranks):
        right, place = WITHOUT[name, ranks], here / f"without {ranks}"
        file = shutil.copytree(EXAMPLES, place) / "hf_trainer.py"
        assert file.read_text().count(right) == 1
        file.write_text(file.read_text().replace(right, ""))
        return place

    @functools.cache
    def started(ranks):
        there = [case for case in TRAINERS if case[1] == ranks and not missing(case[0])]
        cases = [(EXAMPLES, name, here / f"{name} {ranks}") for name, _ in there]
        cases += [(sabotaged(*case), case[0], here / f"{case[0]} {ranks} wrong") for case in there if case in WITHOUT]
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split() if ranks > 1 else []
        command = [sys.executable, *launch, here / "program.py", json.dumps(cases, default=str), DEMO, ROWS]
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        env = os.environ | quiet
        ended = subprocess.run([*map(str, command)], env=env, cwd=here, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]

    def seen(name, ranks, wrong=False):
        if missing(name):
            pytest.skip(f"{missing(name)} not installed: in the extra `peers`")
        started(ranks)
        out = here / f"{name} {ranks}{' wrong' * wrong}"
        return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]

    return seen


@pytest.mark.parametrize("name, ranks", TRAINERS)
def test_another_trainer_computes_what_scope_micro_batch_does(trained_by_others, name, ranks):
    compare(trained_by_others(name, ranks))


@pytest.mark.parametrize("name, ranks", WITHOUT)
def test_a_micro_batch_that_counts_too_much_is_noticed(trained_by_others, name, ranks):
    found = trained_by_others(name, ranks, wrong=True)
    with pytest.raises(AssertionError, match="gradient"):
        compare(found)


def compare(found):
    """Losses and gradients of two steps of an example's trainer, and those of our own loop on the same rows."""
    ranks, whole, model = len(found), corpus(), Llama.from_pretrained(DEMO)
    scores = named("tfidf", "--grouper")(whole, 0)
    at = {tuple(whole.ids[a:b].tolist()): i for i, (a, b) in enumerate(zip(whole.starts, whole.starts[1:]))}
    label, objective = train.groupers.labeller(None, (0.9,)), lambda nats, tokens: sft_go(nats, tokens, 0.9)
    for step in range(2):
        batches, losses = [], []
        for of_rank in found:
            for _, ids, loss in [seen for seen in of_rank["seen"] if seen[0] == step]:
                rows = [at[tuple(row[: max(i for i, x in enumerate(row, 1) if x)])] for row in ids]  # padded with 0
                batches.append(data.pack(whole, scores, np.array(rows)))
                losses.append(loss / ranks)
        assert len(batches) == 3 * ranks and len({int(batch.loss_mask.sum()) for batch in batches}) > 1
        model.zero_grad()
        *_, loss = train.micro_batch_step(model, batches, objective, label)
        for other in found:
            grads = other["grads"][step]
            for n, p in model.named_parameters():
                assert (p.grad - grads[n]).abs().max() < 1e-5, f"gradient of {n}"
        assert abs(sum(losses) - float(loss)) < 1e-5
