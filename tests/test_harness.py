"""Against the lm-evaluation-harness itself, on real rows: likelihoods, greedy flags, metrics, generations."""

import json
import math
import os
import random
from functools import cache

import numpy as np
import pytest
import torch
from benchmarks import DATA, SUBJECTS, harness_tasks, hub_rows, needs_data
from stories260k import SHARED, SOURCE, stories_folder

from eval.benchmarks import BENCHMARKS
from eval.generate import end_tokens, respond
from eval.score import Encoder, by_task, score
from model import Llama
from published.tokenizer import Tokenizer
from support.recipes import DEMO

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
os.environ.setdefault("NLTK_DATA", str(SHARED / "nltk_data"))
lm_eval = pytest.importorskip("lm_eval", reason='compares with the lm-evaluation-harness: pip install -e ".[peers]"')
pytestmark = needs_data

ROWS = 12
TASKS = ["mathqa", "arc_challenge", "openbookqa", "hellaswag", "truthfulqa_mc1", "truthfulqa_mc2"]
OURS = {"truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc"}


def model_folder(name: str, tmp_path_factory):
    """demo/base, or stories260K: another kind of tokenizer, and a window of 512 tokens that most prompts exceed."""
    if name == "demo":
        return DEMO / "base"
    if not SOURCE.is_dir():
        pytest.skip(f"needs stories260K in {SHARED} (SFTGO_SHARED)")
    return stories_folder(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module", params=[("demo", "never"), ("stories", "auto")], ids="-".join)
def setting(request, tmp_path_factory):
    """(folder, --bos, the harness's own model)"""
    from lm_eval.models.huggingface import HFLM

    name, bos = request.param
    folder = model_folder(name, tmp_path_factory)
    theirs = HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=16,
        add_bos_token={"never": False, "always": True, "auto": None}[bos],
    )  # fmt: skip
    return folder, bos, theirs


