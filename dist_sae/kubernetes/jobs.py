"""The objects of a run: Run -> ConfigMap, NetworkPolicy and JobSet, or plain Indexed Jobs. Pure.

With `cluster.producer.apart` producers are a plain Job beside the JobSet.

How a pod ends decides what happens next:

    0       done
    2       something for the user to fix: the job fails, and the run with it
    evicted, preempted, drained (DisruptionTarget): a new pod, not counted
    75      stopped and resumable (preempted, a rank lost, the store away): the same
    143     SIGTERM before the program handled it: the same
    else    a crash. Reporter: counted against `retries`.
            All others: a new pod, not counted by Kubernetes; but 1, 126 and 127, with which a
            program ends that has not come to work, are counted against `retries`

All but the reporter count by themselves (`storage/lives.py`): `retries` lives in a row without
progress, however they ended, and the next one ends with 2. Kubernetes' own count of an index is
never set back. Where parts are Jobs by themselves, one that ends with 2 tells the others
(`storage/failure.py`).

The Job controller waits before it replaces a pod: 10 s, doubled with every failure, at most 10 min,
and failures that are not counted lengthen the wait as others do (kubernetes#130881). It counts over
the whole Job unless there is a `backoffLimitPerIndex`: 16 pods that end together would wait for 10
min, and among a thousand producers one ends before the wait for the last is over.
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
    is_apart,
    n_pods,
    pod_template,
    pods_of,
)
from dist_sae.storage.lives import Part as LivingPart

JOBSET_VERSION = "jobset.x-k8s.io/v1alpha2"
RUN_KEY = "run.yaml"
LEAST = "kueue.x-k8s.io/job-min-parallelism"
"""Annotation of a Job whose `parallelism` Kueue may reduce."""
_ELASTIC = "kueue.x-k8s.io/elastic-job"
_TERMINATED = 128 + signal.SIGTERM
_NOT_STARTED = (126, 127)  # by the container's runtime


def render_objects(run: Run) -> list[Object]:
    """Render everything that `submit` applies, in order.

    Raises:
        ConfigError: The run cannot run on a cluster; one line per reason.
    """
    if problems := list(_problems(run)):
        raise ConfigError("\n".join(problems))
    configuration = _object(run, "v1", "ConfigMap") | {"data": {RUN_KEY: dump_run(in_pods(run))}}
    policy = _network_policy(run)
    apart = [_plain_job(run, part) for part in parts(run) if is_apart(run, part)]
    if run.cluster.jobset:
        return [configuration, policy, _jobset(run), *apart]
    service = _object(run, "v1", "Service") | {
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # ranks meet before they are ready
            "selector": selector(run),
        }
    }
    return [configuration, policy, service, *apart]


def _network_policy(run: Run) -> Object:
    """Close the run's pods to all others of the namespace.

    Ranks trust one another (rendezvous, NCCL and gloo know no passwords). The policy of the
    namespace cannot say "of the same run", so each run brings its own.
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
    """Parts of the run on a cluster, in the order of a JobSet."""
    left_out = {"index": not run.index.workers, "reporter": run.cluster.reporter is None}
    return [part for part in get_args(Part) if not left_out.get(part)]


def _before(run: Run, part: Part) -> Part | None:
    """The part after whose end this one begins; the pods of a Job by itself wait (`--wait`)."""
    last: Part = "index" if run.index.workers else "trainer"
    before: dict[Part, Part] = {
        "producer": "planner",
        "trainer": "planner",
        "index": "trainer",
        "reporter": last,
    }
    return before.get(part)


def job_name(run: Run, part: Part) -> str:
    """The name of a part's Job, with JobSet and without."""
    return f"{object_name(run)}-{part}-0"


def _jobset(run: Run) -> Object:
    return _queued(run, _object(run, JOBSET_VERSION, "JobSet")) | {
        "spec": {
            "ttlSecondsAfterFinished": int(3600 * run.cluster.keep_hours),
            "network": {
                "enableDNSHostnames": True,
                "subdomain": object_name(run),
                "publishNotReadyAddresses": True,
            },
            # a job that fails has used its retries, or would fail the same way again
            "failurePolicy": {
                "maxRestarts": 0,
                "rules": [{"name": "stop", "action": "FailJobSet"}],
            },
            "replicatedJobs": [
                _replicated_job(run, part) for part in parts(run) if not is_apart(run, part)
            ],
        }
    }


