"""From numbers of samples to a batch of tensors: reads, verifies, decodes and stacks them."""

import threading

import numpy as np
import torch

from .decode import Batch, BatchDecoder, Decoder, decode_batch
from .reader import Reader
from .shards import ShardSet


class Samples:
    """The samples of a data set by their numbers, as batches; from any thread."""

    def __init__(
        self,
        shards: ShardSet,
        decoder: Decoder,
        *,
        evict: bool = True,
        stop: threading.Event | None = None,
    ) -> None:
        self._decoder = decoder
        self._has_label = "cls" in shards.extensions
        self.reader = Reader(shards, extensions={*decoder.extensions, "cls"}, evict=evict, stop=stop)

    def batch(self, numbers: np.ndarray, *, index: np.ndarray) -> Batch:
        """Return the samples with these numbers; `index` goes into the batch.

        Raises `ValueError` for a sample that cannot be read or decoded, or is not finite; it is named.
        """
        batch = self._at_once(numbers)
        if batch is None:
            batch = decode_batch([self.reader.read(number) for number in numbers.tolist()], self._decoder)
        if self._has_label:
            batch["label"] = torch.from_numpy(self.reader.labels(numbers))
        return {"index": torch.from_numpy(index), **batch}

    def _at_once(self, numbers: np.ndarray) -> Batch | None:
        """Decode samples that are alike, without an object for each; nothing where they are not."""
        decoder = self._decoder
        if not isinstance(decoder, BatchDecoder) or len(decoder.extensions) > 1:
            return None
        if self.reader.shards.remote is not None or self.reader.not_finite(numbers) is not None:
            return None
        (extension,) = decoder.extensions
        return decoder.stack(self.reader.members(numbers, extension), len(numbers))
