"""Published pipelines of students of diffusers checkpoints: diffusers' own, whose network is told the gap.

This file is copied into a published repository with layers.py, and imports only torch and diffusers besides.
A student predicts what its teacher did, and jumps from s to t by DDIM's step, x_t = alpha(t) data + sigma(t)
noise; so diffusers' DDIMScheduler with trailing steps samples it. The gap s - t of a step goes to the network
as `timestep_cond`, or to a UNet2DModel as a class; all else, prompts included, is the pipeline's.
The scheduler's config says under RECOMMENDED which arguments of a call are the default.
"""

import inspect
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DiTPipeline,
    ImagePipelineOutput,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils.torch_utils import randn_tensor

from .layers import GAP_RADIANS, GAP_WAVES, beside_timestep

RECOMMENDED = "_recommended"  # diffusers keeps a name that begins so, and does not warn of it


def jumps(scheduler: Any) -> list[tuple[int, int]]:
    """Return the timesteps that a DDIM scheduler's steps go from and to; -1 is data."""
    step = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return [(int(now), max(int(now) - step, -1)) for now in scheduler.timesteps]


class TellsTheGap:
    """A pipeline of a `unet`, around whose calls the gap is added to what it is given."""

    unet: Any
    scheduler: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as the pipeline does; what is not given is as the scheduler recommends.

        `guidance_scale`, from 1 on, is told where the network takes it.
        """
        call: Any = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        signature = inspect.signature(call)
        given = signature.bind_partial(*args, **kwargs).arguments
        recommended = self.scheduler.config.get(RECOMMENDED, {})
        left = (recommended.keys() & signature.parameters.keys()) - given.keys()
        told = self.unet.register_forward_pre_hook(self._tell, with_kwargs=True)
        try:
            return call(*args, **kwargs, **{name: recommended[name] for name in left})
        finally:
            told.remove()

    def _tell(self, unet: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, timestep = args[0], int(torch.as_tensor(args[1]).flatten()[0])
        (end,) = (after for now, after in jumps(self.scheduler) if now == timestep)
        gap = torch.full((len(x),), (timestep - end) / self.scheduler.config.num_train_timesteps)
        gap = gap.to(x.device)
        width = unet.config.get("time_cond_proj_dim")
        if width is None:
            return args, kwargs | {"class_labels": GAP_RADIANS * gap}
        scale = torch.full_like(gap, max(1.0, self._guidance_scale)) if width > 2 * GAP_WAVES else None  # pyright: ignore[reportAttributeAccessIssue]
        return args, kwargs | {"timestep_cond": beside_timestep(gap, scale).to(x.dtype)}


class FlowMapStableDiffusionPipeline(TellsTheGap, StableDiffusionPipeline):
    """Stable Diffusion in a few jumps."""


class FlowMapStableDiffusionXLPipeline(TellsTheGap, StableDiffusionXLPipeline):
    """SDXL in a few jumps."""


class FlowMapDDIMPipeline(TellsTheGap, DDIMPipeline):
    """Pixels in a few jumps."""


class FlowMapDiTPipeline(DiTPipeline):
    """A DiT with two times, in a few jumps; its `transformer` is (x, s, t, labels) -> prediction."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return pictures, one a class label; `output_type` is "pil", "np" or "pt", in [0, 1].

        Steps are by default as many as the scheduler recommends, 4 where it says nothing.
        """
        transformer: Any = self.transformer
        scheduler: Any = self.scheduler
        vae: Any = self.vae
        count, device, dtype = len(class_labels), self._execution_device, transformer.dtype
        shape = (count, *transformer.sample_shape)
        x = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        labels = torch.as_tensor(class_labels, device=device)
        usual = scheduler.config.get(RECOMMENDED, {"num_inference_steps": 4})
        scheduler.set_timesteps(num_inference_steps or usual["num_inference_steps"])
        for now, after in self.progress_bar(jumps(scheduler)):  # pyright: ignore
            s, t = (
                torch.full((count,), (n + 1) / transformer.num_timesteps).to(device) for n in (now, after)
            )
            said = transformer(x, s, t, labels)[:, : shape[1]]
            x = scheduler.step(said, now, x).prev_sample
        images = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
