"""Builds PromQL from the metric table, so that an unknown name or label is an error here.

In a dashboard, it would only show as an empty panel.
"""

import re
from typing import Literal, NamedTuple, Self

from dist_sae.telemetry.metric import EVERY_SERIES
from dist_sae.telemetry.metrics import TABLE

_START = "dist_sae_process_start_timestamp_seconds"
MANY = 16
"""Number of ranks from which on a line for each would be too many to tell apart."""
_SHOWN = 5  # ranks shown if there are many
_PODS = "(planner|producer|trainer|index|reporter)-0-[0-9]+-[a-z0-9]+"
_NAMES = "run_role_kubernetes_name:dist_sae_run_info:last12h"
_RESTARTS = "run_role_rank:dist_sae_process_start_timestamp_seconds:max"


class Query(NamedTuple):
    """An expression and the legend of its series (`{{label}}` is a label's value)."""

    expr: str
    legend: str

    def named(self, word: str) -> Self:
        """Add a word to the legend, to distinguish the series from those of other queries."""
        return self._replace(legend=f"{self.legend} {word}")

    def over(self, other: "Query", on: str | None = None) -> Self:
        """Divide by another query. With `on`, divide many series by one."""
        match = f"on ({_by(on)}) group_left () " if on else ""
        return self._replace(expr=f"{self.expr} / {match}({other.expr} > 0)")

    def averaged(self, by: str) -> Self:
        """Average the chosen ranks' series over all labels but `by`."""
        mean = _aggregated(self.expr, by, "avg")
        return self._replace(expr=mean.expr, legend=mean.legend)


def now(name: str, by: str = "run", how: str = "max", **where: str) -> Query:
    """Query a gauge's value. `max` takes any rank's, because all export the same global values."""
    return _aggregated(f"{_series(name, 'gauge', by, where)}", by, how)


def rate(name: str, by: str = "run", how: str = "sum", **where: str) -> Query:
    """Query a counter's growth per second."""
    series = _series(name, "counter", by, where)
    return _aggregated(f"rate({series}[$__rate_interval])", by, how)


def growth(name: str, by: str = "run", **where: str) -> Query:
    """Query a counter's growth over the time range of the dashboard."""
    return _aggregated(f"increase({_series(name, 'counter', by, where)}[$__range])", by, "sum")


def quantile(share: float, name: str, by: str) -> Query:
    """Query a quantile of a histogram."""
    series = _series(name, "histogram", by, {}).replace("{", "_bucket{")
    buckets = f"sum by ({_by(by)}, le) (rate({series}[$__rate_interval]))"
    return Query(f"histogram_quantile({share}, {buckets})", _legend(by)).named(f"p{share * 100:g}")


def age(name: str, by: str = "run") -> Query:
    """Query the seconds since the timestamp in a gauge."""
    moment = now(name, by)
    return moment._replace(expr=f"time() - {moment.expr}")


def alive(role: str) -> Query:
    """Query the number of scraped processes of a role."""
    ranks = f"count by (namespace, run, rank) ({_START}{{{_matchers(['run'], {'role': role})}}})"
    return _aggregated(ranks, "run", "count")


def recorded(name: str, **where: str) -> Query:
    """Query a recording rule of monitoring/rules.yaml, whose name begins with its labels."""
    labels = re.findall(r"run|role|rank|phase|waited_for", name.partition(":")[0])
    shown = ", ".join(label for label in labels if label not in where)
    return Query(f"{name}{{{_matchers(['run'], where)}}}", _legend(shown))


