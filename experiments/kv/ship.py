"""What finished runs of configs/kv.py leave in the repository: `experiments/results/kv.json` and its page.

python -m experiments.kv.ship runs/kv runs/kv-claim
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def main(argv: Sequence[str]) -> int:
    """Copy both runs' results and pages; marks of single items are left out, they are in the run's cells.jsonl."""
    for folder, name in zip(argv, ("kv", "kv_claim"), strict=True):
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        for line in results["metrics"]["cells"]:
            line.pop("marks", None)
        environment = json.loads((Path(folder) / "env.json").read_text(encoding="utf-8"))
        out = results | {"environment": environment}
        (RESULTS / f"{name}.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
        shutil.copy(Path(folder) / "report.html", RESULTS / f"{name}.html")
        print(f"wrote {name}.json and {name}.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
