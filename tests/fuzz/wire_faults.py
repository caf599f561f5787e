"""What a hostile or broken server does to one answer; see fuzz_wire.py.

A fault's name opens with a class. ``bytes`` change contents, ``etag`` hides or changes the hash that they could be
compared with, ``absent`` denies a file in the hub's own words: what these hide cannot be found by anyone.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from typing import Any

from wire_server import COMMITS, Fault, Reply

HTML = b"<html><head><title>Sign in to the network</title></head><body>Accept the terms</body></html>"
CODES = [401, 403, 404, 407, 408, 410, 416, 418, 425, 429, 451, 500, 501, 502, 503, 504, 520, 204, 205, 206, 300, 304]
ERROR_BODIES: list[tuple[str, bytes]] = [
    ("application/json", b"[]"),
    ("application/json", b'"no"'),
    ("application/json", b"null"),
    ("application/json", b"17"),
    ("application/json", b'{"error": ["a", {"b": 1}, null]}'),
    ("application/json", b'{"error": {"message": 3}, "errors": 5}'),
    ("application/json", b'{"errors": [1, null, {"message": []}]}'),
    ("application/json", b'{"errors": {"a": 1}}'),
    ("application/json", b"[" * 100_000),
    ("application/json", b'{"error": "\xff\xfe"}'),
    ("application/json", b'{"error": "' + b"long " * 50_000 + b'"}'),
    ("text/plain; charset=no-such", b"\xff\xfe\x00"),
    ("text/plain; charset=utf-16", b"abc"),
    ("text/html", HTML),
    ("text/plain", b"no " * 1_000_000),
    ("", b""),
]
WAITS = ["0", "0.1", "-1", "soon", "9" * 400, "1e9", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00", ","]
WAITS += ["Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 -9999", "1, 1, 1", "31", "\xb2", "00:00", "Mon"]
LOCATIONS = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/x",
    "//[",
    "http://[::1",
    "http://a b/",
    "",
    "http://:0/",
    "data:,x",
]
LOCATIONS += [
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://\xe4\xf6/",
    "http://no-such-host.invalid/",
    "?",
]
LOCATIONS += ["http://127.0.0.1:9/", "https://127.0.0.1:9/", "http://user:secret@127.0.0.1:9/", "http://" + "a" * 70000]
LOCATIONS += [
    "http://xn--a/",
    "http://a..b/",
    "javascript:1",
    "http:",
    "http:///x",
    "\\\\host\\x",
    "..",
    "%00",
    "http://%00/",
]
ETAGS: list[str | None] = [None, "", '""', "W/", '"1"', 'W/"1"', '"5f-62d"', '"version 1"', '"../x"', "x" * 300, "\xe4"]
ETAGS += [
    '"%s"' % ("0" * 40),
    '"%s"' % ("0" * 64),
    '"%s"' % ("A" * 40),
    '"%s-2"' % ("0" * 32),
    '"a/b"',
    "..",
    ".",
    '"1',
]
SIZES: list[str | None] = [None, "", "0", "-1", "abc", "9" * 5000, "9" * 18, "1e3", "\xb2", "1_000", " 5", "12"]
COMMIT_NAMES: list[str | None] = [
    None,
    "",
    "..",
    "../x",
    "x" * 300,
    "a/b",
    "main",
    "0" * 40,
    "\xe4",
    ".git",
    "-",
    "a b",
]
RANGES: list[str | None] = [
    None,
    "",
    "bytes 0-9/10",
    "bytes */5",
    "bytes 5-1/10",
    "items 0-1/2",
    "bytes 0-0/*",
    "bytes x",
]
RANGES += ["bytes 7-99999999/100000000", f"bytes 0-9/{'9' * 5000}"]
RAW = [
    b"\0" * 2000,
    b"SSH-2.0-OpenSSH_9\r\n",
    HTML,
    b"HTTP/1.1 200\r\n\r\n",
    b"HTTP/1.1 abc OK\r\n\r\n",
    b"HTTP/2 200 OK\r\n\r\n",
]
RAW += [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", b"HTTP/1.1 103 Early\r\n\r\n" * 50]
RAW += [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000, b"\r\n" * 50]
RAW += [b"HTTP/1.1 200 OK\r\nX-Repo-Commit : x\r\n\r\n", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\nabc"]
RAW += [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    b"HTTP/1.1 999 Odd\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\n\r\n",
]


def status(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """A refusal, with headers and a body of any kind."""
    code = rng.choice(CODES)
    error = rng.choice([None, None, None, "RepoNotFound", "GatedRepo", "RevisionNotFound", "Nonsense", ""])
    said = rng.choice([None, None, "Access to this resource is disabled.", "no", "long " * 9000, "\xe4", ""])
    kind, body = rng.choice(ERROR_BODIES)
    coding = rng.choice([None] * 5 + ["gzip", "gzip", "bomb", "lie", "zstd", "br"])
    if coding in ("gzip", "bomb"):
        body = gzip.compress(body if coding == "gzip" else bytes(200_000_000), 1) if coding == "gzip" else _bomb()
    headers: dict[str, str | None] = {
        "X_Error_Code": error,
        "X_Error_Message": said,
        "Retry_After": rng.choice([None, *WAITS]),
        "X_Repo_Commit": rng.choice([None, *COMMITS]),
        "Content_Type": kind,
        "Content_Encoding": {"bomb": "gzip", "lie": "gzip"}.get(str(coding), coding),
        "X_HF_Warning": rng.choice([None, "topic; text"]),
        "Ratelimit": rng.choice([None, '"api";r=0;t=55', '"api";r=x;t=', "\xb2"]),
    }
    how = rng.choice(["", "", "", "", "short", "until close", "bad chunks"])
    return f"status {code}", lambda r, a: replace(Reply(code, {}, body, how, 3).with_headers(**headers))


_BOMB: list[bytes] = []


def _bomb() -> bytes:
    if not _BOMB:
        _BOMB.append(gzip.compress(bytes(1 << 30), 1))  # 1 GiB in 5 MB
    return _BOMB[0]


def connection(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """The connection ends, stands still, or brings no HTTP."""
    how = rng.choice(["reset", "close", "reset", "close", "short", "long", "silence", "drip", "slow", "raw"])
    how = rng.choice([how, how, "until close", "chunked", "bad chunks", "cut chunks"])
    number = rng.choice([0, 1, 20, 200, 700, 3000, 20_000, 60_000])
    raw = rng.choice(RAW)
    changed = "bytes " if how in ("raw",) else ""
    return f"{changed}connection {how}", lambda r, a: replace(
        r, how=how, number=number, body=raw if how == "raw" else r.body
    )


def ranges(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """Another part than the one that was asked for."""
    kind = rng.choice(["ignored", "lie", "other", "unasked", "multi"])
    value, at = rng.choice(RANGES), rng.choice([1, 500, 5000])

    def fault(reply: Reply, asked: Any) -> Reply:
        total = 100_000
        if kind == "lie":
            return replace(reply, status=206 if reply.status == 200 else reply.status).with_headers(Content_Range=value)
        if kind == "multi":
            headers = {"Content_Type": "multipart/byteranges; boundary=x", "Content_Range": None}
            return replace(reply, status=206, body=b"--x\r\n\r\n" + reply.body).with_headers(**headers)
        if kind == "ignored" or reply.status not in (200, 206):
            return replace(reply, status=200).with_headers(Content_Range=None) if reply.status == 206 else reply
        total = len(reply.body)
        place = f"bytes {at}-{total - 1}/{total}"
        return replace(reply, status=206, body=reply.body[at:]).with_headers(Content_Range=place)

    # What a server announces honestly as a part, and what is no answer to a range, must be noticed without a hash.
    return ("bytes " if kind in ("lie", "ignored") else "") + f"range {kind}", fault


def content(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """Other bytes: of another file, of a portal, with a bit flipped, compressed."""
    kind = rng.choice(["flip", "other", "portal", "gzip", "gzip lie", "empty", "cut", "zeros"])
    place = rng.random()

    def fault(reply: Reply, asked: Any) -> Reply:
        body = reply.body
        if kind == "portal":
            return Reply(200, {"Content-Type": "text/html"}, HTML)
        if kind == "gzip":
            return replace(reply, body=gzip.compress(body, 1)).with_headers(Content_Encoding="gzip")
        if kind == "gzip lie":
            return reply.with_headers(Content_Encoding="gzip")
        if kind == "flip" and body:
            at = int(place * len(body))
            body = body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :]
        changed = {"other": other, "empty": b"", "cut": body[: int(place * len(body))], "zeros": bytes(len(body))}
        return replace(reply, body=changed.get(kind, body))

    return f"bytes {kind}", fault


def names(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """Headers that name the content, its size or the commit otherwise."""
    kind = rng.choice(["etag", "etag", "commit", "size", "length", "weak"])
    linked = rng.random() < 0.5
    etag, size, commit = rng.choice(ETAGS), rng.choice(SIZES), rng.choice([*COMMIT_NAMES, *COMMITS])

    def fault(reply: Reply, asked: Any) -> Reply:
        if kind == "etag":
            gone = {} if linked else {"X_Linked_Etag": None}
            return reply.with_headers(**{"X_Linked_Etag" if linked else "ETag": etag}, **gone)
        if kind == "weak":
            return reply.with_headers(ETag=f"W/{reply.headers.get('ETag', '')}")
        if kind == "commit":
            return reply.with_headers(X_Repo_Commit=commit)
        return reply.with_headers(**{"X_Linked_Size" if kind == "size" else "Content_Length": size})

    return {"etag": "etag", "commit": "etag commit", "length": "bytes length"}.get(kind, f"name {kind}"), fault


def redirect(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """To somewhere else, or round and round."""
    code = rng.choice([301, 302, 303, 307, 308])
    kind = rng.choice(["loop", "odd", "odd", "odd", "portal", "self"])
    target = rng.choice(LOCATIONS)
    keep = rng.random() < 0.5

    def fault(reply: Reply, asked: Any) -> Reply:
        where = {"loop": asked.path, "odd": target, "portal": "/portal", "self": "?x=1"}[kind]
        return (
            replace(reply, status=code, body=b"").with_headers(Location=where)
            if keep
            else Reply(code, {"Location": where})
        )

    return f"redirect {kind}", fault


def absent(rng: random.Random, other: bytes) -> tuple[str, Fault]:
    """The hub's own words for a file that is not there."""
    headers = {"X-Error-Code": "EntryNotFound"}
    if rng.random() < 0.5:
        headers["X-Repo-Commit"] = rng.choice(COMMITS)
    return "absent", lambda r, a: Reply(404, headers)


