"""--grouper FILE.py:NAME and --objective FILE.py:NAME: a user's own functions train, and every mistake is one line."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train

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
NUMBER = 3
'''


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def config(folder, rows, *flags):
    base = f"--model {folder} --data {rows} --context 128 --micro-batch-tokens 512 --batch-size 4 --lr 1e-2"
    return train.parse_args(
        [*base.split(), *"--dtype float32 --max-steps 3 --checkpoint-every 0".split(), *map(str, flags)]
    )


def run(folder, rows, out, *flags):
    train.train(config(folder, rows, "--out", out, *flags))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, load_file(out / "model" / "model.safetensors")


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
    many = "--grouper", "tfidf", "--micro-batch-tokens", 127  # a batch is several micro-batches
    metrics, weights = run(folder, rows, tmp_path / "a", *many, "--objective", f"{mine}:plain")
    others, other_weights = run(folder, rows, tmp_path / "b", *many, "--objective", "cross_entropy")
    assert [row["loss"] for row in metrics] == [row["loss"] for row in others]
    assert all(torch.equal(w, other_weights[name]) for name, w in weights.items())


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
        ("mine.py:NUMBER", MINE, "mine.py has no function NUMBER"),
        ("mine.py", MINE, "expected one of .*, or FILE.py:NAME"),
        ("mine.py:f", "def f(:\n", r"SyntaxError while it was imported \(.*mine.py, line 1\)"),
        ("mine.py:f", "1 / 0\n", r"ZeroDivisionError while it was imported"),
        ("mine.py:f", "import absent_library\n", "No module named 'absent_library'"),
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
@pytest.mark.parametrize(
    "returned, found",
    [
        ("np.zeros(3)", r"float64 \(3,\)"),
        ("np.zeros((len(c.ids), 2))", r"float64 \(\d+, 2\)"),
        ("np.zeros(len(c.ids), int)", r"int64 \(\d+,\)"),
        ("c.loss_mask", r"bool \(\d+,\)"),
        ("[0.0] * len(c.ids)", "list"),
        ("__import__('torch').zeros(len(c.ids))", "torch.float32"),
        ("None", "NoneType"),
    ],
)
def test_a_grouper_that_returns_anything_but_a_float_for_each_token_is_refused(folder, rows, mine, returned, found):
    mine.write_text(f"import numpy as np\n\n\ndef f(c, seed):\n    return {returned}\n")
    out = mine.parent / "out"
    with pytest.raises(
        ValueError, match=rf"--grouper .*mine.py:f: returned {found}.*, expected floats .*\(\d+,\)"
    ) as e:
        train.train(config(folder, rows, "--grouper", f"{mine}:f", "--out", out))
    assert "\n" not in str(e.value) and not out.exists()
