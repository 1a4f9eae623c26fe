"""Pictures of any kind become pictures of one kind: upright, 8 bits, without transparency, one size or a few.

The order is that in which a viewer would do it: decode, turn upright (EXIF), 8 bits a channel, lay over
the background, fit into the size by Lanczos. Whatever cannot be decoded is an error that says what was
found; nothing is repaired in silence.
"""

import json
import struct
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from .buckets import Size, nearest

Fit = Literal["crop", "pad", "stretch"]

_MODES = {1: "L", 3: "RGB"}
# Pillow's decoders raise any of these for damaged bytes.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_LYING = (5, 6, 7, 8)  # orientations whose height is the width of what is stored
_HIGHEST = {"u1": 255, "u2": 65535}


@dataclass(frozen=True)
class PicturePolicy:
    """What pictures become: `size` x `size`, 1 channel (grey) or 3 (colour).

    Where `buckets` are given, a picture gets the one of these sizes whose proportions are nearest to its own.
    `fit` says what happens to a picture of other proportions: `crop` keeps its centre, `pad` keeps it whole
    and fills up with `background`, `stretch` changes its proportions. `background` also shows through where a
    picture is transparent; it is a name or `#rrggbb`.
    """

    size: int
    channels: int = 3
    fit: Fit = "crop"
    background: str = "white"
    buckets: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; expected a number of pixels")
        if self.channels not in _MODES:
            raise ValueError(f"channels is {self.channels}; a picture has 1 (grey) or 3 (colour)")
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit is {self.fit!r}; expected one of {', '.join(get_args(Fit))}")
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError(
                f"background is {self.background!r}; expected the name of a colour, such as white, or #rrggbb"
            )

    @cached_property
    def colour(self) -> tuple[int, int, int]:
        """The background as red, green, blue."""
        return cast(tuple[int, int, int], ImageColor.getrgb(self.background))

    @property
    def info(self) -> dict[str, Any]:
        """What the card of a data set says of its pictures."""
        size = {} if self.buckets else {"size": self.size}
        return {**size, "channels": self.channels, "fit": self.fit, "background": self.background}

    def size_of(self, size: Size) -> Size:
        """Return the size that a picture of a size gets."""
        return self.buckets[nearest(size, self.buckets)] if self.buckets else (self.size, self.size)


def prepare(data: bytes, policy: PicturePolicy, size: Size | None = None) -> tuple[Image.Image, str]:
    """Decode a picture and bring it into the form of the policy; the text is a remark, mostly empty.

    A `size` that was chosen for it replaces the policy's.

    Raises `ValueError` if the bytes are no picture, are cut off, or have pixels of an unknown range.
    """
    image, remark = _opened(data)
    image = _upright(image)
    image = _laid_over(_eight_bits(image), policy.colour).convert(_MODES[policy.channels])
    return _fitted(image, policy, size or policy.size_of((image.height, image.width))), remark


def png(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Draft:
    """A sample whose picture is still to be made.

    `place` is what an error or a remark calls it: a file, a row of a table, a key. `about` becomes the
    `json` member, and its "class" the `cls` member too. `members` go along as they are. `size` is the one of
    several that was chosen for the picture.
    """

    picture: Path | bytes
    place: str
    about: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    size: Size | None = None


def finish(policy: PicturePolicy, draft: Draft) -> tuple[dict[str, bytes], str]:
    """Return the members of a sample, its picture prepared and encoded as PNG, and a remark, mostly empty.

    Raises `ValueError` that begins with the draft's place.
    """
    try:
        data = draft.picture.read_bytes() if isinstance(draft.picture, Path) else draft.picture
        image, remark = prepare(data, policy, draft.size)
    except OSError as error:
        found = f"{draft.picture} cannot be read ({error.strerror})"
        raise ValueError(f"{draft.place}: {found}; expected a picture file there") from error
    except ValueError as error:
        raise ValueError(f"{draft.place}: {error}; remove it or replace it") from error
    members = {"png": png(image)}
    if "class" in draft.about:
        members["cls"] = str(draft.about["class"]).encode()
    if draft.about:
        members["json"] = json.dumps(draft.about).encode()
    return {**members, **draft.members}, f"{draft.place}: {remark}" if remark else ""


def size_of(draft: Draft) -> Size:
    """Return the size of a draft's picture as a viewer shows it, from its first bytes where these tell it.

    Raises `ValueError` that begins with the draft's place.
    """
    try:
        with Image.open(
            draft.picture if isinstance(draft.picture, Path) else BytesIO(draft.picture)
        ) as image:
            width, height = image.size
            turned = _orientation(image) in _LYING
    except _UNREADABLE as error:
        raise ValueError(
            f"{draft.place}: its size cannot be read ({error}); remove it or replace it"
        ) from error
    if 0 in (height, width):
        raise ValueError(f"{draft.place}: it is {width} x {height} pixels; remove it or replace it")
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _UNREADABLE:
        return 1


def _opened(data: bytes) -> tuple[Image.Image, str]:
    """Decode the first frame."""
    if not data:
        raise ValueError("it is empty (0 bytes); expected a picture")
    try:
        image = Image.open(BytesIO(data))
        image.load()
        # The second picture in a phone's MPO is a preview or a depth map, which nobody misses.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise ValueError(f"the {len(data)} bytes are no picture of a known kind") from error
    except _UNREADABLE as error:
        raise ValueError(f"the {len(data)} bytes are no whole picture ({error})") from error
    if 0 in image.size:
        raise ValueError(f"the picture is {image.width} x {image.height} pixels; expected at least 1 x 1")
    remark = f"it has {frames} frames; only the first one is taken of it and of others like it"
    return image, remark if frames > 1 else ""


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says; where that cannot be read, it lies as it was stored, as in viewers."""
    try:
        return ImageOps.exif_transpose(image)
    except _UNREADABLE:
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits a channel to 8, v -> round(255 v / 65535)."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    # Mode I is how some formats give 16 bits; beyond them, or in floats, nothing says what white is.
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > _HIGHEST["u2"]:
        raise ValueError(
            f"the picture has mode {image.mode} with values from {pixels.min()} to {pixels.max()}; "
            "expected 8 or 16 bits a channel: convert it first"
        )
    scaled = np.rint(pixels * (_HIGHEST["u1"] / _HIGHEST["u2"])).astype(np.uint8)
    return Image.fromarray(scaled)


def _laid_over(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Show a colour where a picture is transparent."""
    if not image.has_transparency_data:
        return image
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image.convert("RGBA"))


def _fitted(image: Image.Image, policy: PicturePolicy, target: Size) -> Image.Image:
    size, lanczos = (target[1], target[0]), Image.Resampling.LANCZOS
    if policy.fit == "crop":
        return ImageOps.fit(image, size, lanczos)
    if policy.fit == "pad":
        ground = Image.new("RGB", (1, 1), policy.colour).convert(image.mode).getpixel((0, 0))
        return ImageOps.pad(image, size, lanczos, color=cast(Any, ground))
    return image.resize(size, lanczos)
