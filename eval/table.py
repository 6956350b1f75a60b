"""Results as the paper's tables: `python -m eval.table runs/*/eval.json` prints Tables 1 and 2, 3, and 5 to 8.

Runs that differ only in the seed make one row, mean ± standard deviation (n - 1) over seeds; a column's best is bold.
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

if not __package__:  # python PATH/eval/table.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import command_line, paper, results, say
from support.checkpoint import training

BASELINE, PAPER = "Baseline-SFT", "paper"
METHODS = {"none": BASELINE, "rho1": "Rho-1", "tfidf": "TF-IDF", "llmlingua2": "LLMLingua-2"}
# What is read of a run's configuration, and its types.
RUN = dict.fromkeys(("model", "data", "grouper", "objective", "scope"), str) | {"lam_max": int | float}
RUN |= {"seed": int, "digests": dict}
TRUTHFULQA = ("BLEU", "ROUGE1", "ROUGE2", "ROUGEL", "MC1", "MC2")
IFEVAL = ("Inst loose", "Inst strict", "Prompt loose", "Prompt strict")
SUBJECT = ("MMLU:0", "MMLU:5", "MathQA", "ARC-C", "OpenBookQA")
REASONING = ("HellaSwag", "TruthfulQA", "IFEval")
NORMED = {"MathQA": "mathqa", "ARC-C": "arc_challenge", "OpenBookQA": "openbookqa", "HellaSwag": "hellaswag"}
AVERAGES = {"TruthfulQA": TRUTHFULQA, "IFEval": IFEVAL, "Avg.": SUBJECT + REASONING, "SS-B": SUBJECT, "GR-B": REASONING}
GAINS = {"SS-B": "Δ SS-B", "GR-B": "Δ GR-B"}  # averages, and their gains over the baseline
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
UNSAID = "† acc, as in the other columns; the paper does not say whether its ARC-C is acc or acc_norm."
Number = tuple[float, float | None]  # mean and standard deviation over seeds


@dataclass
class Entry:
    """A method on a base model and a data set, over seeds; ours, or the paper's."""

    base: str
    data: str
    method: str
    config: dict = field(default_factory=dict)  # what its runs share
    seeds: dict = field(default_factory=dict)  # seed -> (fingerprint, file, tasks)
    numbers: dict[str, Number] = field(default_factory=dict)  # of each column that every seed has
    note: str = ""  # what tells it from other rows of its method

    @property
    def label(self) -> str:
        return self.method + (f" ({self.note})" if self.note else "")

    def cell(self, column: str, table: int | None) -> str:
        if column not in self.numbers:
            return "–"
        mean, sd = self.numbers[column]
        text = format(round(mean, 2) + 0.0, "+.2f" if column in GAINS.values() else ".2f")  # -0.0 + 0.0 is 0.0
        text += "‡" * (self.note == PAPER and text in paper.INCONSISTENT.get(table, ()))
        return text if sd is None or table == 3 else f"{text} ± {sd:.2f}"


def scores(tasks: dict, file: Path) -> dict[str, float]:
    """Every column of one model's tasks, in percent; an average needs all of its parts."""
    out = {}
    for column, path in PATHS.items():
        value = tasks
        for key in path:
            value = value.get(key, {}) if isinstance(value, dict) else None
        if type(value) in (int, float) and -1e-9 <= value <= 1 + 1e-9:
            out[column] = 100 * value
        elif value != {}:
            raise ValueError(f"{file}: {' '.join(path)} is {value!r:.40}, expected a share from 0 to 1")
    for column, parts in AVERAGES.items():
        if all(part in out for part in parts):
            out[column] = fmean(out[part] for part in parts)
    return out


def over_seeds(models: list[dict[str, float]]) -> dict[str, Number]:
    """The columns that every seed's model has: mean and standard deviation."""
    columns = [column for column in models[0] if all(column in model for model in models)]
    values = {column: [model[column] for model in models] for column in columns}
    return {column: (fmean(x), stdev(x) if len(x) > 1 else None) for column, x in values.items()}


def papers() -> list[Entry]:
    """The paper's own rows."""
    out = []
    for data in paper.DATASETS:
        for (base, method), averages in paper.printed_3(data).items():
            numbers = dict(zip((*GAINS, *GAINS.values()), ((x, None) for x in averages)))
            for columns, tables in KINDS.values():
                numbers |= zip(columns, paper.printed(tables[data])[base, method]) if tables else {}
            out.append(Entry(base, data, method, seeds=dict.fromkeys(range(5)), numbers=numbers, note=PAPER))
    return out


