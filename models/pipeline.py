"""The published pipeline: noise to pictures in a few jumps of a flow map.

This file is copied into a published repository with layers.py, and imports only torch and diffusers besides.
Components: a two-time `transformer` whose forward is (x, s, t, labels or (embeddings, mask)) -> mean
velocity, or diffusers' own UNet2DConditionModel as `unet`, which takes the gap s - t as `timestep_cond`;
diffusers' `FlowMapEulerDiscreteScheduler`; and an `AutoencoderKL` for latents (none for a model of pixels).
"""

import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .layers import beside_zeros, parts_of, waves


class FlowMapPipeline(DiffusionPipeline):
    """Sample pictures, by class or caption where the model takes any, in a few evaluations."""

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]

    def __init__(
        self,
        scheduler: Any,
        transformer: Any = None,
        unet: Any = None,
        vae: Any = None,
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
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

    def velocity(self, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        """Return the mean velocity of jumps from the times s to t (B,), at the states x (B, C, H, W)."""
        if self.unet is None:
            return self.transformer(x, s, t, condition)
        config, dtype = self.unet.config, self.unet.dtype
        text_width = config.cross_attention_dim if config.mid_block_type == "UNetMidBlock2DCrossAttn" else 0
        given = parts_of(condition, x, text_width=text_width, max_tokens=sys.maxsize)
        labels, text, seen = (None, *beside_zeros(*given)) if text_width else (*given, None, None)
        if labels is None and config.num_class_embeds is not None:
            labels = torch.full((len(x),), config.num_class_embeds - 1, device=x.device)
        return self.unet(
            x,
            self.scheduler.config.num_train_timesteps * s,
            encoder_hidden_states=text,
            class_labels=labels,
            timestep_cond=waves(s - t, config.time_cond_proj_dim // 2, vanishing=True).to(dtype),
            encoder_attention_mask=seen,
        ).sample

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
        network, device = self.transformer if self.unet is None else self.unet, self._execution_device
        config, dtype = network.config, network.dtype
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
            velocity = self.velocity(x, s.expand(count), t.expand(count), condition)
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
