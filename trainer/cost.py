"""What a recipe costs: the bytes that a process holds under each strategy, the operations of a sample.

Bytes are sums over the shapes of the network, built on the `meta` device. Operations are counted on fake
tensors, which cost no memory at any size. How often, and with what derivative, an objective
evaluates its networks is found by calling it with networks that only take notes.

Weights, gradients, moments and means are fp32. With n elements, k means, w processes, in units of 4 n bytes:

    strategy   parameters   gradients   moments   master copy   means
    ddp        1            1           2                       k
    fsdp       1/w          1/w *       2/w                     k/w     (w: shard_size, where it is given)
    zero1      1            1/w *       2/w       1/w           k/w
    zero2      1            1/w         2/w       1/w           k/w
    zero3      1/w          1/w         2/w                     k/w
    * whole with accumulation

Source: Rajbhandari et al., "ZeRO", 2020, section 3; padding and buffers from torch 2.13, DeepSpeed 0.19.8.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.batch import ordered
from ..models.flow_map import FlowMap
from ..models.path import expand
from .blocks import blocks
from .build import make_network, settings_of_run
from .ema import kinds_of
from .error_weighting import log_variance_of
from .guiding import guided
from .objective import Batch, States
from .outline import network_of, network_settings
from .recipe import Ddp, Fsdp, Recipe, Zero
from .seeds import Random
from .strategy import trainable
from .tangent import time_derivative
from .zero import BUCKET

ELEMENT = 4  # bytes, fp32
# DeepSpeed's default: up to how many gathered elements stay whole because they are needed again.
LIVE = 1_000_000_000
SMALL = 300_000_000  # parameters times positions of a sample; below, real tensors are faster than fake ones
PROBED_SAMPLES = 4096

Loss = Callable[[int], Tensor]  # of the batch size
Made = AbstractContextManager[nn.Module]


@dataclass(frozen=True)
class Held:
    """Bytes on the GPU of the process with the largest share; `on_cpu` is what an offload has moved off it.

    `optimizer` has the moments and a master copy; `frozen` are buffers and the teacher; `working` is what
    the engine needs besides, an estimate.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    working: int = 0
    activations: int = 0
    on_cpu: int = 0

    @property
    def total(self) -> int:
        """All bytes on the GPU."""
        return sum(vars(self).values()) - self.on_cpu


def num_parameters(model: nn.Module) -> int:
    """Return the number of elements to train."""
    return sum(parameter.numel() for parameter in trainable(model).values())


def num_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def held(recipe: Recipe, model: nn.Module, world: int) -> Held:
    """Return what the first of `world` processes holds under the recipe's strategy, without activations.

    Raises ValueError where shard_size does not divide the processes.
    """
    strategy, means = recipe.strategy, len(kinds_of(recipe.ema))
    whole, share = ELEMENT * num_parameters(model), ELEMENT * _share(model, strategy, world)
    frozen = num_bytes(model) - whole
    if recipe.ema.target is not None:
        frozen += share if isinstance(strategy, Fsdp) else whole
    if recipe.teacher is not None:
        runs = [run for run in (recipe.teacher.run, recipe.teacher.weak) if run is not None]
        teacher = sum(num_bytes(network_of({"from_run": run})) for run in runs)
        teacher //= 2 if recipe.teacher.precision == "bf16" else 1
        group = isinstance(strategy, Fsdp) and (strategy.shard_size or world)
        frozen += ceil(teacher / group) if recipe.teacher.shard and group else teacher
    found = Held(parameters=share, gradients=share, optimizer=2 * share, ema=means * share, frozen=frozen)
    if isinstance(strategy, Ddp):
        return found  # the gradients are views of the buckets that DDP reduces
    away = ["gradients", "optimizer", "ema"]
    # Between the micro steps of one step these two keep whole gradients: only the last one is reduced.
    waits = strategy.name in ("fsdp", "zero1") and recipe.training.accumulation > 1
    found = replace(found, gradients=whole if waits else share)
    if isinstance(strategy, Fsdp):
        found = replace(found, working=_gathered(model, recipe.training.precision))
        away += ["parameters"]
    elif strategy.name == "zero3":
        found = replace(found, working=ELEMENT * BUCKET + min(whole, ELEMENT * LIVE))
        away += ["parameters"]
    else:
        # Before the step the gradients of the partition are copied into one flat tensor.
        found = replace(found, parameters=whole, optimizer=3 * share, working=ELEMENT * BUCKET + share)
    if waits:
        away.remove("gradients")
    moved = sum(getattr(found, name) for name in away)
    return replace(found, on_cpu=moved, **dict.fromkeys(away, 0)) if strategy.offload else found


