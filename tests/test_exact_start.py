"""A student starts as its teacher: its diagonal is the teacher's velocity to the last bit.

Whatever the teacher predicts. What a prediction along one schedule means along another is exact to rounding.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from latents import write_latents

from driftmap.models.denoiser import Along, Denoiser
from driftmap.models.flow_map import FlowMap
from driftmap.models.path import Linear, Trig
from driftmap.models.schedule import Cosine, LinearBetas, ScaledLinearBetas
from driftmap.trainer.build import build, load_flow_map, train
from driftmap.trainer.config import read_config
from driftmap.trainer.recipe import recipe_from
from oracle import Posterior, exact, gaussian_batch
from runs import write_config

NETWORKS: dict[str, Any] = {
    "dit": {"name": "dit", "sample_size": 4, "in_channels": 2, "width": 16, "depth": 1, "num_heads": 2},
    "unet": {"name": "unet", "sample_size": 4, "in_channels": 2, "block_out_channels": [8, 16]}
    | {"layers_per_block": 1, "head_width": 8, "norm_num_groups": 4},
}
TEACHERS: dict[str, Any] = {
    "flow": {"name": "flow_matching"},
    "noise": {"name": "ddpm"},
    "v": {"name": "ddpm", "path": {"name": "cosine"}, "prediction": "v"},
}
SCHEDULES = {
    "line, EDM's": Linear(),
    "quarter circle": Trig(),
    "linear betas": LinearBetas(),
    "scaled linear betas": ScaledLinearBetas(),
    "cosine": Cosine(),
}
TIMES = torch.linspace(
    0.02, 0.93, 64, dtype=torch.float64
)  # the scaled linear betas end at 0.936 of the line


@pytest.mark.parametrize("data_std", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["noise", "data", "v", "velocity"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_prediction_along_every_schedule_is_the_exact_velocity_of_the_line(
    schedule: str, kind: Any, data_std: float
) -> None:
    own, batch = SCHEDULES[schedule], gaussian_batch(64)
    network = Denoiser(Posterior(own, kind, data_std=data_std), own, prediction=kind, data_std=data_std)
    x = Linear().state(batch.data, batch.noise(), TIMES)
    found = Along(network, own, Linear()).velocity(x, TIMES)
    torch.testing.assert_close(found, exact().velocity(x, TIMES), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    """Return a folder with a short run of every network as every kind of teacher."""
    folder = tmp_path_factory.mktemp("exact-start")
    write_latents(folder / "latents")
    for name, settings in NETWORKS.items():
        for kind, objective in TEACHERS.items():
            model = {**settings, "num_classes": 2}
            train(recipe(folder, model=model, objective=objective), folder / f"{name}-{kind}")
    return folder


def recipe(home: Path, **sections: Any) -> Any:
    steps = {"training__steps": 4, "training__save_every": 4, "training__log_every": 4}
    config = write_config(home / "config.yaml", home / "latents", data__batch_size=12, **steps, **sections)
    return recipe_from(read_config(config))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_students_diagonal_is_its_teachers_velocity_to_the_last_bit(
    home: Path, tmp_path: Path, name: str, kind: str
) -> None:
    run, path = str(home / f"{name}-{kind}"), load_flow_map(home / f"{name}-{kind}").path
    objective = {"name": "lagrangian", "path": {"name": path.name}}
    made = build(recipe(home, model={"from_run": run}, teacher={"run": run}, objective=objective), tmp_path)
    # Where weights want gradients, and on several threads in training, torch sums in another order.
    student, teacher = made.model.requires_grad_(False).eval(), made.strategy.task._frozen[0]
    assert isinstance(student, FlowMap)
    x, labels = torch.randn(9, 2, 4, 4), torch.arange(9) % 3
    s, t = torch.linspace(0.05, 0.95, 9), torch.linspace(0.9, 0.0, 9)
    velocity = teacher.velocity(x, s, labels)
    assert torch.equal(student.velocity(x, s, labels), velocity) and velocity.abs().max() > 1e-3
    # The network does not see the gap yet: jumps go straight on, or are DDIM's steps.
    assert torch.equal(student.predict(x, s, t, labels), student.predict(x, s, s, labels))
