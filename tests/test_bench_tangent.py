"""A rule without derivatives costs at most 1.7 flow-matching steps; `bench tangent` times what it says."""

import pytest

from driftmap.launch.bench_tangent import RULES, tangent, with_objective
from driftmap.launch.quickstart import recipe_named
from driftmap.trainer import cost

SMALL = ["model.width=16", "model.depth=1", "model.num_heads=2", "data.batch_size=8"]


def operations_of(rule):
    recipe = recipe_named("quickstart-teacher", SMALL)
    return cost.flops(with_objective(recipe, RULES[rule])) / cost.flops(recipe)


def test_the_operations_of_a_step_are_near_those_of_flow_matching():
    found = {rule: operations_of(rule) for rule in RULES}
    # Three quarters of the samples go through the network once more, or twice, where a step is three passes.
    assert found["discrete"] == pytest.approx(1.25, abs=0.05)
    assert found["discrete semigroup"] == pytest.approx(1.5, abs=0.05)
    assert found["discrete semigroup"] < 1.7 < found["forward mode with gradient"]


def test_every_row_is_there():
    rows = tangent(rounds=3, overrides=SMALL)
    names = [row["name"] for row in rows]
    assert names[:3] == [
        f"{name} / plain forward" for name in ("forward mode", "finite difference", "discrete")
    ]
    assert names[3:] == [f"{rule} step / flow-matching step" for rule in RULES]
    assert all(row["lower_is_better"] and row["ratio"] > 0 for row in rows)
