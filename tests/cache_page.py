"""The policy that docs/add_a_cache.md writes, taken from the page itself."""

import re
from pathlib import Path
from types import ModuleType

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_cache.md").read_text(encoding="utf-8")


def page_module() -> ModuleType:
    """The page's python block, run as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    module = ModuleType("add_a_cache")
    exec(compile(code, "docs/add_a_cache.md", "exec"), vars(module))
    return module
