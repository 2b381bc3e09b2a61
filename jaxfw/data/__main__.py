"""Folders of tokens from the command line.

    python -m jaxfw.data prepare --input=FILES --tokenizer=DIR --output=DIR [--column=text] [--chat] [--split=train]
    python -m jaxfw.data inspect DIR
    python -m jaxfw.data verify DIR

prepare: text, JSON, CSV or parquet (a file, a folder or a glob), or a data set of the Hub, as tokens that training
maps; --chat: conversations (column `messages`), trained on the assistant's turns only. inspect: what a folder holds,
and how its documents would be packed. verify: reads everything and compares with the sums. Exit codes: 0; 1 when a
check fails or the disk does not take it; 2 when what was given cannot be used. --traceback shows where an error came
from.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxfw.core.command import FAILED, OK, UNUSABLE, Parser, run_command

LENGTHS = (512, 2048, 8192)


def main(argv: Sequence[str]) -> int:
    """Parse the command line, act, and say in one line what went wrong; returns the exit code."""
    if not argv or any(word in ("--help", "-h") for word in argv):
        print(__doc__)
        return OK if argv else UNUSABLE
    return run_command(_act, argv)


def _act(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    return options.act(options)


def _parser() -> Parser:
    parser = Parser(prog="python -m jaxfw.data", allow_abbrev=False, add_help=False)
    commands = parser.add_subparsers(required=True, metavar="prepare|inspect|verify", parser_class=Parser)
    for name, act in (("prepare", _prepare), ("inspect", _inspect), ("verify", _verify)):
        command = commands.add_parser(name, allow_abbrev=False, add_help=False)
        command.set_defaults(act=act)
        command.add_argument("--traceback", action="store_true")
        if act is not _prepare:
            command.add_argument("directory")
            continue
        for flag in ("--input", "--tokenizer", "--output"):
            command.add_argument(flag, required=True)
        command.add_argument("--column")
        command.add_argument("--split", default="train")
        command.add_argument("--chat", action="store_true")
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from jaxfw.data.encoding import prepare
    from jaxfw.data.token_file import read_meta
    from jaxfw.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    column = options.column or ("messages" if options.chat else "text")
    left_out = prepare(options.input, tokenizer, options.output, column=column, chat=options.chat, split=options.split)
    meta = read_meta(options.output)
    print(f"written: {options.output}: {meta['documents']:,} documents, {meta['tokens']:,} tokens")
    if str(left_out):
        print(f"left out: {left_out}")
    if not options.chat:
        eos = tokenizer.special_tokens.get("eos_token")
        none = "this tokenizer has no end-of-text token: documents follow each other unmarked"
        print(none if tokenizer.eos_id is None else f"each document ends with {eos}")
    return OK


def _inspect(options: argparse.Namespace) -> int:
    from jaxfw.data.packing import Packed
    from jaxfw.data.token_file import open_tokens, read_meta

    corpus, meta = open_tokens(options.directory), read_meta(options.directory)
    lengths = corpus.lengths
    rows = {
        "documents": f"{len(corpus):,}",
        "tokens": f"{corpus.size:,} ({meta['dtype']}, {corpus.tokens.nbytes:,} bytes)",
        "tokens a document": f"{lengths.min():,} to {lengths.max():,}, {lengths.mean():,.1f} on average",
        "vocabulary": f"{corpus.vocab_size:,} tokens, fingerprint {corpus.tokenizer[:16] or 'not known'}",
        "content": corpus.fingerprint[:16],
    }
    if corpus.weights is not None:
        rows["trained on"] = f"{corpus.weights.mean():.1%} of the tokens"
    rows |= {f"notes: {name}": str(value) for name, value in meta.get("notes", {}).items()}
    for length in LENGTHS:
        packed = Packed(corpus, 1, length)
        rows[f"rows of {length}"] = f"{packed.rows_per_epoch:,}, {packed.padding:.2%} padding"
    for name, value in rows.items():
        print(f"{name:18} {value}")
    return OK


def _verify(options: argparse.Namespace) -> int:
    from jaxfw.data.token_file import verify_tokens

    problems = 0
    for name, problem in verify_tokens(options.directory):
        problems += bool(problem)
        print(f"FAILED {name}: {problem}" if problem else f"ok     {name}", flush=True)
    return FAILED if problems else OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
