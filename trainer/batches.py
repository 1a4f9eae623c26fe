"""The batches that a recipe asks for, from where a checkpoint left them."""

from pathlib import Path
from typing import Any

from ..data.batch import Batches, Stream
from ..data.faults import Fault, Quarantine
from ..data.resampled import COST, Resampled
from ..data.shards import ShardSet
from ..data.stream import ShardStream
from .faults import AgreedBatches
from .guard import tells_bad_samples
from .log import warn
from .recipe import Recipe
from .world import World


def batches_of(
    recipe: Recipe, shards: ShardSet, world: World, *, num_classes: int, folder: Path, state: dict[str, Any]
) -> AgreedBatches:
    """Return the batches of a data set in the order of a recipe; `state` is a checkpoint's, or empty."""
    data, start = recipe.data, state.get("samples", 0)
    stream = Stream(
        data.batch_size // recipe.training.accumulation,
        seed=recipe.seed,
        window=data.window,
        rank=world.rank,
        world=world.size,
        mixing=data.mixing,
        bucket_batch=data.batch_size,
    )
    quarantine = Quarantine(Fault(**entry) for entry in state.get("quarantine", ()))
    if isinstance(shards, ShardStream):
        if world.rank == 0:
            warn(COST)
        batches = Resampled(shards, stream, num_classes=num_classes, start=start)
    else:
        replacing = quarantine if data.max_bad_fraction else None
        batches = Batches(shards, stream, start=start, workers=data.workers, quarantine=replacing)
    tell = tells_bad_samples(folder, batch_size=data.batch_size)
    return AgreedBatches(
        batches, shards, world, quarantine=quarantine, max_bad_fraction=data.max_bad_fraction, tell=tell
    )
