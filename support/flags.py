"""A frozen dataclass as a command line: one flag for each field."""

import argparse
import sys
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import get_args


class Parser(argparse.ArgumentParser):
    """Names the nearest flag beside one that there is not: by its letters, or one whose help has its words."""

    def parse_known_args(self, args=None, namespace=None):
        self.given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        known = self._option_string_actions
        names = [flag.partition("=")[0] for flag in self.given if flag.startswith("--")]
        for name in [name for name in names if name not in ("--", *known)]:
            flag = name.replace("_", "-").lower()
            words = flag.strip("-").replace("-", " ")  # --learning-rate: those words in the help of --lr
            near = [x for x, action in known.items() if len(words) > 3 and words in (action.help or "").lower()]
            near = get_close_matches(flag, known, 1, 0.7) or near
            message += f"; no flag {name}" * (name not in message) + (f"; nearest: {near[0]}" if near else "")
        super().error(message)


def given(cls: type, argv: list[str], about: str, sections: dict[str, str], metavars: dict) -> dict:
    """The values of the fields that `argv` names.

    Args:
        cls:      a field's metadata have `help` and `choices`; its type is that of the value, of several or None.
        sections: the first field of each section of --help -> its title.
        metavars: a field's name or its type -> how --help writes a value.
    """
    shape = partial(argparse.HelpFormatter, max_help_position=34, width=110)
    usage = "train.py [--flag VALUE …]"
    parser = Parser("train.py", usage, about, allow_abbrev=False, formatter_class=shape)
    section, several = parser, [f.name for f in fields(cls) if isinstance(f.default, tuple)]
    for f in fields(cls):
        section = parser.add_argument_group(sections[f.name]) if f.name in sections else section
        kind, default, choices = (get_args(f.type) or [f.type])[0], f.default, f.metadata["choices"]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        how = {"help": f.metadata["help"] + (f" (default: {shown})" if shown is not None and kind is not bool else "")}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            any_number = get_args(f.type)[-1:] == (...,)  # tuple[float, ...], not tuple[float, float]
            how |= {
                "type": kind,
                "choices": choices,
                "nargs": ("+" if any_number else 2) if f.name in several else None,
            }
            how |= {"metavar": metavars.get(f.name, None if choices else metavars[kind])}
        section.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    found = vars(parser.parse_args(argv))
    return found | {name: tuple(found[name]) for name in several if name in found}
