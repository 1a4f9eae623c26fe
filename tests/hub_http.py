"""Reads requests to a Hub on loopback (hub_server.py), finds who answers them, and sends the answers."""

import http.server
import json
import re
import socket
import urllib.parse

ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{ID}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", r"/api/agent-harnesses", "harnesses"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"{API}", "info"),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", "make_branch"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{API}/xet-write-token/(?P<revision>[^/]+)", "xet_token"),
    ("POST", rf"/(?P<prefix>datasets/|spaces/)?{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    ("GET", rf"/(?P<prefix>datasets/|spaces/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status, code="", message=""):
        self.status, self.code, self.message = status, code, message


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, finds who answers it, and sends the answer."""

    protocol_version = "HTTP/1.1"
    hub = None

    def handle_any(self):
        """Answer a request of any method."""
        path = urllib.parse.urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        if not self.read_body(path):
            return
        method = "GET" if self.command == "HEAD" else self.command
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        self.account = self.hub.tokens.get(token)
        calls = [(name, re.fullmatch(pattern, path)) for wanted, pattern, name in ROUTES if wanted == method]
        name, match = next((call for call in calls if call[1]), ("", None))
        if match is None:
            self.answer(404, {"error": f"no such call {method} {path}"})
            return
        try:
            if (
                path.startswith("/api/")
                and token not in self.hub.tokens
                and name not in ("validate", "harnesses")
            ):
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            found = getattr(self.hub, name)(self, **match.groupdict())
            if found is not None:
                self.answer(200, found)
        except Refusal as refusal:
            told = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.answer(
                refusal.status, {"error": refusal.message}, {**told, "X-Error-Message": refusal.message}
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self, path):
        """Read the body; return False where the connection was cut in the middle of it."""
        if self.headers["Transfer-Encoding"] == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b"".join(parts)
            return True
        length = int(self.headers["Content-Length"] or 0)
        cut = self.hub.cut_after
        if path.startswith("/lfs/") and cut is not None and length > cut:
            self.rfile.read(cut)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return False
        self.body = self.rfile.read(length)
        return True

    def answer(self, status, told, headers=None):
        """Send JSON."""
        self.send(status, json.dumps(told).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, data, headers=None):
        """Send a file, or the part that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and self.command == "GET":
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            headers = {**(headers or {}), "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            self.send(206, data[start : end + 1], headers)
        else:
            self.send(200, data, headers or {})

    def send(self, status, body, headers):
        """Send it; of what HEAD asks only the headers."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""
