"""Serves a metrics page and responds to probes, over HTTP."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dist_sae.errors import TelemetryError
from dist_sae.telemetry.liveness import PATHS

logger = logging.getLogger(__name__)

LAST_SCRAPE_SECONDS = 100.0
"""Maximum wait for the last scrape. Long enough for scrapes every minute."""
_LATE_SECONDS = 1.0
SCRAPE_HEADER = "X-Prometheus-Scrape-Timeout-Seconds"
_CLIENT_SECONDS = 10.0


class PageServer:
    """Serves one page, rendered on request, in background threads.

    Args:
        port: Port to serve on; 0 for any free port.
        render: Renders the page in Prometheus' text format. Called with True for a scrape by
            Prometheus, and with False for a person or another program, for whom the process does
            not wait at its end.
        probe_failure: Returns why the probe of a path fails (see `liveness`); None if it passes.

    Raises:
        TelemetryError: The port is taken.
    """

    def __init__(
        self, port: int, render: Callable[[bool], bytes], probe_failure: Callable[[str], str | None]
    ) -> None:
        self._render = render
        self._probe_failure = probe_failure
        self._last_scrape: float | None = None
        self._interval: float | None = None
        self._ending = float("inf")
        self._scraped_again = threading.Event()
        try:
            self._server = _Server(("", port), self._handler())
        except OSError as exc:
            raise TelemetryError(
                f"telemetry.port {port}: cannot be opened ({exc.strerror}); "
                f"choose another, or 0 for any free one"
            ) from exc
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def await_last_scrape(self) -> None:
        """Wait for one more scrape, for at most one interval, if there have been any scrapes."""
        self._ending = time.monotonic()
        if self._last_scrape is None:
            return
        rest = LAST_SCRAPE_SECONDS  # one scrape so far: the interval is unknown
        if self._interval is not None:  # negative if scrapes have ended
            rest = self._last_scrape + 1.5 * self._interval + _LATE_SECONDS - self._ending
        self._scraped_again.wait(min(max(rest, 0.0), LAST_SCRAPE_SECONDS))

    def _note_scrape(self, requested_at: float) -> None:
        if self._last_scrape is not None:
            self._interval = requested_at - self._last_scrape
        self._last_scrape = requested_at

    def _note_response(self, requested_at: float) -> None:
        if requested_at >= self._ending:
            self._scraped_again.set()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        render, probe_failure = self._render, self._probe_failure
        note_scrape, note_response = self._note_scrape, self._note_response

        class Handler(BaseHTTPRequestHandler):
            timeout = _CLIENT_SECONDS

            def do_GET(self) -> None:
                if self.path in PATHS:
                    why = probe_failure(self.path)
                    self._answer(200 if why is None else 503, f"{why or 'ok'}\n".encode())
                    return
                requested_at, scraped = time.monotonic(), SCRAPE_HEADER in self.headers
                try:
                    page = render(scraped)
                except Exception:
                    logger.exception("could not render the metrics page")
                    self.send_error(500)
                    return
                if scraped:
                    # before responding: an ending process waits for this client
                    note_scrape(requested_at)
                self._answer(200, page)
                if scraped:
                    note_response(requested_at)

            def _answer(self, status: int, page: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_: Any) -> None:
                pass  # it would log a line for every scrape

        return Handler


class _Server(ThreadingHTTPServer):
    """A server on both IPv4 and IPv6, because a pod may have only one kind of address."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, *_: Any) -> None:
        pass  # the client has disconnected, and will request the page again
