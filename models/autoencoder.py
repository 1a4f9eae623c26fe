"""Pictures to latents and back, by a KL autoencoder: moments, the scale of latents, a fingerprint."""

import hashlib

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def encode_moments(autoencoder: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std (B, c, h, w) of the posterior of pictures (B, C, H, W) in [-1, 1], unscaled."""
    posterior = autoencoder.encode(pictures, return_dict=False)[0]
    return posterior.mean, posterior.std


@torch.no_grad()
def decode_latents(autoencoder: AutoencoderKL, latents: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return pictures (N, C, H, W) in [-1, 1] of scaled latents (N, c, h, w): D(latents / scale + shift)."""
    scale, shift = scale_and_shift(autoencoder)
    parts = [
        autoencoder.decode(part / scale + shift, return_dict=False)[0] for part in latents.split(batch_size)
    ]
    return torch.cat(parts).clamp(-1, 1)


def scale_and_shift(autoencoder: AutoencoderKL) -> tuple[float, float]:
    """Return the factors of the autoencoder's config: scaled latents are (z - shift) * scale."""
    return autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0


def fingerprint(autoencoder: AutoencoderKL) -> str:
    """Return a hash of the weights: latents of one fingerprint belong to one autoencoder."""
    digest = hashlib.sha256()
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
