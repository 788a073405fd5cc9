"""Real Prometheus, Alertmanager and Pushgateway with a run on S3: producers, ranks and an index."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

import promql_parser
import pytest

from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.index.layout import IndexFolder
from dist_sae.telemetry.dashboards import PAGES
from dist_sae.telemetry.dashboards.queries import MANY
from tests import launch
from tests.forks import Program
from tests.monitoring.files import alerts, metrics_in, rules
from tests.monitoring.servers import Prometheus, alertmanager, prometheus, pushgateway, webhook
from tests.runs import write_run
from tests.servers import OWNER, Server, free_ports

pytestmark = pytest.mark.system

WAIT_SECONDS = 300.0  # allows for a busy machine
MOST_SERIES = 500  # per rank

ABSENT = {
    "dist_sae_process_device_memory_bytes": "no GPU",
    "dist_sae_run_failed": "nothing has failed",
    "dist_sae_rank_up": "of a pod",
    "dist_sae_evaluate_ce_recovered": "of language models",
    "dist_sae_train_prefix_fvu": "of matryoshka",
    "dist_sae_train_site_fvu": "of several sites",
}
"""Metrics without a series in this run, and why. A query of any other metric must not be empty."""
OF_A_CLUSTER = ("kube_", "dist_sae_job:wanted")
"""Metrics of kube-state-metrics, and what is recorded from them."""


class Live(NamedTuple):
    prometheus: Prometheus
    alerts: "Queue[dict[str, Any]]"
    trainers: list[Program]
    evaluate: Callable[[], object]


@pytest.fixture(scope="module")
def live(
    server: Callable[[str], Server],
    server_client: Callable[[str], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    s3, bucket = server("seaweedfs"), "monitoring"
    client = server_client("seaweedfs")
    client.create_bucket(Bucket=bucket)
    port = free_ports(5)
    path = write_run(
        folder,
        store={
            "activations": f"s3://{bucket}/activations",
            "runs": f"s3://{bucket}/runs",
            "s3": {"endpoint_url": s3.endpoint_url},
            "max_ahead_units": 40,  # so that producers keep running for a while
        },
        corpus={"documents": 1_000},
        sae={
            "kind": "routed",
            "n_latents": 64,
            "k": 3,
            "experts": 4,
            "auxk": 16,
            "dead_after_rows": 480,
        },
        train={
            "rows": 2_000_000,
            "max_passes": 100,
            "save_every_steps": 20,
            "keep_checkpoints": 100,  # more than are saved while one is being evaluated
            "heldout_rows": 320,
        },
        timeouts={"lost_seconds": 10},  # a rank that waits three seconds for a core is not lost
        processes={"producers": 2, "trainers": 2, "latent_shards": 2},
        index={"name": "live", "rows": 320},
        telemetry={"port": port},
    )
    owner = {"AWS_ACCESS_KEY_ID": OWNER.id, "AWS_SECRET_ACCESS_KEY": OWNER.secret}
    launch.run("plan", str(path), env=owner)
    with ExitStack() as stack:
        gateway = stack.enter_context(pushgateway(folder))
        url, received = stack.enter_context(webhook())
        manager = stack.enter_context(alertmanager(folder, url))
        targets = [f"127.0.0.1:{port + i}" for i in range(5)]
        running = stack.enter_context(prometheus(folder, targets, gateway, manager))
        for i in range(2):
            stack.enter_context(program("produce", path, i, owner, "--index", str(i)))
        trainers = [
            stack.enter_context(program("train", path, 2 + i, owner | env))
            for i, env in enumerate(rank_environments(2, 2))
        ]
        # a claim by another worker on the only bucket keeps the index worker waiting, so it can be
        # scraped
        claim = IndexFolder("world", "live").bucket_claims.key(0)
        client.put_object(Bucket=bucket, Key=f"runs/{claim}", Body=b"{}")

        def unsaved() -> list[str]:
            assert [trainer.returncode for trainer in trainers] == [None, None]
            there = client.list_objects_v2(Bucket=bucket, Prefix="runs/world/checkpoints/")
            keys = [entry["Key"] for entry in there.get("Contents", [])]
            return [] if any(key.endswith("/manifest.json") for key in keys) else ["a checkpoint"]

        until(unsaved)
        stack.enter_context(program("index", path, 4, owner))
        push = f"telemetry.pushgateway_url=http://{gateway}"
        evaluate = partial(launch.run, "evaluate", str(path), "--set", push, env=owner)
        yield Live(running, received, trainers, evaluate)


@contextmanager
def program(
    command: str, path: Path, offset: int, env: dict[str, str], *options: str
) -> Iterator[Program]:
    """Start a program of the run, and kill it at the end.

    Its output is read so that it never blocks.
    """
    started = launch.start(command, str(path), "--port-offset", str(offset), *options, env=env)
    readers = [Thread(target=pipe.read) for pipe in (started.stdout, started.stderr)]
    for reader in readers:
        reader.start()
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        for reader in readers:
            reader.join()
        started.communicate()


def until(missing: Callable[[], list[str]]) -> None:
    """Wait until nothing is missing.

    Raises:
        AssertionError: Something, which the error lists, is missing after `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while left := missing():
        assert time.monotonic() < deadline, "\n".join(left)
        time.sleep(0.2)


def until_training(live: Live) -> None:
    until(lambda: [] if live.prometheus.query("run:dist_sae_train_step:share > 0") else ["no step"])


def filled(expression: str) -> str:
    """Fill in a query's variables as Grafana does when each is set to All."""
    expression = re.sub(r'"\$(namespace|run|rank)"', '".*"', expression)
    return expression.replace("$__rate_interval", "10s").replace("$__range", "1m")


def series_in(expression: str) -> set[str]:
    """Return an expression's selectors as text."""
    found, left = set[str](), [promql_parser.parse(expression)]
    while left:
        node = left.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.add(str(node))
        left += [
            getattr(node, name)
            for name in ("lhs", "rhs", "expr", "vector_selector")
            if hasattr(node, name)
        ]
        left += getattr(node, "args", [])
    return found


def excused(expression: str) -> bool:
    of_others = any(name in expression for name in ("ALERTS", *OF_A_CLUSTER))
    return of_others or f">= {MANY}" in expression or bool(metrics_in(expression) & set(ABSENT))


def test_every_panel_has_data(live: Live) -> None:
    """Each panel has data at some time.

    Not all have it at once, because producers exit once the held-out units are stored.
    """
    unanswered = {
        f"{page.name}, {panel.title}: {query.expr}": filled(query.expr)
        for page in PAGES
        for panels in page.sections.values()
        for panel in panels
        for query in panel.queries
        if not excused(query.expr)
    }

    def empty() -> list[str]:
        for name, expression in list(unanswered.items()):
            if live.prometheus.query(expression):
                del unanswered[name]
        return [name for name in unanswered if "dist_sae_evaluate_" not in name]

    until(empty)
    live.evaluate()
    until(lambda: empty() or list(unanswered))


def test_what_is_absent_is_absent(live: Live) -> None:
    assert [name for name in ABSENT if live.prometheus.query(name)] == []


def test_every_rule_and_alert_finds_its_series(live: Live) -> None:
    expressions = {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules() + alerts()}
    for expression in expressions.values():
        live.prometheus.query(expression)  # an invalid expression raises

    def empty() -> list[str]:
        return [
            f"{name}: {series}"
            for name, expression in expressions.items()
            for series in series_in(expression)
            if not live.prometheus.query(f"last_over_time({series}[1h])") and not excused(series)
        ]

    until(empty)


def test_a_scrape_is_small(live: Live) -> None:
    """`dist-sae bench metrics` measures how long a scrape takes."""
    for series in live.prometheus.query(
        'max_over_time(scrape_samples_scraped{job="dist_sae"}[1m])'
    ):
        assert 50 < float(series["value"][1]) <= MOST_SERIES, series


def test_a_healthy_run_alerts_nobody(live: Live) -> None:
    until_training(live)
    firing = live.prometheus.query('ALERTS{alertstate="firing"}')
    assert firing == []


def test_the_death_of_a_rank_is_heard_of(live: Live) -> None:
    """The other ranks exit when one dies, so without the alert nobody would notice."""
    until_training(live)  # the others would wait for a rank that dies before the rendezvous
    live.trainers[1].kill()
    assert live.trainers[0].wait(timeout=WAIT_SECONDS) == 75
    alert = live.alerts.get(timeout=WAIT_SECONDS)
    assert alert["status"] == "firing"
    assert alert["labels"]["alertname"] == "DistSaeTrainersGone"
    assert alert["labels"]["run"] == "world"
    assert "no trainer is running" in alert["annotations"]["summary"]
