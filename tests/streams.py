"""Batches of a stream, in its order: within a batch samples may stand in the order of the shards."""

from collections.abc import Iterable

import torch

from driftmap.data.decode import Batch


def in_order(batch: Batch) -> Batch:
    """Return a batch in the order of its positions in the stream."""
    order = batch["index"].argsort()
    return {name: values[order] for name, values in batch.items()}


def joined(batches: Iterable[Batch]) -> Batch:
    """Return batches, or the parts of one, as one batch in the order of the stream."""
    batches = list(batches)
    return in_order({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
