"""A server that speaks as much of the Hugging Face Hub as a download needs, with faults on demand."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf")
"""Files that are in git-lfs: the Hub lists their SHA-256."""


@dataclass
class Repository:
    """A repository with one commit per revision. gated, private: nothing is given without the token `secret`.

    answers: per file `cut` (the connection is closed in the middle; `cut once`), `short`, `long`, `other` (content of
    the same size), `500`, `stall` (nothing after the middle until `Hub.going_on`), `moved` (a redirect to another
    host), or `outside` (a hash that is a path); listed: names that only the list has.
    """

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    answers: dict[str, str] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    has_ranges: bool = True

    def commit(self, revision: str) -> str:
        """Return the commit of a revision, or an empty string."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else "")

    def files(self, revision: str) -> dict[str, bytes]:
        """Return the files of a revision or a commit."""
        commit = self.commit(revision)
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """The server's repositories, and the requests that it had."""

    repositories: dict[str, Repository]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    going_on: threading.Event = field(default_factory=threading.Event)

    def downloaded(self) -> list[str]:
        """Return the names of the files whose content was asked for."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


def folder_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def etag(name: str, data: bytes) -> str:
    """Return the hash by which the Hub names a file."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve the repositories at `Hub.url`."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name = (listing or file or [""] * 2)[1]
            repository = hub.repositories.get(name)
            is_known = self.headers.get("Authorization") == "Bearer secret"
            if repository is None or (repository.private and not is_known):
                return self.refuse(401, "RepoNotFound")
            revision = (listing or file)[2] or "main"
            if not repository.commit(revision):
                return self.refuse(404, "RevisionNotFound")
            if listing:
                return self.give_list(name, repository, revision)
            if repository.gated and not is_known:
                return self.refuse(401, "GatedRepo")
            if file[3] not in repository.files(revision):
                return self.refuse(404, "EntryNotFound")
            return self.give_file(repository, revision, file[3])

        do_GET = do_HEAD = answer

        def give_list(self, name: str, repository: Repository, revision: str) -> None:
            siblings = []
            for file, data in repository.files(revision).items():
                entry = {"rfilename": file, "size": len(data), "blobId": etag("", data)}
                if file.endswith(LARGE):
                    entry["lfs"] = {"sha256": etag(file, data), "size": len(data), "pointerSize": 130}
                siblings.append(entry)
            siblings += [{"rfilename": file, "size": 1} for file in repository.listed]
            record = {"id": name, "sha": repository.commit(revision), "siblings": siblings}
            body = json.dumps(record).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def give_file(self, repository: Repository, revision: str, name: str) -> None:
            data, fault = repository.files(revision)[name], repository.answers.get(name, "")
            if fault == "500":
                return self.refuse(500, "")
            if fault == "moved" and self.headers["Host"].startswith("127.0.0.1"):
                self.send_response(302)
                self.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}{self.path}")
                self.send_header("Content-Length", "0")
            else:
                sent = {"short": data[:-10], "long": data + b"x" * 10, "other": data[:-10] + b"x" * 10}.get(fault, data)
                begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if repository.has_ranges else None
                start = int(begin[1]) if begin else 0
                self.send_response(206 if begin else 200)
                if begin:
                    self.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
                size = len(data) if self.command == "HEAD" else len(sent) - start
                self.send_header("Content-Length", str(size))
            self.send_header("X-Repo-Commit", repository.commit(revision))
            tag = "../../../../../evil" if fault == "outside" else etag(name, data)
            self.send_header("ETag", f'"{tag}"')
            if name.endswith(LARGE):
                self.send_header("X-Linked-ETag", f'"{tag}"')
                self.send_header("X-Linked-Size", str(len(data)))
            self.end_headers()
            if self.command == "GET" and not (fault == "moved" and self.headers["Host"].startswith("127.0.0.1")):
                body = sent[start:]
                is_cut = fault.startswith("cut") or fault == "stall"
                self.wfile.write(body[: len(body) // 2] if is_cut else body)
                self.close_connection = self.close_connection or is_cut
                if fault == "stall":
                    hub.stalled.set()
                    hub.going_on.wait()
                if fault == "cut once":
                    repository.answers.pop(name)
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.going_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