def _replicated_job(run: Run, part: Part) -> Object:
    job: Object = {"name": part, "replicas": 1, "groupName": "default"}
    if before := _before(run, part):
        job["dependsOn"] = [{"name": before, "status": "Complete"}]
    return job | {"template": {"metadata": {"labels": labels(run, part)}, "spec": _job(run, part)}}


def _plain_job(run: Run, part: Part) -> Object:
    queue = run.cluster.producer.queue if part == "producer" else None
    job = _queued(run, _object(run, "batch/v1", "Job"), queue)
    job["metadata"]["name"] = job_name(run, part)
    job["metadata"]["labels"] |= selector(run, part)
    if part == "producer":
        job["metadata"] |= _of_kueue(run)
    spec = _job(run, part)
    spec["template"]["spec"]["subdomain"] = object_name(run)
    # no time to live: a deleted job would look like one that has not begun
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
        "maxFailedIndexes": 0,  # no part can do without one of its pods
        "podReplacementPolicy": "Failed",  # never two pods of one index: they would be one rank
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


def _queued(run: Run, workload: Object, queue: str | None = None) -> Object:
    """Add the label of the Kueue queue: a JobSet is admitted whole, plain Jobs one by one."""
    if queue := queue or run.cluster.queue:
        workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue
    return workload


def _of_kueue(run: Run) -> Object:
    """How Kueue may admit producers that are apart. It takes one of these annotations at most."""
    producer = run.cluster.producer
    if producer.least is not None:
        # without the annotation that reduces completions, too: who comes later finds less to do,
        # and no share of the units is left out where a store has no conditional writes
        return {"annotations": {LEAST: str(producer.least)}}
    return {"annotations": {_ELASTIC: "true"}} if producer.elastic else {}


def in_pods(run: Run) -> Run:
    """The run as pods read it: with a metrics port, for Prometheus and probes."""
    telemetry = run.telemetry.model_copy(update={"port": run.telemetry.port or run.cluster.port})
    return run.model_copy(update={"telemetry": telemetry})


def _problems(run: Run) -> list[str]:
    """Settings that are invalid on a cluster."""
    problems = []
    if run.cluster.image is None:
        problems.append("cluster.image: missing; build launch/Dockerfile and name what you pushed")
    problems += [
        f"store.{place}: {url} is a folder of one machine; pods share s3://bucket/prefix only"
        for place, url in (("activations", run.store.activations), ("runs", run.store.runs))
        if not url.startswith("s3://")
    ]
    problems += _admission_problems(run)
    if isinstance(run.corpus, FilesCorpus):
        problems += [
            f"corpus.files: {name} is relative to a folder that pods do not have; give "
            f"s3://bucket/key, or an absolute path in the image"
            for name in run.corpus.files
            if not name.startswith(("s3://", "/"))
        ]
    if run.model.kind == "huggingface":
        models = {"model": run.model, "model.other": run.model.other}
        problems += [
            f"{key}.path: {model.path} is relative to a folder that pods do not have; give a "
            f"name on the hub, s3://bucket/folder, or an absolute path in the image"
            for key, model in models.items()
            if model and model.path.startswith((".", "~"))
        ]
    return problems


def _admission_problems(run: Run) -> Iterator[str]:
    """Settings of the producers' queue that are invalid."""
    producer, producers = run.cluster.producer, run.processes.producers
    set_ = [name for name in ("queue", "least", "elastic") if getattr(producer, name)]
    if set_ and not is_apart(run, "producer"):
        yield (
            f"cluster.producer.{set_[0]}: producers of the JobSet are queued with it; set "
            f"cluster.producer.apart: true"
        )
    if set_ and not (producer.queue or run.cluster.queue):
        yield f"cluster.producer.{set_[0]}: without a queue (cluster.queue) it has no effect"
    if producer.least and producer.elastic:
        yield "cluster.producer.elastic: Kueue refuses it together with least; choose one"
    if producer.least and producer.least >= producers:
        yield (
            f"cluster.producer.least: {producer.least} must be less than processes.producers "
            f"{producers}"
        )
