"""What a program of a model will be on a cluster, compiled here without a GPU.

    python -m jaxfw.audit --model=llama-3.1-8b --program=train --target=h200:1x8 --batch=8 --length=4096
    python -m jaxfw.audit --model=llama-3.1-8b --program=decode --target=h200:1x1 --batch=32 --length=8192
    python -m jaxfw.audit --config=configs/pretrain.py --target=h200:1x2 --workdir=runs/audit     # with a page
    ... --compare=remat=layer --compare="mesh=tensor=8"          # side by side, each with this change
    ... --search=remat=none,products,layer --search=options=none,overlap      # all, the fastest that fits first

Says what a device holds and whether it fits, which kernels run, which bytes move over what, and how a model of the
machine would run it: predicted, never measured. Needs `pip install 'jaxfw[aot]'`. Exit codes: 0; 2 for what cannot be
compiled or does not fit, with two changes that do.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfw.audit.audit import PROGRAMS, Audit, Request, audit
from jaxfw.audit.options import SETS
from jaxfw.audit.page import comparison, lines, page
from jaxfw.audit.remedies import check_fits
from jaxfw.core import runtime
from jaxfw.core.command import OK, Parser, run_command
from jaxfw.core.config import to_dataclass
from jaxfw.core.config_file import load_config
from jaxfw.core.errors import InputError, unknown
from jaxfw.core.workdir import write_json
from jaxfw.models import DecoderConfig
from jaxfw.train import OptimizerConfig

FLAGS = {
    "model": "a preset, or a model directory",
    "program": ", ".join(PROGRAMS),
    "target": "chip:HOSTSxGPUS",
    "mesh": "axis=size with commas; by default fsdp for training, else tensor, over all",
    "batch": "rows, on all devices together",
    "length": "tokens of a row, or slots of the cache",
    "dtypes": "of parameters and of arithmetic: float32/bfloat16",
    "remat": "none, products, attention, layer: what a layer keeps for its gradient",
    "chunk": "tokens of a row whose logits exist at once; 0 is all",
    "capacity": "of experts in training, 1.25 say; 0 drops nothing, which takes longer, also to compile",
    "stacked": "true: one loop over the layers; false: each for itself",
    "quantise": "int8 or int4, of a decode step's weights",
    "kv": "what a decode step's cache keeps, as in adakv@keep=0.2,kv=int4 (docs/kv.md)",
    "options": f"{', '.join(SETS)}, or XLA's own as name=value;name=value",
}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = Parser(
        prog="python -m jaxfw.audit", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, what in FLAGS.items():
        p.add_argument(f"--{name}", help=what)
    p.add_argument("--config", help="FILE or FILE:mini-arguments, for model, optimizer, batch and length")
    p.add_argument("--compare", action="append", default=[], metavar="FLAG=VALUE", help="a second audit with a change")
    p.add_argument("--search", action="append", default=[], metavar="FLAG=V,V", help="every combination of values")
    p.add_argument("--workdir", type=Path, help="a folder for results.json and report.html")
    p.add_argument("--traceback", action="store_true", help="show where an error came from")
    return p


def request_of(options: argparse.Namespace) -> Request:
    """What the flags ask for; they win over the config."""
    given = _from_config(options.config) if options.config else {}
    for name in FLAGS:
        value = getattr(options, name)
        if value is not None:
            given[name] = _typed(name, value)
    return Request(**given)


def _typed(name: str, value: str) -> Any:
    """A flag's text as the request's field holds it."""
    if name not in FLAGS:
        raise unknown("flag", name, FLAGS)
    (kind,) = {type(field.default) for field in dataclasses.fields(Request) if field.name == name}
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise InputError(f"--{name}={value!r} must be true or false.")
        return value.lower() == "true"
    if kind is float:
        if not re.fullmatch(r"\d+(\.\d*)?", value):
            raise InputError(f"--{name}={value!r} must be a number from 0 on.")
        return float(value)
    if kind is int:
        if not value.isdecimal() or (int(value) < 1 and name != "chunk"):
            raise InputError(f"--{name}={value!r} must be a whole number from {0 if name == 'chunk' else 1} on.")
        return int(value)
    return value


def _from_config(spec: str) -> dict[str, Any]:
    config = load_config(spec)
    given: dict[str, Any] = {"program": "train"}
    model = config.get("model")
    if isinstance(model, str) or config.get("init"):
        given["model"] = model if isinstance(model, str) else config.init
    elif model is None:
        raise InputError(f"--config={spec} has neither model nor init: nothing to compile.")
    else:
        given["config"] = to_dataclass(DecoderConfig, model)
    if "optimizer" in config:
        given["optimizer"] = to_dataclass(OptimizerConfig, config.optimizer)
    if "train" in config:
        given |= {"batch": config.train.batch, "length": config.train.length}
    if "loss" in config:
        given |= {"remat": config.loss.remat or "none", "chunk": config.loss.chunk}
    return given | {"stacked": bool(config.get("stack_layers", False)), "mesh": config.get("mesh") or ""}


def changes(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and changed fields: each `--compare`, then every combination of the `--search`es."""
    for text in options.compare:
        name, _, value = text.partition("=")
        yield text, {name: _typed(name, value)}
    found = []
    for text in options.search:
        name, _, values = text.partition("=")
        if not values:
            raise InputError(f"--search={text!r} must be FLAG=VALUE,VALUE: what is to be tried.")
        found.append([(name, value) for value in values.split(",")])
    if found:
        for chosen in itertools.product(*found):
            yield (
                " ".join(f"{name}={value}" for name, value in chosen),
                {name: _typed(name, value) for name, value in chosen},
            )


def rank(audits: Sequence[tuple[str, Audit]]) -> list[tuple[str, Audit]]:
    """What fits first, of that the fastest; by bytes where no time can be predicted."""

    def worth(item: tuple[str, Audit]) -> tuple[bool, float, int]:
        one = item[1]
        return not one.account.fits, one.timeline.seconds if one.timeline else math.inf, one.account.total

    return sorted(audits, key=worth)


def run(argv: Sequence[str]) -> int:
    """Audit and print; returns the exit code."""
    options = parser().parse_args(argv)
    request = request_of(options)
    varied = [(name, dataclasses.replace(request, **change)) for name, change in changes(options)]
    first = audit(request)
    print("\n".join(lines(first)), flush=True)
    audits = [("as asked", first)]
    for name, changed in varied:
        audits.append((name, audit(changed)))
        print("\n".join([f"{name}:", *lines(audits[-1][1])]), flush=True)
    if options.search:
        audits = rank(audits)
        print(f"best: {audits[0][0]}")
    if options.workdir:
        _leave(options.workdir, first, audits)
    if not varied:
        check_fits(first)
    return OK


def _leave(workdir: Path, first: Audit, audits: list[tuple[str, Audit]]) -> None:
    from jaxfw.report import write_report

    workdir.mkdir(parents=True, exist_ok=True)
    environment, contents = runtime.environment(), page(first)
    if len(audits) > 1:
        contents["sections"].insert(0, comparison(audits))
    write_report(workdir / "report.html", environment=environment, **contents)
    rows = {name: one.figures() | {"compile_seconds": one.compile_seconds} for name, one in audits}
    request = {name: value for name, value in dataclasses.asdict(first.request).items() if name in FLAGS}
    write_json(workdir / "results.json", {"request": json.loads(json.dumps(request)), "audits": rows,
                                          "environment": environment})  # fmt: skip
    print(f"report: {workdir / 'report.html'}")


def main(argv: Sequence[str]) -> int:
    """Audit, and say in one line what went wrong; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
