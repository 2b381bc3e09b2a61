"""What finished runs of configs/kv.py leave in the repository: `experiments/results/kv.json` and its page.

python -m experiments.kv.ship runs/kv runs/kv-claim
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS, NAMES = Path(__file__).parents[1] / "results", ("results", "config", "env")


def main(argv: Sequence[str]) -> int:
    """Copy each run's results and page; marks of single items are left out, they are in the run's cells.jsonl."""
    for folder in map(Path, argv):
        read = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
        for line in read["results"]["metrics"]["cells"]:
            line.pop("marks", None)
        name = {"study": "kv", "claim": "kv_claim"}[read["config"]["part"]]
        out = read["results"] | {"environment": read["env"]}
        (RESULTS / f"{name}.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
        shutil.copy(folder / "report.html", RESULTS / f"{name}.html")
        print(f"wrote {name}.json and {name}.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