def read_rows(paths: list[Path]) -> tuple[list[Entry], dict]:
    """The rows that the result files make, in the paper's order, and the settings that all of them have."""
    found, settings, names = {}, {}, {}
    for path in paths:
        result = results.read(path)
        run, settings = result.get("run"), settings or result["settings"]
        if run is not None:
            results.typed(f"{path}: its run is not a configuration of train.py", {"digests": {}} | run, RUN)
        if (given := result["settings"]) != settings:
            raise ValueError(f"{path}: scored with {given}, but {paths[0]} with {settings}; one table has one setting")
        config = training(run, run.get("digests", {})) if run else {"model": result["model"]}
        seed = config.pop("seed", 0)
        key = json.dumps(config, sort_keys=True) + ("" if run else result["fingerprint"])
        # The same content under another name is shown under the first.
        base = names.setdefault(("model", str(config["model"])), base_name((run or result)["model"]))
        data = names.setdefault(("data", str(config.get("data"))), data_name(run))
        row = found.setdefault(key, Entry(base, data, method_name(run), config))
        fingerprint, file, tasks = row.seeds.setdefault(seed, (result["fingerprint"], path, {}))
        if fingerprint != result["fingerprint"]:
            raise ValueError(f"{path}: seed {seed} of this configuration is another model in {file}; leave one out")
        for name, summary in result["tasks"].items():
            summary = {key: value for key, value in summary.items() if key != "made"}
            if tasks.setdefault(name, summary) != summary:
                raise ValueError(f"{path}: {name} has another score than in {file}, of the same model; leave one out")
    rows = list(found.values())
    for row in rows:
        row.numbers = over_seeds([scores(tasks, file) for _, file, tasks in row.seeds.values()])
    tell_apart(rows)
    baselines = {(row.data, row.base): row.numbers for row in rows if row.label == BASELINE}  # none of several
    for row in rows:
        below = baselines.get((row.data, row.base), {})
        for kind in GAINS.keys() & row.numbers.keys() & below.keys():
            row.numbers[GAINS[kind]] = (row.numbers[kind][0] - below[kind][0], None)
    return sorted(rows, key=place), settings


def place(row: Entry) -> list[tuple[int, str]]:
    """Where a row stands: the paper's order, then the alphabet."""
    orders = ((row.data, paper.DATASETS), (row.base, paper.BASES), (row.method, paper.METHODS), (row.label, ()))
    return [(order.index(name) if name in order else len(order), name) for name, order in orders]


def base_name(model: str) -> str:
    """The last part of a path or Hub name; the paper's two in the paper's spelling."""
    name = Path(model).resolve().name
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
    grouper, objective = (run[name].rpartition("/")[2] for name in ("grouper", "objective"))
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
    for same in alike.values():
        names = sorted({name for row in same for name in row.config})
        names = [name for name in names if any(row.config.get(name) != same[0].config.get(name) for row in same)]
        for row in same if len(same) > 1 else ():
            values = [x if isinstance(x := row.config.get(name), list) else [x] for name in names]
            texts = [" ".join(map(str, [name, *value])) for name, value in zip(names, values)]
            row.note = ", ".join(texts) or next(iter(row.seeds.values()))[0][:8]


