"""Logs of a run's pods, including pods that were replaced."""

import heapq
import logging
import queue
import threading
from collections.abc import Iterator
from typing import get_args

from dist_sae.config import Run
from dist_sae.errors import ClusterError, NotStartedError
from dist_sae.kubernetes.cluster import Cluster
from dist_sae.kubernetes.cluster_objects import describe
from dist_sae.kubernetes.names import selector
from dist_sae.kubernetes.pod_status import has_ended, index_of, name_of, newest_pods, part_of
from dist_sae.kubernetes.pods import Object, Part

logger = logging.getLogger(__name__)

_Source = tuple[Object, str]
"""A pod and the name of one of its containers."""


def read_logs(
    run: Run,
    cluster: Cluster,
    which: str,
    *,
    follow: bool = False,
    previous: bool = False,
    tail: int | None = None,
) -> Iterator[str]:
    """Return log lines in order of time. With several pods, the pod's name is prepended to each.

    Args:
        which: A part, a part and an index (`trainer-0`), or a pod's name.
        follow: Wait for the pods to start, and yield lines until they end.
        previous: Read the logs of the pods that the current ones replaced.
        tail: Number of last lines per container; None for all.

    Raises:
        ClusterError: The pods do not exist, or have no logs yet.
    """
    pods = _chosen(cluster.find("Pod", selector(run)), which, previous=previous)
    if not pods:
        earlier = "earlier " if previous else ""
        raise ClusterError(
            f"{describe(run, cluster)}: there is no {earlier}pod {which}; "
            f"dist-sae status lists the pods"
        )
    sources = [
        (pod, container["name"])
        for pod in pods
        for spec in [pod["spec"]]
        for container in [*spec.get("initContainers", []), *spec["containers"]]
    ]
    if len(pods) == 1:
        return _one_after_another(cluster, sources, tail, follow=follow)
    merged = _as_they_come if follow else _by_time
    return merged(cluster, sources, tail)


def _chosen(pods: list[Object], which: str, *, previous: bool) -> list[Object]:
    part, _, index = which.rpartition("-")
    if which in get_args(Part):
        return newest_pods((p for p in pods if part_of(p) == which), before=int(previous))
    if part in get_args(Part) and index.isdigit():
        ranked = [p for p in pods if part_of(p) == part and index_of(p) == int(index)]
        return newest_pods(ranked, before=int(previous))
    return [pod for pod in pods if name_of(pod) == which]


def _one_after_another(
    cluster: Cluster, sources: list[_Source], tail: int | None, *, follow: bool
) -> Iterator[str]:
    """Yield the lines of one pod's containers, in the order in which they run."""
    for number, (pod, container) in enumerate(sources):
        try:
            if follow:
                yield from _follow(cluster, pod, container, tail)
            else:
                yield from cluster.logs(name_of(pod), container, follow=False, tail=tail)
        except NotStartedError:
            if not number:
                raise
            return  # the containers after this one have not started either


def _follow(cluster: Cluster, pod: Object, container: str, tail: int | None) -> Iterator[str]:
    """Wait until a container starts, and yield its lines until it ends."""
    name, waits = name_of(pod), False
    for pods in cluster.follow("Pod", pod["metadata"]["labels"]):
        try:
            yield from cluster.logs(name, container, follow=True, tail=tail)
        except NotStartedError as exc:
            if not any(name_of(other) == name and not has_ended(other) for other in pods):
                raise  # the pod has ended or is gone, so the container will never start
            if not waits:
                logger.info("waiting: %s", exc)
            waits = True
        else:
            return


def _by_time(cluster: Cluster, sources: list[_Source], tail: int | None) -> Iterator[str]:
    def lines(source: Object, container: str) -> Iterator[tuple[str, str]]:
        pod, stamp = name_of(source), ""
        try:
            for line in cluster.logs(pod, container, follow=False, tail=tail, stamped=True):
                stamp, _, text = line.partition(" ")
                yield stamp, f"{pod}: {text}"
        except ClusterError as exc:  # concerns one pod; the others' lines are still shown
            yield stamp, f"{pod}: ({exc})"

    for _, line in heapq.merge(*(lines(*source) for source in sources), key=lambda item: item[0]):
        yield line


def _as_they_come(cluster: Cluster, sources: list[_Source], tail: int | None) -> Iterator[str]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read(pod: Object, container: str) -> None:
        try:
            for line in _follow(cluster, pod, container, tail):
                lines.put(f"{name_of(pod)}: {line}")
        except ClusterError as exc:  # concerns one pod; the others continue
            lines.put(f"{name_of(pod)}: ({exc})")
        finally:
            lines.put(None)

    for source in sources:
        threading.Thread(target=read, args=source, daemon=True).start()
    for _ in sources:
        while (line := lines.get()) is not None:
            yield line
