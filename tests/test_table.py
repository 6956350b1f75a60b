"""The paper's tables from result files: groups, means, marks, and what is refused."""

import json
import re
import subprocess
import sys
from statistics import fmean, stdev

import pytest

from eval import paper, table
from support.recipes import RECIPES
from train import Config

pytestmark = pytest.mark.fast


def tasks(shift: float = 0.0) -> dict:
    acc = lambda x: {"n": 10, "acc": x + shift, "acc_stderr": 0.1, "acc_norm": x / 2}  # noqa: E731
    out = {
        "mmlu": acc(0.5),
        "mmlu_5shot": acc(0.6),
        "mathqa": acc(0.3),
        "arc_challenge": acc(0.4),
        "openbookqa": acc(0.2),
    }
    out |= {"hellaswag": acc(0.55), "truthfulqa_mc": {"mc1": {"acc": 0.25}, "mc2": {"acc": 0.45}}}
    out["truthfulqa_gen"] = {"bleu_acc": 0.31, "rouge1_acc": 0.32, "rouge2_acc": 0.33, "rougeL_acc": 0.34}
    ifeval = {"prompt_level_strict": 0.1, "prompt_level_loose": 0.2, "inst_level_strict": 0.3, "inst_level_loose": 0.4}
    out["ifeval"] = {f"{name}_acc": x for name, x in ifeval.items()}
    return out


def result(
    path, recipe: str | None, seed=0, shift=0.0, fingerprint: str | None = None, found: dict | None = None, **changes
):
    """A result file of a recipe's run, with every task or those given."""
    run = None
    if recipe:
        reference = {"reference": "r"} if "rho1" in recipe else {}
        run = json.loads(json.dumps(vars(Config(**RECIPES[recipe] | {"seed": seed} | reference | changes))))
    about = {"model": "somewhere/model", "fingerprint": fingerprint or f"{recipe}{seed}{changes}", "run": run}
    settings = {"bos": "never", "dtype": "bfloat16", "limit": None}
    path.write_text(json.dumps(about | {"settings": settings, "tasks": tasks(shift) if found is None else found}))
    return path


def cells(text: str, title: str) -> list[list[str]]:
    """The cells of the Markdown table under a title."""
    part = text.split(f"### {title}")[1].split("###")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n") if line.startswith("|")]


def printed(paths, *flags, capsys) -> str:
    table.main([*map(str, paths), *flags])
    return capsys.readouterr().out


def test_seeds_make_one_row_with_mean_and_deviation_and_the_best_in_bold(tmp_path, capsys):
    shifts = (0.0, 0.02, 0.01)
    paths = [result(tmp_path / f"t{s}.json", "lima-3b-tfidf", s, shift) for s, shift in enumerate(shifts)]
    paths += [result(tmp_path / f"b{s}.json", "lima-3b-sft", s, shift - 0.05) for s, shift in enumerate(shifts[:2])]
    text = printed(paths, capsys=capsys)
    head, _, base, tfidf = cells(text, "LIMA: benchmarks (the paper's Table 1)")
    assert head[:5] == ["Model", "Method", "Seeds", "MMLU:0", "MMLU:5"] and head[-1] == "Avg."
    assert base[:3] == ["Llama-3.2-3B", "Baseline-SFT", "2"] and tfidf[:3] == ["Llama-3.2-3B", "TF-IDF", "3"]
    assert base[3] == f"46.00 ± {100 * stdev([0.45, 0.47]):.2f}" and tfidf[3] == "**51.00 ± 1.00**"
    truthfulqa, ifeval = 100 * (0.31 + 0.32 + 0.33 + 0.34 + 0.25 + 0.45) / 6, 25.0
    assert tfidf[9:11] == [f"{truthfulqa:.2f} ± 0.00", f"{ifeval:.2f} ± 0.00"], "all are equal: none is best"
    average = (50 + 60 + 30 + 40 + 20 + 55 + 6 * 1 + truthfulqa + ifeval) / 8
    assert tfidf[-1].startswith(f"**{average:.2f} ± ")
    assert cells(text, "LIMA: acc_norm of the same runs")[2][3:] == [
        "15.00 ± 0.00",
        "20.00 ± 0.00",
        "10.00 ± 0.00",
        "27.50 ± 0.00",
    ]
    assert cells(text, "LIMA: TruthfulQA (the paper's Table 5)")[3][3] == "31.00 ± 0.00"
    assert [row[3:] for row in cells(text, "LIMA: IFEval (the paper's Table 6)")][0] == [*table.IFEVAL, "Avg."]
    assert [
        c.split(" ")[0].strip("*") for c in cells(text, "LIMA: IFEval (the paper's Table 6)")[2][3:]
    ] == "40.00 30.00 20.00 10.00 25.00".split()
    third = cells(text, "Subject-specific and general-reasoning averages (the paper's Table 3)")
    assert [row[0] for row in third[2:]] == ["Baseline-SFT", "TF-IDF", "Δ"]
    assert third[2][1:] == ["36.00", f"{(51 + truthfulqa + ifeval) / 3:.2f}"] and third[4][1:] == ["+5.00", "+1.67"]


