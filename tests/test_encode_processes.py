"""Any number of processes encode a set to the same bytes; stopped, killed or failing, all of them end."""

import io
import os
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from bad_server import serving
from driftmap.data.check import check_shards
from driftmap.data.index import build_index
from driftmap.data.shards import ShardSet, ShardWriter, index_shards
from driftmap.trainer.signals import ExitCode
from runs import driftmap, launched, wait_until
from small_encoder import bert, write_encoder

NUM_SHARDS, PER_SHARD = 12, 6
AUTOENCODER = """
data: {{shards: {shards}, batch_size: 4}}
model:
  name: autoencoder_kl
  in_channels: 3
  out_channels: 3
  latent_channels: 2
  down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D]
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]
  block_out_channels: [8, 8]
  layers_per_block: 1
  norm_num_groups: 4
  sample_size: 32
  mid_block_add_attention: false
objective: {{name: autoencoder, kl_weight: 1e-3}}
optimizer: {{lr: 1e-3}}
training: {{steps: 1, save_every: 1}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return pictures with captions, and the options that encode both."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "pictures", samples_per_shard=PER_SHARD) as writer:
        for number in range(NUM_SHARDS * PER_SHARD):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "PNG")
            writer.write(
                f"k{number:03d}", {"png": buffer.getvalue(), "txt": b"a red cat" * (number % 3) + b"."}
            )
    index_shards(folder / "pictures")
    config = folder / "autoencoder.yaml"
    config.write_text(AUTOENCODER.format(shards=folder / "pictures"))
    driftmap("train", config, "--out", folder / "autoencoder", logs=folder / "logs").succeeded()
    encoder = write_encoder(folder / "text", bert())
    options = ["--autoencoder", folder / "autoencoder", "--text-encoder", encoder, "--batch-size", "2"]
    return folder / "pictures", options


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """Return what one process makes."""
    pictures, options = made
    folder = tmp_path_factory.mktemp("alone")
    driftmap("shards", "encode", pictures, folder / "out", *options, logs=folder / "logs").succeeded()
    assert check_shards(folder / "out") == []
    return ShardSet.open(folder / "out")


def whole(folder):
    return {tar.name: tar.stat().st_mtime_ns for tar in folder.glob("*.tar")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_that_are_stopped_are_followed_by_three(made, alone, tmp_path, number):
    pictures, options = made
    out = tmp_path / "out"
    commands = launched(2, "shards", "encode", pictures, out, *options, logs=tmp_path / "two")
    wait_until(lambda: len(whole(out)) >= 2)
    for command in commands:
        os.kill(command.process.pid, number)
    expected = 130 if number == signal.SIGTERM else -number
    assert [command.ended() for command in commands] == [expected, expected], commands[0].stderr
    before = whole(out)
    assert 2 <= len(before) < NUM_SHARDS
    if number == signal.SIGTERM:
        assert not list(out.glob("*.tmp"))
        assert re.search(rf"stopped with \d+ of {NUM_SHARDS} shards in .*out; the same", commands[0].stdout)
    assert not (out / "dataset.json").exists()

    for command in launched(3, "shards", "encode", pictures, out, *options, logs=tmp_path / "three"):
        command.succeeded()
    after = whole(out)
    assert {name: after[name] for name in before} == before
    assert ShardSet.open(out).fingerprint == alone.fingerprint
    assert ShardSet.open(out).info == alone.info
    assert check_shards(out) == []


def test_a_bad_sample_ends_all_processes_with_its_name(made, tmp_path):
    pictures, options = made
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    tar = broken / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"red cat.", b"red \xff\xff\xff."))
    index_shards(broken)
    build_index(tar)
    commands = launched(2, "shards", "encode", broken, tmp_path / "out", *options, logs=tmp_path / "logs")
    for command in commands:
        assert "shard-000001.tar: k007: txt cannot be read" in command.refused()
    assert not (tmp_path / "out" / "shard-000001.tar").exists()


def test_a_process_that_dies_is_not_waited_for(made, tmp_path):
    pictures, options = made
    out = tmp_path / "out"
    first, second = launched(2, "shards", "encode", pictures, out, *options, logs=tmp_path / "logs")
    wait_until(lambda: whole(out))
    second.process.kill()
    assert first.ended() == ExitCode.LOST, first.stderr
    assert "another process has ended" in first.stderr


def test_pictures_behind_an_address_give_the_same_latents(made, alone, tmp_path):
    pictures, options = made
    with serving(pictures) as server:
        driftmap(
            *("shards", "encode", server.address, tmp_path / "out", *options),
            logs=tmp_path / "logs",
            DRIFTMAP_CACHE=str(tmp_path / "cache"),
        ).succeeded()
    assert ShardSet.open(tmp_path / "out").fingerprint == alone.fingerprint
    assert "text" in ShardSet.open(tmp_path / "out").info
