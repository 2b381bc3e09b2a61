"""Models that come with jaxfw, by name, and what says which model it was."""

import hashlib
import os
from pathlib import Path

SHIPPED = ("embedded-1",)


def located(directory: str | Path) -> Path:
    """The directory, or where a model of that name lies in this package.

    >>> located("embedded-1").parts[-3:]
    ('jaxfw', 'weights', 'embedded-1')
    """
    is_name = str(directory) in SHIPPED and not os.path.isdir(directory)
    return Path(__file__).parent / str(directory) if is_name else Path(directory)


def model_sha256(directory: str | Path) -> str:
    """One sum over the safetensors files of a model, by their names and contents."""
    found = hashlib.sha256()
    for path in sorted(located(directory).glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