def test_files_of_one_model_are_put_together_and_other_settings_make_another_row(tmp_path, capsys):
    some, others = ({k: v for k, v in tasks().items() if (k in ("mmlu", "ifeval")) == first} for first in (True, False))
    paths = [
        result(tmp_path / "a.json", "alpaca-8b-rho1", found=some),
        result(tmp_path / "b.json", "alpaca-8b-rho1", found=others),
    ]
    paths += [result(tmp_path / "c.json", "alpaca-8b-rho1", eta=(0.8,))]
    paths += [result(tmp_path / "d.json", "alpaca-8b-sft", grouper="tfidf"), result(tmp_path / "e.json", None)]
    text = printed(paths, capsys=capsys)
    rows = cells(text, "Alpaca: benchmarks (the paper's Table 2)")[2:]
    assert [row[1] for row in rows] == ["Baseline-SFT", "Rho-1 (eta 0.4)", "Rho-1 (eta 0.8)"] and {
        row[0] for row in rows
    } == {"Llama-3.1-8B"}
    assert rows[1][3:] == rows[2][3:] and "–" not in rows[1]
    assert cells(text, "no fine-tuning: benchmarks")[2][:3] == ["model", "as given", "1"]


def test_rows_of_one_method_keep_its_place_and_the_gains_their_baseline(tmp_path, capsys):
    paths = [
        result(tmp_path / f"{i}.json", "lima-8b-rho1", eta=(eta,), clip=clip)
        for i, (eta, clip) in enumerate([(0.4, 1.0), (0.4, 2.0), (0.8, 1.0)])
    ]
    paths += [
        result(tmp_path / "t0.json", "lima-8b-tfidf", 0, micro_batch_tokens=4096),
        result(tmp_path / "t1.json", "lima-8b-tfidf", 1),
    ]
    paths += [result(tmp_path / "base.json", "lima-8b-sft", shift=-0.1)]
    text = printed(paths, capsys=capsys)
    labels = [
        "Baseline-SFT",
        "Rho-1 (clip 1.0, eta 0.4)",
        "Rho-1 (clip 1.0, eta 0.8)",
        "Rho-1 (clip 2.0, eta 0.4)",
        "TF-IDF",
    ]
    assert [row[1] for row in cells(text, "LIMA: benchmarks")[2:]] == labels
    assert cells(text, "LIMA: benchmarks")[-1][2] == "2", (
        "the cut into micro-batches does not change a step of scope step"
    )
    third = cells(text, "Subject-specific and general-reasoning averages")
    assert [row[0] for row in third[2:]] == [
        name for label in labels for name in ([label] if label == labels[0] else [label, "Δ"])
    ]
    assert third[4][1] == "+10.00"


def test_runs_of_a_users_function_are_one_row_by_its_content_and_named_by_it(tmp_path, capsys):
    def of(name, seed, place, digest):
        path = result(tmp_path / f"{name}.json", "lima-8b-tfidf", seed, fingerprint=name)
        about = json.loads(path.read_text())
        about["run"] |= {"objective": f"{place}/o.py:soft", "digests": {"objective": digest * 32}}
        path.write_text(json.dumps(about))
        return path

    two_places = [of("a", 0, "x", "ab"), of("b", 1, "y", "ab")]
    (row,) = cells(printed(two_places, capsys=capsys), "LIMA: benchmarks")[2:]
    assert row[1:3] == ["TF-IDF, o.py:soft", "2"], "one content at two places: two seeds of one row"
    text = printed([*two_places, of("c", 0, "x", "cd")], capsys=capsys)
    rows = [row[1:3] for row in cells(text, "LIMA: benchmarks")[2:]]
    assert [seeds for _, seeds in rows] == ["2", "1"] and all(
        "o.py:soft (objective soft with content" in x for x, _ in rows
    )


@pytest.mark.parametrize(
    "data, name",
    [("/data/climate.json", "climate.json"), ("/data/oldlima.json", "oldlima.json"), ("/lima/a/b.json", "b.json"),
     ("/home/lima/alpaca.json", "Alpaca"), ("x/lima/train.jsonl.gz", "LIMA"), ("lima_train.jsonl", "LIMA"),
     ("hf://datasets/yahma/alpaca-cleaned/alpaca_data_cleaned.json", "Alpaca")],
)  # fmt: skip
def test_a_data_set_is_known_by_its_file_or_folder(data, name):
    assert table.data_name({"data": data}) == name


