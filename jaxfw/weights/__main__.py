"""Model directories from the command line.

    python -m jaxfw.weights inspect DIR [--mesh=tensor=2] [--quantise=int4]
    python -m jaxfw.weights verify DIR [--write]
    python -m jaxfw.weights export SOURCE TARGET [--param-dtype=bfloat16] [--shard-bytes=5000000000] [--adapter=DIR]

inspect: family, configuration, tensors, what is missing or would be ignored, bytes of each device of a mesh; fails
where it would not load. verify: sums against SHA256SUMS, structure, numbers that are not finite; --write makes
SHA256SUMS. export: a model directory, or a workdir's model, to a new directory; --adapter=DIR, of PEFT or of a run, is
merged into it. Exit codes: 0; 1 when a check or the export fails; 2 when what was given cannot be used. --traceback
shows where an error came from.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxfw.core.command import FAILED, OK, UNUSABLE, Parser, run_command
from jaxfw.core.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Parse the command line, act, and say in one line what went wrong; returns the exit code."""
    if not argv or any(word in ("--help", "-h") for word in argv):
        print(__doc__)
        return OK if argv else UNUSABLE
    return run_command(_act, argv)


def _act(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    _stay_off_accelerators()
    return options.act(options)


def _parser() -> Parser:
    parser = Parser(prog="python -m jaxfw.weights", allow_abbrev=False, add_help=False)
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|export", parser_class=Parser)
    for name, act, positional, flags in (
        ("inspect", _inspect, ("directory",), ("--mesh", "--quantise")),
        ("verify", _verify, ("directory",), ()),
        ("export", _export, ("source", "target"), ("--param-dtype", "--shard-bytes", "--adapter")),
    ):
        command = commands.add_parser(name, allow_abbrev=False, add_help=False)
        command.set_defaults(act=act)
        for word in positional:
            command.add_argument(word)
        for flag in flags:
            command.add_argument(flag)
        if act is _verify:
            command.add_argument("--write", action="store_true")
        command.add_argument("--traceback", action="store_true")
    return parser


def _stay_off_accelerators() -> None:
    """Nothing here needs a GPU, and another process may have it."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _inspect(options: argparse.Namespace) -> int:
    from jaxfw.core.mesh import parse_mesh
    from jaxfw.ops.quant import bits_of
    from jaxfw.weights.inspection import describe, loads

    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    if options.quantise is not None:
        bits_of(options.quantise)
    print(describe(options.directory, mesh=mesh, quantise=options.quantise))
    return OK if loads(options.directory) else FAILED


def _verify(options: argparse.Namespace) -> int:
    from jaxfw.weights.inspection import verify, write_sums

    problems = 0
    for finding in verify(options.directory):
        problems += bool(finding.problem)
        print(f"FAILED {finding.name}: {finding.problem}" if finding.problem else f"ok     {finding.name}", flush=True)
    if problems:
        return FAILED
    if options.write:
        print(f"written: {write_sums(options.directory)}")
    return OK


def _export(options: argparse.Namespace) -> int:
    from jaxfw.weights.exporting import export
    from jaxfw.weights.saving import SHARD_BYTES

    given = options.shard_bytes
    if given is not None and (not given.replace("_", "").isdecimal() or int(given) < 1):
        raise InputError(f"--shard-bytes={given!r} must be a whole number of bytes, as in --shard-bytes=5000000000.")
    size = SHARD_BYTES if given is None else int(given)
    written = export(
        options.source, options.target, param_dtype=options.param_dtype, shard_bytes=size, adapter=options.adapter
    )
    print(f"written: {written}")
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
