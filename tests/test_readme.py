"""README.md and docs/: what a newcomer types first does what is said beside it, and what they name exists."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import data
import eval.__main__
import groupers
import train
from published.tokenizer import Tokenizer, require_trained_headers
from support import look
from support.recipes import DEMO
from support.named import named
from support.scores import without_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BASE, INSTRUCTIONS = ROOT / "demo" / "base", ROOT / "demo" / "instructions.jsonl"
NOT_FILES_OF_OURS = {"hacks.py", "metrics.jsonl", "items.jsonl", "lima.jsonl", "phi.jsonl", "theta.jsonl"}


def run(command: list, folder: Path, **environment: str) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def block(text: str, word: str) -> str:
    """The Python program in a text that has the word in it."""
    (found,) = [code for code in re.findall(r"```python\n(.+?)```", text, re.DOTALL) if word in code]
    return found


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# The first commands.


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The working directory of the README's first command, and what the command printed."""
    (command,) = re.findall(r'^pip install -e "\.\[plots\]" && (.+)$', README, re.MULTILINE)
    assert command == "python train.py"
    folder = tmp_path_factory.mktemp("newcomer")
    return folder, run([ROOT / "train.py"], folder)


def test_the_readmes_first_command_trains_the_demo(demo):
    folder, said = demo
    out = folder / "runs" / "demo-1"
    assert "in runs/demo-1\n" in said and "\nsample " in said
    assert {"config.json", "metrics.jsonl", "losses.png", "model"} <= set(os.listdir(out))
    log = metrics(out)
    first, last = (sum(row["ce"] for row in rows) / 20 for rows in (log[:20], log[-20:]))
    from_, to, steps = re.search(r"falls from ([\d.]+) to ([\d.]+) nats.+\n?.+of (\d+) steps", README).groups()
    assert len(log) == int(steps)
    assert first == pytest.approx(float(from_), abs=0.15) and last == pytest.approx(float(to), abs=0.15)


def test_a_second_first_command_takes_the_next_folder(demo):
    folder, _ = demo
    assert "in runs/demo-2\n" in run([ROOT / "train.py", "--max-steps", "3"], folder)
    assert len(metrics(folder / "runs" / "demo-2")) == 3 and len(metrics(folder / "runs" / "demo-1")) > 3


def test_the_trained_model_answers_as_the_docs_ask_it(demo, monkeypatch, capsys):
    folder, _ = demo
    monkeypatch.chdir(folder)
    exec(block(DOCS["running.md"], "generate"), {})
    assert len(capsys.readouterr().out.split()) > 3


@pytest.mark.fast
def test_a_virtual_environment_comes_before_pip():
    assert re.search(r"^python3 -m venv \.venv && .+\npip install ", README, re.MULTILINE)
    assert re.search(r'^pip install -e ".*" && pytest$', README, re.MULTILINE), ".ci/run looks for this line"


def test_the_readmes_plan_is_the_one_that_is_printed():
    assert f"```text\n{run(['train.py', '--dry-run'], ROOT)}```\n" in README


def test_the_readmes_hacks_train_three_groups_as_printed(tmp_path):
    (command,) = re.findall(r"^python PATH/train\.py (.+hacks\.py.+)$", README, re.MULTILINE)
    (tmp_path / "hacks.py").write_text(block(README, "def soft_worst"))
    said = run([ROOT / "train.py", *command.split(), "--max-steps", "2"], tmp_path)
    assert "method  hacks.py:soft_worst, " in said
    shares = re.search(
        r"groups by hacks\.py:long_tokens, η 0\.5 0\.9: 3 groups, [\d.]+%, ([\d.]+)%, ([\d.]+)% of", said
    )
    middle, top = (float(share) for share in shares.groups())
    assert 20 < middle < 60 and 5 < top < 20
    for row in metrics(tmp_path / "runs" / "demo-1"):
        (low, few), *_, (high, many) = row["groups"]
        assert len(row["groups"]) == 3 and sum(n for _, n in row["groups"]) > many > 0 < few
        assert row["ce"] < row["loss"] < max(mean for mean, _ in row["groups"]), "the worse groups weigh more"
        assert (low, high) == (row["unimportant"], row["important"])


def test_the_readmes_look_at_tokens_writes_its_page(tmp_path):
    (command,) = re.findall(r"^`python -m support\.look ([^`]+)`", README, re.MULTILINE)
    said = run([ROOT / "support" / "look.py", *command.split()], tmp_path)
    assert said.count("══ row") == 3
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert all(f"<h3>{name}</h3>" in page for name in ("tfidf", "frequency", "loss"))


# The demo.