def by_rank(query: Query, *, lowest: bool = False) -> tuple[Query, ...]:
    """Show a line for each rank; for many ranks, the median, a tail and its most extreme ranks.

    Args:
        query: Query with a series for each rank.
        lowest: Whether the lowest values are the ones to look at, instead of the highest.
    """
    labels = re.findall(r"{{(\w+)}}", query.legend)
    by = ", ".join(label for label in labels if label not in ("namespace", "rank"))
    all_by = _by(by)
    tail, ends = (0.05, "bottomk") if lowest else (0.95, "topk")
    of_many = f"and on ({all_by}) count by ({all_by}) ({query.expr}) >= {MANY}"
    quantiles = (
        Query(f"quantile by ({all_by}) ({share}, {query.expr}) {of_many}", _legend(by)).named(name)
        for share, name in ((0.5, "median"), (tail, f"p{tail * 100:.0f}"))
    )
    return (
        query._replace(
            expr=f"{query.expr} and on ({all_by}) count by ({all_by}) ({query.expr}) < {MANY}"
        ),
        *quantiles,
        query._replace(expr=f"{ends} by ({all_by}) ({_SHOWN}, {query.expr}) {of_many}"),
    )


def slowest_ranks() -> Query:
    """Query the ranks that wait least, so the others wait for them, with the ranks' nodes."""
    series = _series("dist_sae_train_phase_seconds_total", "counter", "run", {"phase": "ranks"})
    waits = f"max by (namespace, pod, run, rank) (rate({series}[$__rate_interval]))"
    nodes = "max by (namespace, pod, node) (kube_pod_info)"
    slowest = f"bottomk by (namespace, run) ({_SHOWN}, {waits})"
    expr = f"{slowest} * on (namespace, pod) group_left (node) {nodes}"
    return Query(expr, f"{_legend('run, rank')} on {{{{node}}}}")


def pending_pods() -> Query:
    """Count pods that have no node yet, or whose containers cannot start."""
    series = f'kube_pod_status_phase{{phase="Pending",pod=~".+-{_PODS}"}} == 1'
    name = f'label_replace({series}, "kubernetes_name", "$1", "pod", "(.+)-{_PODS}")'
    part = f'label_replace({name}, "part", "$2", "pod", "(.+)-{_PODS}")'
    chosen = f"{_NAMES}{{{_matchers(['run'], {})}}}"
    expr = f"{part} and on (namespace, kubernetes_name) {chosen}"
    return _aggregated(expr, "kubernetes_name, part", "count")


def restarts() -> Query:
    """Count restarts of processes within the last hour."""
    changes = f"changes({_RESTARTS}{{{_matchers(['run'], {})}}}[1h])"
    return _aggregated(changes, "run, role", "sum")


def _series(
    name: str, kind: Literal["counter", "gauge", "histogram"], by: str, where: dict[str, str]
) -> str:
    """Select a metric's series with the dashboard's variables.

    Raises:
        ValueError: The metric is of another kind or lacks a label.
    """
    metric, labels = TABLE[name], by.split(", ")
    if metric.kind != kind:
        raise ValueError(f"{name} is a {metric.kind}, not a {kind}")
    if unknown := {*labels, *where} - {*EVERY_SERIES, *metric.labels}:
        raise ValueError(f"{name} has no label {', '.join(sorted(unknown))}")
    chosen = ["run", "rank"] if "rank" in labels else ["run"]
    return f"{name}{{{_matchers(chosen, where)}}}"


def _matchers(chosen: list[str], where: dict[str, str]) -> str:
    fixed = [f'{k}{"=~" if "|" in v else "="}"{v}"' for k, v in where.items()]
    return ",".join([*(f'{label}=~"${label}"' for label in ("namespace", *chosen)), *fixed])


def _aggregated(expr: str, by: str, how: str) -> Query:
    return Query(f"{how} by ({_by(by)}) ({expr})", _legend(by))


def _by(labels: str) -> str:
    """Add the namespace to these labels, because runs in two namespaces may have the same name."""
    return f"namespace, {labels}"


def _legend(by: str) -> str:
    """Format a legend: `{{namespace}} {{run}} rank {{rank}} {{phase}}`.

    Outside Kubernetes, the namespace is empty.
    """
    labels = _by(by).split(", ")
    return " ".join(f"{'rank ' * (label == 'rank')}{{{{{label}}}}}" for label in labels)
