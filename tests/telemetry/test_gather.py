"""The metrics pages of a pod's ranks, merged into one."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from dist_sae.telemetry import gather, server
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.gather import GatheredTelemetry, Rank, merge
from dist_sae.telemetry.server import PageServer
from tests.telemetry.scrape import of_rank, scrape, series


@pytest.fixture(autouse=True)
def no_last_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks exit without waiting for a last scrape."""
    monkeypatch.setattr(server, "LAST_SCRAPE_SECONDS", 0.0)


def settled(gathered: GatheredTelemetry, up: int) -> str:
    """Return the page once `up` ranks are up. On a busy machine the first page may lack a rank."""
    deadline = time.monotonic() + 30
    while sum(of_rank(page := scrape(gathered.port), "dist_sae_rank_up").values()) != up:
        assert time.monotonic() < deadline, page
    return page


def test_every_series_of_every_rank_is_there_once_and_families_are_whole() -> None:
    with ExitStack() as open_:
        ranks = {
            rank: open_.enter_context(Telemetry("run", "train", 0, rank)) for rank in (0, 1, 9)
        }
        for rank, telemetry in ranks.items():
            telemetry.set("dist_sae_train_fvu", rank / 10)
            telemetry.observe("dist_sae_store_operation_seconds", 0.1, operation="get")
        ports = {rank: telemetry.port or 0 for rank, telemetry in ranks.items()}
        gathered = open_.enter_context(GatheredTelemetry("run", "train", ports, 0))
        page = settled(gathered, up=3)
        own = [scrape(port) for port in ports.values()]
    assert of_rank(page, "dist_sae_train_fvu") == {"0": 0.0, "1": 0.1, "9": 0.9}
    assert of_rank(page, "dist_sae_rank_up") == {"0": 1.0, "1": 1.0, "9": 1.0}
    assert len(series(page)) == sum(len(series(text)) for text in own) + len(ranks)
    names = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_a_rank_that_is_gone_is_marked_and_not_shown() -> None:
    with Telemetry("run", "train", 0, 0) as first, ExitStack() as second:
        other = second.enter_context(Telemetry("run", "train", 0, 1))
        ports = {0: first.port or 0, 1: other.port or 0}
        with GatheredTelemetry("run", "train", ports, 0) as gathered:
            page = settled(gathered, up=2)
            assert of_rank(page, "dist_sae_run_finished") == {"0": 0.0, "1": 0.0}
            second.close()
            page = settled(gathered, up=1)
    assert of_rank(page, "dist_sae_rank_up") == {"0": 1.0, "1": 0.0}
    assert of_rank(page, "dist_sae_run_finished") == {"0": 0}


def test_a_busy_rank_holds_nobody_up_and_is_shown_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy, free = threading.Event(), threading.Event()
    free.set()

    def render(_: bool) -> bytes:  # noqa: FBT001
        busy.set()
        free.wait(20)
        return b'# HELP one A one.\n# TYPE one gauge\none{rank="1"} 1.0\n'

    slow = PageServer(0, render, lambda _: None)
    with GatheredTelemetry("run", "train", {1: slow.port}, 0) as gathered:
        settled(gathered, up=1)
        free.clear()
        busy.clear()
        since = time.monotonic()
        page = scrape(gathered.port)
        seconds = time.monotonic() - since
        assert busy.wait(20)
        assert of_rank(page, "one") == {"1": 1.0}
        assert of_rank(page, "dist_sae_rank_up") == {"1": 1.0}
        assert seconds < 5  # the server waits 40 ms; the rest is this machine's load
        free.set()
        settled(gathered, up=1)
        free.clear()
        monkeypatch.setattr(gather, "RESPONSE_TIMEOUT_SECONDS", 0.05)
        page = settled(gathered, up=0)  # the rank's answer took too long
        assert of_rank(page, "one") == {}
        free.set()
    slow.close()


def test_last_words_that_come_too_late_for_a_page_are_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that was scraped exits, so an answer that is too late for one page must be in the
    next.
    """
    asked, free = threading.Event(), threading.Event()

    def render(scraped: bool) -> bytes:  # noqa: FBT001
        assert scraped  # the request is marked as a scrape by Prometheus
        asked.set()
        assert free.wait(20)
        return b'# HELP one A one.\n# TYPE one gauge\none{rank="1"} 1.0\n'

    answers, ask = list[Future[None]](), Rank.request_page

    def kept(*args: Any, **kwargs: Any) -> Future[None]:
        answers.append(ask(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(Rank, "request_page", kept)
    monkeypatch.setattr(gather, "SCRAPE_TIMEOUT_SECONDS", 0.0)
    slow = PageServer(0, render, lambda _: None)
    with GatheredTelemetry("run", "train", {1: slow.port}, 0) as gathered:
        assert of_rank(scrape(gathered.port), "one") == {}
        assert asked.wait(20)
        free.set()
        answers[0].result(20)
        slow.close()
        monkeypatch.setattr(gather, "SCRAPE_TIMEOUT_SECONDS", 20.0)
        assert of_rank(scrape(gathered.port), "one") == {"1": 1.0}
        assert of_rank(scrape(gathered.port), "one") == {}


def test_a_proxy_for_the_internet_is_not_asked_for_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Telemetry("run", "train", 0, 1) as telemetry, ThreadPoolExecutor(1) as pool:
        rank = Rank(1, telemetry.port or 0)
        assert rank.probe_failure("/livez") is None
        rank.request_page(pool, scraped=False).result(20)
        assert "dist_sae_run_info" in rank.serve()


def test_pages_are_merged_by_family() -> None:
    one = "# HELP a An a.\n# TYPE a gauge\na 1\n# HELP b A b.\n# TYPE b counter\nb 2\n"
    other = "# HELP b A b.\n# TYPE b counter\nb 3\n"
    assert merge([one, other]) == (
        "# HELP a An a.\n# TYPE a gauge\na 1\n# HELP b A b.\n# TYPE b counter\nb 2\nb 3\n"
    )
