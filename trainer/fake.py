"""The fake score: a second network that learns, in the run of a student, the velocity of its samples.

It is a part of the model that is trained, `model.fake`, so that a strategy wraps, shards and saves it; of a
run that is read the student alone is kept. To the optimizer it is another player: it has moments, a learning
rate (`optimizer.fake_lr`), clipping and a count of updates of its own, and also moves in steps in which the
student, without gradients, stands still.

Source: Yin et al., "Improved distribution matching distillation for fast image synthesis", 2024, section 4.2:
two time scales.
"""

import copy
from typing import Any

from torch import nn

from ..models.flow_map import FlowMap
from .objective import Objective

FAKE = "fake."  # what the names of its parameters begin with


def fake_of(objective: Objective, model: FlowMap) -> FlowMap | None:
    """Return a copy of a student as it starts, if an objective trains one beside it."""
    return copy.deepcopy(model) if getattr(objective, "fake_network", False) else None


def players(parameters: dict[str, Any]) -> list[list[nn.Parameter]]:
    """Return the parameters, by name, of the student and, where there is one, of its fake network."""
    student = [parameter for name, parameter in parameters.items() if not name.startswith(FAKE)]
    fake = [parameter for name, parameter in parameters.items() if name.startswith(FAKE)]
    return [student, fake] if fake else [student]
