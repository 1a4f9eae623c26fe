"""FSDP2: torch's `fully_shard` on our own mesh; parameters, gradients and moments live in rows.

Not Accelerate's plugin, which trains unsharded without a GPU and takes one model only. The blocks of a
network are sharded one by one, so that only one is whole at a time; the rest (embeddings, head) as one.

Source: Zhao et al., "PyTorch FSDP", 2023; torch.distributed.fsdp.fully_shard.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .blocks import blocks
from .fragment import Fragment
from .recipe import Fsdp, Recipe
from .strategy import DataParallel, trainable

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FullySharded(DataParallel):
    """Every process holds some rows of every parameter (within groups of `shard_size`: HSDP)."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.strategy, Fsdp)
        self.section = recipe.strategy
        self.precision = recipe.training.precision
        super().__init__(recipe)
        self.mesh = self._mesh()

    def _mesh(self) -> DeviceMesh:
        size, group = self.world.size, self.section.shard_size or self.world.size
        if size % group:
            raise ValueError(
                f"strategy.shard_size: {group} does not divide the {size} processes; give one of its divisors"
            )
        if not dist.is_initialized():  # one process, started without a launcher
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        shape, names = ((size,), ("shard",)) if group == size else ((size // group, group), ("copy", "shard"))
        return init_device_mesh(self.world.device.type, shape, mesh_dim_names=names)

    def _wrapped(self, task: nn.Module, model: nn.Module) -> nn.Module:
        self.shard(task)
        return task

    def shard(self, module: nn.Module) -> None:
        """Shard a module in place: its repeated blocks one by one, then what is left."""
        more: dict[str, Any] = {"mesh": self.mesh}
        if self.section.offload:
            more["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        # Blocks travel and compute in half precision, sums of gradients do not; all else stays fp32.
        half = MixedPrecisionPolicy(
            param_dtype=HALF.get(self.precision), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in blocks(module):
            fully_shard(block, mp_policy=half, **more)
        fully_shard(module, **more)

    def shard_frozen(self, module: nn.Module) -> None:
        """Shard a network that is not trained on the same mesh."""
        for block in blocks(module):
            fully_shard(block, mesh=self.mesh)
        # What is in no block, too, is let go of after each use: the weights of a target network change.
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

    def _fragments(self, model: nn.Module) -> list[Fragment]:
        return [self._fragment(name, parameter) for name, parameter in trainable(model).items()]

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment:
        assert isinstance(parameter, DTensor)
        _, offset = compute_local_shape_and_global_offset(parameter.shape, self.mesh, parameter.placements)
        state = self.optimizer.state[parameter]
        row = parameter[0].numel() if len(parameter) else 0
        copy = self.mesh.get_local_rank("copy") if self.mesh.ndim > 1 else 0
        return Fragment(
            name=name,
            shape=tuple(parameter.shape),
            start=min(offset[0], len(parameter)) * row,
            value=parameter._local_tensor.detach(),
            exp_avg=state["exp_avg"]._local_tensor,
            exp_avg_sq=state["exp_avg_sq"]._local_tensor,
            writes=copy == 0,
        )

    def _check(self, model: nn.Module) -> None:
        group = self.mesh["shard"].size()
        for name, parameter in trainable(model).items():
            sharded = isinstance(parameter, DTensor) and Shard(0) in parameter.placements
            if not sharded or parameter.device_mesh["shard"].size() != group:  # pyright: ignore[reportAttributeAccessIssue]
                raise RuntimeError(f"asked for fsdp over {group} processes, but {name} is not sharded so")

    def _synchronised(self, now: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.task, FSDPModule)
        self.task.set_requires_gradient_sync(now)
        return nullcontext()

    def refresh(self) -> None:
        """Let the model hold what the fragments hold, after they were written from outside."""
        for module in self.task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves what is not in a block gathered

    def local(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor, laid out like a parameter, that this process holds."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = super()._norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
