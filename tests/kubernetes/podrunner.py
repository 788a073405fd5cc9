"""A Kubernetes cluster on one machine that runs rendered objects.

    Cluster     takes objects, and reconciles Jobs and JobSets whenever a pod changes
    Pod         a pod as its kubelet sees it (`kubelet.py`)
    Container   processes in separate Linux namespaces (`sandbox.py`)

Nothing polls: threads wait for processes to end and for probes and pauses to become due. Everything
is stopped and removed at the end of the `with` block, even after an exception.
"""

import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.forks import HANG_SECONDS
from tests.kubernetes.controllers import Condition, Job, JobSet
from tests.kubernetes.kubelet import ENDED, Node, Pod
from tests.kubernetes.manifests import Object
from tests.kubernetes.sandbox import Network, read_image
from tests.preloaded import preloaded_programs


class Cluster:
    """A cluster with its objects and their pods.

    Args:
        folder: Folder for the pods' files and logs.
        time_scale: Factor on the time between probes.
        pause_scale: Factor on the pause before a pod is replaced.
    """

    def __init__(
        self, folder: Path, *, time_scale: float = 0.25, pause_scale: float = 0.001
    ) -> None:
        self.network = Network()
        self.pods: list[Pod] = []
        self.jobs: dict[str, Job] = {}
        self.jobsets: dict[str, JobSet] = {}
        self._services: dict[str, Object] = {}
        self._config: dict[tuple[str, str], dict[str, str]] = {}
        self._node = Node(
            folder, read_image(folder / "image"), self.network, self._config, time_scale
        )
        self._programs = ExitStack()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._over = False
        self._pause_scale = pause_scale
        self._controllers = threading.Thread(target=self._control, name="controllers")
        self._controllers.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._controllers.join()
        with ExitStack() as each:  # runs all of them, last one first, even if one raises
            each.callback(self.network.close)
            each.callback(self._programs.close)
            for pod in self.pods:
                each.callback(pod.close)

    def preload(self) -> None:
        """Let containers run `dist-sae` from preloaded modules from now on."""
        self._programs.enter_context(preloaded_programs(self._node.image.programs))

    def apply(self, objects: Iterable[Object]) -> None:
        """Create objects."""
        with self._changed:
            for item in objects:
                name = item["metadata"]["name"]
                match item["kind"]:
                    case "ConfigMap":
                        self._config["ConfigMap", name] = item["data"]
                    case "Secret":
                        data = {k: b64decode(v).decode() for k, v in item.get("data", {}).items()}
                        self._config["Secret", name] = data | item.get("stringData", {})
                    case "NetworkPolicy":
                        pass  # not supported by this network
                    case "Service":
                        self._services[name] = item
                    case "Job":
                        self._make_job(item)
                    case "JobSet":
                        assert name not in self.jobsets
                        self.jobsets[name] = jobset = JobSet(item, self._make_job)
                        self._services[jobset.service["metadata"]["name"]] = jobset.service
                    case kind:
                        raise NotImplementedError(f"{kind}: this runner does not know it")
            self._changed.notify_all()

    def delete(self, name: str, seconds: float = HANG_SECONDS) -> None:
        """Delete a JobSet with its dependents, and wait until its pods have ended."""
        with self._changed:
            jobset = self.jobsets.pop(name)
            jobset.delete()
        jobs = [job for jobs in jobset.jobs.values() for job in jobs]
        self.wait(lambda: not any(job.active for job in jobs), seconds)
        with self._changed:
            for job in jobs:
                del self.jobs[job.name]

    def wait(self, until: Callable[[], object], seconds: float = HANG_SECONDS) -> None:
        """Wait for a condition, which is checked whenever a pod changes.

        Raises:
            TimeoutError: The condition is still false. The message contains the pods' logs.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or until(), seconds)
            if self._failure:
                raise self._failure
            if not until():
                raise TimeoutError(self.story())

    def running(self, job: str, index: int) -> Pod:
        """Return the running pod of a job's index."""
        with self._changed:
            return self.jobs[job].active[index]

    def conditions(self) -> dict[str, Condition | None]:
        """Return the conditions of all Jobs and JobSets."""
        return {name: item.condition for name, item in (self.jobs | self.jobsets).items()}

    def story(self) -> str:
        """Describe what happened, for people."""
        pods = (
            f"== {pod.name} {pod.phase} {pod.exit_codes} {pod.conditions}\n{pod.log()[-1000:]}"
            for pod in self.pods
        )
        return "\n".join([*pods, *(f"{name}: {what}" for name, what in self.conditions().items())])

    def _make_job(self, manifest: Object) -> Job:
        job = Job(manifest, self._make_pod, self._clock)
        assert job.name not in self.jobs
        self.jobs[job.name] = job
        return job

    def _make_pod(self, manifest: Object) -> Pod:
        pod = Pod(manifest, self._node, self._tell)
        self.pods.append(pod)
        self._publish_names()
        pod.start()
        return pod

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _control(self) -> None:
        with self._changed:
            while not self._over and self._failure is None:
                try:
                    self._reconcile()
                except BaseException as exc:
                    self._failure = exc
                self._changed.notify_all()  # wakes threads in `wait`
                self._changed.wait(self._pause())

    def _clock(self) -> float:
        return time.monotonic() / self._pause_scale

    def _pause(self) -> float | None:
        """Return the seconds until the first pause of a Job ends, or None if there is no pause."""
        starts = [job.next_start for job in self.jobs.values() if job.next_start is not None]
        left = min(starts) - self._clock() if starts else None
        return left and max(0.0, left * self._pause_scale)

    def _reconcile(self) -> None:
        for job in self.jobs.values():
            job.reconcile()
        for jobset in self.jobsets.values():
            jobset.reconcile()
        for job in self.jobs.values():  # again, because JobSets may have created some
            job.reconcile()
        self._publish_names()

    def _publish_names(self) -> None:
        """Publish the names of existing pods as headless Services do: <hostname>.<subdomain>."""
        there = [pod for pod in self.pods if pod.phase not in ENDED]
        lines = []
        for pod in there:
            service = self._services.get(pod.spec.get("subdomain", ""))
            if service is None or not service["spec"]["selector"].items() <= pod.labels.items():
                continue
            if pod.ready or service["spec"].get("publishNotReadyAddresses", False):
                name = f"{pod.hostname}.{pod.spec['subdomain']}"
                lines.append(f"{pod.address} {name}\n")
        for pod in there:
            pod.name_hosts("".join(lines))
