"""Requests over bad and hostile connections: how long to wait, when to try again, which redirects to follow."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import timezone
from typing import Any
from urllib.parse import urljoin, urlsplit

from medgmae.checkpoints.cards import WeightsError

CONNECT = 4.0  # seconds for a connection
SOON = 2.0  # seconds in which a host that never answered is tried again
ANSWER = 8.0  # seconds that a host which takes connections has for its first answer
TIMEOUT = 30.0  # seconds without a byte from a host that has answered before
STALLED = 60.0  # seconds since the last progress after which there is no other attempt
ATTEMPTS = 5  # without progress
UPLOAD = 60.0  # seconds of silence in an upload
BACKOFF = 1.0  # seconds before the second attempt; doubles with each one after it
LONGEST_WAIT = 120.0  # seconds of a Retry-After that are waited for
LEAST = 1000  # bytes that are progress, and that must come within TIMEOUT
_REDIRECTS = 10
_MOST_TOLD = 1 << 16  # bytes of the body of a refusal
_AGAIN = {408, 425, 429, 500, 502, 503, 504}

_log = logging.getLogger("medgmae")


class Interrupted(Exception):
    """The connection failed or ended before the answer did; another attempt may help.

    progress: whether the attempt brought something. wait: seconds that the server asks to wait.
    """

    def __init__(self, message: str, *, progress: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.progress = progress
        self.wait = wait


class Attempts:
    """Counts the attempts at one thing and waits between them; any progress starts the count again.

    Args:
        most: attempts without progress.
        answered: whether the host is known to answer, which buys it more time.
    """

    def __init__(self, most: int | None = None, *, answered: bool = False) -> None:
        self.most = ATTEMPTS if most is None else most
        self.answered = answered
        self.failures = 0
        self._since = time.monotonic()  # the last progress

    def timeout(self) -> Any:
        """Time limits of the next request, as the hub's client takes them."""
        scale = _scale()
        read = max(TIMEOUT, ANSWER * scale) if self.answered else ANSWER * scale
        return _client().httpx.Timeout(read, connect=CONNECT * scale)

    def failed(self, failure: Interrupted) -> None:
        """Wait for the next attempt.

        Raises:
            WeightsError: there should be none.
        """
        now = time.monotonic()
        if failure.progress:
            self.failures, self._since, pause = 0, now, BACKOFF / 10
        else:
            self.failures += 1
            pause = BACKOFF * 2 ** (self.failures - 1)
        if failure.wait is not None:
            pause = failure.wait
            self._since += pause  # which the server asks for: no standstill
        if pause > LONGEST_WAIT:
            raise WeightsError(f"{failure}; the server asks to wait for {pause:.0f} seconds, call again then")
        late = now - self._since + pause > (STALLED if self.answered else SOON) * _scale()
        if self.failures >= self.most or late:
            plural = "s" if self.failures > 1 else ""
            raise WeightsError(f"{failure}; gave up after {self.failures} attempt{plural}") from failure
        _log.info("%s (attempt %d of %d)", failure, self.failures, self.most)
        time.sleep(pause)


@contextmanager
def answer(method: str, url: str, headers: Mapping[str, str], attempts: Attempts) -> Iterator[Any]:
    """The answer to one request, to be read inside the block.

    Redirects are followed, except from https to anything else, and a token stays with the host it is meant for. The
    hub's own redirects to its store end a HEAD: they carry what it asks for.

    Raises:
        Interrupted: no answer, or one that asks to come back later, or an end before the answer's.
        WeightsError: a redirect that is not followed, an address that is none.
        HfHubHTTPError: the server refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError

    client = _client()
    httpx = client.httpx
    headers = {**headers, "Accept-Encoding": "identity"}  # compressed bytes have another hash
    asked = url
    for _ in range(_REDIRECTS):
        try:
            _check_name(url)
            options: dict[str, Any] = {"headers": headers, "timeout": attempts.timeout(), "follow_redirects": False}
            with closing(_sent(method, url, **options)) as response:
                attempts.answered = True
                if response.status_code in _AGAIN:
                    status = f"{response.status_code} {response.reason_phrase}"
                    raise Interrupted(f"the server answers {status}", wait=_retry_after(response))
                if not response.has_redirect_location or (method == "HEAD" and "X-Linked-Etag" in response.headers):
                    _raise_refusal(response)
                    yield response
                    return
                target = urljoin(url, response.headers["Location"])
        except HfHubHTTPError:  # some of them are ValueErrors too
            raise
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Interrupted(_network_message(error) + _through(url)) from error
        except (httpx.InvalidURL, ValueError, ImportError) as error:  # a proxy may need a package that is not there
            said = f"{str(error)[:200]}{_through(url)}"
            led = "" if url == asked else f", to which {shown(asked)} leads,"
            raise WeightsError(f"{shown(url)}:{led} cannot be asked for ({said}); check the address") from error
        _check_redirect(url, target)
        if urlsplit(url)[:2] != urlsplit(target)[:2]:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    raise WeightsError(
        f"{shown(url)}: more than {_REDIRECTS} redirects, one after the other; check whether a proxy answers for it"
    )


def check_reachable(url: str, what: str) -> None:
    """Raise a WeightsError unless a host answers, whatever it says: for a client that would wait for minutes."""
    from huggingface_hub.errors import HfHubHTTPError

    attempts = Attempts(1)
    try:
        with answer("HEAD", url, {}, attempts):
            return
    except HfHubHTTPError:
        return
    except Interrupted as failure:
        if not attempts.answered:
            raise WeightsError(f"{what}: {url}: {failure}; check the connection and call again") from failure


@contextmanager
def bounded_client() -> Iterator[None]:
    """Time limits for the hub's client, which has none: a host that falls silent would hold an upload for ever."""
    session = _client().get_session()
    before, session.timeout = session.timeout, _client().httpx.Timeout(UPLOAD * _scale(), connect=CONNECT * _scale())
    try:
        yield
    finally:
        session.timeout = before


