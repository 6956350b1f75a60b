"""Results as the paper's tables: `python -m eval.table runs/*/eval.json` prints Tables 1 and 2, 3, and 5 to 8 for what it is given.

Runs that differ in nothing but the seed make one row, mean ± standard deviation (n - 1) over seeds; the best of a column is bold.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from checkpoint import HOW_ONLY, WHERE_ONLY
from eval import paper
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


def scores(tasks: dict) -> dict[str, float]:
    """Every column that a run's tasks give, in percent; an average stands where all of its parts do."""
    out = {}

    def put(column: str, task: str, *keys: str) -> None:
        value = tasks.get(task)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            out[column] = 100 * value

    put("MMLU:0", "mmlu", "acc")
    put("MMLU:5", "mmlu_5shot", "acc")
    for column, task in NORMED.items():
        put(column, task, "acc")
        put(f"{column} acc_norm", task, "acc_norm")
    for column in TRUTHFULQA[:4]:
        put(column, "truthfulqa_gen", f"{column.lower().replace('rougel', 'rougeL')}_acc")
    for column in TRUTHFULQA[4:]:
        put(column, "truthfulqa_mc", column.lower(), "acc")
    for column in IFEVAL:
        level, how = column.lower().split()
        put(column, "ifeval", f"{level}_level_{how}_acc")
    averages = (("TruthfulQA", TRUTHFULQA), ("IFEval", IFEVAL), ("Avg.", MAIN), ("SS-B", SUBJECT), ("GR-B", REASONING))
    for column, parts in averages:
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

    def cell(self, column: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over seeds; None unless every seed has the column."""
        values = [scores(tasks).get(column) for _, _, tasks in self.seeds.values()]
        if not values or None in values:
            return None
        return fmean(values), stdev(values) if len(values) > 1 else None


def read(path: Path) -> dict:
    """One result file of `python -m eval`."""
    result = read_json(path)
    if not {"model", "fingerprint", "settings", "tasks"} <= result.keys() or not isinstance(result["tasks"], dict):
        raise ValueError(f"{path}: not a result of `python -m eval`")
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
        run = result.get("run")
        same = {k: v for k, v in (run or {"model": result["model"]}).items() if k not in (*WHERE_ONLY, *HOW_ONLY, "seed")}
        key = json.dumps(same, sort_keys=True) + ("" if run else result["fingerprint"])
        entry = found.setdefault(key, Entry(base_name(same["model"]), data_name(run), method_name(run), same))
        seed = run["seed"] if run else 0
        fingerprint, files, tasks = entry.seeds.setdefault(seed, (result["fingerprint"], [], {}))
        if fingerprint != result["fingerprint"]:
            raise ValueError(f"{path}: seed {seed} of this configuration is another model in {files[0]}; leave one of them out")
        files.append(path)
        for name, summary in result["tasks"].items():
            timeless = {k: v for k, v in summary.items() if k not in ("seconds", "items_per_second")}
            if tasks.setdefault(name, timeless) != timeless:
                raise ValueError(f"{path}: {name} has another score than in {files[0]}, of the same model; leave one of them out")
    out = list(found.values())
    tell_apart(out)
    rank = lambda name, order: (order.index(name) if name in order else len(order), name)  # noqa: E731
    out.sort(key=lambda e: (rank(e.data, DATASETS), rank(e.base, BASES), rank(e.method, METHOD_ORDER)))
    return out, settings[1] if settings else {}


def base_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").split("/")[-1]


def data_name(run: dict | None) -> str:
    if run is None:
        return "no fine-tuning"
    name = run["data"].lower()
    return next((known for known in DATASETS if known.lower() in name), Path(run["data"]).name)


def method_name(run: dict | None) -> str:
    if run is None:
        return "as given"
    if run["lam_max"] == 0 and run["worst"] == "max":
        return METHODS["none"]  # groups, if any, are only watched
    return METHODS.get(run["grouper"], run["grouper"])


def tell_apart(rows: list[Entry]) -> None:
    """Name, in the label of rows that are otherwise called the same, the settings in which they differ."""
    alike = defaultdict(list)
    for row in rows:
        alike[row.base, row.data, row.method].append(row)
    for same in (group for group in alike.values() if len(group) > 1):
        names = [n for n in sorted({n for row in same for n in row.config}) if len({json.dumps(row.config.get(n)) for row in same}) > 1]
        for row in same:
            row.method += " (" + ", ".join(f"{n} {row.config.get(n)}" for n in names[:3]) + ")"


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
    return [[bool(cell) and len(rows) > 1 and round(cell[0], 2) == best[i] for i, cell in enumerate(row)] for row in rows]


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
            labels = [base, row.method, str(len(row.seeds))]
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
    note = f"Percent, mean ± standard deviation over seeds. BOS {settings.get('bos', 'never')}, {settings.get('dtype', '')}.".replace(
        ", .", "."
    )
    if settings.get("limit"):
        note += f" Only the first {settings['limit']} items of each task: not comparable with anything."
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
    places = [(data, base) for data in DATASETS for base in BASES]
    others = dict.fromkeys((row.data, row.base) for row in rows)
    places = [place for place in places if place in others or (with_paper and not rows)] + [p for p in others if p not in places]
    columns = [(data, base, kind) for data, base in places for kind in ("SS-B", "GR-B")]
    mine = {(row.data, row.base, row.method): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    methods.sort(key=lambda m: METHOD_ORDER.index(m) if m in METHOD_ORDER else len(METHOD_ORDER))

    def ours(method: str, column: tuple[str, str, str]) -> float | None:
        row = mine.get((*column[:2], method))
        cell = row and row.cell(column[2])
        return cell[0] if cell else None

    body = []
    for method in methods:
        values = [ours(method, column) for column in columns]
        if all(value is None for value in values):
            continue
        body.append(([method], [("–" if value is None else f"{value:.2f}", False) for value in values]))
        gains = [None if value is None or (b := ours(METHODS["none"], c)) is None else value - b for value, c in zip(values, columns)]
        if method != METHODS["none"] and any(gain is not None for gain in gains):
            body.append((["Δ"], [("–" if gain is None else f"{gain:+.2f}", False) for gain in gains]))
    if with_paper and any(place in [(d, b) for d in DATASETS for b in BASES] for place in places):
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
        data, base, kind = column
        means = [mean for mean, _ in paper.printed({"LIMA": 1, "Alpaca": 2}[data])[base, method]]
        return fmean(means[:5] if kind == "SS-B" else means[5:8])

    def cells(values: list[float], expected: Callable, form: str, slack: float) -> list[Cell]:
        out = []
        for column in columns:
            if column not in order:
                out.append(("–", False))
                continue
            value = values[order.index(column)]
            out.append((format(value, form) + "‡" * (abs(value - expected(column)) >= slack), False))
        return out

    body = []
    for method, (values, gains) in paper.printed_3().items():
        body.append(([method + PAPER], cells(values, partial(computed, method), ".2f", 0.0101)))
        if gains:
            gain = lambda column, method=method: computed(method, column) - computed(METHODS["none"], column)  # noqa: E731
            body.append((["Δ" + PAPER], cells(gains, gain, "+.2f", 0.0151)))
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
        for sign, macro in (("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#")):
            text = text.replace(sign, macro)
        for sign, macro in (
            ("±", r"$\pm$"),
            ("†", r"$^\dagger$"),
            ("‡", r"$^\ddagger$"),
            ("Δ", r"$\Delta$"),
            ("–", "--"),
            ("η", r"$\eta$"),
        ):
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
    parser = argparse.ArgumentParser(
        prog="python -m eval.table",
        description="Print results of `python -m eval` as the paper's tables.",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=110),
    )
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
