"""A proxy in front of an S3 server that injects network and server faults."""

import http.client
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self
from urllib.parse import urlsplit

KINDS = {
    "slow": "the request waits a moment; in addition to any other fault",
    "error": "the server never sees it; the answer is one of `answers`",
    "reset": "the server never sees it; the connection is reset",
    "flip_put": "one bit of the body of a PUT is flipped on its way to the server",
    "error_after": "the server does it; the answer is one of `answers`",
    "reset_after": "the server does it; the connection is reset before the answer",
    "reset_body": "the connection is reset in the middle of the answer's body",
    "truncate": "the answer's body ends early; Content-Length says what it should have been",
    "shorten": "the answer's body ends early, and Content-Length agrees",
    "skew": "the answer's Date is off by up to an hour, as if the server's clock were",
    "flip_get": "one bit of the body of an object is flipped on its way to the client",
}
_BEFORE = ("error", "reset", "flip_put")
_AFTER = ("error_after", "reset_after", "reset_body", "truncate", "shorten", "skew", "flip_get")

XML = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"
ANSWERS = (
    (500, XML % b"InternalError"),
    (503, XML % b"SlowDown"),
    (429, XML % b"TooManyRequests"),
    (503, b""),
    (502, b"<html><body>Bad Gateway</body></html>"),
)
_LONGEST_DELAY_SECONDS = 0.1
_UPSTREAM_SECONDS = 60.0
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class _Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    bytes_announced: int | None
    """Content-Length of the response, or None."""


