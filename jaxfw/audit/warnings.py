"""What XLA's compiler says on stderr, kept from there: it knows which arrays it had to replicate."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_LINE = re.compile(r"^[WEI]\d{4} \S+\s+\d+ \S+\] (.*)$")
_REPLICATED = re.compile(
    r"Involuntary full rematerialization.*? for HLO operation %(\S+) = (\S+) .*?(?:op_name=\"([^\"]*)\"|$)"
)


@contextlib.contextmanager
def compiler_log() -> Iterator[list[str]]:
    """Collects the compiler's lines while the context lasts; what else was written to stderr goes there afterwards."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                found = _LINE.match(line)
                if found:
                    said.append(found[1])
                else:
                    print(line, file=sys.stderr)


def replicated(said: list[str]) -> list[str]:
    """Arrays that the compiler gathers whole on every device because it knows no other way to lay them out anew."""
    found = {}
    for line in said:
        if match := _REPLICATED.search(line):
            found[match[3] or match[1]] = match[2].partition("{")[0]
    return [f"{name}: {shape}" for name, shape in found.items()]
