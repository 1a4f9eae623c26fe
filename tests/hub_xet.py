"""What a client of xet leaves in a folder that stands for the storage (`local://`), as files.

The client cuts files into chunks and packs these into xorbs; a shard says of which chunks a file is. A shard
has a header of 48 bytes and then, for each file, records of 48 bytes: its hash, flags and number of
segments; the segments; as many records of verification where bit 31 of the flags is set; and its sha256 where
bit 30 is. A hash is four little-endian words, written as their hexadecimal digits. hf_xet itself puts the
file together again.
"""

import hashlib
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hf_xet

RECORD = 48
LAST = b"\xff" * 32  # the hash that ends the list of files


def digits(hash_bytes: bytes) -> str:
    """Return a hash as it is written."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", hash_bytes))


def files_in(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield (sha256, xet's hash, size) of the files of a shard."""
    place = RECORD
    while (name := shard[place : place + 32]) != LAST:
        flags, count = struct.unpack_from("<II", shard, place + 32)
        segments = [struct.unpack_from("<I", shard, place + RECORD * (1 + n) + 36)[0] for n in range(count)]
        place += RECORD * (1 + count + (count if flags >> 31 else 0))
        if flags >> 30 & 1:
            yield digits(shard[place : place + 32]), digits(name), sum(segments)
            place += RECORD


def from_xet(folder: Path) -> dict[str, bytes]:
    """Return the files of all sessions in the folder, by their sha256."""
    found = {}
    for session in folder.iterdir() if folder.is_dir() else ():
        shards = [file.read_bytes() for file in session.glob("xet/xorbs/shards/*.mdb")]
        files = [told for shard in shards for told in files_in(shard)]
        with tempfile.TemporaryDirectory() as scratch:  # the client has locked its own
            shutil.copytree(session, Path(scratch, "copy"))
            group = hf_xet.XetSession().new_file_download_group(
                endpoint=f"local://{scratch}/copy", token="x", token_expiry_unix_secs=int(time.time()) + 3600
            )
            with group:
                for sha256, name, size in files:
                    group.start_download_file(hf_xet.XetFileInfo(name, size), f"{scratch}/{sha256}")
            found |= {sha256: Path(scratch, sha256).read_bytes() for sha256, _, _ in files}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in found.items())
    return found
