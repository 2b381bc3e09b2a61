"""The shell of a command line: parse, act, and say in one line what went wrong, with the exit codes of all doors."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxfw.core.errors import InputError, RunError

OK, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise InputError(f"{message.rstrip('.')}. See --help.")


def run_command(act: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """`act(argv)`, or the exit code of what it raised; --traceback shows where that came from."""
    try:
        return act(argv)
    except (InputError, RunError) as error:
        return say_error(argv, str(error), UNUSABLE if isinstance(error, InputError) else FAILED)
    except BrokenPipeError:  # what reads the output has seen enough
        sys.stderr.close()
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED


def say_error(argv: Sequence[str], message: str, code: int) -> int:
    """One line on stderr, behind the traceback where --traceback asks for it; returns `code`."""
    if "--traceback" in argv:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code
