"""Which metrics tell a teacher's single step from its many; the others are blind and say nothing.

A distance sees if the single step's is at least twice that of the many steps, and of two real sets. A share
sees if the single step loses at least a tenth of it, and three standard errors.
"""

import math
from collections.abc import Mapping

DISTANCES = ("frechet", "kernel")
SHARES = ("precision", "recall", "density", "coverage", "class_accuracy")
ALIGNMENT, SHUFFLED = "caption_alignment", "caption_alignment_shuffled"
ALIGNMENT_ERROR = "caption_gain_error"  # the standard error of the difference of these two
METRICS = (*DISTANCES, *SHARES, ALIGNMENT)
TIMES, LOST, ERRORS = 2.0, 0.1, 3.0

Values = Mapping[str, float]


def blind_metrics(single: Values, many: Values, *, chance: Values, num_samples: int) -> list[str]:
    """Return the names of the blind ones among the metrics that all have.

    `chance` are the values of one real set against another, `num_samples` how many a share is a mean over.
    """
    found = [name for name in METRICS if name in single and name in many]
    return [name for name in found if not _sees(name, single, many, chance, num_samples)]


def _sees(name: str, single: Values, many: Values, chance: Values, num_samples: int) -> bool:
    if name in DISTANCES:
        return single[name] >= TIMES * max(many[name], abs(chance.get(name, 0.0)), 1e-12)
    if name == ALIGNMENT:
        best, worst = many[name] - many[SHUFFLED], single[name] - single[SHUFFLED]
        error = math.hypot(many[ALIGNMENT_ERROR], single[ALIGNMENT_ERROR])
    else:
        best, worst = many[name], single[name]
        error = math.sqrt((_variance(best) + _variance(worst)) / num_samples)
    return best - worst >= max(LOST * best, ERRORS * error, 1e-12)


def _variance(share: float) -> float:
    """Return the variance of one answer; density may be above 1, where it is taken for 1."""
    share = min(max(share, 0.0), 1.0)
    return share * (1 - share)
