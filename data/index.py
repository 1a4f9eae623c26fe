"""The sidecar of one tar: the place, size and checksum of every member of every sample.

The sidecar `NAME.idx` is a numpy archive without pickles. A reader that has it needs no pass over the tar
to find a sample. Any tar can be indexed, whoever wrote it: members are grouped by key (the path up to the
first dot of its last component, WebDataset's rule), in whatever order they lie. Folders, links and hidden
files are passed over.

A sidecar belongs to a tar of one size. Times of modification are not looked at: copying changes them.
"""

import contextlib
import io
import mmap
import re
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from zlib_ng.zlib_ng import crc32  # zlib's own takes ten times as long

from .members import NO_ARRAY, is_finite, read_label, read_npy
from .writer import write_atomically

_FORMAT = 2
NO_LABEL = np.iinfo(np.int64).min
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_COMMAND = "run `driftmap shards index {}`"

Samples = dict[str, dict[str, tuple[int, int]]]  # key -> extension -> (offset, size)


@dataclass(frozen=True)
class Index:
    """The samples of one tar, in the order of their first members.

    `offsets`, `sizes` and `crcs` are (n, m) for n samples and m extensions; a size of -1 means absent.
    `packed_keys` is every key followed by a zero byte. `labels` (n,) are the classes, `NO_LABEL` where there
    is none, and `finite` (n,) tells whether no array of a sample holds a number that is not finite: whoever
    compares checksums need not look at the numbers again.
    """

    packed_keys: bytes
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    tar_bytes: int
    labels: np.ndarray
    finite: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, row: int) -> str:
        """Return the key of one sample; unpacking all keys would cost more memory than the rest."""
        start = self._ends[row - 1] + 1 if row else 0
        return self.packed_keys[start : self._ends[row]].decode("utf-8", "surrogateescape")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(self.packed_keys, np.uint8) == 0)


def index_path(tar: Path) -> Path:
    """Return where the sidecar of a tar lies."""
    return tar.with_suffix(".idx")


def list_tars(folder: Path) -> list[Path]:
    """List the tars of a folder by name.

    Raises `ValueError` if there is no such folder or no tar in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected a folder of WebDataset tars")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        packed = sorted(path.name for path in folder.glob("*.tar.*") if path.suffix != ".tmp")
        hint = f"; {packed[0]} is compressed: unpack it to a plain .tar first" if packed else ""
        raise ValueError(f"{folder} holds no .tar file; expected WebDataset tars{hint}")
    return tars


def build_index(tar: Path) -> Path:
    """Write the sidecar of one tar and return its path.

    Raises `ValueError` for a damaged, cut or compressed tar, or one that holds the same member twice.
    """
    index = scan(Path(tar))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        format=np.int64(_FORMAT),
        keys=np.frombuffer(index.packed_keys, np.uint8),
        extensions=np.array(index.extensions, dtype=str),
        offsets=index.offsets,
        sizes=index.sizes,
        crcs=index.crcs,
        tar_bytes=np.int64(index.tar_bytes),
        labels=index.labels,
        finite=index.finite,
    )
    path = index_path(Path(tar))
    write_atomically(path, buffer.getvalue())
    return path


def scan(tar: Path) -> Index:
    """Return the index of a tar without writing it; raises as `build_index` does."""
    with open(tar, "rb") as file:
        return _tabulate(tar, file, _scan(tar, file))


def load_index(tar: Path) -> Index:
    """Load the sidecar of a tar.

    Raises `ValueError` if it is missing, is no sidecar of ours, or belongs to a tar of another size.
    """
    path = index_path(tar)
    command = _COMMAND.format(tar.parent)
    if not path.is_file():
        raise ValueError(f"{tar} has no index {path.name}; {command}")
    if not is_sidecar(path):
        raise ValueError(f"{path} was written by another program; move it away, then {command}")
    index = read_index(path, path, remedy=f"delete it, then {command}")
    found = tar.stat().st_size
    if found != index.tar_bytes:
        raise ValueError(
            f"{tar} has {found} bytes but its index was made for {index.tar_bytes}; "
            f"if the tar is the right one, {command}, else copy it again"
        )
    return index


def read_index(source: Path | BinaryIO, name: Path | str, *, remedy: str) -> Index:
    """Read a sidecar from a file or from memory.

    Raises `ValueError` if it is damaged or of another format; it calls it `name` and gives the remedy.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            arrays = {file.removesuffix(".npy"): read_npy(archive.read(file)) for file in archive.namelist()}
        found = int(arrays["format"])
    # zipfile raises RuntimeError, and NotImplementedError is one, for what a flipped bit says of an archive.
    except (KeyError, RuntimeError, zipfile.BadZipFile, *NO_ARRAY) as error:
        raise ValueError(f"{name} is damaged ({error}); {remedy}") from error
    if found != _FORMAT:
        raise ValueError(f"{name} has format {found}, expected {_FORMAT}; {remedy}")
    return Index(
        packed_keys=arrays["keys"].tobytes(),
        extensions=tuple(str(extension) for extension in arrays["extensions"]),
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
        crcs=arrays["crcs"],
        tar_bytes=int(arrays["tar_bytes"]),
        labels=arrays["labels"],
        finite=arrays["finite"],
    )


