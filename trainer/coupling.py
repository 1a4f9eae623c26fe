"""Which noise belongs to which data: as drawn, or so that the paths of a batch are short.

Optimal transport exchanges the noise of the samples that one process holds so that the sum of |data -
noise|^2 is the least. Paths then hardly cross: the velocity varies less given the state, and the flow is
straighter. Data of different classes exchange nothing, so that the noise of every class stays normal.

The noise of a sample is a function of its position, so exchanging noise is exchanging positions, and the
times drawn from them go along. The result depends on what stands in one process's batch: unlike all else
here, the loss changes with the number of processes and with accumulation. More than 256 samples exchange in
groups of as many.

Source: Tong et al., "Improving and generalizing flow-based generative models with minibatch optimal
transport", 2024; classes apart: Cheng and Schwing, "The curse of conditions", 2025.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .objective import Batch
from .seeds import Random

Coupling = Literal["independent", "optimal_transport"]
GROUP = 256  # samples that exchange noise: the time it takes grows with the cube of their number


def coupled(batch: Batch, how: Coupling) -> Batch:
    """Return the batch with the noise of its samples exchanged; `index` then no longer says where data stand.

    Raises ValueError for captions: each is a class of its own, and nothing could be exchanged.
    """
    if how == "independent":
        return batch
    labels = batch.condition
    if labels is not None and not isinstance(labels, torch.Tensor):
        raise ValueError(
            "coupling optimal_transport exchanges noise within a class, and captions are no classes; set "
            "coupling to independent"
        )
    data, noise = batch.data.flatten(1).float(), batch.noise().flatten(1).float()
    place = np.arange(len(data))
    for label in [None] if labels is None else labels.unique():
        mine = place.copy() if labels is None else np.flatnonzero((labels == label).cpu().numpy())
        for start in range(0, len(mine), GROUP):
            rows = mine[start : start + GROUP]
            costs = torch.cdist(data[rows], noise[rows]).square().cpu().numpy()
            place[rows] = rows[linear_sum_assignment(costs)[1]]
    index = batch.random.index
    exchanged = index[torch.from_numpy(place).to(index.device)]
    return replace(batch, random=Random(batch.random.seed, exchanged))
