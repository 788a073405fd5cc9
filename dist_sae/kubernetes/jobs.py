"""The objects of a run: Run -> ConfigMap, NetworkPolicy and JobSet, or plain Indexed Jobs. Pure.

With `cluster.producer.apart`, producers are a plain Job alongside the JobSet.

A pod's exit code decides what happens next:

    0       done
    2       the user must fix something: the Job fails, and the run with it
    evicted, preempted, drained (DisruptionTarget): replaced, not counted
    75      stopped and resumable (preempted, a rank lost, the store unreachable): the same
    143     SIGTERM before the program handled it: the same
    else    a crash. Reporter: counted against `retries`.
            Other parts: replaced, and not counted by Kubernetes. But 1, 126 and 127 are counted
            against `retries`, because a program that could not start its work ends with these.

Kubernetes never resets its failure count of an index, however much progress the pods make. So all
parts except the reporter count for themselves (`storage/lives.py`): after `retries` pods in a row
that ended without progress, for any reason, the next pod exits with 2. If parts are separate Jobs,
a part that exits with 2 notifies the others (`storage/failure.py`).

The Job controller waits before it replaces a pod: 10 s, doubled at every failure, at most 10 min.
Failures that are not counted lengthen the wait too (kubernetes#130881). Without a
`backoffLimitPerIndex`, it counts failures over the whole Job. Then 16 pods that end together would
wait for 10 min, and of a thousand producers one would always end before the wait is over.
"""

import signal
from collections.abc import Iterator
from typing import get_args

from dist_sae.config import Run, dump_run
from dist_sae.config.data import FilesCorpus
from dist_sae.errors import EXIT_BUG, EXIT_RESUMABLE, EXIT_USER, ConfigError
from dist_sae.kubernetes.names import labels, object_name, selector
from dist_sae.kubernetes.pods import (
    METRICS,
    Object,
    Part,
    has_own_job,
    n_pods,
    pod_template,
    pods_of,
)
from dist_sae.storage.lives import Part as LivingPart

JOBSET_VERSION = "jobset.x-k8s.io/v1alpha2"
RUN_KEY = "run.yaml"
MIN_PARALLELISM = "kueue.x-k8s.io/job-min-parallelism"
"""Annotation of a Job whose `parallelism` Kueue may reduce to this number."""
_ELASTIC = "kueue.x-k8s.io/elastic-job"
_TERMINATED = 128 + signal.SIGTERM
_NOT_STARTED = (126, 127)  # the container runtime could not start the program


def render_objects(run: Run) -> list[Object]:
    """Render all objects that `submit` applies, in order.

    Raises:
        ConfigError: The run cannot run on a cluster. The message has one line per reason.
    """
    if problems := list(_problems(run)):
        raise ConfigError("\n".join(problems))
    configuration = _object(run, "v1", "ConfigMap") | {
        "data": {RUN_KEY: dump_run(with_metrics_port(run))}
    }
    policy = _network_policy(run)
    own_jobs = [_plain_job(run, part) for part in parts(run) if has_own_job(run, part)]
    if run.cluster.jobset:
        return [configuration, policy, _jobset(run), *own_jobs]
    service = _object(run, "v1", "Service") | {
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the rendezvous comes before ranks are ready
            "selector": selector(run),
        }
    }
    return [configuration, policy, service, *own_jobs]


def _network_policy(run: Run) -> Object:
    """Render a policy by which only the run's own pods reach its pods, except for metrics.

    Ranks trust each other, because the rendezvous, NCCL and gloo have no authentication. A policy
    for the whole namespace cannot say "of the same run", so each run has its own.
    """
    own = {"matchLabels": selector(run)}
    return _object(run, "networking.k8s.io/v1", "NetworkPolicy") | {
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": own}]}, {"ports": [{"port": METRICS}]}],
        }
    }


def parts(run: Run) -> list[Part]:
    """Return the run's parts on a cluster, in the order of the JobSet."""
    left_out = {"index": not run.index.workers, "reporter": run.cluster.reporter is None}
    return [part for part in get_args(Part) if not left_out.get(part)]


def _prerequisite(run: Run, part: Part) -> Part | None:
    """Return the part that must complete before this one starts, or None.

    Only a JobSet enforces this order. Pods of plain Jobs wait by themselves (`--wait`).
    """
    last: Part = "index" if run.index.workers else "trainer"
    before: dict[Part, Part] = {
        "producer": "planner",
        "trainer": "planner",
        "index": "trainer",
        "reporter": last,
    }
    return before.get(part)


def job_name(run: Run, part: Part) -> str:
    """Return the name of a part's Job. It is the same with and without JobSet."""
    return f"{object_name(run)}-{part}-0"


def _jobset(run: Run) -> Object:
    return _with_queue(run, _object(run, JOBSET_VERSION, "JobSet")) | {
        "spec": {
            "ttlSecondsAfterFinished": int(3600 * run.cluster.keep_hours),
            "network": {
                "enableDNSHostnames": True,
                "subdomain": object_name(run),
                "publishNotReadyAddresses": True,
            },
            # a Job that fails has used its retries, or would fail again for the same reason
            "failurePolicy": {
                "maxRestarts": 0,
                "rules": [{"name": "stop", "action": "FailJobSet"}],
            },
            "replicatedJobs": [
                _replicated_job(run, part) for part in parts(run) if not has_own_job(run, part)
            ],
        }
    }