CLASSES = [status, status, connection, connection, ranges, content, content, names, names, redirect, absent]


def hostile_index(rng: random.Random, index: bytes) -> tuple[str, bytes]:
    """An index of sharded weights that names what is not, or not there."""
    held = json.loads(index)
    places: Any = held["weight_map"]
    first = next(iter(places))
    kind = rng.choice(
        ["escaping", "missing file", "missing name", "moved", "absolute", "type", "deep", "many", "self", "twice"]
    )
    if kind == "type":
        return kind, rng.choice(
            [b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {}}', b"{", b"1"]
        )
    if kind == "deep":
        return kind, b'{"weight_map":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    if kind == "many":
        places |= {f"x{i}": f"x{i}.safetensors" for i in range(2000)}
    elif kind == "missing name":
        del places[first]
    elif kind == "moved":
        places[first] = next(file for file in places.values() if file != places[first])
    elif kind == "twice":  # in two entries of the same object: the later one counts, as everywhere
        wrong = next(file for file in places.values() if file != places[first])
        return kind, index.replace(
            b'"weight_map": {', b'"weight_map": {"%s": "%s", ' % (first.encode(), wrong.encode()), 1
        )
    else:
        names = {"escaping": "../x.safetensors", "missing file": "no.safetensors", "absolute": "/x.safetensors"}
        places[first] = names.get(kind, "model.safetensors.index.json")
    return kind, json.dumps(held).encode()
