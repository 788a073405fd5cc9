"""A read-only server for the browser's pages. It requires a token unless it is on loopback."""

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

from dist_sae.browser.lists import ListQuery, read_number
from dist_sae.browser.pages import Pages
from dist_sae.errors import ArgumentError, ConfigError, DistSaeError, LatentNotFoundError

logger = logging.getLogger(__name__)

_COOKIE = "dist-sae-token-{}"  # named by port, as browsers send a cookie to all ports of a host
_EVERYWHERE = ("", "0.0.0.0")  # addresses to listen at, which a browser cannot open
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
    """Open a server, whose `serve_forever` the caller must call.

    Args:
        pages: The pages to serve.
        host: Address to listen at. If it is not on the loopback interface, requests need a token,
            which is part of the URL.
        port: Port to listen at; 0 takes a free one.

    Yields:
        The server, and the URL to open.

    Raises:
        ConfigError: The server cannot listen at this address and port.
    """
    token = "" if _is_loopback(host) else secrets.token_urlsafe(24)

    class Handler(_Handler):
        def __init__(self, *args: object) -> None:
            self.pages, self.token = pages, token
            super().__init__(*args)  # type: ignore[arg-type]

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as exc:  # OverflowError: the port number is too large
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
    """Handler of GET requests."""

    pages: Pages
    token: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        query = dict(parse_qsl(place.query, keep_blank_values=True))
        if not self._may_ask(query):
            self._answer(
                HTTPStatus.FORBIDDEN, "text/plain", "open the URL that dist-sae browse printed\n"
            )
        elif self.token and "token" in query:
            # people share URLs, so the token moves from the URL to a cookie
            # SameSite=Lax keeps links from other sites working
            cookie = f"{self._cookie}={self.token}; HttpOnly; SameSite=Lax; Path=/"
            rest = urlencode({k: v for k, v in query.items() if k != "token"})
            where = f"/{place.path.lstrip('/')}" + (f"?{rest}" if rest else "")
            more = {"Location": where, "Set-Cookie": cookie}
            self._answer(HTTPStatus.SEE_OTHER, "text/plain", "", more)
        else:
            self._answer(*self._page(place.path, query))

    def _page(self, path: str, query: Mapping[str, str]) -> tuple[HTTPStatus, str, str]:
        """Return the status, content type and text of a response."""
        first, _, rest = path.lstrip("/").partition("/")
        pages = self.pages
        try:
            if path == "/":
                text = pages.listed(ListQuery.of(query))
            elif first == "latent" and rest.isdecimal():
                text = pages.latent(int(rest), ListQuery.of(query) if "sort" in query else None)
            elif path == "/search":
                text = pages.search(query)
            elif path == "/compare":
                other = read_number(query, "other") if "other" in query else None
                text = pages.compare(read_number(query, "latent"), other)
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
        """Return whether the request knows the token or, without one, is for a loopback host.

        Without a token, the host is checked against DNS rebinding: a foreign page could otherwise
        read ours through a host name that resolves to this machine.
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
        """Log nothing for a request."""
