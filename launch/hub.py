"""A repository on the Hub made like a local folder: what differs is sent, in one commit, or nothing is.

One commit, because a reader of the repository sees either the old files or the new ones, whatever breaks off
in between; the client's own `upload_folder` makes several. What was sent before a break is not sent again:
the Hub keeps contents by their hash. A commit names the one that it follows, so that two publishers do not
overwrite each other.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from ..trainer.config import ConfigError

NO_ROOM = re.compile(r"storage limit|storage quota|quota exceeded|too large|exceeded your", re.IGNORECASE)


@dataclass(frozen=True)
class Changes:
    """What a commit would do: files to send, those to delete, the commit that it follows, all files there."""

    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    parent: str | None

    def __bool__(self) -> bool:
        return bool(self.sent or self.deleted)


@dataclass(frozen=True)
class Repository:
    """A model or a Space on the Hub, at a branch."""

    name: str
    kind: str = "model"
    branch: str = "main"

    @property
    def address(self) -> str:
        """Return where a browser finds it."""
        base = HfApi().endpoint
        return f"{base}/{self.name}" if self.kind == "model" else f"{base}/{self.kind}s/{self.name}"

    def make(self, *, private: bool) -> None:
        """Create it, and the branch, where they are not there.

        Raises ConfigError where it is there and public, but `private` is asked for.
        """
        api = HfApi()
        with telling(self.name):
            sdk = "gradio" if self.kind == "space" else None
            api.create_repo(self.name, repo_type=self.kind, private=private, exist_ok=True, space_sdk=sdk)
            if private and not api.repo_info(self.name, repo_type=self.kind).private:
                raise ConfigError(
                    f"{self.name} exists and is public, and --private asks for a private one; make it "
                    "private in its settings, choose another name, or leave out --private"
                )
            if self.branch != "main":
                api.create_branch(self.name, branch=self.branch, repo_type=self.kind, exist_ok=True)

    def changes(self, folder: Path, *, owned: tuple[str, ...] = ()) -> Changes:
        """Compare a folder with the repository, by hashes; a repository that is not there has no files.

        Files of the `owned` sub-folders that the folder has not are to be deleted; all others stay.
        """
        there, parent = self._tree()
        here = files_of(folder)
        sent = tuple(name for name, file in here.items() if not same(file, there.get(name)))
        stale = tuple(name for name in there if name not in here and name.split("/")[0] in owned)
        return Changes(sent, stale, parent)

    def send(self, folder: Path, changes: Changes, *, message: str) -> str:
        """Make the changes in one commit and return its hash; nothing is changed where it fails."""
        added: list[Any] = [CommitOperationAdd(name, folder / name) for name in changes.sent]
        removed = [CommitOperationDelete(name) for name in changes.deleted]
        with telling(self.name):
            done = HfApi().create_commit(
                self.name,
                [*added, *removed],
                repo_type=self.kind,
                revision=self.branch,
                commit_message=message,
                parent_commit=changes.parent,
            )
        if left := self.changes(folder):
            raise OSError(f"{self.name} holds other bytes than were sent, of {left.sent[0]}; publish again")
        return done.oid

    def head(self) -> str | None:
        """Return the commit of the branch."""
        return self._tree()[1]

    def _tree(self) -> tuple[dict[str, RepoFile], str | None]:
        """Return the files by name and the commit that has them."""
        api = HfApi()
        with telling(self.name):
            try:
                commit = api.repo_info(self.name, repo_type=self.kind, revision=self.branch).sha
                entries = api.list_repo_tree(self.name, recursive=True, repo_type=self.kind, revision=commit)
                return {each.path: each for each in entries if isinstance(each, RepoFile)}, commit
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return {}, None


def identify() -> str:
    """Return whose token publishes; raises ConfigError where there is none, or the Hub does not know it."""
    with telling("the account"):
        return HfApi().whoami()["name"]


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their names in the repository."""
    return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}


def same(file: Path, other: RepoFile | None) -> bool:
    """Return whether a local file has the bytes of one on the Hub: sha256 of large ones, git's of others."""
    if other is None or file.stat().st_size != other.size:
        return False
    if other.lfs is not None:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == other.lfs.sha256
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == other.blob_id


@contextmanager
def telling(name: str) -> Iterator[None]:
    """Turn what the client says of the Hub's refusals into what to do about them."""
    try:
        yield
    except ConfigError:
        raise
    except LocalTokenNotFoundError as error:
        raise ConfigError("there is no token for the Hub; run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE is set, and publishing asks the Hub; unset it") from error
    except Exception as error:
        if (told := _told(name, error)) is None:
            raise
        raise told from error


def _told(name: str, error: BaseException) -> Exception | None:
    """Return an error that says what to do, None of what is none of the Hub's."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    answer = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    said = " ".join(str(each) for each in chain)
    status = None if answer is None or answer.response is None else answer.response.status_code
    if status is None and (by_xet := re.search(r"HTTP status client error \((\d{3})", said)):
        status = int(by_xet[1])  # it keeps the Hub's reasons to itself
    server = f": {answer.server_message}" if answer is not None and answer.server_message else ""
    if status in (413, 507) or NO_ROOM.search(said):
        return OSError(
            f"the Hub has no room for {name}{server or f': {said.splitlines()[-1]}'}; free some (its "
            "settings list large files), publish fewer variants, or under an account with room. What was "
            "there is as it was"
        )
    if status == 401:
        return ConfigError(
            f"the Hub does not know this token (of HF_TOKEN or `hf auth login`){server}; make one that may "
            f"write at {HfApi().endpoint}/settings/tokens"
        )
    if status in (403, 404):
        return ConfigError(
            f"this token may not write to {name}{server}: it is another's, perhaps a private one, or the "
            "token only reads, or its account is full; choose a name of your own account, a token with write "
            "access to it, or free some room"
        )
    if status in (409, 412):
        return OSError(f"{name} was changed by someone else meanwhile{server}; publish again")
    if status is not None:
        return OSError(
            f"the Hub answered {status} of {name}{server}; publish again: what was sent stays there"
        )
    if any("httpx" in type(each).__module__ or isinstance(each, ConnectionError) for each in chain) or (
        "xet" in said.lower()
    ):
        return OSError(
            f"the connection to {os.environ.get('HF_ENDPOINT', HfApi().endpoint)} broke off: "
            f"{said.splitlines()[0]}. {name} is as it was; publish again, and what was sent is not sent twice"
        )
    return None
