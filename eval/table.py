"""Results as the paper's tables: `python -m eval.table runs/*/eval.json` prints Tables 1 and 2, 3, and 5 to 8 for what it is given.

Runs that differ in nothing but the seed make one row, mean ± standard deviation (n - 1) over seeds; the best of a column is bold.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from statistics import fmean, stdev

from checkpoint import training
from eval import command_line, paper
from files import read_json

METHODS = {"none": "Baseline-SFT", "rho1": "Rho-1", "tfidf": "TF-IDF", "llmlingua2": "LLMLingua-2"}
BASES, METHOD_ORDER = list(paper.BASES), list(paper.METHODS)
DATASETS = ("LIMA", "Alpaca")
TRUTHFULQA = ("BLEU", "ROUGE1", "ROUGE2", "ROUGEL", "MC1", "MC2")
IFEVAL = ("Inst loose", "Inst strict", "Prompt loose", "Prompt strict")
SUBJECT = ("MMLU:0", "MMLU:5", "MathQA", "ARC-C", "OpenBookQA")
REASONING = ("HellaSwag", "TruthfulQA", "IFEval")
MAIN = SUBJECT + REASONING
NORMED = {"MathQA": "mathqa", "ARC-C": "arc_challenge", "OpenBookQA": "openbookqa", "HellaSwag": "hellaswag"}


# Results to rows.


PATHS = {  # where a result file has each column's score
    "MMLU:0": ("mmlu", "acc"),
    "MMLU:5": ("mmlu_5shot", "acc"),
    **{column: (task, "acc") for column, task in NORMED.items()},
    **{f"{column} acc_norm": (task, "acc_norm") for column, task in NORMED.items()},
    **{column: ("truthfulqa_gen", f"{name}_acc") for column, name in zip(TRUTHFULQA, ("bleu", "rouge1", "rouge2", "rougeL"))},
    **{column: ("truthfulqa_mc", column.lower(), "acc") for column in TRUTHFULQA[4:]},
    **{column: ("ifeval", "{}_level_{}_acc".format(*column.lower().split())) for column in IFEVAL},
}
AVERAGES = {"TruthfulQA": TRUTHFULQA, "IFEval": IFEVAL, "Avg.": MAIN, "SS-B": SUBJECT, "GR-B": REASONING}


def scores(tasks: dict) -> dict[str, float]:
    """Every column that a run's tasks give, in percent; an average stands where all of its parts do."""
    out = {}
    for column, path in PATHS.items():
        value = reduce(lambda found, key: found.get(key, {}) if isinstance(found, dict) else {}, path, tasks)
        if isinstance(value, float):
            out[column] = 100 * value
    for column, parts in AVERAGES.items():
        if all(part in out for part in parts):
            out[column] = fmean(out[part] for part in parts)
    return out


