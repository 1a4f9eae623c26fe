"""The losses of the autoencoder and of the classifier have their known values on exact stand-ins."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from driftmap.trainer.objective import Batch
from driftmap.trainer.objectives.autoencoder import Autoencoder
from driftmap.trainer.objectives.classifier import Classifier
from driftmap.trainer.seeds import Random


class IdentityAutoencoder(nn.Module):
    """An autoencoder whose posterior is N(picture, std^2) and whose decoder multiplies by a gain."""

    def __init__(self, std: float, gain: float = 1.0) -> None:
        super().__init__()
        self.log_variance, self.gain = 2 * math.log(std), gain

    def encode(self, pictures: Tensor, return_dict: bool) -> tuple[DiagonalGaussianDistribution]:
        """Return the posterior, as diffusers does."""
        parameters = torch.cat([pictures, torch.full_like(pictures, self.log_variance)], dim=1)
        return (DiagonalGaussianDistribution(parameters),)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """Return the pictures, as diffusers does."""
        return (self.gain * latents,)


@pytest.mark.parametrize("std", [1e-6, 0.5])
def test_the_identity_autoencoder_errs_by_its_posterior_noise_and_has_the_divergence_of_gaussians(
    std,
) -> None:
    random = Random(3, torch.arange(16))
    pictures = random.normal("pictures", (2, 3, 3)).double()
    batch, n = Batch(pictures, None, random), random.normal("posterior", (2, 3, 3)).double()
    divergence = 0.5 * (pictures**2 + std**2 - 1 - 2 * math.log(std)).flatten(1).mean(1)
    for kind, expected in (("absolute", std * n.abs()), ("square", std**2 * n**2)):
        losses = Autoencoder(kl_weight=0.3, reconstruction=kind)(IdentityAutoencoder(std), batch)
        torch.testing.assert_close(losses["error"], expected.flatten(1).mean(1))
        torch.testing.assert_close(losses["divergence"], divergence)
        torch.testing.assert_close(losses["loss"], (losses["error"] + 0.3 * divergence).mean())
    reversing = Autoencoder()(IdentityAutoencoder(std, gain=-1.0), batch)["error"]
    torch.testing.assert_close(reversing, (2 * pictures + std * n).abs().flatten(1).mean(1))


def test_the_classifier_loss_of_known_scores_is_their_cross_entropy() -> None:
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]), Random(3, torch.arange(2)))
    scores = torch.tensor([[2.0, 0.0, 1.0], [1.0, 3.0, 0.0]])
    losses = Classifier()(lambda _: scores, batch)
    total = [math.log(math.exp(2) + 1 + math.e), math.log(math.e + math.exp(3) + 1)]
    assert losses["loss"].item() == pytest.approx((total[0] - 2 + total[1] - 0) / 2, rel=1e-6)
    assert losses["error"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"needs class labels: shards with a \.cls member a sample"):
        Classifier()(lambda _: scores, Batch(batch.data, None, batch.random))


def test_the_classifier_sees_every_shift_and_repeats_the_edges() -> None:
    seen: list[Tensor] = []
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    pictures = torch.stack([rows, columns]).expand(600, 2, 5, 6)
    batch = Batch(pictures, torch.zeros(600, dtype=torch.long), Random(3, torch.arange(600)))

    def network(shifted: Tensor) -> Tensor:
        seen.append(shifted)
        return torch.zeros(600, 2)

    Classifier()(network, batch)
    moves = [(int(picture[0, 2, 2]) - 2, int(picture[1, 2, 2]) - 2) for picture in seen[0]]
    assert set(moves) == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    for (down, right), picture in zip(moves, seen[0], strict=True):
        assert torch.equal(picture[0], (rows + down).clamp(0, 4))
        assert torch.equal(picture[1], (columns + right).clamp(0, 5))
    Classifier(max_shift=0)(network, batch)
    assert torch.equal(seen[1], pictures)
