"""A term of the bound of one sample by brute force: Gaussians of full covariance, conditioned by matrices."""

import math

import torch
from scipy import stats
from torch.distributions import MultivariateNormal, kl_divergence


def reference_term(chain, point, n, noise):
    """Return L_n of one point (D,), at the states that `noise` by step makes.

    The posterior of a step comes from the joint Gaussian of x_n and x_{n + 1}.
    """
    total, size = chain.num_steps, len(point)
    abar = [1.0, *chain.alpha_bar.tolist()]
    eye = torch.eye(size, dtype=torch.float64)
    if n == total:
        last = MultivariateNormal(abar[-1] ** 0.5 * point, (1 - abar[-1]) * eye)
        return kl_divergence(last, MultivariateNormal(torch.zeros(size).double(), eye)).item()
    x = abar[n + 1] ** 0.5 * point + (1 - abar[n + 1]) ** 0.5 * noise[n + 1]
    guess = chain.predict(x[None], torch.tensor([n + 1]))[0]

    def posterior(data, step):
        keep = abar[step + 1] / abar[step]
        joint = torch.cat(
            [
                torch.cat([(1 - abar[step]) * eye, keep**0.5 * (1 - abar[step]) * eye], 1),
                torch.cat([keep**0.5 * (1 - abar[step]) * eye, (1 - abar[step + 1]) * eye], 1),
            ]
        )
        gain = joint[:size, size:] @ torch.linalg.inv(joint[size:, size:])
        mean = abar[step] ** 0.5 * data + gain @ (x - abar[step + 1] ** 0.5 * data)
        return mean, joint[:size, :size] - gain @ joint[size:, :size]

    if n == 0:
        if chain.decoder == "gaussian":
            return -MultivariateNormal(guess, (1 - abar[1]) * eye).log_prob(point).item()
        width = posterior(point, 1)[1][0, 0].item() ** 0.5
        edges = [(u - 0.5) / 127.5 - 1 for u in range(257)]
        edges[0], edges[-1] = -math.inf, math.inf
        nats = 0.0
        for value, mean in zip(point.tolist(), guess.tolist(), strict=True):
            u = round((value + 1) * 127.5)
            below, above = ((edge - mean) / width for edge in edges[u : u + 2])
            if below > 0:
                below, above = -above, -below
            nats -= math.log(stats.norm.cdf(above) - stats.norm.cdf(below))
        return nats
    mean, covariance = posterior(point, n)
    variance = covariance if chain.variance == "fixed_small" else (1 - abar[n + 1] / abar[n]) * eye
    model = MultivariateNormal(posterior(guess, n)[0], variance)
    return kl_divergence(MultivariateNormal(mean, covariance), model).item()
