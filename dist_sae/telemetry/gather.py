"""One metrics endpoint for all ranks of a pod, each of which serves its own page."""

import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Self
from urllib.error import HTTPError

from dist_sae.telemetry.metrics import TABLE
from dist_sae.telemetry.server import SCRAPE_HEADER, PageServer

SCRAPE_TIMEOUT_SECONDS = 0.04
"""Maximum wait for all ranks together, so that a scrape of a pod takes at most 50 ms."""
RESPONSE_TIMEOUT_SECONDS = 10.0
"""A rank that takes longer to respond is down."""
_PROBE_SECONDS = 5.0  # below the probe's own timeout, so that the response can name the rank

_UP = TABLE["dist_sae_rank_up"]


class GatheredTelemetry:
    """Serves the pages of a pod's ranks as one page.

    Labels keep the ranks' series apart. `dist_sae_rank_up` shows which ranks responded. For a busy
    rank, its last page is served. A rank that is gone has no series.

    Args:
        run: Name of the run.
        role: Program of the ranks: `produce` or `train`.
        targets: Ports of the ranks' own pages on this machine, by rank.
        port: Port to serve the merged page on; 0 for any free port.

    Raises:
        TelemetryError: The port is taken.
    """

    def __init__(self, run: str, role: str, targets: Mapping[int, int], port: int) -> None:
        self._labels = f'role="{role}",run="{run}"'
        self._ranks = [Rank(rank, target) for rank, target in targets.items()]
        self._pool = ThreadPoolExecutor(2 * len(self._ranks), "gather")  # scrape and probe
        self._server = PageServer(port, self._render, self._probe_failure)
        self.port = self._server.port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _render(self, scraped: bool) -> bytes:  # noqa: FBT001 - PageServer gives it no name
        answers = [rank.request_page(self._pool, scraped=scraped) for rank in self._ranks]
        wait(answers, timeout=SCRAPE_TIMEOUT_SECONDS)
        up = "".join(
            f'{_UP.name}{{rank="{rank.number}",{self._labels}}} {float(bool(rank.page))}\n'
            for rank in self._ranks
        )
        pages = [rank.serve() for rank in self._ranks]
        own = f"# HELP {_UP.name} {_UP.help}\n# TYPE {_UP.name} gauge\n{up}"
        return merge([own, *pages]).encode()

    def _probe_failure(self, path: str) -> str | None:
        """Return why a probe fails, or None. The pod is alive or ready when all ranks are."""
        failures = self._pool.map(lambda rank: rank.probe_failure(path), self._ranks)
        return next((failure for failure in failures if failure), None)


def merge(pages: Iterable[str]) -> str:
    """Merge pages in Prometheus' text format. Samples of the same metric family are joined."""
    families: dict[str, list[str]] = {}
    for page in pages:
        for family in page.split("# HELP ")[1:]:
            about, kind, samples = family.split("\n", 2)
            families.setdefault(f"# HELP {about}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs on this machine, ignoring HTTP_PROXY."""


class Rank:
    """A rank and its last page."""

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self.page = ""
        """The rank's last page; empty if the rank did not respond."""
        self._served = True
        self._url = f"http://127.0.0.1:{port}"
        self._request: Future[None] | None = None

    def request_page(self, pool: ThreadPoolExecutor, *, scraped: bool) -> Future[None]:
        """Request a new page unless a request is running; on behalf of Prometheus if `scraped`."""
        if self._request is None or self._request.done():
            self._request = pool.submit(self._fetch, {SCRAPE_HEADER: "1"} if scraped else {})
        return self._request

    def serve(self) -> str:
        """Return the page and note that it was served."""
        self._served = True
        return self.page

    def _fetch(self, headers: Mapping[str, str]) -> None:
        request = urllib.request.Request(f"{self._url}/metrics", headers=dict(headers))
        try:
            with _DIRECT.open(request, timeout=RESPONSE_TIMEOUT_SECONDS) as answer:
                self.page, self._served = answer.read().decode(), False
        except (OSError, HTTPException):  # no process or no response: rank_up reports it
            if self._served:  # else keep the rank's last page, which came too late for a scrape
                self.page = ""

    def probe_failure(self, path: str) -> str | None:
        """Return why the rank fails a probe; None if it passes."""
        try:
            with _DIRECT.open(f"{self._url}{path}", timeout=_PROBE_SECONDS):
                return None
        except HTTPError as exc:
            return f"rank {self.number}: {exc.read().decode().strip()}"
        except (OSError, HTTPException):
            return f"rank {self.number}: does not respond"
