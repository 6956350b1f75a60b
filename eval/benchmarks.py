"""The benchmarks that `--tasks` can name."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from eval import arc_challenge, hellaswag, ifeval, mathqa, mmlu, openbookqa, truthfulqa
from eval.rows import Source
from eval.score import Results, mean


def single(results: Results) -> dict:
    """The summary of a benchmark that is one task."""
    (rows,) = results.values()
    return mean(rows)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows lie, its items from the data folder, and the summary of its items' metrics."""

    sources: tuple[Source, ...]
    load: Callable[[Path], list]
    summarize: Callable[[Results], dict] = single


BENCHMARKS = {
    "mmlu": Benchmark((mmlu.TEST,), partial(mmlu.load, shots=0), mmlu.summarize),
    "mmlu_5shot": Benchmark((mmlu.TEST, mmlu.DEV), partial(mmlu.load, shots=5), mmlu.summarize),
    "mathqa": Benchmark((mathqa.TEST,), mathqa.load),
    "arc_challenge": Benchmark((arc_challenge.TEST,), arc_challenge.load),
    "openbookqa": Benchmark((openbookqa.TEST,), openbookqa.load),
    "hellaswag": Benchmark((hellaswag.VALIDATION,), hellaswag.load),
    "truthfulqa_mc": Benchmark((truthfulqa.CHOICE,), truthfulqa.load_choice, truthfulqa.summarize_choice),
    "truthfulqa_gen": Benchmark((truthfulqa.ANSWERS,), truthfulqa.load_answers, truthfulqa.summarize_answers),
    "ifeval": Benchmark((ifeval.TRAIN,), ifeval.load, ifeval.summarize),
}


def task_names(given: str) -> list[str]:
    """The tasks in "a,b", each once; "all" is every one."""
    names = [name.strip().lower() for name in given.split(",") if name.strip()]
    names = list(BENCHMARKS) if given == "all" else list(dict.fromkeys(names))
    for name in names:
        if name not in BENCHMARKS:
            near = get_close_matches(name, BENCHMARKS, 3, 0.5) or list(BENCHMARKS)
            raise ValueError(f"--tasks {name}: no such task; nearest: {', '.join(near)}")
    if not names:
        raise ValueError(f"--tasks {given!r}: names no task; choose from {', '.join(BENCHMARKS)}")
    return names
