"""The exact flow of a mixture of two Gaussians in the plane, with our models' interface."""

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from driftmap.models.flow_map import FlowMap

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [0.8, -0.2]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.2, 0.05], [0.05, 0.1]], [[0.1, -0.06], [-0.06, 0.3]]], dtype=torch.float64)
DATA = MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, covariance_matrix=COVARIANCES))


STEPS = 16


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


class ReferenceBackbone(MixtureBackbone):
    """The mean velocity (B, 2) from s to t of the flow: that of STEPS classical Runge-Kutta steps."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: None = None) -> Tensor:
        """Return the mean of the steps' velocities: their sum is (X_{s,t}(x) - x) / (t - s), without it."""
        h, total = (t - s) / STEPS, torch.zeros_like(x)
        for number in range(STEPS):
            time, state = s + number * h, x + h[:, None] * total
            first = self._velocity(state, time)
            second = self._velocity(state + h[:, None] / 2 * first, time + h / 2)
            third = self._velocity(state + h[:, None] / 2 * second, time + h / 2)
            fourth = self._velocity(state + h[:, None] * third, time + h)
            total = total + (first + 2 * second + 2 * third + fourth) / 6
        return total / STEPS

    def _velocity(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x, time, time)


def exact_mixture() -> FlowMap:
    """Return the exact velocity as a model."""
    return FlowMap(MixtureBackbone())


def reference_mixture() -> FlowMap:
    """Return the flow map of the mixture, of error h^4."""
    return FlowMap(ReferenceBackbone())
