r"""Text from a Hugging Face directory on the command line.

    python -m jaxfw.generate --model=DIR --prompt="Once upon a time"
    python -m jaxfw.generate --model=DIR --prompt="What is a list?" --chat --system="Answer in one line." --suggested
    python -m jaxfw.generate --model=DIR --prompt="A joke:" --temperature=0.8 --n=3 --stop=$'\n' --json
    python -m jaxfw.generate --model=DIR --prompt="..." --kv="snapkv@keep=0.3" --protocol=refeed
    python -m jaxfw.generate --model=DIR --prompt=- --mesh=tensor=2 --quantise=int4 < prompt.txt

One text is streamed to stdout; several (--prompt more than once, --n) are printed when all are there. --json prints one
JSON object a text. Exit codes: 0; 1 when the run fails; 2 when what was given cannot be used.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxfw.core import runtime
from jaxfw.core.command import OK, Parser, run_command
from jaxfw.core.distributed import FLAGS, finish, join_by_flags
from jaxfw.core.errors import InputError, unknown
from jaxfw.core.launchers import Processes
from jaxfw.core.mesh import make_mesh, parse_mesh
from jaxfw.generate.lm import LM, load
from jaxfw.generate.options import Answer

DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def parser() -> argparse.ArgumentParser:
    """The flags; those of drawing are `LM.generate`'s keywords."""
    p = Parser(
        prog="python -m jaxfw.generate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--model", help="a Hugging Face model directory")
    p.add_argument("--prompt", action="append", default=[], help="a text; - reads stdin; several are one batch")
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message, put into the chat template")
    p.add_argument("--system", help="with --chat: the system's message before it")
    p.add_argument("--mesh", help="devices by axis, as in tensor=2,data=2; all are used")
    p.add_argument("--quantise", help="int8 or int4: matrices in fewer bits")
    p.add_argument("--dtype", help="float32, bfloat16 or float16; as stored if not given")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, help="draw at random, sharper below 1; without it, the likeliest token")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--repetition-penalty", type=float)
    p.add_argument("--suggested", action="store_true", help="draw as generation_config.json says, where no flag does")
    p.add_argument("--n", type=int, default=1, help="texts for each prompt")
    p.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    p.add_argument("--kv", help="how the cache is compressed, as in snapkv@keep=0.3 (jaxfw.kv); whole if not given")
    p.add_argument("--protocol", default="full", help="what the first token sees of it: full, refeed or ctx")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", action="store_true", help="tokens, log-probabilities and seconds beside the text")
    p.add_argument("--traceback", action="store_true", help="show where an error came from")
    for name, text in FLAGS.items():
        p.add_argument(f"--{name}", help=text)
    return p


def main(argv: Sequence[str]) -> int:
    """Parse the command line, generate, and say in one line what went wrong; returns the exit code."""
    return run_command(lambda argv: run(parse(argv)), argv)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags' values.

    Raises:
        InputError: an unknown flag, one that is missing, or a value that it does not take.
    """
    p = parser()
    options, stray = p.parse_known_args(argv)
    if stray:
        known = [name for action in p._actions for name in action.option_strings if name.startswith("--")]
        raise unknown("flag", stray[0].partition("=")[0], known)
    if not options.model:
        raise InputError("--model is missing: name a Hugging Face model directory, as in --model=DIR.")
    if not options.prompt:
        raise InputError("--prompt is missing: give a text, or --prompt=- to read stdin.")
    if options.system is not None and not options.chat:
        raise InputError("--system is given without --chat: only a conversation has a system's message.")
    if options.seed < 0:
        raise InputError(f"--seed={options.seed} must be 0 or more.")
    if options.prompt.count("-") > 1:
        raise InputError("--prompt=- is given twice, but there is one stdin.")
    return options


def run(options: argparse.Namespace) -> int:
    """Load the model, generate, and print."""
    sizes = None if options.mesh is None else parse_mesh(options.mesh)
    processes = join_by_flags({name: getattr(options, name.replace("-", "_")) for name in FLAGS})
    if processes.count > 1 and options.mesh is None:
        raise InputError(f"--mesh is missing: {processes.count} processes share a model by it, as in --mesh=tensor=2.")
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in options.prompt]
    runtime.enable_compilation_cache()
    mesh = None if sizes is None else make_mesh(**sizes, devices=_devices(sizes, processes))  # pyright: ignore[reportArgumentType]
    lm = load(options.model, mesh=mesh, param_dtype=options.dtype, dtype=options.dtype, quantise=options.quantise)
    is_shown = processes.is_main
    streams = is_shown and not options.json and len(prompts) == options.n == 1
    answers = _generated(lm, prompts, options, streams)
    if streams:
        print()
    elif is_shown:
        _show(prompts, answers, options.json)
    return OK


def _devices(sizes: dict[str, int], processes: Processes) -> list[Any]:
    """As many of this machine's as the mesh asks for; of several processes, all."""
    return jax.devices()[: None if processes.count > 1 else math.prod(sizes.values())]


def _generated(lm: LM, prompts: list[str], options: argparse.Namespace, streams: bool) -> list[list[Answer]]:
    """The answers to each prompt."""
    drawing: dict[str, Any] = dict(lm.suggested) if options.suggested else {}
    drawing |= {name: getattr(options, name) for name in DRAWING if getattr(options, name) is not None}
    values: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens, "key": jax.random.key(options.seed), "n": options.n,
        "stop": options.stop, "details": True, "on_text": _write if streams else None,
        "kv": options.kv, "protocol": options.protocol, **drawing,
    }  # fmt: skip
    if not options.chat:
        out: Any = lm.generate(prompts, **values)
        return out
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return lm.chat([[*system, {"role": "user", "content": prompt}] for prompt in prompts], **values)


def _write(row: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _show(prompts: list[str], answers: list[list[Answer]], as_json: bool) -> None:
    for i, (prompt, samples) in enumerate(zip(prompts, answers, strict=True)):
        for j, answer in enumerate(samples):
            if as_json:
                fields = dataclasses.asdict(answer) | {"logprobs": [round(float(x), 6) for x in answer.logprobs]}
                print(json.dumps({"prompt": prompt, "sample": j, **fields}, ensure_ascii=False))
            else:
                print(f"--- prompt {i + 1}" + (f", text {j + 1}" if len(samples) > 1 else ""))
                print(answer.text)


if __name__ == "__main__":
    sys.exit(finish(main(sys.argv[1:])))
