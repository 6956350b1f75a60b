"""The paper's benchmarks. `python -m eval --model OUT/model --tasks mmlu,hellaswag --data FOLDER`; the scorer is `score.py`."""

import argparse
from functools import partial


def command_line(prog: str, description: str) -> argparse.ArgumentParser:
    """How the commands of this package read their flags."""
    shape = partial(argparse.HelpFormatter, max_help_position=26, width=110)
    return argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, formatter_class=shape)