def _share(model: nn.Module, strategy: Ddp | Fsdp | Zero, world: int) -> int:
    """Return how many elements of the master weights the first process holds, padding included."""
    parameters = list(trainable(model).values())
    if isinstance(strategy, Ddp):
        return num_parameters(model)
    if isinstance(strategy, Fsdp):
        group = strategy.shard_size or world
        if world % group:
            raise ValueError(
                f"strategy.shard_size: {group} does not divide the {world} processes; "
                "give one of its divisors"
            )
        return sum(ceil(len(p) / group) * p[0].numel() for p in parameters if len(p))
    if strategy.name == "zero3":
        return sum(ceil(p.numel() / world) for p in parameters)
    # A group of the optimizer is a flat list, padded to a multiple of 2 w: nccl_start_alignment_factor.
    matrices = sum(p.numel() for p in parameters if p.dim() >= 2)
    return sum(2 * ceil(numel / (2 * world)) for numel in (matrices, num_parameters(model) - matrices))


def _gathered(model: nn.Module, precision: str) -> int:
    """Return the bytes that FSDP2 has whole at a time.

    What is no block, with its gradients; two blocks, as the next one is fetched ahead; a block's gradients.
    """
    sizes = [num_parameters(block) for block in blocks(model)]
    rest, largest = num_parameters(model) - sum(sizes), max(sizes, default=0)
    return ELEMENT * (2 * rest + largest) + 2 * largest * (ELEMENT if precision == "fp32" else 2)


class Evaluation(NamedTuple):
    """How a network is called: a frozen run's or (None) the own one, with gradients, along a direction."""

    run: Path | None
    gradient: bool
    tangent: bool


