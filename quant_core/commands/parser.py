"""The command line's parser: bad input is one sentence."""

from __future__ import annotations

import argparse
from functools import partial
from typing import NoReturn

from ..user_text import parse_number


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes options in full only, numbers in decimal digits only, and prints no usage before
    an error."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)
        for kind in (int, float):
            self.register("type", kind, partial(parse_number, kind=kind))

    def error(self, message: str) -> NoReturn:
        """Exit with argparse's code for bad input, 2, and one sentence on stderr."""
        self.exit(2, f"{message}; see {self.prog} --help.\n")
