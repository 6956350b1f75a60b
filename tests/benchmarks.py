"""The real benchmarks for tests: where they lie, and the harness's tasks over them with nothing fetched."""

import csv
import gzip
import json
from functools import cache
from pathlib import Path

import pytest
from stories260k import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason=f"needs the benchmarks in {DATA} (SFTGO_SHARED)")
SUBJECTS = ("abstract_algebra", "management", "miscellaneous", "professional_law")


def lines(path: Path) -> list[dict]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as f:
        return [json.loads(line) for line in f]


@cache
def hub_rows() -> dict[str, list[dict]]:
    """Each split with the fields that the Hub's copy has, from the released files: read here, not by eval's readers."""
    mc = json.loads((DATA / "truthfulqa" / "mc_task.json").read_text(encoding="utf-8"))
    with open(DATA / "truthfulqa" / "TruthfulQA.csv", encoding="utf-8-sig", newline="") as f:
        answers = list(csv.DictReader(f))

    def flat(row: dict, stem: str) -> dict:
        choices = row["question"]["choices"]
        both = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
        return {"id": row["id"], stem: row["question"]["stem"], "choices": both, "answerKey": row["answerKey"]}

    def halves(row: dict) -> dict:
        begun, mark, fragment = row["ctx"].rpartition(". ")
        if not mark or row["ctx"].endswith((".", "!", "?")):
            begun, fragment = row["ctx"], ""
        context = {"ctx_a": begun + mark.strip() * bool(fragment), "ctx_b": fragment}
        return {name: row[name] for name in ("activity_label", "endings")} | context | {"label": str(row["label"])}

    def parted(row: dict, name: str) -> list[str]:
        return [answer.strip() for answer in row[name].split(";") if answer.strip()]

    return {
        "mmlu": lines(DATA / "mmlu" / "test.jsonl.gz"),
        "mmlu_dev": lines(DATA / "mmlu" / "dev.jsonl"),
        "mathqa": json.loads(gzip.open(DATA / "mathqa" / "test.json.gz", "rt", encoding="utf-8").read()),
        "arc_challenge": [flat(row, "question") for row in lines(DATA / "arc_challenge" / "ARC-Challenge-Test.jsonl")],
        "openbookqa": [flat(row, "question_stem") for row in lines(DATA / "openbookqa" / "test.jsonl")],
        "hellaswag": [halves(row) for row in lines(DATA / "hellaswag" / "hellaswag_val.jsonl.gz")],
        "truthfulqa_mc": [
            {"question": row["question"]}
            | {
                name: {"choices": list(row[name]), "labels": list(row[name].values())}
                for name in ("mc1_targets", "mc2_targets")
            }
            for row in mc
        ],
        "truthfulqa_gen": [
            {
                "question": row["Question"],
                "best_answer": row["Best Answer"],
                "correct_answers": parted(row, "Correct Answers"),
                "incorrect_answers": parted(row, "Incorrect Answers"),
            }
            for row in answers
        ],  # fmt: skip
        "ifeval": lines(DATA / "ifeval" / "input_data.jsonl"),
    }


def harness_tasks(folder: Path, names: list[str], limit: int) -> list[str]:
    """Task files that include the packaged ones, over the first `limit` rows of local files; of MMLU, four subjects."""
    import lm_eval

    rows, tasks = hub_rows(), Path(lm_eval.__file__).parent / "tasks"
    split = {"ifeval": "train"} | dict.fromkeys(
        ("hellaswag", "truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"), "validation"
    )
    where = {"arc_challenge": "arc"} | dict.fromkeys(
        ("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"), "truthfulqa"
    )

    def file(name: str, found: list[dict]) -> str:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        return str(path)

    def task(name: str, packaged: Path, changes: dict) -> str:
        path = folder / f"{name}.yaml"
        settings = {"include": str(packaged), "dataset_path": "json", "dataset_name": None} | changes  # JSON is YAML
        path.write_text(json.dumps(settings))
        return str(path)

    out = []
    for name in names:
        if name.startswith("mmlu"):
            for subject in SUBJECTS:
                mine, dev = ([row for row in rows[key] if row["subject"] == subject] for key in ("mmlu", "mmlu_dev"))
                files = {"test": file(f"{name}_{subject}", mine[:limit]), "dev": file(f"{name}_{subject}_dev", dev)}
                changes = {"dataset_kwargs": {"data_files": files}} | (
                    {"num_fewshot": 5} if name == "mmlu_5shot" else {}
                )
                out.append(task(f"{name}_{subject}", tasks / "mmlu" / "default" / f"mmlu_{subject}.yaml", changes))
        else:
            part = split.get(name, "test")
            source = "truthfulqa_mc" if name.startswith("truthfulqa_mc") else name
            changes = dict.fromkeys(("training_split", "validation_split", "test_split"))
            changes |= {"validation_split" if part == "validation" else "test_split": part}
            changes |= {"dataset_kwargs": {"data_files": {part: file(name, rows[source][:limit])}}}
            out.append(task(name, tasks / where.get(name, name) / f"{name}.yaml", changes))
    return out
