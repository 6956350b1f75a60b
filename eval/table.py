"""Results as the paper's tables: `python -m eval.table runs/*/eval.json` prints Tables 1 and 2, 3, and 5 to 8.

Runs that differ only in the seed make one row, mean ± standard deviation (n - 1) over seeds; a column's best is bold.
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from statistics import fmean, stdev

if not __package__:  # python PATH/eval/table.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import command_line, paper, results
from support.checkpoint import training

BASELINE, DELTA = "Baseline-SFT", "Δ "
METHODS = {"none": BASELINE, "rho1": "Rho-1", "tfidf": "TF-IDF", "llmlingua2": "LLMLingua-2"}
RUN = {"model", "data", "grouper", "lam_max", "objective", "scope", "seed"}  # what is read of a run's configuration
TRUTHFULQA = ("BLEU", "ROUGE1", "ROUGE2", "ROUGEL", "MC1", "MC2")
IFEVAL = ("Inst loose", "Inst strict", "Prompt loose", "Prompt strict")
SUBJECT = ("MMLU:0", "MMLU:5", "MathQA", "ARC-C", "OpenBookQA")
REASONING = ("HellaSwag", "TruthfulQA", "IFEval")
NORMED = {"MathQA": "mathqa", "ARC-C": "arc_challenge", "OpenBookQA": "openbookqa", "HellaSwag": "hellaswag"}
AVERAGES = {"TruthfulQA": TRUTHFULQA, "IFEval": IFEVAL, "Avg.": SUBJECT + REASONING, "SS-B": SUBJECT, "GR-B": REASONING}
PATHS = {  # where a result file has each column's score
    "MMLU:0": ("mmlu", "acc"),
    "MMLU:5": ("mmlu_5shot", "acc"),
    **{column: (task, "acc") for column, task in NORMED.items()},
    **{f"{column} acc_norm": (task, "acc_norm") for column, task in NORMED.items()},
    **{name: ("truthfulqa_gen", f"{name.lower()}_acc".replace("gel", "geL")) for name in TRUTHFULQA[:4]},
    **{name: ("truthfulqa_mc", name.lower(), "acc") for name in TRUTHFULQA[4:]},
    **{name: ("ifeval", "{}_level_{}_acc".format(*name.lower().split())) for name in IFEVAL},
}
KINDS = {  # the tables of a data set: columns, and the paper's numbers for them
    "benchmarks": ((*SUBJECT, *REASONING, "Avg."), {"LIMA": 1, "Alpaca": 2}),
    "acc_norm of the same runs": (tuple(f"{column} acc_norm" for column in NORMED), {}),
    "TruthfulQA": ((*TRUTHFULQA, "TruthfulQA"), {"LIMA": 5, "Alpaca": 7}),
    "IFEval": ((*IFEVAL, "IFEval"), {"LIMA": 6, "Alpaca": 8}),
}
UNSAID = "the paper does not say whether its ARC-C is acc or acc_norm"
Number = tuple[float, float | None]  # mean and standard deviation over seeds
Line = tuple[list[str], list[str]]  # labels and cells


# Results to rows.


@dataclass
class Entry:
    """One row of the tables: a method on a base model and a data set, over seeds; ours, or the paper's."""

    base: str
    data: str
    method: str
    config: dict = field(default_factory=dict)  # what its runs share
    seeds: dict = field(default_factory=dict)  # seed -> (fingerprint, file, tasks)
    printed: dict[str, Number] | None = None  # the paper's numbers, by column
    note: str = ""  # what tells it from other rows of its method

    @property
    def label(self) -> str:
        return self.method + (f" ({self.note})" if self.note else "")

    def number(self, column: str) -> Number | None:
        """None unless every seed has the column."""
        if self.printed:
            return self.printed.get(column)
        values = [scores(tasks).get(column) for _, _, tasks in self.seeds.values()]
        return None if None in values else (fmean(values), stdev(values) if len(values) > 1 else None)

    def cell(self, number: Number | None, table: int | None = None, form: str = ".2f") -> str:
        if number is None:
            return "–"
        mean, sd = format(number[0], form), "" if number[1] is None else f" ± {number[1]:.2f}"
        return mean + "‡" * bool(self.printed and mean in paper.INCONSISTENT.get(table, ())) + sd


def scores(tasks: dict) -> dict[str, float]:
    """Every column of one model's tasks, in percent; an average needs all of its parts."""
    out = {}
    for column, path in PATHS.items():
        value = reduce(lambda found, key: found.get(key, {}) if isinstance(found, dict) else {}, path, tasks)
        if isinstance(value, float):
            out[column] = 100 * value
    for column, parts in AVERAGES.items():
        if all(part in out for part in parts):
            out[column] = fmean(out[part] for part in parts)
    return out