@pytest.mark.fast
def test_the_demo_is_complete_and_small():
    assert (ROOT / "demo").samefile(DEMO)
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 8_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(BASE))
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 200 and len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.fast
def test_the_demos_base_is_refused_the_llama3_template():
    with pytest.raises(ValueError, match="this base model never trained .*use --template plain"):
        require_trained_headers(BASE, Tokenizer(BASE, 4096))


@pytest.mark.fast
def test_the_readmes_marked_sentence_is_what_tfidf_marks():
    tokenizer = Tokenizer(BASE, 4096)
    corpus = data.load_corpus(INSTRUCTIONS, tokenizer, "auto", 1024)
    prior = torch.from_numpy(without_model(named("tfidf", "--grouper"), corpus, 0))
    mask, doc_ids = torch.from_numpy(corpus.loss_mask), torch.from_numpy(corpus.doc_ids)
    important = groupers.cut(prior, mask, doc_ids, (0.8,)) == 1
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    (i,) = [i for i, row in enumerate(rows) if row["prompt"] == "Why should we wash our hands before eating?"]
    marked = ""
    for j in range(corpus.starts[i], corpus.starts[i + 1]):
        piece = tokenizer.backend.decode([int(corpus.ids[j])])
        if corpus.kind[j] == data.RESPONSE:
            glue = "·" if piece[0].isalpha() and important[j - 1 : j + 1].any() else ""
            marked += glue + (" " * piece.startswith(" ") + f"**{piece.strip()}**" if important[j] else piece)
    quote = " ".join(line.removeprefix(">").strip() for line in README.splitlines() if line.startswith(">"))
    assert quote.split("Assistant: ")[1].split() == marked.split()


# What README and docs name.


@pytest.mark.fast
def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 100 and len(README.split()) <= 2000


@pytest.mark.fast
@pytest.mark.parametrize("text", [README, *DOCS.values()], ids=["README.md", *DOCS])
def test_every_file_that_is_named_exists(text):
    named = set(re.findall(r"`((?:[a-z0-9_]+/)*[a-z0-9_]+\.(?:py|md|jsonl|toml))`", text))
    linked = set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
    missing = {name for name in named - NOT_FILES_OF_OURS | linked if not (ROOT / name).exists()}
    assert not missing
    assert not re.search(r"[\s`(]/[a-z]+/[a-z]", text), "a path of one machine"


@pytest.mark.fast
def test_the_readme_names_every_docs_file():
    assert {f"docs/{name}" for name in DOCS} <= set(re.findall(r"docs/\w+\.md", README))


@pytest.mark.fast
def test_what_the_reading_table_names_is_in_its_file():
    module, names = None, 0
    for file, code in re.findall(r"^\| (?:\d\. `(\w+)\.py`.*?)? ?\| .+? \| (.+?) \|$", README, re.MULTILINE):
        module = import_module(file) if file else module
        for name in re.findall(r"`(\w+)`", code) if module else ():
            assert hasattr(module, name), f"{module.__name__} has no {name}"
            names += 1
        if file == "model":
            break
    assert names >= 10


@pytest.mark.fast
def test_every_flag_of_our_commands_exists(capsys):
    def of(parse) -> set[str]:
        with pytest.raises(SystemExit):
            parse(["--help"])
        return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))

    ours = {"train.py": {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train.Config)} | {"--help"}}
    ours |= {"-m support.look": of(look.parse_args), "-m eval": of(eval.__main__.parse_args)}
    inline = set.union(*ours.values()) | {"--to", "--paper"} | {"--max-restarts", "--shutdown-timeout"}  # torchrun's
    seen = set()
    for text in map(joined, (README, *DOCS.values())):
        for program, rest in re.findall(r"(train\.py|-m support\.look|-m eval)\b(?!\.)([^`|;&\n]*)", text):
            given = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest))
            assert given <= ours[program], (program, given - ours[program])
            seen |= given
        named = {flag for code in re.findall(r"`(--[^`]+)`", text) for flag in re.findall(r"--[a-z][a-z0-9-]*", code)}
        assert named <= inline, named - inline
        seen |= named
    assert len(seen) > 30


def joined(text: str) -> str:
    """The text with commands that go over several lines in one line each."""
    return re.sub(r"\\\n\s*", "", text)


def test_the_memory_table_is_what_its_program_prints():
    table = run(["bench/memory.py"], ROOT)
    assert table in DOCS["running.md"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    needed = {tuple(row[:4]): row[-2 if row[1] == "1" else -1] for row in rows}  # eight GPUs: LIMA's step is one each
    said = [needed[model, ranks, "4,096", ""] for model in ("3B", "8B") for ranks in ("1", "8")]
    one, eight, large, large_eight = said
    text = " ".join(README.split())
    assert f"for 3B {one} GB, or {eight} GB each of eight; for 8B {large} GB, or {large_eight} GB each" in text
