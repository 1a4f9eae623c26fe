"""A Hub on loopback, as far as huggingface_hub 2.4 asks one to publish and to load; with faults.

Large files come by LFS, or by xet into a folder that stands for its storage (hub_xet.py); they go out by
HTTP. A commit is all or nothing. What is asked is written down in `requests`.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from hub_cards import front_matter, problems_of
from hub_http import Handler, Refusal
from hub_xet import from_xet

KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Entry:
    """A file of a commit: by git's hash, and by sha256 where it is a large one."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Repo:
    """Branches, and the files of every commit."""

    private: bool
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)

    def add(self, branch, files):
        """Make a commit of a branch."""
        told = json.dumps([branch, len(self.commits), sorted(files)]).encode()
        sha = hashlib.sha1(told).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision):
        """Return (commit, files) of a branch or a commit."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return sha, self.commits[sha]


class Hub:
    """The state, and what it answers; `tokens` are the accounts of tokens, None of one that only reads."""

    def __init__(self, folder):
        self.folder = folder
        self.tokens = {"hf_ours": "lab", "hf_reads": None}
        self.repos, self.blobs, self.requests = {}, {}, []
        self.cut_after = None  # bytes of a large file, then the connection is cut
        self.limit = None  # bytes of all large files
        self.address = ""

    def repo(self, kind, id, account):
        """Return a repository that an account may see."""
        repo = self.repos.get((kind, id))
        if repo is None or (repo.private and id.split("/")[0] != account):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repo

    def whoami(self, ask):
        """Tell whose token it is."""
        return {"type": "user", "name": ask.account or "reader", "orgs": [], "auth": {"type": "access_token"}}

    def harnesses(self, ask):
        """Tell of no agents."""
        return {"standardEnvVars": [], "harnesses": {}}

    def create(self, ask):
        """Make a repository with a first commit, which has `.gitattributes`."""
        told = json.loads(ask.body)
        kind = f"{told.get('type', 'model')}s"
        owner = told.get("organization") or ask.account
        id = f"{owner}/{told['name']}"
        url = f"{self.address}/{KINDS[kind]}{id}"
        if owner != ask.account:
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        if (kind, id) in self.repos:
            ask.answer(409, {"error": "You already created this repo", "url": url})
            return None
        self.repos[kind, id] = repo = Repo(told.get("visibility") == "private")
        repo.add(
            "main", {".gitattributes": self._blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        )
        return {"url": url}

    def validate(self, ask):
        """Check a card's metadata by what the Hub's documentation says of them."""
        told = json.loads(ask.body)
        problems = list(problems_of(told["content"], told["repoType"]))
        ask.answer(
            400 if problems else 200, {"errors": [{"message": text} for text in problems], "warnings": []}
        )

    def info(self, ask, kind, id, revision="main"):
        """Tell of a repository at a revision."""
        repo = self.repo(kind, id, ask.account)
        sha, files = repo.at(revision)
        about = {"id": id, "sha": sha, "private": repo.private, "tags": [], "gated": False, "disabled": False}
        about |= {"siblings": [{"rfilename": name} for name in files], "downloads": 0, "likes": 0}
        if "README.md" in files:
            about["cardData"] = front_matter(self.blobs[files["README.md"].oid].decode())
        return about

    def tree(self, ask, kind, id, revision):
        """List all files."""
        _, files = self.repo(kind, id, ask.account).at(revision)
        found = []
        for path, entry in files.items():
            about = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
            if entry.sha256:
                about["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            found.append(about)
        return found

    def make_branch(self, ask, kind, id, branch):
        """Make a branch of the main one."""
        repo = self.writable(kind, id, ask)
        if branch in repo.branches:
            raise Refusal(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def writable(self, kind, id, ask):
        """Return a repository that the token may write to."""
        repo = self.repo(kind, id, ask.account)
        if ask.account != id.split("/")[0]:
            raise Refusal(403, "", "you only have read access to this repo")
        return repo

    def preupload(self, ask, kind, id, revision):
        """Say of every file whether it is a large one, and what is there under its name."""
        _, files = self.writable(kind, id, ask).at(revision)
        found = []
        for told in json.loads(ask.body)["files"]:
            large = told["path"].endswith((".safetensors", ".png"))
            entry = files.get(told["path"])
            oid = None if entry is None else entry.sha256 or entry.oid
            mode = "lfs" if large else "regular"
            found.append({"path": told["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found}

    def lfs_batch(self, ask, id, prefix=None):
        """Say where large files go; none where they are stored already, or there is no room."""
        found = []
        for told in json.loads(ask.body)["objects"]:
            about = {"oid": told["oid"], "size": told["size"]}
            if self.limit is not None and told["size"] > self.limit:
                about["error"] = {"code": 413, "message": "storage limit of this account reached"}
            elif told["oid"] not in self.blobs:
                about["actions"] = {"upload": {"href": f"{self.address}/lfs/{told['oid']}"}}
            found.append(about)
        return {"transfer": "basic", "objects": found}

    def lfs_put(self, ask, oid):
        """Store a large file."""
        if hashlib.sha256(ask.body).hexdigest() != oid:
            raise Refusal(400, "", "other bytes than announced")
        self.blobs[oid] = ask.body
        return {}

    def lfs_get(self, ask, oid):
        """Give a large file, or a part."""
        ask.send_bytes(self.blobs[oid])

    def xet_token(self, ask, kind, id, revision):
        """Say where large files go by xet: a folder of each session, which its client locks."""
        self.writable(kind, id, ask)
        if self.limit is not None:
            raise Refusal(403, "", "Private repository storage limit reached")
        place = self.folder / "xet" / ask.headers["X-Xet-Session-Id"]
        place.mkdir(parents=True, exist_ok=True)
        told = {"accessToken": "x", "exp": int(time.time()) + 3600, "casUrl": f"local://{place}"}
        headers = {"X-Xet-Cas-Url": told["casUrl"], "X-Xet-Access-Token": "x"}
        ask.answer(200, told, {**headers, "X-Xet-Token-Expiration": str(told["exp"])})

    def commit(self, ask, kind, id, revision):
        """Make a commit of what it says, or refuse all of it."""
        repo = self.writable(kind, id, ask)
        head, files = repo.at(revision)
        files = dict(files)
        for line in filter(None, ask.body.split(b"\n")):
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header" and value.get("parentCommit", head) != head:
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            if told["key"] == "file":
                files[value["path"]] = self._blob(base64.b64decode(value["content"]))
            elif told["key"] == "lfsFile":
                files[value["path"]] = self._large(value["oid"])
            elif told["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.add(revision, files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{id}/commit/{sha}"}

    def resolve(self, ask, id, revision, path, prefix=None):
        """Give a file; a large one by xet, or from another origin, as the Hub does."""
        kind = next(kind for kind, start in KINDS.items() if start == (prefix or ""))
        sha, files = self.repo(kind, id, ask.account).at(revision)
        headers = {"X-Repo-Commit": sha}
        if (entry := files.get(urllib.parse.unquote(path))) is None:
            ask.answer(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
        elif entry.sha256 is None:
            ask.send_bytes(self.blobs[entry.oid], {**headers, "ETag": f'"{entry.oid}"'})
        else:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
            headers["Location"] = f"{self.address.replace('127.0.0.1', 'localhost')}/lfs/{entry.sha256}"
            ask.answer(302, {}, headers)

    def _blob(self, data):
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.blobs[oid] = data
        return Entry(oid, len(data))

    def _large(self, sha256):
        if sha256 not in self.blobs:
            self.blobs |= from_xet(self.folder / "xet")
        if sha256 not in self.blobs:
            raise Refusal(400, "", f"the large file {sha256} was not uploaded")
        return Entry(hashlib.sha1(sha256.encode()).hexdigest(), len(self.blobs[sha256]), sha256)


@contextlib.contextmanager
def serving(folder: Path):
    """Yield a Hub that answers while the block runs."""
    hub = Hub(folder)
    handler = type("Here", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()
