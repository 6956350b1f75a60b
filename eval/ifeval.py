"""IFEval (Zhou et al. 2023): instructions that a program can check, by the lm-evaluation-harness's own 25 checks."""

import logging
import random
from functools import cache, partial
from pathlib import Path

from eval.generate import Prompt, needed
from eval.rows import Source
from eval.score import Results, mean

TRAIN = Source("ifeval", "input_data.jsonl", "google/IFEval", "ifeval_input_data.jsonl", rows=541)
UNSETTLED = {1122: 19, 1129: 22}  # key -> row: the letter is "#" or "!", and the harness draws another at random


@cache
def checks() -> dict:
    """Instruction id -> the harness's checker, with what its libraries draw at random fixed."""
    try:
        import langdetect
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english")
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as e:
        raise needed("ifeval", f"the lm-evaluation-harness ({e})") from e
    except LookupError as e:
        fetch = "python -m nltk.downloader punkt_tab (or set NLTK_DATA to the folder that holds tokenizers/punkt_tab)"
        raise ValueError(f"ifeval counts sentences with NLTK's punkt_tab, which is not here: {fetch}") from e
    langdetect.DetectorFactory.seed = 0
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel("CRITICAL")  # it warns of texts without letters
    return INSTRUCTION_DICT


def load(data: Path) -> list[Prompt]:
    """Prompts as they are; whatever the model writes until its end token is the response."""
    known, prompts = checks(), []
    for i, row in enumerate(TRAIN.read(data)):
        names, given, text = row.strings("instruction_id_list"), row.get("kwargs", list), row.get("prompt")
        if len(names) != len(given) or not all(isinstance(a, dict) for a in given):
            raise ValueError(f"{row.where}: {len(names)} instructions need as many kwargs, each an object")
        arguments = tuple({argument: value for argument, value in a.items() if value} for a in given)
        for name, a in zip(names, arguments):
            if name not in known:
                raise ValueError(f"{row.where}: the harness has no check {name!r}; lm-eval 0.4.13 has it")
            try:
                built(name, text, a)
            except Exception as e:  # of any kind: the harness checks few of them
                raise ValueError(f"{row.where}: {name} does not take {a} ({e})") from e
            if missing := [x for x in known[name]("").get_instruction_args_keys() if x not in a]:
                raise ValueError(f"{row.where}: {name} without {missing[0]}, which the harness would draw at random")
        prompts.append(Prompt("ifeval", i, text, 1280, (), partial(judge, text, names, arguments)))
    return prompts


def judge(prompt: str, names: tuple[str, ...], arguments: tuple[dict, ...], response: str) -> dict:
    """Which of a prompt's instructions a response follows, strictly and loosely."""
    verdicts, failed = {}, []
    for how, texts in (("strict", [response]), ("loose", variants(response))):
        held = [holds(built(name, prompt, given), texts, failed) for name, given in zip(names, arguments)]
        verdicts |= {f"prompt_level_{how}_acc": float(all(held)), f"inst_level_{how}_acc": held}
    return verdicts | {"checks_failed": 1} if failed else verdicts


def built(name: str, prompt: str, arguments: dict):
    """The harness's check of an instruction."""
    state = random.getstate()
    random.seed(0)  # a checker that draws a letter (UNSETTLED) always draws the same
    check = checks()[name](name)
    check.build_description(**arguments)
    if "prompt" in (check.get_instruction_args() or {}):
        check.build_description(prompt=prompt)
    random.setstate(state)
    return check


def holds(check, texts: list[str], failed: list[Exception]) -> bool:
    """Whether one of the texts follows an instruction; one on which the check itself fails does not."""
    for text in texts:
        try:
            if text.strip() and check.check_following(text):
                return True
        except Exception as e:  # of any kind: RecursionError for deep brackets
            failed.append(e)
    return False


def variants(response: str) -> list[str]:
    """The response, without its first line, last line or both, and each of these without asterisks."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [text.replace("*", "") for text in cut]


def summarize(results: Results) -> dict:
    """Shares of prompts with standard errors, and of instructions, pooled over prompts."""
    (rows,) = results.values()
    out = mean([{name: value for name, value in row.items() if name.startswith("prompt")} for row in rows])
    for name in ("inst_level_strict_acc", "inst_level_loose_acc"):
        held = [h for row in rows for h in row[name]]
        out |= {name: sum(held) / len(held), "instructions": len(held)}
    out["checks_failed"] = sum(row.get("checks_failed", 0) for row in rows)  # responses: counted as not followed
    return out | {"unsettled_keys": [key for key, row in UNSETTLED.items() if row < len(rows)]}
