"""What a study measures of a trained run: likelihoods, samples, latents, densities, and what a step costs.

Each measurement is kept in a file of its own in RUN/study, with what it is of, and not made again.
"""

import io
import json
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.shards import write_atomically
from ..models.backbones.coupling_flow import CouplingFlow
from ..models.flow_map import FlowMap
from ..models.samplers import sampler_of
from ..trainer.build import load_model
from ..trainer.config import ConfigError
from ..trainer.evaluate import sample_noise
from ..trainer.metrics.gaussian_kernel import mean_discrepancy, mean_kernel, purity, usual_widths
from ..trainer.recipe import Recipe
from ..trainer.seeds import Random
from ..trainer.study import LikelihoodSection, MethodSection, Study
from ..trainer.tensor_memory import TensorMemory
from .compare_data import SHOWN, DataSet
from .compare_points import backward_states, density_on, flow_states, grid_of, process_states
from .likelihood import likelihood_of_run
from .likelihood_request import LikelihoodRequest

FOLDER = "study"
AT_ONCE = 1000  # samples at once
EXACT = "exact"  # the sampler of a discrete flow


@dataclass(frozen=True)
class Kept:
    """Files of what is found; `about` is what all of it is of."""

    folder: Path
    about: dict[str, Any]

    def found(self, name: str, make: Callable[[], Any], **about: Any) -> Any:
        """Return what was kept by a name of the same, or what `make` returns, which is kept."""
        file, wanted = self.folder / f"{name}.pt", json.dumps(self.about | about, sort_keys=True)
        if file.is_file():
            try:
                kept = torch.load(file, map_location="cpu", weights_only=True)
                if kept["about"] == wanted:
                    return kept["found"]
            except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError):
                file.unlink()  # half of a file; it is made again
        found, stream = make(), io.BytesIO()
        torch.save({"about": wanted, "found": found}, stream)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, stream.getvalue())
        return found


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yield how often the networks of a model have been called since, in gradients, too."""
    calls: list[None] = []
    networks = [getattr(model, name, None) for name in ("backbone", "drift", "flow")]
    hooks = [
        network.register_forward_hook(lambda *_: calls.append(None))
        for network in networks
        if isinstance(network, nn.Module)
    ]
    try:
        yield lambda: len(calls)
    finally:
        for hook in hooks:
            hook.remove()


def measured(
    study: Study, section: MethodSection, recipe: Recipe, data: DataSet, folder: Path
) -> dict[str, Any]:
    """Return all measurements of a run, numbers and what is drawn, from files where they are there."""
    model: Any = load_model(folder)
    if not isinstance(model, FlowMap | CouplingFlow):
        raise ConfigError(f"{folder} holds neither a flow nor a diffusion; a study compares these")
    kept = Kept(folder / FOLDER, {"data": data.test.fingerprint, "seed": study.seed})
    own = _Measured(study, section, recipe, data, folder, model, kept)
    return {
        "likelihood": own.likelihoods(),
        "step": kept.found("step", own.cost_of_step),
        "samples": own.samples(),
        **own.latents(),
        **(own.pictures() if data.is_plane else {}),
    }


@dataclass(frozen=True)
class _Measured:
    """One run and what it is measured by."""

    study: Study
    section: MethodSection
    recipe: Recipe
    data: DataSet
    folder: Path
    model: Any
    kept: Kept

    def likelihoods(self) -> list[dict[str, Any]]:
        """Return a row of each measure at each number of steps: nats a sample and their standard error."""
        settings = self.section.likelihood
        return [
            self.kept.found(
                f"likelihood-{measure}-{steps or 'own'}",
                partial(self._likelihood, measure, steps, settings),
                paths=settings.paths if measure == "iw" else None,
                solver=settings.solver if measure == "ode" else None,
            )
            for measure, steps in measures_of(settings)
        ]

    def _likelihood(self, measure: str, steps: int | None, settings: LikelihoodSection) -> dict[str, Any]:
        request = LikelihoodRequest(
            self.folder,
            Path(self.data.test.folder),
            measures=(measure,),
            steps=steps,
            paths=settings.paths if measure == "iw" else None,
            solver=settings.solver if measure == "ode" else None,
            batch_size=AT_ONCE,
            seed=self.study.seed,
        )
        found = likelihood_of_run(request, self.folder / FOLDER / "likelihood.json")
        (row,) = (row for row in found.values() if isinstance(row, dict))
        per_sample = row["nats"] / row["value"] if row["value"] else 0.0
        keys = ("nats", "N", "K", "evaluations", "num_samples")
        told = {"measure": measure, "error": row["standard_error"] * abs(per_sample)}
        return told | {key: row[key] for key in keys} | {"in_units": row.get("nats_in_units")}

    def cost_of_step(self) -> dict[str, float]:
        """Return evaluations and the most bytes of tensors in a step of training, at its last stage."""
        batch_size = self.recipe.data.batch_size
        batch = self.data.first(batch_size, seed=self.study.seed)
        model = load_model(self.folder).train().requires_grad_(True)
        with counted(model) as calls, TensorMemory() as memory:
            self.recipe.objective(model, batch)["loss"].backward()
        return {"evaluations": calls(), "tensor_bytes": memory.most}

    def samples(self) -> list[dict[str, Any]]:
        """Return the discrepancy of samples from test points, by sampler and number of steps."""
        asked = [(EXACT, 1)]
        if isinstance(self.model, FlowMap):
            sampling = self.section.sampling
            asked = [(name, steps) for name in sampling.samplers for steps in sampling.steps]
        count = self.study.num_samples
        real = self.data.points[:count]
        widths = usual_widths(real)
        within = mean_kernel(real, real, widths)

        def make(name: str, steps: int) -> dict[str, Any]:
            since = time.process_time()
            with counted(self.model) as calls:
                points = self._sampled(name, steps)
            return {
                "sampler": name,
                "steps": steps,
                "evaluations": calls(),
                "seconds": time.process_time() - since,
                "discrepancy": mean_discrepancy(points, real, widths, within_second=within),
                "points": points[:SHOWN],
            }

        return [
            self.kept.found(
                f"samples-{name.replace(':', '-')}-{steps}", partial(make, name, steps), num_samples=count
            )
            for name, steps in asked
        ]

    def _sampled(self, name: str, steps: int) -> Tensor:
        noise = self._noise(self.study.num_samples)
        if isinstance(self.model, CouplingFlow):
            with torch.no_grad():
                return self.model.samples(noise)
        sampler = sampler_of(name, path=self.model.path_of_states, draw=self._draw(len(noise)))
        return sampler.sample(self.model, noise, grid=sampler.grid(steps))

    def _noise(self, count: int) -> Tensor:
        return sample_noise(count, tuple(self.data.points.shape[1:]), seed=self.study.seed)

    def _draw(self, count: int) -> Callable[[int], Tensor]:
        random = Random(self.study.seed, torch.arange(count))
        return lambda step: random.normal(f"sample step {step}", tuple(self.data.points.shape[1:]))

    def latents(self) -> dict[str, Any]:
        """Return where data go, in the process that is reversed and along the flow, and how they lie."""
        if not isinstance(self.model, FlowMap):
            return {}
        count, neighbours = min(SHOWN, self.study.num_samples), self.study.neighbours
        points = self.data.points[:count]
        labels = None if self.data.labels is None else self.data.labels[:count]

        def make(states: Callable[..., Tensor | None]) -> dict[str, Any] | None:
            found = states(self.model, points, seed=self.study.seed)
            if found is None:
                return None
            normal = Random(self.study.seed + 1, torch.arange(count)).normal("noise", tuple(points.shape[1:]))
            told: dict[str, Any] = {
                "discrepancy": mean_discrepancy(found[-1], normal, usual_widths(normal)),
                "floor": mean_discrepancy(self._noise(count), normal, usual_widths(normal)),
            }
            if labels is not None:
                told["purity"], told["chance"] = purity(found[-1], labels, neighbours=neighbours)
            return told | ({"states": found} if self.data.is_plane else {})

        about = {"num_samples": count, "neighbours": neighbours}
        return {
            "process": self.kept.found("process", partial(make, process_states), **about),
            "flow": self.kept.found("flow", partial(make, flow_states), **about),
        }

    def pictures(self) -> dict[str, Any]:
        """Return states on the way from noise to samples, and the density on a grid of the plane."""
        side, solver = self.study.density_side, self.section.likelihood.solver
        found = {
            "density": self.kept.found(
                "density",
                lambda: density_on(self.model, grid_of(self.data.points), side, solver=solver),
                side=side,
                solver=solver,
            )
        }
        if isinstance(self.model, FlowMap):
            name, steps = self.section.sampling.samplers[0], max(self.section.sampling.steps)
            count = min(SHOWN, self.study.num_samples)
            found["backward"] = self.kept.found(
                "backward",
                lambda: backward_states(self.model, self._noise(count), name, steps, draw=self._draw(count)),
                sampler=name,
                steps=steps,
                num_samples=count,
            )
        return found


def measures_of(settings: LikelihoodSection) -> Iterator[tuple[str, int | None]]:
    """Yield each measure of likelihood with each number of steps, None for the model's own."""
    numbers = {"bound": settings.bound_steps, "iw": settings.iw_steps}
    for measure in settings.measures:
        for steps in numbers.get(measure) or (None,):
            yield measure, steps
