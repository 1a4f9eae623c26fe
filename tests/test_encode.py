"""Encoding keeps keys, order and shards, and goes on where it was killed without mixing encoders."""

import io
import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from driftmap.data.batch import ordered
from driftmap.data.check import check_shards
from driftmap.data.decode import Pixels, floats
from driftmap.data.encode import encode_shards
from driftmap.data.encoders import CaptionEncoder, Encoding, PictureEncoder
from driftmap.data.reader import Reader
from driftmap.data.shards import ShardSet, ShardWriter, index_shards
from driftmap.data.text import CaptionPlace
from driftmap.trainer.encode import latent_statistics


def all_samples(shards):
    reader = Reader(shards)
    return [reader.read(number) for number in range(shards.num_samples)]


def halved(pictures):
    mean = torch.nn.functional.avg_pool2d(pictures, 2)
    return mean, torch.full_like(mean, 0.125)


def latents(moments=halved, version=1):
    about = {"encoder": {"name": "halved", "version": version}}
    return Encoding(PictureEncoder(moments, Pixels()), about, lambda: {"scaling": 0.5})


def letters(captions):
    return [torch.tensor([[ord(letter), 0.5] for letter in caption]).reshape(-1, 2) for caption in captions]


def text(embeddings=letters, version=1):
    about = {"text": {"encoder": version, "max_tokens": 8}}
    encoder = CaptionEncoder(embeddings, CaptionPlace("json", "caption"))
    return Encoding(encoder, about, lambda: {"text": {"encoder": version, "max_tokens": 8, "width": 2}})


@pytest.fixture
def pictures(tmp_path):
    with ShardWriter(tmp_path / "pictures", samples_per_shard=4) as writer:
        for number in range(10):
            buffer = io.BytesIO()
            Image.new("RGB", (4, 4), (25 * number, 0, 255)).save(buffer, "PNG")
            members = {"png": buffer.getvalue(), "cls": b"%d" % number, "bin": b"kept"}
            writer.write(f"p{number}", members | {"json": json.dumps({"caption": "x" * number}).encode()})
    return index_shards(tmp_path / "pictures", info={"classes": [*"abcdefghij"]}, licence="CC0-1.0")


def test_latents_take_the_place_of_pictures_and_nothing_else_changes(pictures, tmp_path):
    done = []
    made = encode_shards(pictures, tmp_path / "out", [latents()], batch_size=3, progress=done.append)
    assert (made.shards, made.counts) == (pictures.shards, pictures.counts)
    assert done == [3, 4, 7, 8, 10]
    assert made.licence == "CC0-1.0"
    assert made.info == {
        **pictures.info,
        "encoder": {"name": "halved", "version": 1},
        "scaling": 0.5,
        "encoded_from": pictures.fingerprint,
    }
    for picture, latent in zip(all_samples(pictures), all_samples(made), strict=True):
        assert picture.key == latent.key
        expected = picture.members | {"moments.npy": latent.members["moments.npy"]}
        del expected["png"]
        assert latent.members == expected
    data = floats(next(ordered(pictures, 10))["data"])
    batch = next(ordered(made, 10))
    assert torch.equal(batch["mean"], halved(data)[0].half())
    assert torch.all(batch["std"] == 0.125)
    assert check_shards(made.folder) == []
    assert sorted(path.suffix for path in made.folder.iterdir()) == [".idx"] * 3 + [".json"] + [".tar"] * 3


def test_embeddings_join_pictures_or_latents_without_padding(pictures, tmp_path):
    both = encode_shards(pictures, tmp_path / "both", [latents(), text()], batch_size=3)
    assert both.extensions == ("bin", "cls", "json", "moments.npy", "text.npy")
    assert both.info["text"] == {"encoder": 1, "max_tokens": 8, "width": 2}
    for number, sample in enumerate(all_samples(both)):
        assert len(sample.members["text.npy"]) == 128 + number * 2 * 2
    beside = encode_shards(pictures, tmp_path / "beside", [text()])
    assert "png" in beside.extensions
    after = encode_shards(beside, tmp_path / "after", [latents()])
    assert [sample.members for sample in all_samples(after)] == [
        sample.members for sample in all_samples(both)
    ]
    assert after.info["text"] == both.info["text"]
    problems = check_shards(both.folder)
    assert problems == [
        "shard-000002.tar: p9: text.npy is float16 (9, 2); the card says float (up to 8, 2). "
        "Encode the captions again"
    ]


