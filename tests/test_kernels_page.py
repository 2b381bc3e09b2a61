"""docs/kernels.md keeps its word: the kernel on that page passes the tests on that page."""

import re
import sys
import types
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


def run_block(name: str, code: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__file__"] = str(PAGE)
    sys.modules[name] = module
    exec(compile(code, f"{PAGE.name}:{name}", "exec"), module.__dict__)
    return module


KERNEL, TESTS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
kernel = run_block("pallas_kernels.row_scale", KERNEL)
page = run_block("tests.row_scale_of_the_page", TESTS)
TestRowScale = page.TestRowScale
test_the_reference_is_numpy = page.test_the_reference_is_numpy


def test_the_kernel_has_the_parts_that_the_page_lists():
    order = ["class Config", "def row_scale", "def supports_row_scale", "def reference", "# --- bodies", "custom_vjp"]
    places = [KERNEL.index(part) for part in order]
    assert places == sorted(places)
