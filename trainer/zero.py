"""ZeRO 1, 2 and 3 through Accelerate's DeepSpeed engine.

The engine averages, clips and steps in one go, and holds the fp32 master copy in flat partitions: views into
these are the fragments. Weights and gradients stay fp32 in the engine; half precision is autocast's, as under
every other strategy.

Source: Rajbhandari et al., "ZeRO", 2020; facts about DeepSpeed 0.19.8 from its source.
"""

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from ..models.layers import innermost_stages
from . import recipe as settings
from .fragment import MOMENTS, Fragment
from .optim import adamw
from .recipe import OptimizerSection, Recipe
from .strategy import DataParallel, set_learning_rate, trainable
from .world import World

BUCKET = 50_000_000  # elements of the buffer that collects gradients; DeepSpeed's default takes 2 GB
LAUNCHED_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


class Zero(DataParallel):
    """Moments (1), gradients too (2), parameters too (3) are split among the processes."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.strategy, settings.Zero)
        self.stage = int(recipe.strategy.name.removeprefix("zero"))
        self.offload = recipe.strategy.offload
        self.batch_size = recipe.data.batch_size // recipe.training.accumulation
        super().__init__(recipe)

    def _connect(self) -> None:
        try:
            import deepspeed.utils  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"strategy.name: zero{self.stage} needs DeepSpeed; pip install 'driftmap[deepspeed]'"
            ) from error
        deepspeed.utils.logger.setLevel("WARNING")
        # A kernel for CPU inference, which DeepSpeed (0.19.8) would compile for a minute at its first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed (0.19.8) calls torch.distributed by names that torch (2.13) has renamed.
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        on_gpus = torch.cuda.is_available()
        if not on_gpus:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "WORLD_SIZE" not in os.environ:
            os.environ.update(LAUNCHED_ALONE)
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        # Accelerate (1.15) leaves DeepSpeed out without a word where this is not set, or with cpu=True.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        backend = "cuda:nccl,cpu:gloo" if on_gpus else "gloo"
        self.plugin = DeepSpeedPlugin(hf_ds_config={**self._settings(), "train_micro_batch_size_per_gpu": 1})
        self.accelerator = Accelerator(
            deepspeed_plugin=self.plugin,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=self.longest_wait)],
        )
        self.world = World(self.accelerator)

    def _settings(self) -> dict[str, Any]:
        """Return DeepSpeed's config. Nothing is left to its defaults: it would clip at 1.0 (0.19)."""
        device = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        offload = {"offload_optimizer": device} if self.offload else {}
        if self.offload and self.stage == 3:
            offload["offload_param"] = device
        return {
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**60,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": BUCKET,
                # A custom autograd.Function without a forward-mode rule.
                "memory_efficient_linear": False,
                # Small parameters are shared like all others, so that a plan can count what is held.
                "stage3_param_persistence_threshold": 0,
                **offload,
            },
        }

    def prepare(self, task: nn.Module, model: nn.Module, section: OptimizerSection) -> None:
        """Make the engine and check that what was asked for is in force."""
        self.plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.batch_size // self.world.size
        if self.stage == 3:
            for module in innermost_stages(task):
                module.around_derivative = _gathered
        names = {id(parameter): name for name, parameter in trainable(model).items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in trainable(model).items()}
        self.task, _ = self.accelerator.prepare(task, adamw(section, model))
        self.engine: Any = self.task
        self._zero: Any = self.engine.optimizer
        self.optimizer = self._zero.optimizer  # over the flat partitions
        self._check(model)
        find = self._cut_by_parameter if self.stage == 3 else self._cut_flat
        self.fragments = find(names, shapes)

    def _check(self, model: nn.Module) -> None:
        engine = self.engine
        found = (
            engine.zero_optimization_stage(),
            engine.gradient_clipping(),
            engine.gradient_accumulation_steps(),
            engine.zero_use_cpu_optimizer(),
        )
        asked = (self.stage, self.clip_norm or 0.0, self.accumulation, self.offload)
        if found != asked:
            raise RuntimeError(
                f"asked DeepSpeed for stage, clipping, accumulation and offload {asked}; in force is {found}"
            )

    def _moments(self, flat: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of a flat partition, made now so that a checkpoint can fill it."""
        state = self.optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), device=flat.device)
            state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
        return state

    def _cut_flat(self, names: dict[int, str], shapes: dict[str, tuple[int, ...]]) -> list[Fragment]:
        """Return the fragments of stages 1 and 2: the flat list of all parameters is cut in equal parts."""
        found = []
        for flat, group in zip(
            self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True
        ):
            state = self._moments(flat)
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    place, name = mapping.hp_fragment_address, names[id(parameter)]
                    run = slice(place.start, place.start + place.numel)
                    start = mapping.lp_fragment_address.start
                    found.append(_fragment(name, shapes[name], start, flat, state, run))
        return found

    def _cut_by_parameter(self, names: dict[int, str], shapes: dict[str, tuple[int, ...]]) -> list[Fragment]:
        """Return the fragments of stage 3: every parameter is cut in equal parts, the last one padded."""
        found = []
        for number, group in enumerate(self._zero.fp16_groups):
            flat = self._zero.fp32_partitioned_groups_flat[number]
            model_flat = self._zero.fp16_partitioned_groups_flat[number]
            if model_flat.dtype == flat.dtype and model_flat.device == flat.device:
                # DeepSpeed (0.19.8) means to share the two, but compares a device with its name.
                flat.data = model_flat.data
            state = self._moments(flat)
            for parameter in group:
                name = names[id(parameter)]
                _, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = self.world.rank * padded
                length = max(0, min(padded, torch.Size(shapes[name]).numel() - start))
                if length:
                    run = slice(offset, offset + length)
                    found.append(_fragment(name, shapes[name], start, flat, state, run))
        return found

    def _synchronised(self, now: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # the engine counts micro steps itself

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro step's loss; the engine divides it by their number."""
        self.world.enter("averaging gradients")
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """Let the engine clip and step where accumulation is complete; it skips what is not finite."""
        set_learning_rate(self.optimizer, learning_rate)
        self.engine.step()
        if self.stepped:
            self.applied = not self._zero.overflow
            if self.applied:
                self.grad_norm = float(self._zero._global_grad_norm)

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the model hold what the fragments hold, after they were written from outside."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # an evaluation leaves some of them gathered
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            self._zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            self._zero._unflatten_partitioned_parameters(number)


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters whole and call it without hooks: DeepSpeed's have no forward-mode rule."""
    from deepspeed import zero

    modules = list(module.modules())
    hooks = [(inner._forward_pre_hooks, inner._forward_hooks) for inner in modules]
    with zero.GatheredParameters(list(module.parameters())):
        for inner in modules:
            inner._forward_pre_hooks, inner._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for inner, (before, after) in zip(modules, hooks, strict=True):
                inner._forward_pre_hooks, inner._forward_hooks = before, after


def _fragment(
    name: str, shape: tuple[int, ...], start: int, flat: Tensor, state: dict[str, Any], run: slice
) -> Fragment:
    value = flat.detach()[run]
    return Fragment(name, shape, start, value, state["exp_avg"][run], state["exp_avg_sq"][run], writes=True)
