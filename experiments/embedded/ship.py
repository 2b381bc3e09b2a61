"""A trained stage as the model that comes with jaxfw: tensors of 16 bits, meant for arithmetic in 32.

    python -m experiments.embedded.ship runs/stage-3 jaxfw/weights/embedded-2

The target is a new folder: a model that figures rest on is never made again in its place.
"""

import json
import sys
from pathlib import Path

from jaxfw.core.workdir import write_json
from jaxfw.weights.exporting import export


def ship(source: Path, target: Path) -> Path:
    """Write the model of a workdir to a new directory."""
    directory = export(source, target, param_dtype="bfloat16")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", config | {"dtype": "float32", "torch_dtype": "float32"})
    return directory


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), Path(sys.argv[2])))
