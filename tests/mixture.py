"""The exact flow of a mixture of two Gaussians in the plane, with our models' interface."""

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from driftmap.models.flow_map import FlowMap

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [0.8, -0.2]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.2, 0.05], [0.05, 0.1]], [[0.1, -0.06], [-0.06, 0.3]]], dtype=torch.float64)
DATA = MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, covariance_matrix=COVARIANCES))


class MixtureBackbone(nn.Module):
    """The velocity along the linear path: E[noise - data | x], a mean over what each component would have."""

    sample_shape = (2,)
    null_label = None

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: None = None) -> Tensor:
        """Return the velocity (B, 2) at s, whatever t is."""
        alpha, sigma = (1 - s)[:, None, None], s[:, None, None]
        spread = alpha[..., None] ** 2 * COVARIANCES + sigma[..., None] ** 2 * torch.eye(2).double()
        centred = x[:, None] - alpha * MEANS
        inner = torch.linalg.solve(spread, centred)
        logits = WEIGHTS.log() - (torch.logdet(spread) + (centred * inner).sum(-1)) / 2
        data = MEANS + alpha * (COVARIANCES @ inner[..., None])[..., 0]
        return (logits.softmax(1)[..., None] * (sigma * inner - data)).sum(1)


def exact_mixture() -> FlowMap:
    """Return the exact velocity as a model."""
    return FlowMap(MixtureBackbone())
