"""The published pipeline: noise to pictures in a few jumps of a flow map.

This file, with all of layers.py in it, goes into a published repository; it imports only torch and diffusers,
and for captions transformers.
Components: a two-time `transformer` whose forward is (x, s, t, labels or (embeddings, mask)) -> mean
velocity, or diffusers' own UNet2DConditionModel as `unet`, which takes the gap s - t as `timestep_cond`;
either may take the scale of guidance, too;
diffusers' `FlowMapEulerDiscreteScheduler`; and an `AutoencoderKL` for latents (none for a model of pixels).
"""

import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .layers import GAP_WAVES, beside_timestep, beside_zeros, parts_of


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
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        caption_encoder: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        self.register_to_config(
            id2label=id2label,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            caption_encoder=caption_encoder,
        )
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        self._encoder: tuple[Any, Any] | None = None

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

    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (B, L, width) of captions, and the mask (B, L) of their tokens.

        The encoder is the one that the config names, loaded by transformers.
        """
        told = self.config["caption_encoder"]
        if told is None:
            raise ValueError("this model takes no captions; give class_labels, or nothing")
        if self._encoder is None:
            from transformers import AutoModel, AutoTokenizer

            model = AutoModel.from_pretrained(told["name"]).float().eval()
            model = model.get_encoder() if model.config.is_encoder_decoder else model
            tokenizer = AutoTokenizer.from_pretrained(told["name"], padding_side="right")
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            self._encoder = getattr(model, "text_model", model), tokenizer
        model, tokenizer = self._encoder
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=told["max_tokens"], return_tensors="pt"
        )
        with torch.no_grad():
            states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]
        mask = tokens["attention_mask"].bool()
        # To half precision, as the captions that it was trained on are stored.
        return states.half().float() * mask[..., None], mask

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes the scale of guidance as an input."""
        if self.unet is None:
            return self.transformer.config.get("guidance_input", False)
        return self.unet.config.time_cond_proj_dim > 2 * GAP_WAVES

    def velocity(
        self,
        x: torch.Tensor,
        s: torch.Tensor,
        t: torch.Tensor,
        condition: Any,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean velocity of jumps from the times s to t (B,), at the states x (B, C, H, W)."""
        if self.unet is None:
            return self.transformer(x, s, t, condition, scale)
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
            timestep_cond=beside_timestep(s - t, scale).to(dtype),
            encoder_attention_mask=seen,
        ).sample

    def _scale(self, guidance_scale: float | None, count: int, device: Any) -> torch.Tensor | None:
        """Return the scale of guidance of each of `count` samples, None where the network takes none."""
        if not self.takes_guidance:
            if guidance_scale is not None:
                raise ValueError(
                    "this network takes no guidance_scale: its guidance was learned; leave it out"
                )
            return None
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        if scale < 1:
            raise ValueError(f"guidance_scale is {scale}, expected 1 (no guidance) or more")
        return torch.full((count,), scale, device=device)

    @property
    def network(self) -> Any:
        """The transformer or the U-Net."""
        return self.transformer if self.unet is None else self.unet

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one state."""
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    @torch.no_grad()
    def jump(
        self, x: torch.Tensor, s: Any, t: Any, condition: Any, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return where states x (B, C, H, W) of time s are at time t, in one evaluation.

        Times are tensors (), 1 is noise and 0 data; from t = 0.01 to 1 it inverts.
        """
        count, timesteps = len(x), self.scheduler.config.num_train_timesteps
        velocity = self.velocity(x, s.expand(count), t.expand(count), condition, scale)
        return self.scheduler.step(velocity, timesteps * s, x, r_timestep=timesteps * t).prev_sample

    @torch.no_grad()
    def encode(self, pictures: Any) -> torch.Tensor:
        """Return the states at t = 0 (B, C, H, W) of pictures, resized to what the network was trained on."""
        side = self.sample_shape[1] * self.image_processor.config["vae_scale_factor"]
        pixels = self.image_processor.preprocess(pictures, height=side, width=side)
        pixels = pixels.to(self._execution_device, self.network.dtype)
        if self.vae is None:
            return pixels
        config = self.vae.config
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, x: torch.Tensor, output_type: str = "pil") -> Any:
        """Return states (B, C, H, W) as pictures."""
        if self.vae is not None:
            config = self.vae.config
            x = self.vae.decode(x / config.scaling_factor + (config.shift_factor or 0.0)).sample
        return self.image_processor.postprocess(x, output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int | str] | int | str | None = None,
        num_inference_steps: int | None = None,
        num_images: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        prompt: list[str] | str | None = None,
    ) -> Any:
        """Return pictures, one a class label or caption (or `num_images` without either).

        `latents` (B, C, H, W) is the noise to start from; `output_type` is "pil", "np", "pt" (in [0, 1]) or
        "latent". `prompt` are captions for the text encoder that the card names; or `prompt_embeds`
        (B, L, width) are its last hidden state, and `prompt_mask` (B, L) is False at padding.
        `guidance_scale`, from 1 on, costs no evaluation; a network that does not take it has its guidance for
        good. Steps and scale are by default those of the pipeline's config.
        """
        device, dtype = self._execution_device, self.network.dtype
        if prompt is not None:
            prompt_embeds, prompt_mask = self.embed([prompt] if isinstance(prompt, str) else prompt)
        condition = self.condition(class_labels, prompt_embeds, prompt_mask)
        count = num_images
        if condition is not None:
            count = len(condition[0] if isinstance(condition, tuple) else condition)
        shape = (count, *self.sample_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        x, scale = latents.to(device, dtype), self._scale(guidance_scale, count, device)

        self.scheduler.set_timesteps(num_inference_steps or self.config["num_inference_steps"], device=device)
        sigmas = self.scheduler.sigmas
        steps = list(zip(sigmas[:-1], sigmas[1:], strict=True))
        for s, t in self.progress_bar(steps):  # pyright: ignore
            x = self.jump(x, s, t, condition, scale)
        images: Any = x if output_type == "latent" else self.decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