class _Notes(nn.Module):
    """A backbone that only notes how it is called; its output depends on all that it is given."""

    def __init__(self, network: Any, calls: Counter[Evaluation], run: Path | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()), requires_grad=run is None)
        self.sample_shape = network.sample_shape
        self.null_label = None if network.null_condition is None else 1  # a class stands for a caption, too
        self.calls, self.run = calls, run

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return a tensor like x."""
        dual = fwad._current_level >= 0 and any(fwad.unpack_dual(y).tangent is not None for y in (x, s, t))
        gradient = torch.is_grad_enabled() and self.run is None
        self.calls[Evaluation(self.run, gradient, dual)] += len(x)
        return self.weight * (x + expand(s - t, x))


def evaluations(recipe: Recipe) -> dict[Evaluation, float]:
    """Return how often a sample goes through a network in each way, averaged over many samples."""
    calls: Counter[Evaluation] = Counter()
    network, teacher = network_of(recipe.model), None
    assert isinstance(network, FlowMap)
    section = recipe.teacher
    if section is not None:
        notes, weak = (
            run and FlowMap(_Notes(network_of({"from_run": run}), calls, run))
            for run in (section.run, section.weak)
        )
        assert notes is not None
        teacher = guided(notes, section.scale, interval=section.guidance_interval, weak=weak)
    shape = [1 for _ in network.sample_shape]
    batch = Batch(
        torch.zeros(PROBED_SAMPLES, *shape),
        None if network.null_condition is None else torch.zeros(PROBED_SAMPLES, dtype=torch.long),
        Random(recipe.seed, torch.arange(PROBED_SAMPLES)),
        states=States(torch.zeros(PROBED_SAMPLES, 2, *shape), torch.tensor([[1.0, 0.0]] * PROBED_SAMPLES)),
    )
    student = FlowMap(_Notes(network, calls))
    student.log_variance = log_variance_of(recipe.objective)
    recipe.objective(student, batch, teacher)
    return {evaluation: count / PROBED_SAMPLES for evaluation, count in calls.items() if count}


def flops(recipe: Recipe) -> float:
    """Return the operations of a sample, forward and backward, not counting what is made again.

    Those of matrix products, attention and convolutions; a multiplication and its addition are two.
    """
    total = 0.0
    for share, made, loss_of in losses(recipe):
        # Counted as plain matrix products: torch (2.13) counts nothing for attention's fused form on CPUs.
        with made as model, sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                loss = loss_of(model)(1)
                if loss.requires_grad:
                    loss.backward()
        total += share * counter.get_total_flops()
    return total


def losses(recipe: Recipe) -> Iterator[tuple[float, Made, Callable[[nn.Module], Loss]]]:
    """Yield what a sample goes through: how often, a network to make, and the loss made of it."""
    # An objective with a meaning has a model of its own kind, which it asks for more than a velocity.
    meaning = getattr(recipe.objective, "meaning", None)
    settings = network_settings(recipe.model) | ({"means": meaning()} if meaning else {})
    shape = _shape(settings, recipe)
    if meaning or not isinstance(network_of(settings), FlowMap):
        yield 1.0, _made(settings, shape), partial(_whole_loss, recipe, shape)
        return
    for evaluation, share in evaluations(recipe).items():
        network = settings if evaluation.run is None else settings_of_run(evaluation.run)
        yield share, _made(network, _shape(network, recipe)), partial(_evaluation_loss, evaluation)


def _shape(settings: dict[str, Any], recipe: Recipe) -> tuple[int, ...]:
    """Return the shape of a sample that a network takes, or that the data have where it takes any."""
    model = network_of(settings)
    if isinstance(model, FlowMap):
        return model.sample_shape
    first = next(ordered(recipe.data.open(), 1))
    return tuple(first["mean" if "mean" in first else "data"].shape[1:])


@contextmanager
def _made(settings: dict[str, Any], shape: tuple[int, ...]) -> Iterator[nn.Module]:
    """Yield a network of fake tensors, or of real ones where it is small; `shape` is that of a sample."""
    fake = num_parameters(network_of(settings)) * prod(shape[1:]) >= SMALL
    with torch.random.fork_rng(devices=[]), FakeTensorMode() if fake else nullcontext():
        yield make_network(settings)


def _evaluation_loss(evaluation: Evaluation, model: nn.Module) -> Loss:
    """Return a loss that calls a network once, in the way of an evaluation."""
    assert isinstance(model, FlowMap)

    def loss(batch: int) -> Tensor:
        x, s, t = torch.zeros(batch, *model.sample_shape), torch.ones(batch), torch.zeros(batch)
        velocity = partial(model.mean_velocity, x, s, condition=model.any_condition(batch))
        with torch.set_grad_enabled(evaluation.gradient):
            outputs = time_derivative(velocity, t, how="forward") if evaluation.tangent else [velocity(t)]
            return torch.stack([output.float().square().mean() for output in outputs]).sum()

    return loss


def _whole_loss(recipe: Recipe, shape: tuple[int, ...], model: nn.Module) -> Loss:
    """Return the objective's loss, for samples of a shape."""

    def loss(batch: int) -> Tensor:
        labels = torch.zeros(batch, dtype=torch.long)
        condition = model.any_condition(batch) if isinstance(model, FlowMap) else labels
        samples = Batch(torch.zeros(batch, *shape), condition, Random(recipe.seed, torch.arange(batch)))
        return recipe.objective(model, samples)["loss"]

    return loss