class FaultProxy:
    """Proxy that runs inside its `with` block. Use `endpoint_url` instead of `target`.

    The fault of the n-th attempt of a request depends only on the seed, the request (method, key,
    query, range) and n, not on other threads. Requests are forwarded without changes except in the
    body, even with their signed Host header.

    Args:
        target: Endpoint of the server.
        seed: Seed of the schedule.
        rates: Probability of each of `KINDS` per request. Kinds that are left out do not occur.
        only: Predicate of (method, path with query) that selects the requests that can have faults.
        most_per_request: Maximum number of faults per request; None for no limit.
        slow_budget_seconds: Limit on the sum of all delays.
        answers: (Status, body) of errors.
        tls: Certificate, to use https; None for http.

    Attributes:
        rates: Can be replaced at any time. `{"reset": 1.0}` is an endpoint that is down.
        requests: Number of requests so far, by method.
        injected: Number of injected faults, by kind.
    """

    def __init__(
        self,
        target: str,
        seed: int,
        rates: Mapping[str, float],
        *,
        only: Callable[[str, str], bool] = lambda _method, _path: True,
        most_per_request: int | None = None,
        slow_budget_seconds: float = 5.0,
        answers: Sequence[tuple[int, bytes]] = ANSWERS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        assert rates.keys() <= KINDS.keys(), rates.keys() - KINDS.keys()
        self.rates = rates
        self.requests: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.answers = answers
        self._target = urlsplit(target).netloc
        self._seed = seed
        self.only = only
        self._most = most_per_request
        self._slow_budget = slow_budget_seconds
        self._tries: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            def __init__(self, *arguments: object) -> None:
                self.proxy = proxy
                super().__init__(*arguments)  # type: ignore[arg-type]

        self._server = _Server(("127.0.0.1", 0), Handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.endpoint_url = f"{scheme}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="faults", daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def schedule(self, request: str) -> random.Random:
        """Return the random numbers for this attempt of a request."""
        with self._lock:
            self._tries[request] += 1
            return random.Random(f"{self._seed} {request} {self._tries[request]}")

    def draw(
        self, kinds: tuple[str, ...], chance: random.Random, request: str, possible: set[str]
    ) -> str | None:
        """Draw one of the possible faults for a request, or none."""
        # draws for all kinds, so that one kind's rate does not affect the draws of the others
        draws = {kind: chance.random() for kind in kinds}
        for kind, drawn in draws.items():
            if drawn < self.rates.get(kind, 0.0) and kind in possible:
                with self._lock:
                    if self._most is not None and self._hits[request] >= self._most:
                        return None
                    self._hits[request] += 1
                    self.injected[kind] += 1
                return kind
        return None

    def delay(self, chance: random.Random) -> float:
        """Draw the delay of a request, in seconds."""
        drawn, seconds = chance.random(), chance.uniform(0, _LONGEST_DELAY_SECONDS)
        with self._lock:
            if drawn >= self.rates.get("slow", 0.0) or seconds > self._slow_budget:
                return 0.0
            self._slow_budget -= seconds
            self.injected["slow"] += 1
        return seconds

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> _Answer:
        """Forward a request, and return the server's response."""
        upstream = http.client.HTTPConnection(self._target, timeout=_UPSTREAM_SECONDS)
        try:
            upstream.putrequest(
                handler.command, handler.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in handler.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            if body or handler.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            # the server may respond before it has read the whole body
            with suppress(BrokenPipeError, ConnectionResetError):
                upstream.endheaders(body)
            said = upstream.getresponse()
            content = said.read()
            headers = [(n, v) for n, v in said.headers.items() if n.lower() not in _HOP_BY_HOP]
            announced: int | None = len(content)
            if handler.command == "HEAD":
                announced = int(said.headers["Content-Length"] or 0)
            elif said.status == http.HTTPStatus.NO_CONTENT:
                announced = None
            return _Answer(said.status, headers, content, announced)
        finally:
            upstream.close()


class _Server(ThreadingHTTPServer):
    """Server that closes all connections when it is closed."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._connections: set[socket.socket] = set()

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # bucket and upload id are left out, because they differ between test runs
        what = re.sub(r"^/[^/?]*|uploadId=[^&]*", "", self.path)
        request = f"{self.command} {what} {self.headers.get('Range', '')}"
        is_object = "/" in urlsplit(self.path).path.strip("/")
        self.proxy.requests[self.command] += 1
        if not self.proxy.only(self.command, self.path):
            self._answer(self.proxy.forward(self, body))
            return

        chance = self.proxy.schedule(request)
        time.sleep(self.proxy.delay(chance))
        possible = {"error", "reset"}
        if self.command == "PUT" and body:
            possible.add("flip_put")
        fault = self.proxy.draw(_BEFORE, chance, request, possible)
        if fault == "reset":
            self._reset()
            return
        if fault == "error":
            self._error(chance)
            return
        if fault == "flip_put":
            body = _flip(body, chance)
        try:
            answer = self.proxy.forward(self, body)
        except (OSError, http.client.HTTPException):  # the server is down
            self._reset()
            return
        self._spoil(answer, chance, request, is_object=is_object)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _spoil(
        self, answer: _Answer, chance: random.Random, request: str, *, is_object: bool
    ) -> None:
        possible = {"error_after", "reset_after"}
        if answer.body:
            possible |= {"reset_body", "truncate", "shorten"}
        if self.command == "GET" and answer.body and answer.status < 300 and is_object:
            possible.add("flip_get")
        if any(name.lower() == "date" for name, _ in answer.headers):
            possible.add("skew")
        fault = self.proxy.draw(_AFTER, chance, request, possible)
        cut = answer._replace(body=answer.body[: chance.randrange(max(1, len(answer.body)))])
        if fault == "reset_after":
            self._reset()
        elif fault == "error_after":
            self._error(chance)
        elif fault == "shorten":
            self._answer(cut._replace(bytes_announced=len(cut.body)))
        elif fault in ("reset_body", "truncate"):
            self._answer(cut)
            if fault == "reset_body":
                self._reset()
        elif fault == "skew":
            self._answer(answer._replace(headers=_skew(answer.headers, chance)))
        elif fault == "flip_get":
            self._answer(answer._replace(body=_flip(answer.body, chance)))
        else:
            self._answer(answer)

    def _error(self, chance: random.Random) -> None:
        status, body = chance.choice(self.proxy.answers)
        body = b"" if self.command == "HEAD" else body
        self._answer(_Answer(status, [("Content-Type", "application/xml")], body, len(body)))

    def _answer(self, answer: _Answer) -> None:
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        if answer.bytes_announced is not None:
            lines.append(f"Content-Length: {answer.bytes_announced}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body)
        if self.command != "HEAD" and len(answer.body) != (answer.bytes_announced or 0):
            self.close_connection = True

    def _reset(self) -> None:
        """Close the connection as a crash does: the client receives an RST."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing, because the counters show what happened."""


def _skew(headers: list[tuple[str, str]], chance: random.Random) -> list[tuple[str, str]]:
    """Change the Date header."""
    date = formatdate(time.time() + chance.uniform(-3600, 3600), usegmt=True)
    return [(name, date if name.lower() == "date" else value) for name, value in headers]


def _flip(data: bytes, chance: random.Random) -> bytes:
    """Flip one random bit."""
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
