"""Pictures of any kind become upright, opaque, 8 bits a channel and of one size, or are refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from driftmap.data.making import PictureWarning, make_shards
from driftmap.data.pictures import Draft, PicturePolicy, finish, prepare
from driftmap.data.reader import Reader
from driftmap.data.sources import Request, find_source

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_exif_turns_a_picture_before_it_is_fitted():
    stored = Image.new("RGB", (8, 4), RED)
    stored.paste(BLUE, (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise: left becomes top
    image, _ = prepare(encoded(stored, "JPEG", exif=exif, quality=100), PicturePolicy(8, fit="stretch"))
    red, blue = image.getpixel((4, 1)), image.getpixel((4, 6))
    assert red[0] > 240 > 20 > red[2]
    assert blue[2] > 240 > 20 > blue[0]


def test_cmyk_becomes_red_green_blue():
    image, _ = prepare(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), PicturePolicy(2))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", RED)


@pytest.mark.parametrize(("transparency", "expected"), [(None, BLUE), (1, GREEN)])
def test_a_palette_is_looked_up_with_its_transparent_colour(transparency, expected):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([*RED, *BLUE])
    settings = {} if transparency is None else {"transparency": transparency}
    image, _ = prepare(encoded(picture, **settings), PicturePolicy(4, background="lime"))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", expected)


def test_16_bits_are_scaled_to_8():
    values = np.array([[0, 257, 65535], [128, 129, 32896]], np.uint16)
    image, _ = prepare(encoded(Image.fromarray(values)), PicturePolicy(3, channels=1, fit="pad"))
    # Three wide and two high, so `pad` leaves the rows as they are and adds one.
    assert np.asarray(image)[:2].tolist() == [[0, 1, 255], [0, 1, 128]]


def test_values_without_a_known_range_are_refused():
    floats = encoded(Image.fromarray(np.float32([[0.5, 2.0]])), "TIFF")
    with pytest.raises(ValueError, match=r"mode F with values from 0\.5 to 2\.0; expected 8 or 16 bits"):
        prepare(floats, PicturePolicy(2))


def test_transparency_shows_the_background():
    picture = Image.new("RGBA", (4, 4), (*RED, 0))
    picture.paste((*RED, 128), (0, 0, 2, 4))
    image, _ = prepare(encoded(picture), PicturePolicy(4, background="#0000ff"))
    assert image.getpixel((3, 0)) == BLUE
    assert image.getpixel((0, 0)) == (128, 0, 127)
    grey, _ = prepare(encoded(Image.new("LA", (4, 4), (0, 0))), PicturePolicy(4, channels=1))
    assert grey.getpixel((0, 0)) == 255


def test_of_an_animation_the_first_frame_is_taken_and_one_warning_given(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for name in ("a", "b"):
        write(
            tmp_path / "in" / f"{name}.gif",
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        )
    with pytest.warns(PictureWarning, match=r"[ab]\.gif: it has 2 frames; only the first") as caught:
        made = make_shards(find_source(str(tmp_path / "in"), Request(size=4)), tmp_path / "out")
    assert len(caught) == 1
    for number in range(2):
        kept = Image.open(io.BytesIO(Reader(made).read(number).members["png"]))
        assert kept.getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_cut_picture_is_named(kind):
    whole = encoded(Image.effect_noise((64, 64), 80), kind)
    with pytest.raises(
        ValueError, match=r"^x/a: the \d+ bytes are no whole picture .*remove it or replace it"
    ):
        finish(PicturePolicy(8), Draft(whole[: len(whole) // 2], "x/a"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"it is empty \(0 bytes\); expected a picture"),
        (b"P6 0 4 255\n", "the 11 bytes are no picture of a known kind"),
        (b"GIF89a" + bytes(7) + b";", "the 14 bytes are no .*picture"),
    ],
)
def test_a_picture_of_no_size_is_named(tmp_path, data, message):
    file = write(tmp_path / "a.png", data)
    with pytest.raises(ValueError, match=rf"^a: {message}.*; remove it or replace it"):
        finish(PicturePolicy(8), Draft(file, "a"))


def test_each_fit_is_what_its_name_says():
    # Three squares side by side: red, green, blue.
    picture = Image.new("RGB", (24, 8))
    for third, colour in enumerate((RED, GREEN, BLUE)):
        picture.paste(colour, (8 * third, 0, 8 * third + 8, 8))
    data = encoded(picture)

    def seen(fit, *places):
        image, _ = prepare(data, PicturePolicy(24, fit=fit))
        assert image.size == (24, 24)
        return [image.getpixel(place) for place in places]

    assert seen("crop", (10, 0), (12, 12), (13, 23)) == [GREEN, GREEN, GREEN]
    assert seen("pad", (4, 0), (4, 12), (12, 12), (20, 12), (12, 23)) == [WHITE, RED, GREEN, BLUE, WHITE]
    assert seen("stretch", (2, 0), (12, 12), (21, 23)) == [RED, GREEN, BLUE]


def test_a_smaller_picture_is_averaged_by_lanczos():
    values = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    image, _ = prepare(encoded(Image.fromarray(values)), PicturePolicy(8, channels=1))
    lanczos = Image.fromarray(values).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(image), np.asarray(lanczos))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0; expected a number of pixels"),
        ({"size": 4, "channels": 2}, "channels is 2; a picture has 1"),
        ({"size": 4, "fit": "squeeze"}, "fit is 'squeeze'; expected one of crop, pad, stretch"),
        ({"size": 4, "background": "whitish"}, "background is 'whitish'; expected the name of a colour"),
        ({"size": 4, "background": "#ffffff00"}, "background is '#ffffff00'; expected the name of a colour"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PicturePolicy(**settings)