def test_a_killed_encoding_goes_on_at_the_first_missing_shard(pictures, tmp_path):
    code = """
        import sys, time
        import torch
        from driftmap.data.decode import Pixels
        from driftmap.data.encode import encode_shards
        from driftmap.data.encoders import Encoding, PictureEncoder
        from driftmap.data.shards import ShardSet
        calls = 0
        def slow(pictures):
            global calls
            calls += 1
            if calls > 2:
                print("in the second shard", flush=True)
                time.sleep(60)
            mean = torch.nn.functional.avg_pool2d(pictures, 2)
            return mean, torch.full_like(mean, 0.125)
        encoding = Encoding(
            PictureEncoder(slow, Pixels()),
            {"encoder": {"name": "halved", "version": 1}},
            lambda: {"scaling": 0.5},
        )
        encode_shards(ShardSet.open(sys.argv[1]), sys.argv[2], [encoding], batch_size=2)
    """
    out = tmp_path / "latents"
    command = [sys.executable, "-c", textwrap.dedent(code), str(pictures.folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the second shard\n"
        process.send_signal(signal.SIGKILL)
    with pytest.raises(ValueError, match="has no dataset.json, so it is not complete"):
        ShardSet.open(out)
    assert check_shards(out) == [
        f"{out}/encoding.json: what makes these shards was stopped; run the same command again"
    ]
    first = (out / "shard-000000.tar").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"holds what was made of .*'version': 1.*expected .*'version': 2"):
        encode_shards(pictures, out, [latents(version=2)])

    calls = []

    def counted(batch):
        calls.append(len(batch))
        return halved(batch)

    resumed = encode_shards(pictures, out, [latents(counted)], batch_size=2)
    assert calls == [2, 2, 2]
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first
    whole = encode_shards(pictures, tmp_path / "whole", [latents()], batch_size=2)
    assert (resumed.fingerprint, resumed.info) == (whole.fingerprint, whole.info)
    assert not list(out.glob("*.tmp"))


def test_a_complete_set_is_left_alone(pictures, tmp_path):
    def never(batch):
        raise AssertionError("there is nothing left to encode")

    out = tmp_path / "latents"
    first = encode_shards(pictures, out, [latents(), text()])
    assert encode_shards(pictures, out, [latents(never), text(never)]) == first
    for others in ([latents(never, version=2), text(never)], [latents(never), text(never, version=2)]):
        with pytest.raises(ValueError, match="Choose another folder"):
            encode_shards(pictures, out, others)


def test_mistakes_in_encoding_are_named(pictures, tmp_path):
    def refused(message, *encodings, source=pictures):
        with pytest.raises(ValueError, match=message):
            encode_shards(source, tmp_path / str(len(list(tmp_path.iterdir()))), encodings)

    refused(
        r"shard-000000\.tar: p0: its moments\.npy is not finite in float16", latents(lambda x: (x * 1e5, x))
    )
    refused(
        r"gave mean \(4, 3, 4, 4\) and std \(4, 3, 1, 4\) for 4 pictures",
        latents(lambda x: (x, x[:, :, :1])),
    )
    refused(
        r"p1: its text\.npy is not finite in float16",
        text(lambda captions: [tokens * 1e5 for tokens in letters(captions)]),
    )
    made = encode_shards(pictures, tmp_path / "made", [latents()])
    refused("holds moments.npy already; encode what it was made from", latents(), source=made)


def test_samples_that_cannot_be_read_are_left_out_up_to_a_share(tmp_path):
    with ShardWriter(tmp_path / "in", samples_per_shard=4) as writer:
        for number, size in enumerate([(4, 4)] * 8 + [(8, 4)] * 4):
            buffer = io.BytesIO()
            Image.new("RGB", size).save(buffer, "PNG")
            picture = buffer.getvalue()[:40] if number in (1, 9) else buffer.getvalue()
            writer.write(
                f"p{number}", {"png": picture, "json": b'{"caption": "x"}' if number != 6 else b"{}"}
            )
    source = index_shards(tmp_path / "in", info={"buckets": [[4, 4, 8], [4, 8, 4]]})
    out = tmp_path / "out"
    for share in (0.0, 0.2):
        with pytest.raises(
            ValueError, match=r"[13] of 12 samples cannot be encoded, such as .*: p\d.*--max-bad"
        ):
            encode_shards(source, out, [latents(), text()], batch_size=3, max_bad_fraction=share)
    made = encode_shards(source, out, [latents(), text()], batch_size=3, max_bad_fraction=0.25)
    assert [sample.key for sample in all_samples(made)] == [f"p{n}" for n in (0, 2, 3, 4, 5, 7, 8, 10, 11)]
    lost = ["shard-000000.tar: p1", "shard-000001.tar: p6", "shard-000002.tar: p9"]
    assert made.info["left_out"] == {"number": 3, "names": lost}
    assert made.info["buckets"] == [[4, 4, 6], [4, 8, 3]]
    assert list(made.buckets) == [(4, 4), (4, 8)]
    assert check_shards(out) == []


def test_latents_are_scaled_to_mean_zero_and_variance_one(tmp_path):
    """Over all pixels of all sizes: the variance of a posterior is that of its mean plus its own."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, samples_per_shard=5) as writer:
        for number, size in enumerate([(8, 4)] * 5 + [(4, 8)] * 5 + [(6, 6)] * 3):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 200, (*size, 3), np.uint8)).save(buffer, "PNG")
            writer.write(f"p{number}", {"png": buffer.getvalue()})
    shards = index_shards(tmp_path)
    found = latent_statistics(halved, shards, Pixels())
    means = [
        halved(floats(Pixels().stack([sample.members["png"]], 1)["data"]))[0]
        for sample in all_samples(shards)
    ]
    pixels = torch.cat([mean.flatten() for mean in means])
    scaled = (pixels - found["shift_factor"]) * found["scaling_factor"]
    assert scaled.mean().item() == pytest.approx(0, abs=1e-6)
    assert scaled.var().item() + (0.125 * found["scaling_factor"]) ** 2 == pytest.approx(1, rel=1e-5)
    assert found["channel_mean"][1] == pytest.approx(
        torch.cat([mean[:, 1].flatten() for mean in means]).mean()
    )
