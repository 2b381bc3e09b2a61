"""The floors of docs/architecture.md, read from the imports: down only, no cycles, no long files, no surprises."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("pallas_kernels",),
    ("jaxfw.core",),
    ("jaxfw.ops",),
    ("jaxfw.nn",),
    ("jaxfw.models",),
    ("jaxfw.weights",),
    ("jaxfw.data",),
    ("jaxfw.generate",),
    ("jaxfw.train",),
    ("jaxfw.report",),
    ("jaxfw.evals",),
    ("jaxfw.audit",),
    ("jaxfw.fed", "jaxfw.merge", "jaxfw.kv", "jaxfw.moe", "jaxfw.sim", "jaxfw.edit", "jaxfw.wan", "jaxfw.nas"),
    ("jaxfw.fuse", "jaxfw.offload"),  # sideways: fuse -> fed, offload -> moe
    ("jaxfw",),  # its table of contents, in __init__
    ("jaxfw.launch", "experiments", "configs"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
LONGEST = 500
TOPS = ("jaxfw", "pallas_kernels", "configs", "experiments", "tests")
ALL_FILES = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))
PACKAGE_FILES = [path for path in ALL_FILES if path.relative_to(ROOT).parts[0] != "tests"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE_FILES}


def place(module: str) -> str:
    """The longest name of a floor that the module stands under."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    found = next((name for name in names if name in FLOOR), None)
    assert found, f"{module} stands on no floor"
    # Only jaxfw/__init__.py is the table of contents: a new folder must be given a floor of its own.
    assert found != "jaxfw" or module == "jaxfw", f"{module} stands on no floor"
    return found


def imports(path: Path, *, only_top: bool = False) -> set[str]:
    """Modules of this project that a file imports; with `only_top`, not those inside functions or for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if only_top else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            found |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return {name for name in found if name in MODULES}


def test_imports_go_down():
    wrong = []
    for module, path in MODULES.items():
        for target in imports(path):
            here, there = place(module), place(target)
            if module != "jaxfw" and here != there and FLOOR[there] >= FLOOR[here] and here != "experiments":
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_doors_are_not_imported():
    doors = ("jaxfw.launch", "configs")
    wrong = [(m, t) for m, path in MODULES.items() for t in imports(path) if place(t) in doors and place(m) != place(t)]
    assert not wrong


def test_no_cycles():
    edges = {module: imports(path, only_top=True) - {module} for module, path in MODULES.items()}
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"cycle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module in state:
            return
        state[module] = "open"
        for target in sorted(edges[module]):
            visit(target, (*trail, module))
        state[module] = "done"

    for module in edges:
        visit(module, ())


def test_folders_have_no_cycles():
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module != "jaxfw":
            edges.setdefault(place(module), set()).update(place(t) for t in imports(path) if place(t) != place(module))
    both = [(a, b) for a in edges for b in edges[a] if a in edges.get(b, set())]
    assert not both


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_only_nn_imports_linen():
    users = {module for module, path in MODULES.items() if "flax.linen" in path.read_text(encoding="utf-8")}
    assert {place(module) for module in users} == {"jaxfw.nn"}


def test_packages_have_no_rooms_for_odds_and_ends():
    assert not {m for m in MODULES if {"utils", "helpers", "common"} & set(m.split("."))}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LATE = ("orbax", "transformers", "datasets", "matplotlib", "torch", "ml_collections", "tensorboardX", "jinja2")


def test_importing_everything_touches_no_device():
    """Every module of the packages but the launcher, which a notebook and a GPU image without ml_collections import.

    And but the one for lm-eval, which is another program and brings its own.
    """
    others = ("configs", "experiments", "jaxfw.launch")
    names = [m for m in MODULES if place(m) not in others and m != "jaxfw.evals.harness"]
    run(f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
late = [name for name in {LATE!r} if name in sys.modules]
assert not late, late
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
""")


def test_importing_jaxfw_is_light():
    run("""
import sys
import jaxfw, pallas_kernels
heavy = [name for name in ("orbax", "transformers", "datasets", "matplotlib", "tokenizers") if name in sys.modules]
assert not heavy, heavy
""")


def test_a_launch_imports_only_what_it_uses(tmp_path):
    systems = [name for names in FLOORS[12:14] for name in names]
    out = run(f"""
import sys
from jaxfw.launch import main
code = main(["launch", "--config=configs/quickstart.py:smoke", "--workdir={tmp_path}"])
ours = [name for name in sys.modules if name.split(".")[0] in ("jaxfw", "pallas_kernels", "configs", "experiments")]
assert len(ours) <= 150, len(ours)
used = [name for name in ours if any(name == s or name.startswith(s + ".") for s in {systems!r})]
assert not used, used
print("exit", code)
""")
    assert out.endswith("exit 0\n")


def test_importing_a_test_changes_no_environment():
    """Doctests import every module here: what a program sets for itself would be every test's."""
    lines = {path.name: path.read_text(encoding="utf-8").splitlines() for path in Path(__file__).parent.rglob("*.py")}
    assert not [name for name in lines if any(line.startswith("os.environ[") for line in lines[name])]
