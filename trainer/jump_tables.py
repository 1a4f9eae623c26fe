"""How far the jumps of an evaluated student agree, as tables by source and target, and their best grids."""

import math
from typing import Any

from .charts import Row, number

TITLES = {"semigroup_gap": "Two half jumps against a whole one", "round_trip": "There and back"}
DECADES = 2  # that the colours tell apart, below the largest number
STRONGEST = 60  # percent of colour, under a text that stays readable


def jump_tables(evaluation: Row) -> list[dict[str, Any]]:
    """Give a table for each measure of agreement: by source time, numbers with their colour in percent."""
    jumps = evaluation.get("jumps", {})
    tables = []
    for key, title in TITLES.items():
        if key not in jumps:
            continue
        rows = [
            (source, list(map(number, row))) for source, row in zip(jumps["times"], jumps[key], strict=True)
        ]
        largest = max(value for _, row in rows for value in row)
        cells = [(source, [(value, _colour(value / largest)) for value in row]) for source, row in rows]
        tables.append({"title": title, "times": jumps["times"], "rows": cells})
    return tables


def _colour(share: float) -> int:
    """Give the percent of colour for a share of the largest number, by its logarithm."""
    return round(STRONGEST * max(0.0, 1 + math.log10(share) / DECADES)) if share > 0 else 0