def papers() -> list[Entry]:
    """The paper's own rows."""
    out = []
    for data in paper.DATASETS:
        for (base, method), averages in paper.printed_3(data).items():
            printed = dict(zip(("SS-B", "GR-B", f"{DELTA}SS-B", f"{DELTA}GR-B"), ((x, None) for x in averages)))
            for columns, numbers in KINDS.values():
                printed |= zip(columns, paper.printed(numbers[data])[base, method]) if numbers else {}
            out.append(Entry(base, data, method, seeds=dict.fromkeys(range(5)), printed=printed, note="paper"))
    return out


def entries(paths: list[Path]) -> tuple[list[Entry], dict]:
    """The rows that the result files make, in the paper's order, and the settings that all of them have.

    Raises:
        ValueError: settings differ, a model's task has two scores, or a seed two models.
    """
    found, settings = {}, None
    for path in paths:
        result = results.read(path)
        run, given = result.get("run"), result["settings"]
        if run is not None and not (isinstance(run, dict) and run.keys() >= RUN):
            raise ValueError(f"{path}: its run is not a configuration of train.py")
        settings = given if settings is None else settings
        if given != settings:
            raise ValueError(f"{path}: scored with {given}, but {paths[0]} with {settings}; one table has one setting")
        config = training(run) if run else {"model": result["model"]}
        seed = config.pop("seed", 0)
        key = json.dumps(config, sort_keys=True) + ("" if run else result["fingerprint"])
        entry = found.setdefault(key, Entry(base_name(config["model"]), data_name(run), method_name(run), config))
        fingerprint, file, tasks = entry.seeds.setdefault(seed, (result["fingerprint"], path, {}))
        if fingerprint != result["fingerprint"]:
            seed = f"seed {seed} of this configuration"
            raise ValueError(f"{path}: {seed} is another model in {file}; leave one of them out")
        for name, summary in result["tasks"].items():
            summary = {key: value for key, value in summary.items() if key != "made"}
            if tasks.setdefault(name, summary) != summary:
                other = f"{name} has another score than in {file}, of the same model"
                raise ValueError(f"{path}: {other}; leave one of them out")
    tell_apart(out := list(found.values()))
    orders = (("data", paper.DATASETS), ("base", paper.BASES), ("method", paper.METHODS))
    out.sort(key=lambda entry: ([place(getattr(entry, name), order) for name, order in orders], entry.label))
    return out, settings or {}


