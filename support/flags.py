"""A frozen dataclass as a command line: one flag for each field."""

import argparse
import sys
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import get_args


def given(cls: type, argv: list[str], about: str, sections: dict[str, str], metavars: dict) -> dict:
    """The values of the fields that `argv` names.

    Args:
        cls:      a field's metadata have `help` and `choices`; its type is that of the value, of several or None.
        sections: the first field of each section of --help -> its title.
        metavars: a field's name or its type -> how --help writes a value.
    """
    shape = partial(argparse.HelpFormatter, max_help_position=34, width=110)
    usage = "train.py [--flag VALUE …]"
    parser = argparse.ArgumentParser("train.py", usage, about, allow_abbrev=False, formatter_class=shape)
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


class Parser(argparse.ArgumentParser):
    """Names the nearest flag beside one that there is not."""

    def parse_known_args(self, args=None, namespace=None):
        self.given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        names = [flag.partition("=")[0] for flag in self.given if flag.startswith("--")]
        for name in [name for name in names if name not in ("--", *self._option_string_actions)]:
            near = get_close_matches(name, self._option_string_actions, 1)
            message += f"; no flag {name}" * (name not in message) + (f"; nearest: {near[0]}" if near else "")
        super().error(message)