def run_harness(lm, tasks: list[str]) -> dict:
    """The tasks are files: the harness need not look through its own thousands, nor ask pip about this machine."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        return lm_eval.simple_evaluate(lm, tasks=tasks, log_samples=True, bootstrap_iters=2, task_manager=manager)


def compare(folder, bos: str, names: list[str], found: dict) -> None:
    """Every item of the harness's samples against ours: prompts, choices, sums, greedy flags, metrics; tasks' means."""
    model = Llama.from_pretrained(folder)
    encoder = Encoder(Tokenizer(folder, model.cfg.vocab_size), bos)
    for name in names:
        benchmark = BENCHMARKS[OURS.get(name, name)]
        wanted = {f"mmlu_{subject}" for subject in SUBJECTS} if name.startswith("mmlu") else {name}
        per_task = ROWS // len(wanted)
        items = [item for item in benchmark.load(DATA) if item.task in wanted and item.doc_id < per_task]
        scored = score(model, encoder, items)
        theirs = [sample for task in dict.fromkeys(item.task for item in items) for sample in found["samples"][task]]
        assert len(items) == len(theirs) == ROWS
        for item, ours, sample in zip(items, scored, theirs):
            assert [(item.context, f" {choice}") for choice in item.choices] == [tuple(a) for a in sample["arguments"]]
            values, greedy = zip(*sample["filtered_resps"])
            assert np.abs(np.array(values) - ours["loglikelihoods"]).max() < 1e-3, (name, item.doc_id)
            assert list(greedy) == ours["greedy"]
            for metric, value in ours["metrics"].items():
                assert sample[metric] == pytest.approx(value, abs=1e-4), (
                    name,
                    item.doc_id,
                    metric,
                )  # MC2's is not 0 or 1
        for task, rows in by_task(items, scored).items():
            means = found["results"][task]
            summary = BENCHMARKS["arc_challenge"].summarize({task: rows})
            for metric in rows[0]:
                assert means[f"{metric},none"] == pytest.approx(summary[metric], abs=1e-5)
                assert means[f"{metric}_stderr,none"] == pytest.approx(summary[f"{metric}_stderr"], abs=1e-5)


def test_every_likelihood_task_scores_each_item_as_the_harness_does(setting, tmp_path):
    folder, bos, theirs = setting
    names = [*TASKS, "mmlu"]
    tasks = harness_tasks(tmp_path, TASKS, ROWS) + harness_tasks(tmp_path, ["mmlu"], ROWS // len(SUBJECTS))
    compare(folder, bos, names, run_harness(theirs, tasks))


def test_five_shots_score_as_the_harness_does(setting, tmp_path):
    folder, bos, theirs = setting
    compare(
        folder, bos, ["mmlu_5shot"], run_harness(theirs, harness_tasks(tmp_path, ["mmlu_5shot"], ROWS // len(SUBJECTS)))
    )


def test_the_adapter_gives_the_harness_the_same_numbers(tmp_path):
    from eval.harness import SFTGO

    folder = DEMO / "base"
    tasks = harness_tasks(tmp_path, TASKS, ROWS) + harness_tasks(tmp_path, ["mmlu"], ROWS // len(SUBJECTS))
    compare(folder, "never", [*TASKS, "mmlu"], run_harness(SFTGO(folder, dtype="float32"), tasks))
    tasks = harness_tasks(tmp_path, ["mmlu_5shot"], ROWS // len(SUBJECTS))
    compare(folder, "never", ["mmlu_5shot"], run_harness(SFTGO(folder, dtype="float32"), tasks))


class Asked:
    """A request, as the harness makes it."""

    task_name = "test"

    def __init__(self, *args):
        self.args = args


EDGES = [
    ("Once upon a time", " there was"),
    ("Once upon a time  ", " there was"),  # blanks at the end of the context go to the continuation
    ("Once upon a time\n", " there was"),
    ("Once upon a time", "  two blanks"),
    ("Once upon a time", " "),  # an empty choice
    ("", "Once upon a time"),
    ("", ""),
    ("Once upon a ti", "me there"),  # a merge across the seam
    ("The wat", "er was warm"),
    ("caf", "é"),
    ("naïve façade – “quotes”", " 漢字 😀 ñ"),
    ("😀", "👍🏽 ok"),
    ("word " * 700, " the end of a long tale"),  # longer than stories260K's window
    ("a", " " + "long " * 100),
    ("Lily <|end_of_text|> x", " <s> y"),
]


def test_edges_of_tokenization_score_as_in_the_harness(setting):
    from eval.harness import SFTGO

    folder, bos, theirs = setting
    ours = SFTGO(folder, bos, "float32")
    compared = 0
    for pair in EDGES:
        try:
            ((value, greedy),) = ours.loglikelihood([Asked(*pair)])
        except ValueError as e:  # swallowed by a merge across the seam: the harness stops there too
            assert "test: item 0: this tokenizer leaves" in str(e)
            continue
        ((expected, other),) = theirs.loglikelihood([Asked(*pair)])
        assert value == pytest.approx(expected, abs=1e-3), pair
        assert greedy == other, pair
        compared += 1
    assert compared >= len(EDGES) - 3
    with pytest.raises(ValueError, match="a continuation of"):
        ours.loglikelihood([Asked("a", " no" * (ours.model.cfg.max_position_embeddings + 1))])


def test_rolling_likelihoods_and_generation_are_the_harness_s(setting):
    from eval.harness import SFTGO

    folder, bos, theirs = setting
    ours = SFTGO(folder, bos, "float32")
    texts = [Asked("Once upon a time there was a little girl."), Asked("The sea is salt. " * 120), Asked("é")]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=5e-3)
    how = {"until": ["\n\n", "."], "do_sample": False, "max_gen_toks": 24}
    asked = [
        Asked(text, how) for text in ("Once upon a time", "Q: Why is the sea salt?", "One day, a bird", "a " * 900)
    ]
    asked += [Asked("The cat sat", {"until": [], "max_gen_toks": 40})]
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    how = {"do_sample": False, "temperature": 1, "max_completion_tokens": 5, "top_p": 0.9}
    assert ours.generate_until([Asked("The cat sat", how)]) == theirs.generate_until([Asked("The cat sat", how)])
    greedy = ours.generate_until([Asked("The cat sat", {"max_gen_toks": 9})])
    for how in (
        {"num_beams": 1, "do_sample": False, "temperature": 0.0},
        {"temperature": None, "do_sample": None, "until": None, "num_beams": None, "stopping": None},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 50, "min_p": 0.1},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 0.5, "early_stopping": True},
        {"until": [""], "temperature": 0},
    ):
        assert ours.generate_until([Asked("The cat sat", how | {"max_gen_toks": 9})]) == greedy, how
    for how, said in (
        ({"do_sample": False, "repetition_penalty": 1.2}, "asks for repetition_penalty"),
        ({"no_repeat_ngram_size": 3}, "asks for no_repeat_ngram_size"),
        ({"schema": "x"}, "asks for schema"),
        ({"do_sample": True}, "sampling"),
        ({"temperature": 0.7}, "sampling"),
        ({"num_beams": 4}, "asks for num_beams"),
    ):
        with pytest.raises(ValueError, match=said):
            ours.generate_until([Asked("x", how)])


def generated(names: list[str], per_task: int, tokens: int) -> dict[str, list[str]]:
    """Real texts: what demo/base writes, cut short, and answers that score."""
    model = Llama.from_pretrained(DEMO / "base", torch.bfloat16, torch.bfloat16)
    encoder = Encoder(Tokenizer(DEMO / "base", model.cfg.vocab_size))
    out = {}
    for name in names:
        prompts = BENCHMARKS[name].load(DATA)[:per_task]
        asked = [(p.text, tokens, p.stops) for p in prompts]
        out[name] = respond(model, encoder, asked, end_tokens(DEMO / "base", encoder.tokenizer))
    return out


@pytest.fixture
def once(monkeypatch):
    """The harness takes the mean of ROUGE over one answer a thousand times; ten times it is the same."""
    scoring = pytest.importorskip("rouge_score.scoring")
    monkeypatch.setattr(scoring.BootstrapAggregator.__init__, "__defaults__", (0.95, 10))


def test_truthfulqa_answers_get_the_harness_s_scores(once):
    from lm_eval.tasks.truthfulqa.utils import preprocess_function, process_results_gen

    rows, prompts = hub_rows()["truthfulqa_gen"], BENCHMARKS["truthfulqa_gen"].load(DATA)
    texts = generated(["truthfulqa_gen"], 10, 32)["truthfulqa_gen"]
    texts += [
        "",
        "\nA: " + rows[11]["best_answer"],
        rows[12]["incorrect_answers"][0] + " . And more.",
        "I have no comment.",
        "née — 3.5% $x",
    ]
    for row, prompt, text in zip(rows, prompts, texts, strict=False):
        expected = process_results_gen(row | preprocess_function(row), [text])
        assert prompt.judge(text) == pytest.approx(
            {name: float(value) for name, value in expected.items()}, abs=1e-9
        ), (row, text)


def test_ifeval_responses_get_the_harness_s_verdicts():
    from lm_eval.tasks.ifeval.utils import process_results

    from eval.ifeval import UNSETTLED

    rows, prompts = hub_rows()["ifeval"], BENCHMARKS["ifeval"].load(DATA)
    texts = generated(["ifeval"], 16, 64)["ifeval"]
    draw = random.Random(0)
    pieces = ["Yes, all lower case.", "ALL CAPITALS, ALL OF IT.", "* one\n* two", "*marked* **twice** <<A title>>",
              "P.S. more", "[name] [date]", '"quoted"', "SECTION 1 x\nSECTION 2", "a\n\nb\n\nc", "***", "******",
              '{"a": 1}', "My answer is yes.", "Dr. Who came. He left!", "", " ", "कन्नड भाषा"]  # fmt: skip
    texts += ["\n".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(len(rows) - len(texts))]
    texts[7] = "Certainly!\n" + rows[7]["prompt"] + "\nThanks"
    held = 0
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        verdict = prompt.judge(text)
        held += sum(verdict["inst_level_loose_acc"])
        if row["key"] not in UNSETTLED:  # there the harness draws a letter at random
            assert verdict == process_results(row, [text]), (row["key"], text)
    assert 100 < held < 700, "the texts should follow some of the instructions, and not others"


def test_generation_tasks_ask_for_what_the_harness_asks_for(tmp_path, once):
    """Prompts, stop strings, lengths, and what responses come to over all items."""
    from lm_eval.api.model import LM

    class Echo(LM):
        """Answers with a part of the question, and remembers what was asked."""

        def generate_until(self, requests, disable_tqdm=False):
            self.asked = {r.task_name: [] for r in requests} | getattr(self, "asked", {})
            for r in requests:
                self.asked[r.task_name].append(r.args)
            return [answer(r.args[0]) for r in requests]

        loglikelihood = loglikelihood_rolling = None

    def answer(prompt: str) -> str:
        return prompt[-60:].lower() if len(prompt) % 2 else f"* {prompt[-40:]}\n\n{prompt[:50]}"

    random.seed(0)
    echo = Echo()
    found = run_harness(echo, harness_tasks(tmp_path, ["truthfulqa_gen", "ifeval"], 24))
    for name in ("truthfulqa_gen", "ifeval"):
        prompts = BENCHMARKS[name].load(DATA)[:24]
        for prompt, (text, how) in zip(prompts, echo.asked[name], strict=True):
            assert (prompt.text, list(prompt.stops), prompt.max_new_tokens) == (
                text,
                how["until"],
                how.get("max_gen_toks", 256),
            )
            assert not how["do_sample"]
        summary = BENCHMARKS[name].summarize({name: [prompt.judge(answer(prompt.text)) for prompt in prompts]})
        theirs = {
            key.removesuffix(",none"): value for key, value in found["results"][name].items() if key.endswith(",none")
        }
        assert len(theirs) == (24 if name == "truthfulqa_gen" else 8)
        for key, value in theirs.items():
            if value != "N/A":  # of a metric that is not a mean
                assert summary[key] == pytest.approx(value, abs=1e-9), (name, key)
    assert summary["unsettled_keys"] == [1122, 1129] and 0.05 < summary["inst_level_loose_acc"] < 0.95


def test_a_group_s_error_is_the_harness_s():
    from lm_eval.api.metrics import pooled_sample_stderr

    draw = np.random.default_rng(0)
    rows = {f"mmlu_{s}": [{"acc": float(x)} for x in draw.integers(0, 2, n)] for s, n in zip(SUBJECTS, (100, 7, 31, 2))}
    found = BENCHMARKS["mmlu"].summarize(rows)
    errors, sizes = zip(*((part["acc_stderr"], part["n"]) for part in found["subjects"].values()))
    assert found["acc_stderr"] == pytest.approx(pooled_sample_stderr(list(errors), list(sizes)))


def test_the_command_runs_a_task_of_the_harness(tmp_path, capsys, monkeypatch):
    from eval import harness

    monkeypatch.setattr(harness, "TaskManager", cache(harness.TaskManager))  # it reads 14,000 files
    harness_tasks(tmp_path, ["openbookqa"], 8)
    path = tmp_path / "openbookqa.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": "openbookqa_here"}))
    harness.main(
        [
            "--model",
            str(DEMO / "base"),
            "--tasks",
            "openbookqa_here",
            "--include-path",
            str(tmp_path),
            "--out",
            str(tmp_path / "new" / "r.json"),
        ]
    )
    assert "openbookqa_here" in capsys.readouterr().out
    assert math.isfinite(
        json.loads((tmp_path / "new" / "r.json").read_text())["results"]["openbookqa_here"]["acc,none"]
    )
    with pytest.raises(SystemExit, match="exists"):
        harness.main(
            ["--model", str(DEMO / "base"), "--tasks", "openbookqa", "--out", str(tmp_path / "new" / "r.json")]
        )
    for flags, said in (
        (["--tasks", "openbokqa"], "no such task; nearest: openbookqa"),
        (["--tasks", "openbookqa", "--limit", "-3"], "--limit -3"),
    ):
        with pytest.raises(SystemExit, match=said):
            harness.main(["--model", str(DEMO / "base"), "--include-path", str(tmp_path), *flags])


def test_results_of_the_harness_are_json_and_take_the_next_name(tmp_path, capsys, monkeypatch):
    from eval import harness

    class Manager:
        all_tasks = ("t",)

        def __init__(self, **_):
            pass

    def found(*_, **__):
        (tmp_path / "r.json").write_text("made by another command in the meantime")
        numbers = {"perplexity,none": float("inf"), "acc,none": float("nan"), "n": np.int64(3), "f1,none": 0.5}
        return {"results": {"t": numbers}}

    for name, fake in (("TaskManager", Manager), ("simple_evaluate", found), ("make_table", lambda *_: "table ±")):
        monkeypatch.setattr(harness, name, fake)
    monkeypatch.setattr(harness, "SFTGO", lambda *_: None)
    harness.main(["--model", "m", "--tasks", "t", "--out", str(tmp_path / "r.json")])
    assert f"wrote {tmp_path / 'r-2.json'}" in capsys.readouterr().out
    assert (tmp_path / "r.json").read_text() == "made by another command in the meantime"
    text = (tmp_path / "r-2.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["results"]["t"] == {"perplexity,none": None, "acc,none": None, "n": 3, "f1,none": 0.5}
    with pytest.raises(SystemExit):
        harness.main(["--model", "m", "--tasks", "t", "--num_fewshot", "5"])
    assert "nearest: --num-fewshot" in capsys.readouterr().err