def tables(rows: list[Entry], settings: dict, with_paper: bool) -> list[str]:
    """Every table for which there is a number, in Markdown. The paper's rows stand below ours; alone, all of them."""
    here = {(row.data, row.base) for row in rows}
    theirs = [row for row in papers() if not rows or (row.data, row.base) in here] if with_paper else []
    note = "Percent, mean ± standard deviation over seeds; –: not scored, or not for every seed. "
    note += "Bold: the highest of a model's rows, and of the paper's rows."
    note += f" BOS {settings['bos']}, {settings['dtype']}." if settings else ""
    if settings.get("limit"):
        note += f" Only the first items, {settings['limit']} of each task (in MMLU, of each subject): not comparable."
    out = []
    for data in dict.fromkeys(row.data for row in rows + theirs):
        bases = dict.fromkeys(row.base for row in rows + theirs if row.data == data)
        models = [[row for row in x if (row.data, row.base) == (data, base)] for base in bases for x in (rows, theirs)]
        unknown = [base for base, found in zip(bases, models[1::2]) if with_paper and not found]
        for kind, (columns, numbers) in KINDS.items():
            title, heads, notes = f"{data}: {kind}", [*columns[:-1], "Avg."], [note]
            if kind == "benchmarks":
                heads[heads.index("ARC-C")] = "ARC-C†"
                notes.append(UNSAID)
            if not numbers:
                heads, notes = [*NORMED], ["Choices compared per character."]
            elif unknown:
                notes.append(f"The paper has no rows for {', '.join(unknown)} on {data}.")
            if data in numbers:
                title += f" (the paper's Table {numbers[data]})"
            body = [line for model in models for line in block(model, columns, numbers.get(data))]
            out += markdown(title, ["Model", "Method", "Seeds", *heads], 3, body, notes)
    return out + table_3(rows, theirs)


def block(rows: list[Entry], columns: tuple[str, ...], table: int | None) -> list[list[str]]:
    """Rows that compete: a column's highest mean, to the printed digits, is bold where they differ."""
    lines = [[row.base, row.label, str(len(row.seeds))] for row in rows]
    for column in columns:
        means = [round(row.numbers.get(column, (-1,))[0], 2) for row in rows]
        differ = len({*means} - {-1}) > 1
        for row, mean, line in zip(rows, means, lines):
            bold = "**" * (differ and mean == max(means))
            line.append(bold + row.cell(column, table) + bold)
    return lines


def table_3(rows: list[Entry], theirs: list[Entry]) -> list[str]:
    """Averages of subject-specific (SS-B) and general-reasoning benchmarks (GR-B), and gains over the baseline."""
    places, body = dict.fromkeys((row.data, row.base) for row in rows or theirs), []
    at = {(row.data, row.base, row.label): row for row in rows + theirs}
    ordered = sorted(rows + theirs, key=lambda row: (row.note == PAPER, place(row)[2:]))
    for label, method, note in dict.fromkeys((row.label, row.method, row.note) for row in ordered):
        found = [at.get((*place, label), Entry(*place, method)) for place in places]
        body.append([label, *(row.cell(kind, 3) for row in found for kind in GAINS)])
        if method != BASELINE:
            gains = [row.cell(gain, 3) for row in found for gain in GAINS.values()]
            body.append(["Δ (paper)" if note == PAPER else "Δ", *gains])
    body = [line for line in body if any(text != "–" for text in line[1:])]
    note = "SS-B: mean of MMLU:0, MMLU:5, MathQA, ARC-C, OpenBookQA; GR-B: of HellaSwag, TruthfulQA, IFEval; "
    title = "Subject-specific and general-reasoning averages (the paper's Table 3)"
    heads = [f"{data} {base} {kind}" for data, base in places for kind in GAINS]
    return markdown(title, ["Method", *heads], 1, body, [f"{note}Δ: less Baseline-SFT."])


def markdown(title: str, heads: list[str], labels: int, body: list[list[str]], notes: list[str]) -> list[str]:
    """The table, whose first columns are labels; none where no cell has a number."""
    cells = [text for line in body for text in line[labels:]]
    if all(text == "–" for text in cells):
        return []
    if any("‡" in text for text in cells):
        notes = [notes[0], "‡ as the paper prints it; its own columns do not give it.", *notes[1:]]
    rule = ["---"] * labels + ["---:"] * (len(heads) - labels)
    rows = "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *body])
    return [f"### {title}\n\n{rows}\n\n" + "\n\n".join(notes)]


def main(argv: list[str] | None = None) -> None:
    parser = command_line("python -m eval.table", "Print results of `python -m eval` as the paper's tables.")
    parser.add_argument("results", nargs="*", metavar="RESULT.json", help="results of any number of runs and seeds")
    parser.add_argument("--paper", action="store_true", help="the paper's own rows below ours; alone: its tables")
    args = parser.parse_args(argv)
    try:
        if not args.results and not args.paper:
            raise ValueError("no results given; `python -m eval` writes them, and --paper alone needs none")
        found = tables(*read_rows([Path(path) for path in args.results]), args.paper)
        if not found:
            raise ValueError(f"{args.results[0]}: no task in it that the tables have")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    say("\n\n".join(found))


if __name__ == "__main__":
    main()