@dataclass
class Entry:
    """One row of the tables: a method on a base model and a data set, over seeds."""

    base: str
    data: str
    method: str
    config: dict  # what its runs share
    seeds: dict = field(default_factory=dict)  # seed -> (fingerprint, files, tasks)
    note: str = ""  # what tells it from other rows of its method

    @property
    def label(self) -> str:
        return f"{self.method} ({self.note})" if self.note else self.method

    def cell(self, column: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over seeds; None unless every seed has the column."""
        values = [scores(tasks).get(column) for _, _, tasks in self.seeds.values()]
        if not values or None in values:
            return None
        return fmean(values), stdev(values) if len(values) > 1 else None


RUN = {"model", "data", "grouper", "lam_max", "worst", "scope", "seed"}  # what is read of a run's configuration


def read(path: Path) -> dict:
    """One result file of `python -m eval`."""
    if not path.is_file():
        inside = path / "eval.json"
        raise ValueError(
            f"{path}: " + (f"a folder; its results are {inside}" if inside.is_file() else "no such file; `python -m eval` writes it")
        )
    result = read_json(path)
    run = result.get("run")
    if not {"model", "fingerprint", "settings", "tasks"} <= result.keys() or not isinstance(result["tasks"], dict):
        raise ValueError(f"{path}: not a result of `python -m eval`")
    if run is not None and not (isinstance(run, dict) and run.keys() >= RUN):
        raise ValueError(f"{path}: its run is not a configuration of train.py")
    return result


def entries(paths: list[Path]) -> tuple[list[Entry], dict]:
    """The rows that the result files make, in the paper's order, and the settings that all of them have.

    Raises:
        ValueError: settings differ, a model's task has two scores, or a seed two models.
    """
    found: dict[str, Entry] = {}
    settings = None
    for path in paths:
        result = read(path)
        if settings is not None and result["settings"] != settings[1]:
            raise ValueError(f"{path}: scored with {result['settings']}, but {settings[0]} with {settings[1]}; one table has one setting")
        settings = settings or (path, result["settings"])
        run = result["run"] if "run" in result else None
        same = {name: value for name, value in training(run).items() if name != "seed"} if run else {"model": result["model"]}
        key = json.dumps(same, sort_keys=True) + ("" if run else result["fingerprint"])
        entry = found.setdefault(key, Entry(base_name(same["model"]), data_name(run), method_name(run), same))
        seed = run["seed"] if run else 0
        fingerprint, files, tasks = entry.seeds.setdefault(seed, (result["fingerprint"], [], {}))
        if fingerprint != result["fingerprint"]:
            raise ValueError(f"{path}: seed {seed} of this configuration is another model in {files[0]}; leave one of them out")
        files.append(path)
        for name, summary in result["tasks"].items():
            found_scores = {k: v for k, v in summary.items() if k != "made"}
            if tasks.setdefault(name, found_scores) != found_scores:
                raise ValueError(f"{path}: {name} has another score than in {files[0]}, of the same model; leave one of them out")
    out = list(found.values())
    tell_apart(out)
    out.sort(key=lambda e: (place(e.data, DATASETS), place(e.base, BASES), place(e.method, METHOD_ORDER), e.label))
    return out, settings[1] if settings else {}


def place(name: str, order: Sequence[str]) -> tuple[int, str]:
    """A sorting key: the paper's order, then the alphabet."""
    return (order.index(name) if name in order else len(order), name)


def base_name(model: str) -> str:
    """The last part of a path or Hub name; the paper's two in the paper's spelling."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").split("/")[-1]
    return next((base for base in BASES if base.lower() == name.lower()), name)


def data_name(run: dict | None) -> str:
    """LIMA or Alpaca where the file's name says so, or its folder's (on the Hub, the data set's); else the file's name."""
    if run is None:
        return "no fine-tuning"
    for part in reversed(run["data"].lower().split("/")[-2:]):
        for known in DATASETS:
            if re.search(rf"(?<![a-z]){known.lower()}(?![a-z])", part):
                return known
    return run["data"].split("/")[-1]


def method_name(run: dict | None) -> str:
    if run is None:
        return "as given"
    if run["lam_max"] == 0:
        return METHODS["none"]  # groups, if any, are only watched
    name = METHODS.get(run["grouper"], run["grouper"])
    return name if run["worst"] == ("important" if run["grouper"] == "rho1" else "max") else f"{name}, worst {run['worst']}"


def tell_apart(rows: list[Entry]) -> None:
    """Note, on rows that are otherwise called the same, the settings in which they differ."""
    alike = defaultdict(list)
    for row in rows:
        alike[row.base, row.data, row.method].append(row)
    for same in (group for group in alike.values() if len(group) > 1):
        names = [n for n in sorted({n for row in same for n in row.config}) if len({json.dumps(row.config.get(n)) for row in same}) > 1]
        for row in same:
            row.note = ", ".join(f"{n} {row.config.get(n)}" for n in names) or next(iter(row.seeds.values()))[0][:8]


# Rows to tables.

Cell = tuple[str, bool]  # what to print, and whether in bold


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[tuple[list[str], list[Cell]]]  # labels, cells
    notes: list[str] = field(default_factory=list)


def shown(cell: tuple[float, float | None] | None, mark: str = "") -> str:
    if cell is None:
        return "–"
    mean, sd = cell
    return f"{mean:.2f}{mark}" + ("" if sd is None else f" ± {sd:.2f}")


def bold_best(rows: list[list[tuple[float, float | None] | None]]) -> list[list[bool]]:
    """Which cells have their column's highest mean, to the printed digits, where there is anything to compare."""
    best = [max((round(row[i][0], 2) for row in rows if row[i]), default=None) for i in range(len(rows[0]))]
    least = [min((round(row[i][0], 2) for row in rows if row[i]), default=None) for i in range(len(rows[0]))]
    return [[bool(cell) and round(cell[0], 2) == best[i] != least[i] for i, cell in enumerate(row)] for row in rows]


PAPER = " (paper)"
MARKED = "‡ as the paper prints it; its own columns do not give it."


def block(
    rows: list[Entry], columns: tuple[str, ...], table: int | None, base: str, with_paper: bool
) -> list[tuple[list[str], list[Cell]]]:
    """The rows of one base model, ours and then the paper's."""
    mine = [(row, [row.cell(column) for column in columns]) for row in rows if row.base == base]
    out = []
    if mine:
        for (row, cells), bold in zip(mine, bold_best([cells for _, cells in mine])):
            labels = [base, row.label, str(len(row.seeds))]
            out.append((labels, list(zip(map(shown, cells), bold))))
    if with_paper and table and base in BASES:
        theirs = {method: cells for (b, method), cells in paper.printed(table).items() if b == base}
        for (method, cells), bold in zip(theirs.items(), bold_best(list(theirs.values()))):
            off = not follows(cells[-1][0], fmean(mean for mean, _ in cells[:-1]))
            texts = [shown(cell) for cell in cells[:-1]] + [shown(cells[-1], "‡" * off)]
            out.append(([base, method + PAPER, "5"], list(zip(texts, bold))))
    return out


def follows(printed: float, computed: float) -> bool:
    """Whether a printed mean is what rounded parts give, to the rounding of both."""
    return abs(printed - computed) < 0.0101


def tables(rows: list[Entry], settings: dict, with_paper: bool) -> list[Table]:
    """Every table for which there is a row."""
    numbers = {"LIMA": (1, 5, 6), "Alpaca": (2, 7, 8)}
    data = list(dict.fromkeys([row.data for row in rows] + (list(DATASETS) if with_paper and not rows else [])))
    note = "Percent, mean ± standard deviation over seeds; –: not scored, or not for every seed. "
    note += "Bold: the highest of a model's rows, and of the paper's rows."
    note += f" BOS {settings['bos']}, {settings['dtype']}." if settings else ""
    if settings.get("limit"):
        note += f" Only the first items, {settings['limit']} of each task (in MMLU, of each subject): not comparable with anything."
    out = []
    kinds = (("benchmarks", (*MAIN, "Avg.")), ("TruthfulQA", (*TRUTHFULQA, "TruthfulQA")), ("IFEval", (*IFEVAL, "IFEval")))
    for name in data:
        mine = [row for row in rows if row.data == name]
        bases = list(dict.fromkeys([row.base for row in mine] + (BASES if not rows else [])))
        for (kind, columns), number in zip(kinds, numbers.get(name, (None,) * 3)):
            body = [line for base in bases for line in block(mine, columns, number, base, with_paper)]
            if all(text == "–" for _, cells in body for text, _ in cells):
                continue
            heads = ["ARC-C†" if column == "ARC-C" else column for column in columns[:-1]] + ["Avg."]
            notes = [note] + [MARKED] * any("‡" in text for _, cells in body for text, _ in cells)
            if kind == "benchmarks":
                notes.append("† acc, as in the other columns; the paper does not say whether its ARC-C is acc or acc_norm.")
            if with_paper and (unknown := [base for base in bases if not (number and base in BASES)]):
                notes.append(f"The paper has no rows for {', '.join(unknown)} on {name}.")
            where = f" (the paper's Table {number})" if number else ""
            out.append(Table(f"{name}: {kind}{where}", heads, body, notes))
            if kind == "benchmarks" and mine:
                out += normed(name, mine, bases)
    if averages := table_3(rows, with_paper):
        out.append(averages)
    return out


def normed(name: str, rows: list[Entry], bases: list[str]) -> list[Table]:
    """acc_norm, beside the table of acc."""
    columns = tuple(f"{column} acc_norm" for column in NORMED)
    body = [line for base in bases for line in block(rows, columns, None, base, False)]
    if all(text == "–" for _, cells in body for text, _ in cells):
        return []
    return [Table(f"{name}: acc_norm of the same runs", list(NORMED), body, ["Choices compared per character."])]


def table_3(rows: list[Entry], with_paper: bool) -> Table | None:
    """Averages of the subject-specific (SS-B) and the general-reasoning benchmarks (GR-B), with each method's gain over the baseline."""
    printed = [(data, base) for data in DATASETS for base in BASES]
    places = list(dict.fromkeys((row.data, row.base) for row in rows)) or (printed if with_paper else [])
    columns = [(data, base, kind) for data, base in places for kind in ("SS-B", "GR-B")]
    mine = {(row.data, row.base, row.label): row for row in rows}
    labels = sorted({(row.method, row.label) for row in rows}, key=lambda names: (place(names[0], METHOD_ORDER), names[1]))

    def mean(label: str, column: tuple[str, str, str]) -> float | None:
        row = mine.get((*column[:2], label))
        cell = row and row.cell(column[2])
        return cell[0] if cell else None

    body = []
    for method, label in labels:
        values = [mean(label, column) for column in columns]
        if all(value is None for value in values):
            continue
        body.append(([label], [("–" if value is None else f"{value:.2f}", False) for value in values]))
        below = [mean(METHODS["none"], column) for column in columns]  # None where there are several baselines
        gains = [None if value is None or base is None else value - base for value, base in zip(values, below)]
        if method != METHODS["none"] and any(gain is not None for gain in gains):
            body.append((["Δ"], [("–" if gain is None else f"{gain:+.2f}", False) for gain in gains]))
    if with_paper and any(column[:2] in printed for column in columns):
        body += paper_3(columns)
    if not body:
        return None
    heads = [f"{data} {base} {kind}" for data, base, kind in columns]
    notes = ["SS-B: mean of MMLU:0, MMLU:5, MathQA, ARC-C, OpenBookQA; GR-B: of HellaSwag, TruthfulQA, IFEval; Δ: less Baseline-SFT."]
    notes += [MARKED] * any("‡" in text for _, cells in body for text, _ in cells)
    return Table("Subject-specific and general-reasoning averages (the paper's Table 3)", heads, body, notes)


def paper_3(columns: list[tuple[str, str, str]]) -> list[tuple[list[str], list[Cell]]]:
    """The paper's rows of these columns, each number checked against its Tables 1 and 2."""
    order = [(data, base, kind) for data in DATASETS for base in BASES for kind in ("SS-B", "GR-B")]

    def computed(method: str, column: tuple[str, str, str]) -> float:
        means = [mean for mean, _ in paper.printed({"LIMA": 1, "Alpaca": 2}[column[0]])[column[1], method]]
        return fmean(means[:5] if column[2] == "SS-B" else means[5:8])

    def cells(values: list[float], expected: Callable[[tuple[str, str, str]], float], form: str, slack: float) -> list[Cell]:
        given = [values[order.index(column)] if column in order else None for column in columns]
        marks = ["‡" * (value is not None and abs(value - expected(column)) >= slack) for value, column in zip(given, columns)]
        return [("–" if value is None else format(value, form) + mark, False) for value, mark in zip(given, marks)]

    def gain(method: str, column: tuple[str, str, str]) -> float:
        return computed(method, column) - computed(METHODS["none"], column)

    body = []
    for method, (values, gains) in paper.printed_3().items():
        body.append(([method + PAPER], cells(values, partial(computed, method), ".2f", 0.0101)))
        if gains:
            body.append((["Δ" + PAPER], cells(gains, partial(gain, method), "+.2f", 0.0151)))
    return body


# Tables to text.


def markdown(table: Table) -> str:
    labels = ["Model", "Method", "Seeds"] if len(table.rows[0][0]) == 3 else ["Method"]
    lines = [[*labels, *table.columns], ["---"] * len(labels) + ["---:"] * len(table.columns)]
    lines += [[*names, *(f"**{text}**" if bold else text for text, bold in cells)] for names, cells in table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"### {table.title}\n\n{body}\n\n" + "\n\n".join(table.notes)


def latex(table: Table) -> str:
    labels = ["Model", "Method", "Seeds"] if len(table.rows[0][0]) == 3 else ["Method"]

    def cell(text: str, bold: bool = False) -> str:
        text = re.sub(r"([&%_#${}])", r"\\\1", text.translate({ord(sign): "-" for sign in "~^\\"}))
        for sign, macro in (("±", r"$\pm$"), ("†", r"$^\dagger$"), ("‡", r"$^\ddagger$"), ("Δ", r"$\Delta$"), ("–", "--")):
            text = text.replace(sign, macro)
        return rf"\textbf{{{text}}}" if bold else text

    lines = [" & ".join(map(cell, [*labels, *table.columns])) + r" \\ \midrule"]
    last = None
    for names, cells in table.rows:
        if last is not None and len(names) == 3 and names[0] != last:
            lines.append(r"\midrule")
        last = names[0]
        lines.append(" & ".join([*map(cell, names), *(cell(*c) for c in cells)]) + r" \\")
    spec = "l" * len(labels) + "r" * len(table.columns)
    notes = " ".join(cell(note) for note in table.notes)
    return "\n".join(
        [r"\begin{table}", r"\centering\small", rf"\caption{{{cell(table.title)}. {notes}}}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule"]
        + lines
        + [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    )


def main(argv: list[str] | None = None) -> None:
    parser = command_line("python -m eval.table", "Print results of `python -m eval` as the paper's tables.")
    parser.add_argument("results", nargs="*", metavar="RESULT.json", help="results of any number of runs and seeds")
    parser.add_argument("--paper", action="store_true", help="the paper's own rows below ours; alone: the paper's tables")
    parser.add_argument("--format", default="markdown", choices=("markdown", "latex"), help="(default: markdown)")
    args = parser.parse_args(argv)
    try:
        if not args.results and not args.paper:
            raise ValueError("no results given; `python -m eval` writes them, and --paper alone prints the paper's tables")
        rows, settings = entries([Path(path) for path in args.results])
        found = tables(rows, settings, args.paper)
        if not found:
            raise ValueError(f"{args.results[0]}: no task in it that the tables have")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print("\n\n".join({"markdown": markdown, "latex": latex}[args.format](table) for table in found))
    if args.format == "latex":
        print("% needs \\usepackage{booktabs}")


if __name__ == "__main__":
    main()