def _client() -> Any:
    """The hub client's tools: its session, which knows proxies and certificates, and the HTTP library under it."""
    from huggingface_hub import utils

    return utils


def _scale() -> float:
    """How much more patience the user asks for: the hub client's HF_HUB_ETAG_TIMEOUT against its default."""
    from huggingface_hub import constants

    return max(1.0, constants.HF_HUB_ETAG_TIMEOUT / constants.DEFAULT_ETAG_TIMEOUT)


def shown(text: str) -> str:
    """What a server says, for a message: short, and nothing that a terminal obeys."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _sent(method: str, url: str, **options: Any) -> Any:
    """Send a request; the answer, when its headers are there.

    The time limits of the HTTP library begin again with each byte. A thread bounds them all together.
    """
    session, limits = _client().get_session(), options["timeout"]
    outcome: list[Any] = []
    given_up = threading.Event()

    def send() -> None:
        try:
            follow = options.pop("follow_redirects")
            response = session.send(session.build_request(method, url, **options), stream=True, follow_redirects=follow)
        except BaseException as error:
            outcome.append(error)
            return
        outcome.append(response)
        if given_up.is_set():
            response.close()

    seconds = limits.connect + limits.read
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        given_up.set()
        raise Interrupted(
            f"the server did not finish the headers of its answer within {seconds:.0f} seconds{_through(url)}"
        )
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _raise_refusal(response: Any) -> None:
    """Let the hub's client say what a refusal means.

    It expects JSON of one form, and reads bodies of any length, compressed ones too: so it gets what we have read.
    """
    client, status = _client(), response.status_code
    if 300 <= status < 400 and not response.has_redirect_location:
        said = f"the server answers {status} {response.reason_phrase}, no file"
        raise WeightsError(f"{shown(str(response.url))}: {said}; check whether a proxy answers in its place")
    if status < 400:
        return
    names = ("X-Error-Code", "X-Error-Message", "X-Repo-Commit", "X-Request-Id", "Content-Range")
    headers = {name: shown(response.headers[name]).encode() for name in names if name in response.headers}
    body = {"error": _told(response) or None}
    client.hf_raise_for_status(client.httpx.Response(status, headers=headers, json=body, request=response.request))


def _told(response: Any) -> str:
    """What the body of a refusal says, if it says it briefly."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return ""
    text, end = b"", time.monotonic() + ANSWER
    with suppress(_client().httpx.TransportError, _client().httpx.StreamError):
        for chunk in response.iter_raw():
            text += chunk
            if len(text) > _MOST_TOLD or time.monotonic() > end:
                break
    if len(text) > _MOST_TOLD:
        return ""
    if "json" not in response.headers.get("Content-Type", ""):
        return shown(text.decode("ascii", "replace").strip()) if text and b"<" not in text else ""
    with suppress(ValueError, RecursionError):
        said = json.loads(text)
        errors = said.get("errors") if isinstance(said, dict) else None
        found = [said.get("error")] if isinstance(said, dict) else []
        found += [item.get("message") for item in errors if isinstance(item, dict)] if isinstance(errors, list) else []
        return shown("; ".join(item for item in found if isinstance(item, str)))
    return ""


def _check_redirect(url: str, target: str) -> None:
    before, after = urlsplit(url).scheme, urlsplit(target).scheme
    if after not in ("http", "https") or (before == "https" and after == "http"):
        raise WeightsError(
            f"{shown(url)}: the server redirects from {before} to {after[:20]} ({shown(target)}), which is not followed"
            "; fetch the file by hand if you trust it, and load it by its path"
        )


def _check_name(url: str) -> None:
    """Bound the look-up of a host's name, the proxy's if there is one: the system has no time limit for it."""
    host = urlsplit(_proxy(url) or url).hostname
    if not host:
        return
    # Whatever goes wrong here goes wrong in the request again, which says it better.
    thread = threading.Thread(target=_look_up, args=(host,), daemon=True)
    thread.start()
    thread.join(CONNECT * _scale())
    if thread.is_alive():
        seconds = CONNECT * _scale()
        raise Interrupted(f"the name {host} could not be looked up within {seconds:.0f} seconds{_through(url)}")


def _proxy(url: str) -> str | None:
    """The proxy that requests for an address go through, as the system and HTTPS_PROXY and its kin name it."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _through(url: str) -> str:
    """The proxy in a message, without the password that its address may hold."""
    proxy = _proxy(url)
    place = shown(proxy).replace(f"{urlsplit(proxy).netloc.rpartition('@')[0]}@", "") if proxy else ""
    return f" through the proxy {place} (HTTPS_PROXY, HTTP_PROXY or ALL_PROXY)" if proxy else ""


def _look_up(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return


def _network_message(error: Exception) -> str:
    name = type(error).__name__
    if name == "ConnectTimeout":
        return f"no connection within {CONNECT * _scale():.0f} seconds"
    if "Timeout" in name:
        return "the server fell silent (timed out)"
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"the connection failed ({shown(text) or name})"


def _retry_after(response: Any) -> float | None:
    """Seconds that the server asks to wait, from a number or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal() and text.isascii():
        return float(text[:12])
    try:
        date = email.utils.parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)  # HTTP knows no other
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
