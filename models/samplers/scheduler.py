"""Any scheduler of diffusers, driven through its own API along our paths.

A discrete path goes as its betas: step n = 1 .. N is diffusers' timestep n - 1, and the model's output is v,
or the noise where a scheduler knows no v. The linear path goes to the flow-matching schedulers and to the
solvers with `use_flow_sigmas`; the output is the velocity. Most schedulers choose their own times from their
number.

Noise that a scheduler draws comes from generators seeded by each sample's own starting noise.
"""

import hashlib
import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..condition import Condition
from ..flow_map import Velocity
from ..path import Linear, Path, expand
from ..schedule import Discrete
from .steps import time_grid


@torch.no_grad()
def scheduler(
    model: Velocity,
    noise: Tensor,
    *,
    grid: Tensor,
    name: str,
    path: Path,
    condition: Condition | None = None,
) -> Tensor:
    """Return the data end of the scheduler `name` along `grid`, an even one unless it takes any times."""
    method = _made(name, path)
    if name.startswith("FlowMatch") and "sigmas" in inspect.signature(method.set_timesteps).parameters:
        method.set_timesteps(sigmas=grid[:-1].tolist(), device=noise.device)
    elif torch.equal(grid.cpu(), time_grid(len(grid) - 1)):
        method.set_timesteps(len(grid) - 1, device=noise.device)
    else:
        raise ValueError(f"{name} has its own times; give the even grid time_grid({len(grid) - 1})")
    takes = inspect.signature(method.step).parameters
    generators = {"generator": _generators(noise)} if "generator" in takes else {}
    x = noise * method.init_noise_sigma if isinstance(path, Discrete) else noise
    for number, timestep in enumerate(method.timesteps):
        if isinstance(path, Discrete):
            time, state = (timestep.double() + 1) / path.num_steps, method.scale_model_input(x, timestep)
        else:
            time, state = method.sigmas[number].double(), x
        t = time.to(x.device, x.dtype).expand(len(x))
        said = model.velocity(state, t, condition)
        if isinstance(path, Discrete):
            data, own = path.end_points(state, said, t, kind="velocity")
            v = expand(path.alpha(t), x) * own - expand(path.sigma(t), x) * data
            said = v if method.config.get("prediction_type") == "v_prediction" else own
        x = method.step(said, timestep, x, **generators).prev_sample
    return x


def _made(name: str, path: Path) -> Any:
    """Return a scheduler that knows the path's noise levels."""
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no scheduler {name!r}")
    known = inspect.signature(kind.__init__).parameters
    if isinstance(path, Discrete) and "trained_betas" in known:
        wanted = {
            "trained_betas": path.betas.numpy(),
            "num_train_timesteps": path.num_steps,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
    elif isinstance(path, Linear) and "use_flow_sigmas" in known:
        wanted = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    elif isinstance(path, Linear) and name.startswith("FlowMatch"):
        wanted = {}
    else:
        raise ValueError(
            f"{name} cannot go along {path}; a discrete path goes with schedulers that take trained_betas, "
            "the linear one with FlowMatch... and with those that take use_flow_sigmas"
        )
    return kind(**{key: value for key, value in wanted.items() if key in known})


def _generators(noise: Tensor) -> list[torch.Generator]:
    """Return a generator a sample."""
    digests = (hashlib.sha256(sample.cpu().numpy().tobytes()).digest()[:8] for sample in noise)
    seeds = (int.from_bytes(digest, "little", signed=True) for digest in digests)
    return [torch.Generator().manual_seed(seed) for seed in seeds]
