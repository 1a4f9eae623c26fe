"""The CRC-32 of rows that lie end to end, from the one that the index has of each member.

With A B for A followed by B, crc(A B) = S_n crc(A) xor crc(B), where S_n, what n = |B| zero bytes do to a CRC
but for a constant, is linear over GF(2). So one pass over a whole batch tells whether all of it is sound, and
that pass holds no lock of the interpreter.
"""

from functools import lru_cache

import numpy as np
from zlib_ng.zlib_ng import crc32


def crc_of_rows(crcs: np.ndarray, *, size: int, width: int) -> int:
    """Return the CRC-32 of rows of `width` bytes, each a member of `size` bytes and zeros after it.

    `crcs` (n,) are those of the members.
    """
    columns, constant = _columns(len(crcs), size, width)
    bits = np.unpackbits(crcs.astype("<u4").view(np.uint8), bitorder="little").view(bool)
    return int(np.bitwise_xor.reduce(columns[bits], initial=constant))


@lru_cache(maxsize=64)
def _columns(count: int, size: int, width: int) -> tuple[np.ndarray, int]:
    """Return what each bit of each row's CRC adds to that of all rows (32 count,), and what comes besides."""
    after, row = bytes(width - size), bytes(width)
    of_after, of_row = crc32(after), crc32(row)
    columns = np.empty((count, 32), np.uint32)
    constant, reached = 0, [crc32(after, 1 << bit) ^ of_after for bit in range(32)]
    for place in reversed(range(count)):
        columns[place] = reached
        constant = crc32(row, constant) ^ of_row ^ of_after
        reached = [crc32(row, column) ^ of_row for column in reached]
    return columns.ravel(), constant
