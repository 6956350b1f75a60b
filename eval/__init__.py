"""The paper's benchmarks: `python -m eval --model OUT/model --tasks mmlu,hellaswag --data FOLDER`."""

import argparse
import os
import sys

from support.flags import Parser


def command_line(prog: str, description: str, scores: bool = False) -> argparse.ArgumentParser:
    """A command of this package, with the flags of those that score a model."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    if scores:
        add("--model", required=True, metavar="PATH", help="model folder in the published layout, or a Hub name")
        add("--limit", type=int, metavar="N", help="the first N items of each task (of each MMLU subject): a try")
        bos = ("never", "auto", "always")
        add("--bos", default="never", choices=bos, help="a BOS before each prompt (default: never, as in the paper)")
        add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="compute type (default: bfloat16)")
    return parser


def say(text: str) -> None:
    """Print lines; where nobody reads on (`| head`), these and all later ones go nowhere."""
    encoding = sys.stdout.encoding or "utf-8"  # perhaps without ±
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
