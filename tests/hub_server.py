"""A small Hugging Face hub over HTTP for tests: what huggingface_hub asks for when it downloads and uploads a model.

    with HubServer() as hub:
        commit = hub.add("org/name", {"model.safetensors": b"..."})
        hub.files["/big.pth"] = b"..."        # a plain file server beside it
        ... run_client(code, hub, home) of hub_client.py ...
        hub.log                               # [("HEAD", "/org/name/resolve/main/model.safetensors", None), ...]

Faults are asked for by path: ``hub.cut[path] = 1000`` ends the next body after 1000 bytes, ``hub.resets[path] = [1000,
0]`` resets the connection after as many bytes of the next bodies, ``hub.status[path] = [503]`` answers the next request
so (or with headers and a body: ``[(429, {"Retry-After": "1"}, b"...")]``), ``hub.headers[path]`` replaces headers,
``hub.announce[path]`` is a length that is not true, ``hub.corrupt`` has the paths whose bodies are changed at equal
length. What is planned for a file of a branch is also for that file of the branch's commit.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)
CONFIG = {"architecture": "vit_nano_patch8_32", "model_args": {}}
FILES = {"model.safetensors": WEIGHTS, "config.json": json.dumps(CONFIG).encode()}
FILE = "/lab/net/resolve/main/model.safetensors"
TOKEN = "hf_test_token"  # the one token that may write, and read what is private


@dataclass
class Repo:
    """Commits (commit -> path -> content), branches (name -> commit), and who may read."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class HubServer:
    """The server, running in threads of its own between ``__enter__`` and ``__exit__``."""

    def __init__(self, certificate: Path | None = None, host: str = "127.0.0.1") -> None:
        self.host = host
        self.certificate = certificate  # with its key: the server then speaks https
        self.repos: dict[str, Repo] = {}
        self.files: dict[str, bytes] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.announce: dict[str, int] = {}
        self.resets: dict[str, list[int]] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.status: dict[str, list[Any]] = {}
        self.corrupt: set[str] = set()
        self.lfs_error: dict[str, Any] = {}
        self.lfs_status = 200  # answer to what is uploaded
        self.ignore_ranges = False
        self.on_request: Callable[[str, Any], object] = lambda path, headers: None
        self.delay = 0.0  # seconds before a body, so that two clients overlap
        self._commits = (hashlib.sha1(str(i).encode()).hexdigest() for i in itertools.count())

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        server = type("Server", (ThreadingHTTPServer,), {"address_family": family})
        self._server = server((self.host, 0), handler)
        scheme = "https" if self.certificate else "http"
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{scheme}://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main", **flags: bool) -> str:
        """Commit files to a repository, made if needed; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(**flags))
        parent = repo.commits.get(repo.refs.get(branch, ""), {})
        commit = next(self._commits)
        repo.commits[commit] = {**parent, **files}
        repo.refs[branch] = commit
        return commit

    def requests(self, method: str, part: str = "") -> list[tuple[str, str, str | None]]:
        """Logged requests of a method whose path contains ``part``."""
        return [entry for entry in self.log if entry[0] == method and part in entry[1]]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append((method, path, self.headers.get("Range")))
        self.hub.on_request(path, self.headers)
        path = self._planned_name(path)
        planned = self.hub.status.get(path)
        if planned:
            plan = planned.pop(0)
            status, headers, content = (
                (*plan, *({}, b"")[len(plan) - 1 :]) if isinstance(plan, tuple) else (plan, {}, b"")
            )
            return self._send(status, content, headers)
        if path in self.hub.files:
            return self._content(method, path, self.hub.files[path], {"ETag": '"file"'})
        for verb, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == ("GET" if method == "HEAD" else method):
                if verb == "POST" and not self._may_write():
                    return self._send(401)
                return action(self, method, match, body)
        self._send(404)

    def _planned_name(self, path: str) -> str:
        """A file of a commit has the faults that are planned for the branch, unless it has its own."""
        match = re.fullmatch(_FILE, path)
        plans = (self.hub.cut, self.hub.announce, self.hub.resets, self.hub.headers, self.hub.status, self.hub.corrupt)
        if match is None or any(path in plan for plan in plans):
            return path
        refs = self.hub.repos[match["repo"]].refs if match["repo"] in self.hub.repos else {}
        branch = next((name for name, commit in refs.items() if commit == match["rev"]), match["rev"])
        return f"/{match['repo']}/resolve/{branch}/{match['file']}"

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _content(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that a Range asks for, with the faults planned for its path."""
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and not self.hub.ignore_ranges:
            start, status = int(wanted[1]), 206
            if start >= len(content):
                return self._send(416, headers={"Content-Range": f"bytes */{len(content)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        if path in self.hub.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, value in {**headers, **self.hub.headers.get(path, {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(self.hub.announce.get(path, len(body))))
        self.end_headers()
        if method == "GET":
            if self.hub.resets.get(path):
                return self._reset(body[: self.hub.resets[path].pop(0)])
            time.sleep(self.hub.delay)
            end = self.hub.cut.pop(path, len(body))
            self.wfile.write(body[:end])
            self.close_connection = self.close_connection or end < len(body)

    def _reset(self, body: bytes) -> None:
        """Send a part, and when the client has it, a reset instead of an end."""
        self.wfile.write(body)
        self.wfile.flush()
        time.sleep(0.1)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _repo(self, name: str) -> Repo | None:
        """The repository, or None after the answer that the hub gives when it is not there or not readable."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._may_write()):
            self._send(401 if repo else 404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        if repo.gated and not self._may_write():
            self._send(403, headers={"X-Error-Code": "GatedRepo"})
            return None
        return repo

    def resolve(self, method: str, match: re.Match[str], body: bytes) -> None:
        repo = self._repo(match["repo"])
        if repo is None:
            return
        found = repo.files(match["rev"])
        if found is None:
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if match["file"] not in files:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[match["file"]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(match["file"], content)}"'}
        self._content(method, match[0], content, headers)

    def info(self, method: str, match: re.Match[str], body: bytes) -> None:
        repo = self._repo(match["repo"])
        if repo is None:
            return
        found = repo.files(match["rev"] or "main")
        if found is None:
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in found[1]]
        self._json({"id": match["repo"], "sha": found[0], "private": repo.private, "tags": [], "siblings": siblings})

    def create_repo(self, method: str, match: re.Match[str], body: bytes) -> None:
        data = json.loads(body)
        repo_id = f"{data.get('organization') or 'me'}/{data['name']}"
        if repo_id in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
        # Clients of version 1 say private, later ones visibility.
        self.hub.add(repo_id, {}, private=bool(data.get("private")) or data.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def create_branch(self, method: str, match: re.Match[str], body: bytes) -> None:
        repo = self.hub.repos[match["repo"]]
        if match["rev"] in repo.refs:
            return self._json({"error": "exists"}, 409)
        repo.refs[match["rev"]] = repo.refs["main"]
        self._json({})

    def validate_yaml(self, method: str, match: re.Match[str], body: bytes) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        self._json({"errors": [] if front else [{"message": "no metadata"}], "warnings": []}, 200 if front else 400)

    def preupload(self, method: str, match: re.Match[str], body: bytes) -> None:
        def mode(name: str) -> str:
            return "lfs" if name.endswith(".safetensors") else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        self._json({"files": [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]})

    def lfs_batch(self, method: str, match: re.Match[str], body: bytes) -> None:
        if self.hub.lfs_error:
            objects = [
                {"oid": o["oid"], "size": o["size"], "error": self.hub.lfs_error} for o in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        objects = [
            {**{k: o[k] for k in ("oid", "size")}, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def commit(self, method: str, match: re.Match[str], body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        oid = self.hub.add(match["repo"], files, branch=match["rev"])
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{match['repo']}/commit/{oid}"})

    def lfs_put(self, method: str, match: re.Match[str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != match["oid"]:
            return self._send(400)
        if self.hub.lfs_status != 200:
            return self._send(self.hub.lfs_status)
        self.hub.lfs[match["oid"]] = body
        self._send(200)


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let this process take an address for the hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def etag(name: str, content: bytes) -> str:
    """As the hub does it: the sha256 of a large file, the git hash of a small one."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_FILE = rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", _FILE, _Handler.resolve),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<rev>.+))?", _Handler.info),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<rev>.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<rev>.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<rev>.+)", _Handler.commit),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
]
