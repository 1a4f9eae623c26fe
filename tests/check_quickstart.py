"""Hold a finished quickstart to what the README says of it: `python tests/check_quickstart.py DIR`.

The metric must see: the teacher's one step is at least twice as far from held-out pictures as its many steps.
Then the student's four evaluations stay within 1.25 of the teacher's many, its one is at most half as far as
the teacher's one, and more evaluations do not make it worse.
"""

import json
import sys
from pathlib import Path


def failures(folder: Path) -> list[str]:
    """Return what does not hold of the evaluation, the report and the pipeline in a quickstart folder."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    rows = {(row["model"], row["nfe"]): row for row in evaluation["rows"]}
    ratio = {key: row["ratio"] for key, row in rows.items()}
    error = {key: row["endpoint_error"] for key, row in rows.items()}
    claims = {
        "teacher at 1 >= 2": ratio["teacher", 1] >= 2,
        "student at 4 <= 1.25": ratio["student", 4] <= 1.25,
        "student at 1 <= half the teacher at 1": ratio["student", 1] <= ratio["teacher", 1] / 2,
        "student at 4 no worse than at 1": ratio["student", 4] <= ratio["student", 1],
        "end points: student nearer than the teacher at 1": error["student", 1] < error["teacher", 1],
        "report.html": (folder / "report.html").stat().st_size > 10_000,
        "pipeline": (folder / "pipeline" / "model_index.json").is_file(),
    }
    return [claim for claim, holds in claims.items() if not holds]


if __name__ == "__main__":
    wrong = failures(Path(sys.argv[1]))
    print("quickstart: " + ("; ".join(f"does not hold: {claim}" for claim in wrong) or "every claim holds"))
    sys.exit(1 if wrong else 0)
