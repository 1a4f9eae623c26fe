"""diffusers' KL autoencoder, under the name that a config gives it; its settings are diffusers' own."""

import diffusers


class AutoencoderKL(diffusers.AutoencoderKL):
    """The autoencoder of latent diffusion: pictures (B, C, H, W) in [-1, 1] to latents and back."""

    kind = "autoencoder"
