"""What the entries' command lines share: value types with clear refusals, and a readable --help."""

import argparse
import math
from collections.abc import Callable


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the entry's docstring and every default that says something."""
    return argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, [], argparse.SUPPRESS)
        if silent or not action.option_strings or "%(default)" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _number(kind: type, legal: Callable[[float], bool], words: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not legal(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return convert


positive = _number(int, lambda n: n >= 1, "a whole number of at least 1")
nonnegative = _number(int, lambda n: n >= 0, "a whole number of at least 0")
seed = _number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
rate = _number(float, lambda x: x > 0, "a number above 0")
weight = _number(float, lambda x: x >= 0, "a number of at least 0")
share = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
decay = _number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
guidance = _number(float, lambda x: x >= 1, "a number of at least 1")
