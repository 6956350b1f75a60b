"""README.md: the command that a newcomer types first does what is said beside it, and does it twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import groupers
import recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_first_command_works_and_works_twice(tmp_path):
    (command,) = re.findall(r'^pip install -e "\.\[plots\]" && (.+)$', README, re.M)
    assert command == "python train.py"
    finals = []
    for n in (1, 2):
        done = subprocess.run([sys.executable, ROOT / "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        out = tmp_path / "runs" / f"demo-{n}"
        assert f"in runs/demo-{n}\n" in done.stdout and "\nsample " in done.stdout
        assert {"config.json", "metrics.jsonl", "losses.png", "model"} <= set(os.listdir(out))
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        finals.append(log[-1]["ce"])
        assert sum(row["ce"] for row in log[-20:]) / 20 < log[0]["ce"] - 0.5, "the demo should visibly learn"
    assert finals[0] == finals[1]

    (code,) = re.findall(r"```python\n(.+?)```", README, re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.split()) > 3, done.stderr


@pytest.mark.fast
def test_the_demo_is_whole_and_small():
    base = recipes.DEMO / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) <= 8_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(base))
    rows = [json.loads(line) for line in (recipes.DEMO / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 200 and len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.fast
def test_the_readmes_plan_is_the_one_that_is_printed():
    done = subprocess.run([sys.executable, "train.py", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "".join(f"    {line}\n" for line in done.stdout.splitlines()) in README


def test_the_readmes_look_at_tokens_writes_its_page(tmp_path):
    (command,) = re.findall(r"^python groupers\.py (.+)$", README, re.M)
    done = subprocess.run([sys.executable, ROOT / "groupers.py", *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("══ row") == 3, done.stderr
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert all(f"<h3>{name}</h3>" in page for name in ("tfidf", "frequency", "loss"))


def test_the_readme_counts_the_tests(request):
    chosen = request.config.option
    if chosen.markexpr or chosen.keyword or len({item.path for item in request.session.items}) < len(list(ROOT.glob("tests/test_*.py"))):
        pytest.skip("only a part of the tests was asked for")
    assert f"pass the tests: {len(request.session.items)} tests," in README


@pytest.mark.fast
def test_the_demos_base_is_refused_the_llama3_template():
    tokenizer = data.Tokenizer(recipes.DEMO / "base", 4096)
    with pytest.raises(ValueError, match="this base model never trained .*use --template plain"):
        data.require_trained_headers(recipes.DEMO / "base", tokenizer)


@pytest.mark.fast
def test_the_readmes_marked_sentence_is_what_tfidf_marks():
    tokenizer = data.Tokenizer(recipes.DEMO / "base", 4096)
    corpus = data.load_corpus(recipes.DEMO / "instructions.jsonl", tokenizer, "auto", 1024)
    important = groupers.label_corpus("tfidf", corpus, 0.8, 0)
    rows = [json.loads(line) for line in (recipes.DEMO / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    (i,) = [i for i, row in enumerate(rows) if row["prompt"] == "Why should we wash our hands before eating?"]
    marked = ""
    for j in range(corpus.starts[i], corpus.starts[i + 1]):
        piece = tokenizer.backend.decode([int(corpus.ids[j])])
        if corpus.kind[j] == data.RESPONSE:
            glue = "·" if piece[0].isalpha() and important[j - 1 : j + 1].any() else ""
            marked += glue + (" " * piece.startswith(" ") + f"**{piece.strip()}**" if important[j] else piece)
    quote = " ".join(line.removeprefix(">").strip() for line in README.splitlines() if line.startswith(">"))
    assert quote.split("Assistant: ")[1].split() == marked.split()


@pytest.mark.fast
def test_every_file_and_flag_the_readme_names_exists():
    import dataclasses

    import train

    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train.Config)}
    flags |= {"--html", "--row", "--stats"}  # of groupers.py
    flags |= {
        "--standalone",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-id",
        "--rdzv-endpoint",
        "--max-restarts",
    }  # torchrun's
    flags |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--requeue", "--signal"}  # Slurm's
    flags |= {"--exclude", "--repo-type"}  # of hf download
    flags |= {"--shutdown-timeout", "--kill-on-bad-exit"}  # torchrun's, and srun's
    flags |= {"--model", "--tasks", "--limit", "--samples", "--bos", "--data", "--to", "--paper", "--format", "--whole"}  # of eval and its bench
    ours = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README)) - {"--help"}
    assert ours <= flags, ours - flags
    for name in re.findall(r"`((?:[a-z0-9_]+/)*[a-z0-9_]+\.(?:py|md|jsonl|toml))`", README):
        assert (ROOT / name).exists() or name in ("metrics.jsonl", "items.jsonl") or (ROOT / "eval" / name).exists(), name