def test_a_method_is_named_by_what_was_trained():
    named = lambda **run: table.method_name({"grouper": "tfidf", "lam_max": 0.9, "objective": "sft_go"} | run)  # noqa: E731
    assert named() == "TF-IDF" and table.base_name("/x/llama-3.2-3b") == "Llama-3.2-3B"
    for run in ({"lam_max": 0}, {"grouper": "none"}, {"objective": "cross_entropy"}):
        assert named(**run) == "Baseline-SFT"
    assert named(objective="important_only") == "TF-IDF, important_only"
    assert named(grouper="rho1", objective="important_only", lam_max=0) == "Rho-1", "λ is not used"
    assert named(grouper="rho1") == "Rho-1, sft_go" and named(grouper="rho1", lam_max=0) == "Baseline-SFT"
    assert named(grouper="x/g.py:mine") == "g.py:mine"
    assert named(objective="o.py:softmax") == "TF-IDF, o.py:softmax"
    assert named(grouper="none", objective="o.py:softmax", lam_max=0) == "o.py:softmax"


def test_a_column_that_a_seed_lacks_is_left_open(tmp_path, capsys):
    paths = [
        result(tmp_path / "a.json", "lima-8b-tfidf", 0),
        result(tmp_path / "b.json", "lima-8b-tfidf", 1, found={"mmlu": {"acc": 0.5}}),
    ]
    text = printed(paths, "--paper", capsys=capsys)
    row = cells(text, "LIMA: benchmarks")[2]
    assert "–: not scored, or not for every seed" in text and "The paper has no rows" not in text
    assert "The paper has no rows for model on no fine-tuning." in printed(
        [result(tmp_path / "c.json", None)], "--paper", capsys=capsys
    )
    assert row[3] == "50.00 ± 0.00" and row[4:] == ["–"] * 8


def test_the_paper_s_rows_stand_below_as_printed_with_its_odd_cells_marked(tmp_path, capsys):
    path = result(tmp_path / "a.json", "lima-8b-tfidf")
    text = printed([path], "--paper", capsys=capsys)
    rows = cells(text, "LIMA: benchmarks (the paper's Table 1)")[2:]
    assert [row[1] for row in rows] == ["TF-IDF"] + [f"{method} (paper)" for method in paper.METHODS]
    assert rows[1][3] == "62.05 ± 0.32" and rows[4][-1] == "**47.33 ± 0.52**" and rows[1][4] == "**63.47 ± 0.15**"
    third = cells(text, "Subject-specific and general-reasoning averages (the paper's Table 3)")
    assert third[0][1:] == ["LIMA Llama-3.1-8B SS-B", "LIMA Llama-3.1-8B GR-B"]
    assert third[3] == ["Baseline-SFT (paper)", "48.54", "40.32‡"]


def test_the_cells_marked_as_inconsistent_are_those_that_do_not_follow_from_the_others(capsys):
    odd = {number: [] for number in paper.INCONSISTENT}
    tables = {number: paper.printed(number) for number in (1, 2, 5, 6, 7, 8)}
    means = {number: {key: [mean for mean, _ in row] for key, row in found.items()} for number, found in tables.items()}
    checks = [(n, ".2f", row[-1], fmean(row[:-1]), 0.01) for n, found in means.items() for row in found.values()]
    for data, number in (("LIMA", 1), ("Alpaca", 2)):
        parts = {key: (fmean(row[:5]), fmean(row[5:8])) for key, row in means[number].items()}
        for (base, method), row in paper.printed_3(data).items():
            gains = [x - y for x, y in zip(parts[base, method], parts[base, "Baseline-SFT"])]
            checks += [(3, ".2f", x, y, 0.01) for x, y in zip(row[:2], parts[base, method])]
            checks += [
                (3, "+.2f", x, y, 0.015) for x, y in zip(row[2:], gains)
            ]  # a gain has two parts that were rounded
    for number, form, x, derived, rounding in checks:
        if abs(x - derived) > rounding + 1e-4:
            odd[number].append(format(x, form))
    assert {number: sorted(found) for number, found in odd.items()} == {
        number: sorted(found) for number, found in paper.INCONSISTENT.items()
    }
    marked = re.findall(r"([-+\d.]+)‡", printed([], "--paper", capsys=capsys))
    assert sorted(marked) == sorted(text for found in odd.values() for text in found)


def test_the_paper_s_numbers_are_all_here():
    assert {n: len(paper.printed(n)) for n in (1, 2, 5, 6, 7, 8)} == dict.fromkeys((1, 2, 5, 6, 7, 8), 8)
    assert {len(row) for n in (1, 2) for row in paper.printed(n).values()} == {9}
    assert paper.printed(2)["Llama-3.1-8B", "LLMLingua-2"][0] == (63.94, 0.18)
    for one, parts in ((1, (5, 6)), (2, (7, 8))):  # the last columns of Tables 5 to 8 are two columns of Tables 1 and 2
        for key, row in paper.printed(one).items():
            assert [row[6], row[7]] == [paper.printed(n)[key][-1] for n in parts]


