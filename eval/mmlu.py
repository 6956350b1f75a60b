"""MMLU (Hendrycks et al. 2021): four-way questions on 57 subjects; the letters are scored, at 0 or 5 shots."""

from pathlib import Path

from eval.rows import Row, Source
from eval.score import Item, Results, mean, pooled

CSV = ("question", *"ABCD", "answer")  # of a file SUBJECT_test.csv
TEST = Source("mmlu", "test.jsonl", "cais/mmlu", "all/test-*.parquet", 14_042, "*_test.csv", CSV)
DEV = Source("mmlu", "dev.jsonl", "cais/mmlu", "all/dev-*.parquet", 285, "*_dev.csv", CSV, "mmlu_5shot")
LETTERS, ANSWERS = tuple("ABCD"), tuple("0123")
CATEGORIES = {
    "STEM": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""".split(),
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
}
SUBJECTS = [subject for subjects in CATEGORIES.values() for subject in subjects]


def block(row: Row) -> str:
    choices = row.choices(row.strings("choices"), (4,))
    lettered = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
    return f"{row.get('question').strip()}{lettered}\nAnswer:"


def adapted(row: Row) -> Row:
    """A row of the released CSV files, with the fields that it has on the Hub; any other row as it is."""
    if "file" not in row.fields:
        return row
    if None in row.fields:
        raise ValueError(f"{row.where}: {6 + len(row.fields[None])} cells, expected {', '.join(CSV)}")
    fields = {"question": row.get("question"), "choices": [row.get(letter) for letter in LETTERS]}
    answer = row.index("answer", LETTERS)
    return Row(row.where, fields | {"answer": answer, "subject": row.get("file").rpartition("_")[0]})


def by_subject(rows: list[Row]) -> dict[str, list[Row]]:
    found = {subject: [] for subject in SUBJECTS}
    for row in map(adapted, rows):
        found[SUBJECTS[row.index("subject", SUBJECTS)]].append(row)
    return found


def load(data: Path, shots: int) -> list[Item]:
    """The questions by subject, in the files' order; `doc_id` counts within the subject, as the harness's files do."""
    examples, items = by_subject(DEV.read(data) if shots else []), []
    for subject, rows in by_subject(TEST.read(data)).items():
        context = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for row in examples[subject][:shots]:
            context += f"{block(row)} {LETTERS[row.index('answer', ANSWERS)]}\n\n"
        for i, row in enumerate(rows):
            gold = row.index("answer", ANSWERS)
            items.append(Item(f"mmlu_{subject}", i, context + block(row), LETTERS, gold, ("acc",)))
    return items


def summarize(results: Results) -> dict:
    """Accuracy by subject, by category and over all: each the mean over its items, not over its parts."""
    subjects = {name.removeprefix("mmlu_"): mean(rows) for name, rows in results.items()}
    categories = {}
    for name, members in CATEGORIES.items():
        categories[name] = pooled([subjects[subject] for subject in members if subject in subjects])
    return {**pooled(list(subjects.values())), "categories": categories, "subjects": subjects}