def is_sidecar(path: Path) -> bool:
    """Tell whether a file could be a sidecar of ours; other loaders write text files of the same name."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _scan(tar: Path, file: BinaryIO) -> Samples:
    """Walk over the headers of a tar and group its members by key."""
    samples: Samples = {}
    num_bytes = tar.stat().st_size
    archive: tarfile.TarFile | None = None
    try:
        archive = tarfile.open(fileobj=file, mode="r:")
        while (member := archive.next()) is not None:
            if not _is_member(tar, member):
                continue
            if member.offset_data + member.size > num_bytes:
                raise _cut(tar, samples, f"{member.name} needs {member.size} bytes")
            _add(tar, samples, member)
    except tarfile.TarError as error:
        if not num_bytes:
            raise ValueError(f"{tar} is empty; copy or write it again, or delete it") from error
        if archive is None:
            raise ValueError(f"{tar} is no plain tar ({error}); compressed tars must be unpacked") from error
        raise _cut(tar, samples, str(error)) from error
    # tarfile takes a damaged header for the end; a true end is a block of zeros.
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise _cut(tar, samples, f"no end mark at byte {archive.offset}")
    return samples


def _is_member(tar: Path, member: tarfile.TarInfo) -> bool:
    if member.issparse():
        raise ValueError(f"{tar} stores {member.name} as a sparse file; pack it again without --sparse")
    return member.isreg() and _MEMBER.fullmatch(member.name) is not None


def _add(tar: Path, samples: Samples, member: tarfile.TarInfo) -> None:
    match = _MEMBER.fullmatch(member.name)
    assert match is not None
    key, extension = match.group(1), match.group(2).lower()
    members = samples.setdefault(key, {})
    if extension in members:
        raise ValueError(f"{tar} holds {key}.{extension} twice; remove one of them and pack the tar again")
    members[extension] = (member.offset_data, member.size)


def _cut(tar: Path, samples: Samples, reason: str) -> ValueError:
    extensions = {extension for members in samples.values() for extension in members}
    # Nothing tells whether the only sample so far had all its members yet.
    whole = sum(len(members) == len(extensions) for members in samples.values()) if len(samples) > 1 else 0
    return ValueError(
        f"{tar} is cut off or damaged: {reason}; its first {whole} samples are whole. "
        "Copy or write it again, or unpack those samples and pack them anew"
    )


def _tabulate(tar: Path, file: BinaryIO, samples: Samples) -> Index:
    """Turn grouped members into arrays and take every checksum."""
    extensions = tuple(sorted({extension for members in samples.values() for extension in members}))
    column = {extension: number for number, extension in enumerate(extensions)}
    offsets = np.zeros((len(samples), len(extensions)), np.int64)
    sizes = np.full_like(offsets, -1)
    crcs = np.zeros(offsets.shape, np.uint32)
    labels = np.full(len(samples), NO_LABEL)
    finite = np.ones(len(samples), bool)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory, memoryview(memory) as view:
        for row, members in enumerate(samples.values()):
            for extension, (offset, size) in members.items():
                place = row, column[extension]
                offsets[place], sizes[place] = offset, size
                crcs[place] = crc32(view[offset : offset + size])
                # What cannot be decoded is told to whoever reads the sample, not here.
                with contextlib.suppress(ValueError):
                    if extension == "cls":
                        labels[row] = read_label(memory[offset : offset + size])
                    elif extension.rpartition(".")[2] == "npy":
                        finite[row] &= is_finite(memory[offset : offset + size])
    keys = "".join(f"{key}\0" for key in samples).encode("utf-8", "surrogateescape")
    return Index(keys, extensions, offsets, sizes, crcs, tar.stat().st_size, labels, finite)
