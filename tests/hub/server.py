"""A Hub of a few repositories in a thread of this process, which speaks what huggingface_hub asks of it.

Everything that is requested is written down, and it can be told to break off, to lie, and to refuse.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_LARGE = (".safetensors", ".bin", ".model")


@dataclasses.dataclass
class Repo:
    """A repository: its commits by name of branch, and the files of each commit."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files onto a branch."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        sha = hashlib.sha1(repr((branch, sorted(whole.items()))).encode()).hexdigest()
        self.commits[sha] = whole
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or commit."""
        return revision if revision in self.commits else self.branches.get(revision)


class FakeHub:
    """The repositories, what was asked of them, and how to misbehave.

    Attributes:
        requests: Method, path and Range header of every request, in order.
        break_off: For a file: after how many bytes of its body the connection is cut, once for each entry.
        lies: For a file: what is sent instead of it.
        header_lies: For a file: what is sent instead of it when its header is asked for.
        refuse: Paths beginning so get this status.
        on_file: Called with a file's name before its body is sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.break_off: dict[str, list[int]] = {}
        self.lies: dict[str, bytes] = {}
        self.header_lies: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        self.on_file: Callable[[str], None] = lambda _: None
        self.objects: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.url = ""

    def add(self, name: str, folder: Path, branch: str = "main", more: dict[str, bytes] | None = None) -> str:
        """Put the files of a directory into a repository; return the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.repos.setdefault(name, Repo()).commit(files | (more or {}), branch)

    def fetched(self) -> list[str]:
        """The files of which a body was asked for, whole or from some byte on, in order; headers left aside."""
        return [
            path.rpartition("/")[2]
            for method, path, span in self.requests
            if method == "GET" and path.startswith("/large/") != (not path.endswith(_LARGE) and "/resolve/" in path)
            if not span.startswith("bytes=0-")
        ]

    def asked(self) -> set[str]:
        """The files that were asked for in any way."""
        return {path.rpartition("/")[2] for _, path, _ in self.requests if "/resolve/" in path}

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Answer at a free port of this machine while the context lasts."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self.url
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunked()
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        for prefix, status in self.hub.refuse.items():
            if path.startswith(prefix):
                self._fail(status, "", "refused")
                return
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("HEAD|GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("HEAD|GET", r"/large/([^/]+/[^/]+)/([^/]+)/(.+)", self._large),
            ("POST", r"/api/repos/create", lambda: self._create(body)),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", lambda name, rev: self._preupload(name, rev, body)),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lambda name: self._batch(body)),
            ("PUT", r"/objects/(\w+)", lambda oid: self._object(oid, body)),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", lambda name, rev: self._commit(name, rev, body)),
            ("POST", r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
        ]
        for method, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                answer(*match.groups())
                return
        self._fail(404, "", f"nothing at {self.command} {path} {parse_qs(parts.query)}")

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _repo(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and "Authorization" not in self.headers):
            self._fail(401 if repo is None else 404, "RepoNotFound", "Repository not found")
            return None
        sha = repo.resolve(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound", "Invalid rev id")
            return None
        return repo, sha

    def _info(self, name: str, revision: str | None) -> None:
        found = self._repo(name, revision or "main")
        if found is None:
            return
        repo, sha = found
        siblings = []
        for path, data in repo.commits[sha].items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if path.endswith(_LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        self._json({"id": name, "modelId": name, "sha": sha, "private": False, "siblings": siblings, "tags": []})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._repo(name, revision)
        if found is None:
            return
        repo, sha = found
        if repo.gated:
            self._fail(403, "GatedRepo", "Access to this model is restricted")
            return
        data = repo.commits[sha].get(path)
        if data is None:
            self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        headers = {"X-Repo-Commit": sha}
        if path.endswith(_LARGE):
            headers |= {
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/large/{name}/{sha}/{path}",
            }
            self._send(302, b"", headers)
        else:
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            self._body(path, data, headers)

    def _large(self, name: str, sha: str, path: str) -> None:
        data = self.hub.repos[name].commits[sha][path]
        self._body(path, data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def _body(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, total = 200, len(data)
        heading = span is not None and span[1] == "0"
        if self.command == "GET" and not heading:
            self.hub.on_file(path)
            data = self.hub.lies.get(path, data)
        elif heading:
            data = self.hub.header_lies.get(path, data)
        if span is not None:
            begin, end = int(span[1]), min(int(span[2] or total - 1), total - 1)
            data = data[begin : end + 1]
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{end}/{total}"
        headers["Accept-Ranges"] = "bytes"
        cuts = self.hub.break_off.get(path)
        if self.command == "GET" and cuts and not heading:
            self._send(status, data, headers, cut=cuts.pop(0))
        else:
            if self.command == "GET" and not heading:
                self.hub.sent[path] += len(data)
            self._send(status, data, headers)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self._json({"url": f"{self.hub.url}/{name}"}, 409)
            return
        hidden = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=False)
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}", "private": bool(hidden)})
        self.hub.sent[f"created {name} private={bool(hidden)}"] += 1

    def _branch(self, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        if branch in repo.branches:
            self._fail(409, "", "Reference already exists")
            return
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        if self._repo(name, revision) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, body: bytes) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}}
            if each["oid"] not in self.hub.objects
            else each
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._fail(400, "", "wrong digest")
            return
        self.hub.objects[oid] = body
        self._send(200, b"", {})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        found = self._repo(name, revision)
        if found is None:
            return
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = found[0].commit(files, revision)
        self._json({"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json", **(more or {})}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None:
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)
