"""Serves the browser's pages, read-only. On the loopback interface, or with a token elsewhere."""

import hmac
import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

from dist_sae.browser.lists import Choice, number
from dist_sae.browser.pages import Pages
from dist_sae.errors import ArgumentError, ConfigError, DistSaeError, LatentNotFoundError

logger = logging.getLogger(__name__)

_COOKIE = "dist-sae-token-{}"  # by port: a browser sends cookies to all ports of a machine
_EVERYWHERE = ("", "0.0.0.0")  # no address to open
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@contextmanager
def serve(pages: Pages, host: str, port: int) -> Iterator[tuple[ThreadingHTTPServer, str]]:
    """Listen; the caller calls `serve_forever`.

    Args:
        pages: What is served.
        host: Address to listen at. Elsewhere than on the loopback interface whoever asks must know
            a token, which is part of the URL.
        port: 0 takes a free one.

    Yields:
        The server, and the URL to open.

    Raises:
        ConfigError: The address cannot be had.
    """
    token = "" if _is_loopback(host) else secrets.token_urlsafe(24)

    class Handler(_Handler):
        def __init__(self, *args: object) -> None:
            self.pages, self.token = pages, token
            super().__init__(*args)  # type: ignore[arg-type]

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as exc:  # the second: there is no port of this number
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(
            f"browse: {host}:{port}: {reason or exc}; choose another --port or --host"
        ) from exc
    server.daemon_threads = True
    threading.Thread(target=pages.prepare, name="prepare", daemon=True).start()
    with server:
        query = f"/?token={token}" if token else "/"
        name = socket.gethostname() if host in _EVERYWHERE else host
        yield server, f"http://{name}:{server.server_port}{query}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests."""

    pages: Pages
    token: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        query = dict(parse_qsl(place.query, keep_blank_values=True))
        if not self._may_ask(query):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "open the URL that was printed\n")
        elif self.token and "token" in query:
            # it should not stay in the address, which people share; links from elsewhere work (Lax)
            cookie = f"{self._cookie}={self.token}; HttpOnly; SameSite=Lax; Path=/"
            rest = urlencode({k: v for k, v in query.items() if k != "token"})
            where = f"/{place.path.lstrip('/')}" + (f"?{rest}" if rest else "")
            more = {"Location": where, "Set-Cookie": cookie}
            self._answer(HTTPStatus.SEE_OTHER, "text/plain", "", more)
        else:
            self._answer(*self._page(place.path, query))

    def _page(self, path: str, query: Mapping[str, str]) -> tuple[HTTPStatus, str, str]:
        """Status, type and text of an answer."""
        first, _, rest = path.lstrip("/").partition("/")
        pages = self.pages
        try:
            if path == "/":
                text = pages.listed(Choice.of(query))
            elif first == "latent" and rest.isdecimal():
                text = pages.latent(int(rest), Choice.of(query) if "sort" in query else None)
            elif path == "/search":
                text = pages.search(query)
            elif path == "/compare":
                other = number(query, "other") if "other" in query else None
                text = pages.compare(number(query, "latent"), other)
            elif path == "/clusters":
                text = pages.clusters(query)
            elif path == "/map":
                text = pages.map()
            else:
                return HTTPStatus.NOT_FOUND, "text/html", pages.error(f"no page {path}")
        except LatentNotFoundError as exc:
            return HTTPStatus.NOT_FOUND, "text/html", pages.error(str(exc))
        except (ArgumentError, ValueError) as exc:
            return HTTPStatus.BAD_REQUEST, "text/html", pages.error(str(exc))
        except DistSaeError as exc:
            logger.warning("%s", exc)
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/html", pages.error(str(exc))
        return HTTPStatus.OK, "text/html", text

    @property
    def _cookie(self) -> str:
        return _COOKIE.format(self.server.server_port)  # type: ignore[attr-defined]

    def _may_ask(self, query: Mapping[str, str]) -> bool:
        """Whether the request is from whoever started the server, or knows the token.

        A page elsewhere may send a browser to a name that it points at this machine, so on the
        loopback interface the name must be the machine's own.
        """
        if self.token:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie)
            known = query.get("token") or (cookie.value if cookie else "")
            return hmac.compare_digest(known.encode(), self.token.encode())
        return _is_loopback(urlsplit(f"//{self.headers.get('Host', '')}").hostname or "")

    def _answer(
        self, status: HTTPStatus, kind: str, text: str, more: Mapping[str, str] | None = None
    ) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {**_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""
