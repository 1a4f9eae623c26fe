"""The published pipeline: noise to pictures in a few jumps of a flow map.

This file is copied as it is into a published repository and imports only torch and diffusers. Components: a
two-time `transformer` whose forward is (x, s, t, labels or (embeddings, mask)) -> mean velocity, diffusers'
`FlowMapEulerDiscreteScheduler`, and an `AutoencoderKL` for latents (none for a model of pixels).
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class FlowMapPipeline(DiffusionPipeline):
    """Sample pictures, by class or caption where the model takes any, in a few evaluations."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self, transformer: Any, scheduler: Any, vae: Any = None, id2label: dict | None = None
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    def labels(self, class_labels: list[int | str]) -> list[int]:
        """Return class numbers for numbers or names of `id2label`."""
        numbers = {name: int(number) for number, name in (self.config["id2label"] or {}).items()}
        unknown = [label for label in class_labels if isinstance(label, str) and label not in numbers]
        if unknown:
            raise ValueError(f"no such class {unknown[0]!r}; the classes are {', '.join(numbers)}")
        return [numbers[label] if isinstance(label, str) else int(label) for label in class_labels]

    def condition(
        self,
        class_labels: list[int | str] | int | str | None,
        prompt_embeds: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
    ) -> Any:
        """Return what the transformer takes: labels (B,), captions (embeddings, mask), or nothing."""
        device = self._execution_device
        if prompt_embeds is None:
            if prompt_mask is not None:
                raise ValueError("prompt_mask is of prompt_embeds; give both")
            if class_labels is None:
                return None
            listed = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
            return torch.tensor(self.labels(listed), device=device)
        if class_labels is not None:
            raise ValueError("give class_labels or prompt_embeds, not both")
        if prompt_mask is None:
            prompt_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.bool)
        if prompt_embeds.dim() != 3 or prompt_mask.shape != prompt_embeds.shape[:2]:
            raise ValueError(
                f"prompt_embeds have shape {tuple(prompt_embeds.shape)} and prompt_mask "
                f"{tuple(prompt_mask.shape)}, expected (B, L, width) and (B, L)"
            )
        return prompt_embeds.to(device), prompt_mask.to(device, torch.bool)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int | str] | int | str | None = None,
        num_inference_steps: int = 4,
        num_images: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> Any:
        """Return pictures, one a class label or caption (or `num_images` without either).

        `latents` (B, C, H, W) is the noise to start from; `output_type` is "pil", "np", "pt" (in [0, 1]) or
        "latent". `prompt_embeds` (B, L, width) are the last hidden state of the text encoder that the card
        names, `prompt_mask` (B, L) is False at padding.
        """
        config, dtype, device = self.transformer.config, self.transformer.dtype, self._execution_device
        condition = self.condition(class_labels, prompt_embeds, prompt_mask)
        count = num_images
        if condition is not None:
            count = len(condition[0] if isinstance(condition, tuple) else condition)
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        x = latents.to(device, dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sigmas = self.scheduler.sigmas
        steps = list(zip(sigmas[:-1], sigmas[1:], strict=True))
        for s, t in self.progress_bar(steps):  # pyright: ignore
            velocity = self.transformer(x, s.to(dtype).expand(count), t.to(dtype).expand(count), condition)
            scale = self.scheduler.config.num_train_timesteps
            x = self.scheduler.step(velocity, scale * s, x, r_timestep=scale * t).prev_sample

        if output_type == "latent":
            images: Any = x
        else:
            if self.vae is not None:
                x = self.vae.decode(
                    x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
                ).sample
            images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
