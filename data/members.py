"""The bytes of one member as what they mean: picture, array, label.

Each function raises a `ValueError` that says what was found. The caller knows the shard and the key, and
adds them.
"""

import io
import json
import math
import re
import struct
import tokenize
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

PICTURES = ("png", "jpg", "jpeg", "webp")
Bytes = bytes | memoryview
_MODES = {1: "L", 3: "RGB"}
# Pillow's decoders raise any of these for damaged bytes.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# So do numpy's, for a damaged header.
NO_ARRAY = (EOFError, OSError, ValueError, SyntaxError, tokenize.TokenError)
_JPEG = b"\xff\xd8"
_NPY_VERSION_1 = b"\x93NUMPY\x01\x00"
# Numpy reads headers by `ast`, and Python 3.11 fails where two threads do so at a time.
_USUAL_HEADER = re.compile(
    rb"\{'descr': '([<>|][a-zA-Z]\d+)', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\), \} *\n"
)


def open_picture(data: Bytes) -> Image.Image:
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


def read_pixels(data: Bytes, channels: int) -> np.ndarray:
    """Decode a picture to uint8 (C, H, W), a view of the picture's own (H, W, C)."""
    if channels == 3 and data[:2] == _JPEG and (colours := _read_jpeg(data)) is not None:
        return colours.transpose(2, 0, 1)
    pixels = np.asarray(with_channels(open_picture(data), channels))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _read_jpeg(data: Bytes) -> np.ndarray | None:
    """Decode an ordinary JPEG to (H, W, 3), to the same values as Pillow; it lets other threads run.

    Returns nothing where Pillow has to look: it is damaged, of four colours, or larger than Pillow allows.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        most = Image.MAX_IMAGE_PIXELS or math.inf
        if colours not in ("YCbCr", "Gray") or int(height) * int(width) > most:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def read_npy(data: Bytes) -> np.ndarray:
    """Decode a `.npy` member; an array of a known header costs no parsing.

    Raises `ValueError` if the bytes are no array, or fewer than its header says.
    """
    if data[:8] == _NPY_VERSION_1:
        start = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape, plain = _npy_header(bytes(data[:start]))
        if plain:
            if len(data) - start != dtype.itemsize * math.prod(shape):
                raise ValueError(f"the array says {dtype} {shape} but holds {len(data) - start} bytes")
            return np.frombuffer(data, dtype, offset=start).reshape(shape)
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except NO_ARRAY as error:
        raise ValueError(f"the {len(data)} bytes are no array of numbers ({error})") from error


def read_npys(rows: np.ndarray) -> np.ndarray | None:
    """Return the arrays (n, *shape) in rows (n, size) of bytes, `.npy` members of one size, as views.

    Returns nothing where `read_npy` has to look at each of them: headers differ, or one is damaged.
    """
    first = rows[0].tobytes()
    start = 10 + int.from_bytes(first[8:10], "little")
    if first[:8] != _NPY_VERSION_1 or (rows[:, :start] != rows[0, :start]).any():
        return None
    dtype, shape, plain = _npy_header(first[:start])
    if not plain or rows.shape[1] - start != dtype.itemsize * math.prod(shape):
        return None
    return rows[:, start:].view(dtype).reshape(len(rows), *shape)


def is_finite(data: Bytes) -> bool:
    """Return whether the array of a `.npy` member holds no infinite and no undefined number."""
    array = read_npy(data)
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


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
        if not is_finite(data):
            raise ValueError("the array holds numbers that are not finite")
    elif last == "json":
        json.loads(data)
    elif last == "cls":
        read_label(data)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Parse a version 1 header; the last value tells whether the bytes after it are a plain array."""
    if usual := _USUAL_HEADER.fullmatch(header, 10):
        kind, fortran, shape = (part.decode() for part in usual.groups())
        sizes = tuple(int(size) for size in shape.split(",") if size.strip())
        return np.dtype(kind), sizes, fortran == "False"
    file = io.BytesIO(header)
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except NO_ARRAY as error:
        raise ValueError(f"the header of the array is damaged ({error})") from error
    return dtype, shape, not fortran and not dtype.hasobject
