"""Cells for the tests of the timing process, which imports them by name: each fails in a way of its own."""

import os
import time
from pathlib import Path


def fail(overrides: list[str]) -> int:
    print("it was not to be.")
    return 1


def hang(overrides: list[str]) -> int:
    Path(overrides[0]).write_text(str(os.getpid()))
    time.sleep(600)
    return 0
