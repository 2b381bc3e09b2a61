"""The family that docs/add_a_model.md writes, taken from the page itself, and a small model of it."""

import re
import sys
from pathlib import Path
from types import ModuleType

from jaxfw.weights.families import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_model.md").read_text(encoding="utf-8")


def page_module() -> ModuleType:
    """The page's python block, run as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    module = ModuleType("add_a_model")
    exec(compile(code, "docs/add_a_model.md", "exec"), vars(module))
    return module


def register(monkeypatch) -> ModuleType:
    """The page's module, in the table of families as long as the fixture lives."""
    module = page_module()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, module.MODEL_TYPE, module.__name__)
    return module
