"""Config files: programs with `get_config(arg)`, by their path and mini-arguments."""

import runpy
from pathlib import Path
from typing import Any

from jaxfw.core.errors import InputError, unknown


def load_config(spec: str) -> Any:
    """The config of `FILE` or `FILE:mini-arguments`.

    Raises:
        InputError: no such file, no `get_config` in it, or mini-arguments that it does not know.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = sorted(str(file) for file in path.parent.glob("*.py"))
        if not known:
            raise InputError(f"--config={name} does not exist in {Path.cwd()}: run from the root of a checkout.")
        raise unknown("--config: file", name, known)
    try:
        get_config = runpy.run_path(name)["get_config"]
        return get_config(arg)
    except InputError:
        raise
    except Exception as error:  # a config file is a program: it can raise anything
        raise InputError(
            f"--config={name} is no config file with get_config(arg=''): {type(error).__name__}: {error}. "
            "--traceback shows where."
        ) from error
