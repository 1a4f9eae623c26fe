"""The bytes of one member as what they mean: picture, array, label.

Each function raises a `ValueError` that says what was found. The caller knows the shard and the key, and
adds them.
"""

import io
import json
import math
import re
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, UnidentifiedImageError

PICTURES = ("png", "jpg", "jpeg", "webp")
_MODES = {1: "L", 3: "RGB"}
# Pillow's decoders raise any of these for damaged bytes.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_NPY_VERSION_1 = b"\x93NUMPY\x01\x00"


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture, whatever its mode.

    Raises `ValueError` if the bytes are no picture, are cut off, or hold more than 8 bits a channel.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"the {len(data)} bytes are no picture of a known kind") from error
    except _UNREADABLE as error:
        raise ValueError(f"the {len(data)} bytes are no whole picture ({error})") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"the picture has mode {image.mode}; expected 8 bits a channel: convert it first")
    return image


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to 1 channel (grey) or 3 (red, green, blue); transparency shows white."""
    if channels not in _MODES:
        raise ValueError(f"channels is {channels}; a picture has 1 (grey) or 3 (colour)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    # Converting a picture to what it is copies it.
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def read_bytes(data: bytes, channels: int) -> np.ndarray:
    """Decode a picture to uint8 (C, H, W), a view of the picture's own (H, W, C)."""
    pixels = np.asarray(with_channels(open_picture(data), channels))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def read_pixels(data: bytes, channels: int) -> np.ndarray:
    """Decode a picture to float32 (C, H, W) in [-1, 1]."""
    pixels = read_bytes(data, channels).astype(np.float32)
    pixels /= 127.5
    pixels -= 1
    return pixels


def read_npy(data: bytes) -> np.ndarray:
    """Decode a `.npy` member; an array of a known header costs no parsing.

    Raises `ValueError` if the bytes are no array, or fewer than its header says.
    """
    if data[:8] == _NPY_VERSION_1:
        start = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape, plain = _npy_header(data[:start])
        if plain:
            if len(data) - start != dtype.itemsize * math.prod(shape):
                raise ValueError(f"the array says {dtype} {shape} but holds {len(data) - start} bytes")
            return np.frombuffer(data, dtype, offset=start).reshape(shape)
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"the {len(data)} bytes are no array of numbers ({error})") from error


def read_npys(rows: np.ndarray) -> np.ndarray | None:
    """Decode `.npy` members of one header, given as rows (n, size), to one array (n, *shape), a view.

    Returns nothing where `read_npy` has to look at each of them: headers differ, or one is damaged.
    """
    size = rows.shape[1]
    start = 10 + int.from_bytes(rows[0, 8:10].tobytes(), "little")
    header = rows[0, :start].tobytes()
    if header[:8] != _NPY_VERSION_1 or start >= size or (rows[:, :start] != rows[0, :start]).any():
        return None
    dtype, shape, plain = _npy_header(header)
    if not plain or not dtype.isnative or size - start != dtype.itemsize * math.prod(shape):
        return None
    if start % dtype.itemsize or size % dtype.itemsize:  # torch takes no numbers that lie across their places
        return None
    return rows[:, start:].view(dtype).reshape(len(rows), *shape)


def npy_bytes(array: np.ndarray) -> bytes:
    """Encode an array as a `.npy` member."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_label(data: bytes) -> int:
    """Decode a `cls` member, an integer in ASCII."""
    if not re.fullmatch(rb"\s*-?\d{1,18}\s*", data):
        raise ValueError(f"cls is {data[:20]!r}; expected the number of a class")
    return int(data)


def check_member(extension: str, data: bytes) -> None:
    """Decode a member of a known kind and drop the result; other kinds are taken as they are.

    Raises `ValueError` if it cannot be decoded.
    """
    last = extension.rpartition(".")[2]
    if last in PICTURES:
        open_picture(data)
    elif last == "npy":
        array = read_npy(data)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("the array holds numbers that are not finite")
    elif last == "json":
        json.loads(data)
    elif last == "cls":
        read_label(data)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Parse a version 1 header; the last value tells whether the bytes after it are a plain array."""
    file = io.BytesIO(header)
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (EOFError, ValueError) as error:
        raise ValueError(f"the header of the array is damaged ({error})") from error
    return dtype, shape, not fortran and not dtype.hasobject
