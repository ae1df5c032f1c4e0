"""Responses of a server, kept on disk by the content of their requests, so that none is asked twice.

An append-only file of lines with checksums: a line that a kill has cut is left out when the file is opened.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.files import parse_json, writing

NAME = "responses.jsonl"


def request_key(url: str, path: str, body: Mapping[str, Any]) -> str:
    """Return the sha256 of what is asked of whom."""
    return hashlib.sha256(canonical([url, path, body])).hexdigest()


def canonical(value: Any) -> bytes:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def checksum(text: bytes) -> str:
    """Return a short checksum of a line."""
    return hashlib.sha256(text).hexdigest()[:16]


class AnswerLog:
    """Responses by request; safe for several threads of one process."""

    def __init__(self, folder: Path) -> None:
        self.path, self._lock = folder / NAME, threading.Lock()
        self._places: dict[str, int] = {}
        self._asking: dict[str, threading.Lock] = {}
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        self._index()

    def _index(self) -> None:
        """Find the lines that are whole, and begin a new one after a line that is not."""
        self._file.seek(0)
        at, line = 0, b""
        for line in self._file:
            if (record := self._parsed(line)) is not None:
                self._places[record["key"]] = at
            at += len(line)
        if line and not line.endswith(b"\n"):
            self._file.write(b"\n")
            self._file.flush()

    @staticmethod
    def _parsed(line: bytes) -> dict[str, Any] | None:
        sum_, _, text = line.rstrip(b"\n").partition(b" ")
        if checksum(text) != sum_.decode("ascii", "replace"):
            return None
        try:
            record = parse_json(text)
        except ValueError:
            return None
        is_whole = isinstance(record, dict) and isinstance(record.get("key"), str)
        return record if is_whole and isinstance(record.get("response"), dict) else None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the response of a request, None if it was not asked."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            self._file.seek(place)
            record = self._parsed(self._file.readline())
        response: dict[str, Any] | None = None if record is None else record["response"]
        return response

    def asking(self, key: str) -> threading.Lock:
        """Return the lock of a request: equal ones wait for the first one's response instead of asking as well."""
        with self._lock:
            return self._asking.setdefault(key, threading.Lock())

    def put(self, key: str, response: Mapping[str, Any]) -> None:
        """Append a response; it is on disk when this returns."""
        text = canonical({"key": key, "response": response})
        with self._lock, writing(self.path):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(checksum(text).encode() + b" " + text + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._places[key] = place

    def close(self) -> None:
        """Close the file."""
        self._file.close()
