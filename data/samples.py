"""From numbers of samples to a batch of tensors: reads, verifies, decodes and stacks them."""

import threading

import numpy as np
import torch

from .decode import Batch, BatchDecoder, Decoder, RowDecoder, decode_batch
from .labels import CAPTION, CLASS, json_label, member_of
from .reader import Reader, Sample
from .shards import ShardSet
from .text import TextDecoder


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
        self._of_rows = decoder if isinstance(decoder, RowDecoder) else None
        self._stacking = decoder if isinstance(decoder, BatchDecoder) else None
        self.reader = Reader(shards, extensions={*decoder.extensions, CLASS}, evict=evict, stop=stop)
        self._label_reader = Reader(shards, extensions={member_of(shards.label)}, evict=evict, stop=stop)
        self._text = TextDecoder.of(shards) if shards.label == CAPTION else None

    def batch(self, numbers: np.ndarray, *, index: np.ndarray) -> Batch:
        """Return the samples with these numbers, maybe in another order, and with each its `index`.

        Raises `ValueError` for a sample that cannot be read or decoded, or is not finite; it is named.
        """
        if self._of_rows is not None:
            order = np.argsort(numbers, kind="stable")  # what lies side by side is read at once
            numbers, index = numbers[order], index[order]
        batch = self._at_once(numbers)
        if batch is None:
            batch = decode_batch([self.reader.read(number) for number in numbers.tolist()], self._decoder)
        return {"index": torch.from_numpy(index), **batch, **self.labels(numbers)}

    def labels(self, numbers: np.ndarray) -> Batch:
        """Return what labels the samples: `label` (B,), `text` with `text_mask`, or nothing."""
        shards = self.reader.shards
        if shards.label == CLASS:
            has_class = CLASS in shards.extensions
            return {"label": torch.from_numpy(self.reader.labels(numbers))} if has_class else {}
        samples = [self._label_reader.read(number) for number in numbers.tolist()]
        if self._text is not None:
            return self._text(samples)
        return {"label": torch.tensor([_json_label(sample, shards) for sample in samples])}

    def _at_once(self, numbers: np.ndarray) -> Batch | None:
        """Decode samples that are alike, without an object for each; nothing where they are not."""
        if self.reader.shards.remote is not None or len(self._decoder.extensions) > 1:
            return None
        (extension,) = self._decoder.extensions
        if self.reader.not_finite(numbers) is not None:
            return None
        if self._of_rows is not None:
            rows = self.reader.rows(numbers, extension)
            return None if rows is None else self._of_rows.of_rows(rows)
        if self._stacking is not None:
            return self._stacking.stack(self.reader.members(numbers, extension), len(numbers))
        return None


def _json_label(sample: Sample, shards: ShardSet) -> int:
    try:
        return json_label(sample.members.get("json", b""), shards.label, shards.label_names)
    except ValueError as error:
        raise ValueError(f"{sample.name}: {error}") from error
