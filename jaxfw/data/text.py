"""Text that is at hand on every machine with Python: the documentation strings of its standard library."""

import ast
import sysconfig
import warnings
from pathlib import Path


def stdlib_docstrings(*, shortest: int = 200, most: int | None = None) -> list[str]:
    """The docstrings of the standard library's modules, classes and functions, in the order of file and line.

    Sources are parsed, never imported. Indentation is cleaned, and the few that repeat another are left out.
    Python versions differ in a few of them.

    Args:
        shortest: leave out docstrings with fewer characters.
        most: stop when so many are found; None takes all, which takes a few seconds.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            continue
        tree = _parse(path)
        for node in ast.walk(tree) if tree is not None else ():
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= shortest:
                found[text] = None
        if most is not None and len(found) >= most:
            break
    return list(found)[:most]


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree; None for the few files that are templates or of another version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None
