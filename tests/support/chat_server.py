"""A small server with OpenAI's protocol whose answers are made of the requests, and which fails as it is told to."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """`faults` are taken one per request, in order: a status, or `slow`, `cut`, `garbage`, `list`, `empty`, `huge`."""

    daemon_threads = False  # closing waits for all of them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[int | str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.think = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "teacher-1"}, {"id": "teacher-2"}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.append(self.headers.get("Authorization", ""))
            fault = server.faults.pop(0) if server.faults else None
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self.answer(body, fault)
        finally:
            with server.lock:
                server.running -= 1

    def answer(self, body: dict[str, Any], fault: int | str | None) -> None:
        if fault == "slow":
            self.server.release.wait(20)
            return
        if isinstance(fault, int):
            self.reply(fault, {"error": {"message": f"fault {fault}, {self.headers.get('Authorization', '')}"}})
            return
        if body["model"] != "teacher-1":
            self.reply(404, {"error": {"message": "no such model"}})
            return
        if fault == "garbage":
            self.raw(b"<html>")
        elif fault == "list":
            self.reply(200, [1, 2])
        elif fault == "empty":
            self.reply(200, {"choices": []})
        elif fault == "huge":
            self.raw(b" " * 17_000_000)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        else:
            self.reply(200, answer_to(body, think=self.server.think))

    def reply(self, status: int, content: Any) -> None:
        self.raw(json.dumps(content).encode(), status)

    def raw(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def answer_to(body: dict[str, Any], *, think: bool = False) -> dict[str, Any]:
    """Return the answer to a request: the last message in capital letters, with its seed."""
    asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    text = f"{asked.upper()} {body.get('seed', 0)}"
    words = text.split(" ")
    tokens = [words[0], *(f" {word}" for word in words[1:])]
    content = [
        {
            "token": token,
            "bytes": list(token.encode()),
            "logprob": -0.5 - body.get("seed", 0),
            "top_logprobs": [
                {"token": token, "bytes": list(token.encode()), "logprob": -0.5},
                {"token": " cat", "logprob": -2.0},
            ],
        }
        for token in tokens
    ]
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if "LONG" not in text else "length"}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": f"<think>so {asked}</think>\n{text}" if think else text}
    else:
        choice["text"] = f" {text}"
    if body.get("logprobs"):
        choice["logprobs"] = {"content": content}
    usage = {"prompt_tokens": len(asked.split()), "completion_tokens": len(tokens)}
    return {"model": "teacher-1-2026", "choices": [choice], "usage": usage}


@contextmanager
def serving() -> Iterator[ChatServer]:
    """Serve in a thread."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def waited(condition: Any, seconds: float = 10) -> bool:
    """Tell whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        threading.Event().wait(0.01)
    return False
