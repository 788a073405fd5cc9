"""An OpenAI-compatible endpoint on loopback, whose responses a test defines."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[int, Mapping[str, str], Any]
"""Status, headers and content of a failing response. Status 0 closes the connection."""
Reply = Callable[[Mapping[str, Any]], str | Fault]
"""Function from a request's body to the text of the response, or to a fault."""


class OpenAIServer:
    """State of the server: the requests so far, and how to respond to the next ones."""

    def __init__(self, url: str, reply: Reply) -> None:
        self.url = url
        """Base URL, as in an endpoint file."""
        self.reply = reply
        self.key: str | None = None
        """API key. If not None, requests without it are refused."""
        self.bodies: list[dict[str, Any]] = []
        """Bodies of all requests, including failed ones."""
        self.faults: list[Fault] = []
        """Faults to send for the next requests."""
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, authorization: str | None, body: dict[str, Any]) -> Fault:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.bodies.append(body)
            fault = self.faults.pop(0) if self.faults else None
        try:
            return fault or self._answer(authorization, body)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, authorization: str | None, body: Mapping[str, Any]) -> Fault:
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {}, {"error": {"message": "no such key", "code": "invalid_api_key"}}
        text = self.reply(body)
        if not isinstance(text, str):
            return text
        limit = body.get("max_tokens", 1 << 30)
        words = text.split()
        asked = sum(len(message["content"].split()) for message in body["messages"])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": " ".join(words[:limit])},
            "finish_reason": "length" if len(words) > limit else "stop",
        }
        usage = {"prompt_tokens": asked, "completion_tokens": min(limit, len(words))}
        return 200, {}, {"object": "chat.completion", "choices": [choice], "usage": usage}


@contextmanager
def serving(reply: Reply = lambda _: "yes") -> Iterator[OpenAIServer]:
    """Serve on a free port of loopback. Each word counts as a token."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            if self.path != "/v1/chat/completions":
                self._send(404, {}, {"error": {"message": "no such page"}})
                return
            self._send(*server.answer(self.headers.get("Authorization"), body))

        def _send(self, status: int, headers: Mapping[str, str], content: Any) -> None:
            if not status:
                self.close_connection = True
                return
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = OpenAIServer(f"http://127.0.0.1:{http.server_address[1]}/v1", reply)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def endpoint_file(server: OpenAIServer, **settings: Any) -> str:
    """Return the content of an endpoint file for the server."""
    return json.dumps({"url": server.url, "model": "tests", **settings})  # JSON is YAML


def texts_of(bodies: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the last message of each request."""
    return [body["messages"][-1]["content"] for body in bodies]
