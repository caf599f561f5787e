"""A hub over bare sockets that answers right, or as wrongly as a plan says, request by request.

Written without an HTTP library, and apart from tests/hub_server.py, so that nothing repairs what should be broken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

REPO = "lab/net"
COMMITS = ("a" * 39 + "1", "b" * 39 + "2")
LARGE = (".safetensors", ".pth")


@dataclass
class Reply:
    """An answer: what HTTP says, and what becomes of its bytes on the way (``how`` and its number)."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    how: str = ""
    number: int = 0

    def with_headers(self, **headers: str | None) -> Reply:
        """The same with headers replaced (``_`` for ``-``), or without those that are None."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        kept = {name: value for name, value in self.headers.items() if name not in named}
        return replace(self, headers=kept | {name: value for name, value in named.items() if value is not None})


@dataclass
class Asked:
    """A request."""

    method: str
    path: str
    headers: dict[str, str]
    index: int


Fault = Callable[[Reply, Asked], Reply]


def hash_of(name: str, content: bytes) -> str:
    """What the hub names a content: sha256 of a large file, git's hash of another."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server:
    """Serves ``commits`` (commit -> name -> content) as the hub does, and the same files under ``/url``."""

    def __init__(self, commits: dict[str, dict[str, bytes]], *, redirects: bool) -> None:
        self.commits = commits
        self.refs = {"main": COMMITS[0], "pr/7": COMMITS[0]}
        self.redirects = redirects  # large files lie in a store of another address
        self.plan: dict[int, Fault] = {}  # by the number of the request
        self.moves_at: int | None = None  # the request at which main becomes the second commit
        self.asked: list[Asked] = []
        self.broken = False  # whether a fault was used
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()

    def start(self) -> None:
        """Answer from now on, in threads."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            buffer = b""
            while True:
                while b"\r\n\r\n" not in buffer:
                    data = connection.recv(65536)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                method, target, _ = lines[0].split(" ", 2)
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
                with self._lock:
                    asked = Asked(method, unquote(target), headers, len(self.asked))
                    self.asked.append(asked)
                    if self.moves_at == asked.index:
                        self.refs["main"] = COMMITS[1]
                reply = self._right(asked)
                fault = self.plan.get(asked.index)
                if fault is not None:
                    self.broken = True
                    reply = fault(reply, asked)
                if not send(connection, reply, method):
                    return

    def _right(self, asked: Asked) -> Reply:
        """What a sound hub would answer."""
        match = re.fullmatch(rf"/{REPO}/resolve/([^?]+?)/([^/?]+)(\?.*)?", asked.path)
        if match is None:
            stored = re.fullmatch(r"/(?:store|url)/(\w+)/([^/?]+)", asked.path)
            content = self.commits.get(stored[1], {}).get(stored[2]) if stored else None
            if content is None:
                return Reply(404)
            return self._part(asked, content, {"ETag": '"5f-62d"'})
        commit = self.refs.get(match[1], match[1])
        if commit not in self.commits:
            return Reply(404, {"X-Error-Code": "RevisionNotFound"})
        name = match[2]
        headers = {"X-Repo-Commit": commit}
        if name not in self.commits[commit]:
            return Reply(404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = self.commits[commit][name]
        etag = f'"{hash_of(name, content)}"'
        if not (self.redirects and name.endswith(LARGE)):
            return self._part(asked, content, {**headers, "ETag": etag})
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), "ETag": '"pointer"'}
        return Reply(302, {**headers, "Location": f"{self.url}/store/{commit}/{name}"}, b"Found")

    def _part(self, asked: Asked, content: bytes, headers: dict[str, str]) -> Reply:
        wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
        if wanted is None:
            return Reply(200, headers, content)
        start = int(wanted[1])
        if start >= len(content):
            return Reply(416, {"Content-Range": f"bytes */{len(content)}"})
        return Reply(
            206, {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]
        )


def config_of(commit: str, config: dict[str, object]) -> bytes:
    """A config.json that differs between commits, and from the one in the header of the weights."""
    return json.dumps({**config, "edition": commit}).encode()


def send(connection: socket.socket, reply: Reply, method: str) -> bool:
    """Put an answer on the wire; whether the connection is as it should be afterwards."""
    body, how, number = reply.body, reply.how, reply.number
    headers = {"Content-Length": str(len(body)), **reply.headers}
    if how in ("until close", "chunked", "bad chunks", "cut chunks"):
        headers.pop("Content-Length")
    if "chunk" in how:
        headers["Transfer-Encoding"] = "chunked"
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[i : i + 5000] for i in range(0, len(body), 5000)))
        body = {"chunked": body + b"0\r\n\r\n", "cut chunks": body[:number], "bad chunks": b"zz\r\n" + body}[how]
    if how == "short":
        body = body[:number]
    if how == "long":
        body += b"x" * (1 + number)
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {reply.status} Said\r\n{text}\r\n".encode("latin-1", "replace")
    whole = head + (b"" if method == "HEAD" else body)
    if how == "silence":
        time.sleep(4)
        return False
    if how == "raw":
        connection.sendall(reply.body)
        return False
    if how in ("reset", "close"):
        connection.sendall(whole[:number])
        if how == "reset":
            time.sleep(0.02)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False
    if how == "drip":  # without end, or nearly
        for byte in whole[:2000]:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        return False
    if how == "slow":  # in pieces, but all of it
        step = max(1, len(whole) // 5)
        for begin in range(0, len(whole), step):
            connection.sendall(whole[begin : begin + step])
            time.sleep(0.03)
        return True
    connection.sendall(whole)
    return how in ("", "chunked")
