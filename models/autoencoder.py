"""Pictures to latents and back, by an autoencoder: moments, and the scale of latents.

An autoencoder without a posterior gives moments whose spread is 0.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def posterior(autoencoder: AutoencoderKL, pictures: Tensor) -> DiagonalGaussianDistribution:
    """Return the Gaussian over latents (B, c, h, w) of pictures (B, C, H, W) in [-1, 1], unscaled."""
    return autoencoder.encode(pictures, return_dict=False)[0]


def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Return pictures (B, C, H, W) of unscaled latents (B, c, h, w)."""
    return autoencoder.decode(latents, return_dict=False)[0]


@torch.no_grad()
def encode_moments(autoencoder: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std (B, c, h, w) of the posterior of pictures (B, C, H, W) in [-1, 1], unscaled."""
    if not isinstance(autoencoder, AutoencoderKL):
        latents = autoencoder.encode(pictures, return_dict=False)[0]
        return latents, torch.zeros_like(latents)
    gaussian = posterior(autoencoder, pictures)
    return gaussian.mean, gaussian.std


@torch.no_grad()
def decode_latents(autoencoder: Any, latents: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return pictures (N, C, H, W) in [-1, 1] of scaled latents (N, c, h, w): D(latents / scale + shift)."""
    scale, shift = scale_and_shift(autoencoder)
    parts = [decode(autoencoder, part / scale + shift) for part in latents.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)


def scale_and_shift(autoencoder: Any) -> tuple[float, float]:
    """Return the factors of the autoencoder's config: scaled latents are (z - shift) * scale."""
    return autoencoder.config["scaling_factor"], autoencoder.config.get("shift_factor") or 0.0
