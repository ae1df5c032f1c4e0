"""A client of servers with OpenAI's protocol: chat and text completions, retried, rate-limited and counted.

Knows nothing of prompts, caches or training. The key is read from the environment and is in no message, file or record.
"""

import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmctl.config import ServerConfig
from llmctl.errors import UsageError
from llmctl.files import hash64, parse_json

KEYS = ("LLMCTL_API_KEY", "OPENAI_API_KEY")
LARGEST_BYTES = 16_000_000
"""The largest response that is read."""

LONGEST_WAIT_SECONDS = 300.0
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
SHOWN = 300
"""Characters of a server's message that are shown."""


class RequestError(Exception):
    """A request that failed: with what, whether another attempt may succeed, and after how many seconds."""

    def __init__(self, reason: str, *, again: bool, after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.after_seconds = again, after_seconds


@dataclass
class Counts:
    """What has been asked: requests sent, answers from the cache, attempts after the first, prompts that failed, tokens."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **numbers: int) -> None:
        """Add to some of the numbers."""
        with self._lock:
            for name, number in numbers.items():
                setattr(self, name, getattr(self, name) + number)

    @property
    def tokens(self) -> int:
        """The tokens that the server has counted."""
        return self.prompt_tokens + self.completion_tokens

    def record(self) -> dict[str, int]:
        """Return the numbers by name."""
        names = ("requests", "cached", "retries", "failed", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in names}


class Server:
    """A server at a base URL such as http://host:8000/v1."""

    def __init__(self, url: str, config: ServerConfig) -> None:
        self.config, self.counts = config, Counts()
        self.url = checked_url(url)
        parts = urlsplit(self.url)
        self._is_tls, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._path = parts.path.rstrip("/")
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        self._stopped = threading.Event()
        self._lock, self._next = threading.Lock(), 0.0
        self._open: set[http.client.HTTPConnection] = set()

    def stop(self) -> None:
        """End the requests that run or wait, and refuse further ones."""
        self._stopped.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post a request, again after failures that may pass, and return the response.

        Raises: UsageError for what no retry changes (an unknown model, a wrong key); RequestError after the last attempt.
        """
        attempt = 0
        while True:
            self._pace()
            self.counts.add(requests=1, retries=int(attempt > 0))
            try:
                return self._once("POST", path, body)
            except RequestError as error:
                attempt += 1
                if not error.again or attempt > self.config.retries or self.is_stopped:
                    raise
                self._stopped.wait(min(LONGEST_WAIT_SECONDS, error.after_seconds or self._backoff(attempt, body)))
                if self.is_stopped:
                    raise

    def models(self) -> list[str]:
        """Return the names of the server's models; none if it does not tell."""
        try:
            listed = self._once("GET", "/models", None).get("data")
        except (RequestError, UsageError):
            return []
        return [str(one["id"]) for one in listed or [] if isinstance(one, dict) and "id" in one][:20]

    def _backoff(self, attempt: int, body: Mapping[str, Any]) -> float:
        """Return the seconds before an attempt: twice as many each time, spread by the request, not by a random state."""
        spread = hash64(json.dumps([attempt, body], sort_keys=True, default=str).encode()) / 2**64
        return float(self.config.backoff_seconds * 2 ** (attempt - 1) * (0.5 + spread))

    def _pace(self) -> None:
        """Wait until the rate limit lets the next request through."""
        if not self.config.requests_per_minute:
            return
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now) + 60 / self.config.requests_per_minute
            delay = self._next - 60 / self.config.requests_per_minute - now
        if delay > 0:
            self._stopped.wait(delay)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        options: dict[str, Any] = {"context": ssl.create_default_context()} if self._is_tls else {}
        connection = kind(self._host, self._port, timeout=self.config.timeout_seconds, **options)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline = time.monotonic() + self.config.timeout_seconds
        with self._lock:
            self._open.add(connection)
        try:
            if self.is_stopped:
                raise RequestError("stopped", again=False)
            connection.request(method, self._path + path, None if body is None else json.dumps(body).encode(), headers)
            with closing(connection.getresponse()) as response:
                data = read_within(response, deadline)
            status, after = response.status, response.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise RequestError(f"no answer: {reason[:SHOWN]}", again=True) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if status != 200:
            raise self._refusal(status, data, after, path, body)
        try:
            found = parse_json(data)
        except ValueError as error:
            raise RequestError("the answer is not JSON", again=True) from error
        if not isinstance(found, dict):
            raise RequestError(f"the answer is a JSON {type(found).__name__}, not an object", again=True)
        return found

    def _refusal(
        self, status: int, data: bytes, after: str, path: str, body: Mapping[str, Any] | None
    ) -> RequestError | UsageError:
        told = self._message(data)
        if status in RETRIED:
            seconds = float(after) if after.replace(".", "", 1).isdigit() else 0.0
            return RequestError(f"status {status}: {told}", again=True, after_seconds=seconds)
        if status in (401, 403):
            named = "the key was refused" if self._key else "a key is needed"
            return UsageError(f"`{self.url}`: {named} (status {status}: {told})", f"set {' or '.join(KEYS)}")
        if 300 <= status < 400:
            return UsageError(
                f"`{self.url}{path}` redirects elsewhere (status {status})", "use the address it leads to"
            )
        if status == 404 and body is not None:
            known = ", ".join(f"`{name}`" for name in self.models())
            hint = (
                f"its models: {known}" if known else "check the address, which usually ends in /v1, and --teacher-model"
            )
            return UsageError(f"`{self.url}{path}` has no model `{body.get('model', '')}` (status 404: {told})", hint)
        return RequestError(f"status {status}: {told}", again=False)

    def _message(self, data: bytes) -> str:
        """Return what a server says of an error, short and without the key."""
        text = data.decode("utf-8", "replace")
        try:
            found = parse_json(data)
            error = found.get("error", found) if isinstance(found, dict) else text
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except ValueError:
            pass
        text = " ".join(text.split())[:SHOWN] or "no message"
        return text.replace(self._key, "***") if self._key else text


def read_within(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return the body of a response; the timeout of a connection is one of silence, this one is of the whole.

    Raises: ValueError for one that is too large or slow; http.client.IncompleteRead for one that is cut.
    """
    length = response.headers.get("Content-Length")
    parts, n_bytes = [], 0
    while True:
        part = response.read1(65536)
        if not part:
            break
        parts.append(part)
        n_bytes += len(part)
        if n_bytes > LARGEST_BYTES:
            raise ValueError(f"more than {LARGEST_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise ValueError("it took longer than server.timeout_seconds")
    if length is not None and length.isdigit() and n_bytes < int(length):
        raise http.client.IncompleteRead(b"".join(parts), int(length) - n_bytes)
    return b"".join(parts)


def checked_url(url: str) -> str:
    """Return a base URL without a slash at its end.

    Raises: UsageError for one with a password or parameters, or without a host.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"`{url}` is not an address: {error}", "such as http://localhost:8000/v1") from None
    del port
    if parts.username or parts.password or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise UsageError(
            f"the address of `{shown}` holds a password or parameters, which would be written into recipes",
            f"put the key into the environment: {' or '.join(KEYS)}",
        )
    if not parts.hostname:
        raise UsageError(f"`{url}` has no host", "such as http://localhost:8000/v1")
    return url.rstrip("/")
