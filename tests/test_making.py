"""The making of shards gives the same bytes on any number of processes, however often it is killed."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from driftmap.data.making import Source, make_shards
from driftmap.data.members import read_pixels
from driftmap.data.reader import Reader
from driftmap.data.sources import Request, find_source
from driftmap.data.split import split


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def many(tmp_path):
    random = np.random.default_rng(1)
    for number in range(70):
        noise = Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8))
        file = tmp_path / "many" / f"{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise.save(file)
    return tmp_path / "many"


def test_the_number_of_processes_changes_no_byte(many, tmp_path):
    source = find_source(str(many), Request(size=8))
    done = []
    make_shards(source, tmp_path / "one", samples_per_shard=9)
    make_shards(source, tmp_path / "three", samples_per_shard=9, workers=3, progress=done.append)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert done == list(range(1, 71))
    assert "making.json" not in files_of(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_making_goes_on_at_the_first_missing_shard(many, tmp_path, workers):
    code = """
        import sys, time
        from driftmap.data.sources import Request, find_source, make_shards
        def slowly(done):
            print(done, flush=True)
            if done > 25:
                time.sleep(60)
        source = find_source(sys.argv[1], Request(size=8))
        make_shards(source, sys.argv[2], samples_per_shard=9, workers=int(sys.argv[3]), progress=slowly)
    """
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-c", textwrap.dedent(code), str(many), str(out), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "26\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        # The pipe ends when the last process that holds it does, so the workers have ended too.
        process.communicate(timeout=30)
    growing = tmp_path / ".out.partial"
    assert sorted(path.name for path in growing.glob("*.tar*")) == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar.tmp",
    ]
    kept = (growing / "shard-000001.tar").stat().st_ino
    source, done = find_source(str(many), Request(size=8)), []
    make_shards(source, out, samples_per_shard=9, workers=workers, progress=done.append)
    assert done == [18, *range(19, 71)]
    assert (out / "shard-000001.tar").stat().st_ino == kept
    make_shards(source, whole, samples_per_shard=9)
    assert files_of(out) == files_of(whole)
    assert not growing.exists()


def test_what_a_run_of_something_else_left_is_not_gone_on_with(many, tmp_path):
    def stop(done):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(
            find_source(str(many), Request(size=8)), tmp_path / "out", samples_per_shard=9, progress=stop
        )
    done = []
    other = find_source(str(many), Request(size=4))
    made = make_shards(other, tmp_path / "out", samples_per_shard=9, progress=done.append)
    assert done[0] == 1
    reader = Reader(made)
    shapes = {read_pixels(reader.read(number).members["png"], 3).shape for number in range(70)}
    assert shapes == {(3, 4, 4)}


def test_the_same_key_in_two_shards_is_refused(tmp_path):
    pairs = [("a", {"txt": b"1"}), ("b", {"txt": b"2"}), ("a", {"txt": b"3"})]
    source = Source(lambda: iter(pairs), 3, {})
    with pytest.raises(ValueError, match="key 'a' is written twice"):
        make_shards(source, tmp_path / "out", samples_per_shard=2)


def test_a_bad_picture_ends_the_processes_and_is_named(many, tmp_path):
    (many / "0" / "bad.png").write_bytes(b"\x89PNG hello")
    with pytest.raises(ValueError, match=r"0/bad\.png: the 10 bytes are no picture of a known kind"):
        make_shards(find_source(str(many), Request(size=8)), tmp_path / "out", workers=2)


def test_a_held_out_part_is_the_same_by_whatever_a_key_ends_in(many, tmp_path):
    source = find_source(str(many), Request(size=4))
    training, held_out = split(source, 0.3)
    made = [make_shards(part, tmp_path / name) for part, name in ((training, "t"), (held_out, "h"))]
    keys = [{Reader(part).key(number) for number in range(part.num_samples)} for part in made]
    assert keys[0] | keys[1] == {key for key, _ in source} and not keys[0] & keys[1]
    assert 10 < len(keys[1]) < 35 and made[1].info["split"] == {"part": "held out", "held_out": 0.3}
    # The same picture in another folder, among others, is on the same side.
    some = sorted(keys[1])[0]
    (many / "other").mkdir()
    (many / "other" / f"{some.rpartition('/')[2]}.png").write_bytes((many / f"{some}.png").read_bytes())
    _, again = split(find_source(str(many), Request(size=4)), 0.3)
    assert {key for key, _ in again.samples()} == keys[1] | {f"other/{some.rpartition('/')[2]}"}
    for share, message in ((0, "expected a share between 0 and 1"), (1e-9, "holds out 0 of 71 samples")):
        with pytest.raises(ValueError, match=message):
            split(find_source(str(many), Request(size=4)), share)