def place(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """A sorting key: the paper's order, then the alphabet."""
    return (order.index(name) if name in order else len(order), name)


def base_name(model: str) -> str:
    """The last part of a path or Hub name; the paper's two in the paper's spelling."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").split("/")[-1]
    return next((base for base in paper.BASES if base.lower() == name.lower()), name)


def data_name(run: dict | None) -> str:
    """LIMA or Alpaca where the file's name says so, or its folder's (on the Hub, the data set's); else the file's."""
    parts = run["data"].split("/")[-2:] if run else ["no fine-tuning"]
    found = [x for part in parts for x in paper.DATASETS if re.search(rf"(?i)(?<![a-z]){x}(?![a-z])", part)]
    return found[-1] if found else parts[-1]


def method_name(run: dict | None) -> str:
    """The paper's name of what was trained; an objective that is not the method's own is named beside it."""
    if run is None:
        return "as given"
    grouper, objective = run["grouper"], run["objective"]
    plain = objective == "sft_go" and (grouper == "none" or run["lam_max"] == 0)
    if plain or objective == "cross_entropy":
        return BASELINE  # groups, if any, are only watched
    usual = "important_only" if grouper == "rho1" else "sft_go"
    names = [METHODS.get(grouper, grouper)] * (grouper != "none") + [objective] * (objective != usual)
    return ", ".join(names)


def tell_apart(rows: list[Entry]) -> None:
    """Note, on rows that otherwise have the same name, the settings in which they differ."""
    alike = defaultdict(list)
    for row in rows:
        alike[row.base, row.data, row.method].append(row)
    for same in (group for group in alike.values() if len(group) > 1):
        names = sorted({name for row in same for name in row.config})
        names = [name for name in names if any(row.config.get(name) != same[0].config.get(name) for row in same)]
        for row in same:
            values = [x if isinstance(x := row.config.get(name), list) else [x] for name in names]
            texts = [" ".join(map(str, [name, *value])) for name, value in zip(names, values)]
            row.note = ", ".join(texts) or next(iter(row.seeds.values()))[0][:8]


# Rows to tables.


def tables(rows: list[Entry], settings: dict, with_paper: bool) -> list[str]:
    """Every table for which there is a number, in Markdown. The paper's rows stand below ours; alone, all of them."""
    here = {(row.data, row.base) for row in rows}
    theirs = [row for row in papers() * with_paper if not rows or (row.data, row.base) in here]
    note = "Percent, mean ± standard deviation over seeds; –: not scored, or not for every seed. "
    note += "Bold: the highest of a model's rows, and of the paper's rows."
    note += f" BOS {settings['bos']}, {settings['dtype']}." if settings else ""
    if settings.get("limit"):
        note += f" Only the first items, {settings['limit']} of each task (in MMLU, of each subject): not comparable."
    out = []
    for data in dict.fromkeys(row.data for row in rows + theirs):
        bases = list(dict.fromkeys(row.base for row in rows + theirs if row.data == data))
        unknown = [base for base in bases if with_paper and (data, base) not in {(x.data, x.base) for x in theirs}]
        models = [[row for row in x if (row.data, row.base) == (data, base)] for base in bases for x in (rows, theirs)]
        for kind, (columns, numbers) in KINDS.items():
            body = [line for model in models for line in block(model, columns, numbers.get(data))]
            heads = [column.removesuffix(" acc_norm") for column in columns]
            notes = ["Choices compared per character."]
            if numbers:
                heads, notes = [{"ARC-C": "ARC-C†"}.get(column, column) for column in columns[:-1]] + ["Avg."], [note]
            notes += [f"† acc, as in the other columns; {UNSAID}."] * (kind == "benchmarks")
            notes += [f"The paper has no rows for {', '.join(unknown)} on {data}."] * bool(numbers and unknown)
            title = f"{data}: {kind}" + (f" (the paper's Table {numbers[data]})" if data in numbers else "")
            out += markdown(title, ["Model", "Method", "Seeds"], heads, body, notes)
    return out + table_3(rows, theirs)


def block(rows: list[Entry], columns: tuple[str, ...], table: int | None) -> list[Line]:
    """Rows that compete: a column's highest mean, to the printed digits, is bold where they differ."""
    numbers, out = [[row.number(column) for column in columns] for row in rows], []
    means = [{round(x[0], 2) for x in column if x} for column in zip(*numbers)]
    best = [max(column) if len(column) > 1 else None for column in means]
    for row, line in zip(rows, numbers):
        bold = ["**" if x and round(x[0], 2) == highest else "" for x, highest in zip(line, best)]
        cells = [f"{stars}{row.cell(x, table)}{stars}" for x, stars in zip(line, bold)]
        out.append(([row.base, row.label, str(len(row.seeds))], cells))
    return out


def table_3(rows: list[Entry], theirs: list[Entry]) -> list[str]:
    """Averages of subject-specific (SS-B) and general-reasoning benchmarks (GR-B), and gains over the baseline."""
    places = dict.fromkeys((row.data, row.base) for row in rows or theirs)
    columns = [(data, base, kind) for data, base in places for kind in ("SS-B", "GR-B")]
    at, body = {(row.data, row.base, row.label): row for row in rows + theirs}, []
    ordered = sorted(rows + theirs, key=lambda row: (bool(row.printed), place(row.method, paper.METHODS), row.label))
    for row in {row.label: row for row in ordered}.values():
        values, gains = [], []
        for data, base, kind in columns:
            mine, baseline = (
                at.get((data, base, row.label)),
                at.get((data, base, BASELINE)),
            )  # None if there are several
            value, below = mine and mine.number(kind), baseline and baseline.number(kind)
            gain = (value[0] - below[0], None) if value and below else None
            gain = mine and mine.number(DELTA + kind) if row.printed else gain
            values.append(row.cell(value and (value[0], None), 3))
            gains.append(row.cell(gain, 3, "+.2f"))
        body.append(([row.label], values))
        body += [([DELTA + "(paper)" if row.printed else "Δ"], gains)] * (row.method != BASELINE)
    body = [line for line in body if any(text != "–" for text in line[1])]
    note = "SS-B: mean of MMLU:0, MMLU:5, MathQA, ARC-C, OpenBookQA; GR-B: of HellaSwag, TruthfulQA, IFEval; "
    title = "Subject-specific and general-reasoning averages (the paper's Table 3)"
    return markdown(title, ["Method"], [*map(" ".join, columns)], body, [f"{note}Δ: less Baseline-SFT."])


def markdown(title: str, labels: list[str], heads: list[str], body: list[Line], notes: list[str]) -> list[str]:
    """The table, or none where no cell has a number."""
    cells = [text for _, line in body for text in line]
    if all(text == "–" for text in cells):
        return []
    if any("‡" in text for text in cells):
        notes = [notes[0], "‡ as the paper prints it; its own columns do not give it.", *notes[1:]]
    lines = [labels + heads, ["---"] * len(labels) + ["---:"] * len(heads), *(names + line for names, line in body)]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return [f"### {title}\n\n{rows}\n\n" + "\n\n".join(notes)]


def main(argv: list[str] | None = None) -> None:
    parser = command_line("python -m eval.table", "Print results of `python -m eval` as the paper's tables.")
    add = parser.add_argument
    add("results", nargs="*", metavar="RESULT.json", help="results of any number of runs and seeds")
    add("--paper", action="store_true", help="the paper's own rows below ours; alone: the paper's tables")
    args = parser.parse_args(argv)
    try:
        if not args.results and not args.paper:
            raise ValueError("no results given; `python -m eval` writes them, and --paper alone needs none")
        found = tables(*entries([Path(path) for path in args.results]), args.paper)
        if not found:
            raise ValueError(f"{args.results[0]}: no task in it that the tables have")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print("\n\n".join(found))


if __name__ == "__main__":
    main()