def _replicated_job(run: Run, part: Part) -> Object:
    job: Object = {"name": part, "replicas": 1, "groupName": "default"}
    if before := _prerequisite(run, part):
        job["dependsOn"] = [{"name": before, "status": "Complete"}]
    return job | {"template": {"metadata": {"labels": labels(run, part)}, "spec": _job(run, part)}}


def _plain_job(run: Run, part: Part) -> Object:
    queue = run.cluster.producer.queue if part == "producer" else None
    job = _with_queue(run, _object(run, "batch/v1", "Job"), queue)
    job["metadata"]["name"] = job_name(run, part)
    job["metadata"]["labels"] |= selector(run, part)
    if part == "producer":
        job["metadata"] |= _kueue_annotations(run)
    spec = _job(run, part)
    spec["template"]["spec"]["subdomain"] = object_name(run)
    # no TTL: a Job that was deleted would look like one that has not started
    return job | {"spec": spec}


def _job(run: Run, part: Part) -> Object:
    def exits(action: str, *codes: int, operator: str = "In") -> Object:
        return {"action": action, "onExitCodes": {"operator": operator, "values": list(codes)}}

    if part in get_args(LivingPart):
        again = exits("Ignore", EXIT_BUG, EXIT_USER, *_NOT_STARTED, operator="NotIn")
    else:
        again = exits("Ignore", EXIT_RESUMABLE, _TERMINATED)
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "completionMode": "Indexed",
        "completions": n_pods(run, part),
        "parallelism": n_pods(run, part),
        "backoffLimitPerIndex": pods_of(run, part).retries,
        "maxFailedIndexes": 0,  # every part needs all of its pods
        "podReplacementPolicy": "Failed",  # two pods with one index would be the same rank twice
        "podFailurePolicy": {
            "rules": [
                exits("FailJob", EXIT_USER),
                {"action": "Ignore", "onPodConditions": disrupted},
                again,
            ]
        },
        "template": pod_template(run, part),
    }


def _object(run: Run, version: str, kind: str) -> Object:
    metadata = {
        "name": object_name(run),
        "namespace": run.cluster.namespace,
        "labels": labels(run),
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _with_queue(run: Run, workload: Object, queue: str | None = None) -> Object:
    """Add the Kueue queue's label. Kueue admits a JobSet as a whole, and plain Jobs one by one."""
    if queue := queue or run.cluster.queue:
        workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue
    return workload


def _kueue_annotations(run: Run) -> Object:
    """Return the annotations by which Kueue may admit only some of the producers.

    Kueue accepts at most one of the two.
    """
    producer = run.cluster.producer
    if producer.least is not None:
        # `completions` is not reduced as well: producers that start later find less to do, and
        # without conditional writes, the share of a producer that never starts would be left out
        return {"annotations": {MIN_PARALLELISM: str(producer.least)}}
    return {"annotations": {_ELASTIC: "true"}} if producer.elastic else {}


def with_metrics_port(run: Run) -> Run:
    """Return the run as pods read it: with a metrics port for Prometheus and the probes."""
    telemetry = run.telemetry.model_copy(update={"port": run.telemetry.port or run.cluster.port})
    return run.model_copy(update={"telemetry": telemetry})


def _problems(run: Run) -> list[str]:
    """List settings that are invalid on a cluster."""
    problems = []
    if run.cluster.image is None:
        problems.append(
            "cluster.image: missing; build launch/Dockerfile, push the image and name it here"
        )
    problems += [
        f"store.{place}: {url} is a local folder, which pods cannot share; use s3://bucket/prefix"
        for place, url in (("activations", run.store.activations), ("runs", run.store.runs))
        if not url.startswith("s3://")
    ]
    problems += _admission_problems(run)
    if isinstance(run.corpus, FilesCorpus):
        problems += [
            f"corpus.files: {name} is relative to a folder that pods do not have; use "
            f"s3://bucket/key, or an absolute path in the image"
            for name in run.corpus.files
            if not name.startswith(("s3://", "/"))
        ]
    if run.model.kind == "huggingface":
        models = {"model": run.model, "model.other": run.model.other}
        problems += [
            f"{key}.path: {model.path} is relative to a folder that pods do not have; use a "
            f"name on the hub, s3://bucket/folder, or an absolute path in the image"
            for key, model in models.items()
            if model and model.path.startswith((".", "~"))
        ]
    return problems


def _admission_problems(run: Run) -> Iterator[str]:
    """Yield invalid settings of the producers' queue."""
    producer, producers = run.cluster.producer, run.processes.producers
    given = [name for name in ("queue", "least", "elastic") if getattr(producer, name)]
    if given and not has_own_job(run, "producer"):
        yield (
            f"cluster.producer.{given[0]}: producers in the JobSet are queued with it; set "
            f"cluster.producer.apart: true"
        )
    if given and not (producer.queue or run.cluster.queue):
        yield f"cluster.producer.{given[0]}: has no effect without a queue; set cluster.queue"
    if producer.least and producer.elastic:
        yield "cluster.producer.elastic: Kueue does not allow it together with least; choose one"
    if producer.least and producer.least >= producers:
        yield (
            f"cluster.producer.least: {producer.least} must be less than processes.producers "
            f"{producers}"
        )