@pytest.mark.parametrize(
    "case, said",
    [
        ("settings", "one table has one setting"),
        ("seed", "seed 0 of this configuration is another model"),
        ("score", "mmlu has another score than in"),
        ("json", "not readable as JSON"),
        ("other", "not a result of `python -m eval`"),
        ("run", "its run is not a configuration of train.py"),
        ("none", "no results given"),
        ("missing", "no such file; `python -m eval` writes it"),
        ("folder", "eval.json"),
        ("empty", "no task in it"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, case, said):
    one = result(tmp_path / "one.json", "lima-3b-tfidf", found={} if case == "empty" else None)
    two = tmp_path / "two.json"
    if case == "settings":
        result(two, "lima-3b-tfidf", 1)
        two.write_text(two.read_text().replace('"never"', '"always"'))
    elif case == "seed":
        result(two, "lima-3b-tfidf", fingerprint="other")
    elif case == "run":
        two.write_text(
            json.dumps(
                {
                    "model": "m",
                    "fingerprint": "f",
                    "settings": json.loads(one.read_text())["settings"],
                    "tasks": {},
                    "run": {"model": "m"},
                }
            )
        )
    elif case == "score":
        result(two, "lima-3b-tfidf", shift=0.1)
    else:
        two.write_text({"json": "{", "other": "{}"}.get(case, ""))
    if case in ("missing", "folder"):
        two.unlink()
    if case == "folder":
        two.mkdir()
        one.rename(two / "eval.json")
    paths = {"none": [], "empty": [one], "folder": [two]}.get(case, [one, two])
    with pytest.raises(SystemExit, match=re.escape(said)) as e:
        table.main(list(map(str, paths)))
    assert str(e.value).startswith("error: ")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"settings": None}, "settings is None, expected dict"),
        ({"settings": {"bos": "never"}}, "dtype is None, expected str"),
        ({"settings": {"bos": "never", "dtype": "bfloat16", "limit": "60"}}, "limit is '60', expected int | None"),
        ({"tasks": {"mmlu": None}}, "mmlu is None, expected dict"),
        ({"tasks": []}, "tasks is [], expected dict"),
        ({"tasks": {"mmlu": {"acc": 0.5, "made": 3}}}, "made is 3, expected dict"),
        ({"tasks": {"mmlu": {"acc": "0.5"}}}, "mmlu acc is '0.5', expected a share from 0 to 1"),
        ({"tasks": {"mmlu": {"acc": None}}}, "mmlu acc is None, expected a share"),
        ({"tasks": {"mmlu": {"acc": float("nan")}}}, "tasks cannot be written as JSON"),
        ({"tasks": {"mmlu": {"acc": 50.0}}}, "mmlu acc is 50.0, expected a share"),
        ({"tasks": {"truthfulqa_mc": {"mc1": 0.3}}}, "truthfulqa_mc mc1 acc is None, expected a share"),
        ({"fingerprint": 3}, "fingerprint is 3, expected str"),
        ({"model": None}, "model is None, expected str"),
        ({"run": []}, "run is [], expected dict | None"),
        ({"run": {"model": 3}}, "its run is not a configuration of train.py (model is 3, expected str)"),
    ],
)
def test_a_damaged_result_is_named_with_what_is_wrong(tmp_path, change, said):
    path = result(tmp_path / "a.json", "lima-3b-sft")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit, match=re.escape(said)) as e:
        table.main([str(path)])
    assert str(e.value).startswith(f"error: {path}: ") and "\n" not in str(e.value)


def test_whole_numbers_are_shares_too(tmp_path, capsys):
    text = printed([result(tmp_path / "a.json", None, found={"mmlu": {"acc": 1}, "mathqa": {"acc": 0}})], capsys=capsys)
    assert cells(text, "no fine-tuning: benchmarks")[2][3:6] == ["100.00", "–", "0.00"]


@pytest.mark.parametrize("shift", [-0.00001, -0.00004, 0.0, 0.00002])
def test_equal_methods_gain_plus_zero(tmp_path, capsys, shift):
    paths = [result(tmp_path / "a.json", "lima-3b-sft"), result(tmp_path / "b.json", "lima-3b-tfidf", shift=shift)]
    text = printed(paths, capsys=capsys)
    assert "-0.00" not in text and cells(text, "Subject-specific")[-1][1:] == ["+0.00", "+0.00"]


def test_head_ends_the_table_quietly(tmp_path):
    command = [sys.executable, table.__file__, "--paper", result(tmp_path / "a.json", "lima-8b-tfidf")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
