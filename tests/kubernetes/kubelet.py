"""A kubelet: runs a pod's containers one after the other, and probes them.

A pod is created from its manifest and runs until it is Succeeded or Failed. Then it has the exit
codes. The time between probes can be scaled down, but not the failure thresholds.
"""

import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import NamedTuple

from tests.kubernetes.manifests import Object
from tests.kubernetes.probe import Probe
from tests.kubernetes.sandbox import Container, Image, Mount, Network, User

DISRUPTED = "DisruptionTarget"
"""Condition of a pod that the cluster ended, instead of its program."""
_NOT_STARTED = 128
ENDED = ("Succeeded", "Failed")


class Node(NamedTuple):
    """Node of a pod: the resources of the machine and the cluster that a pod uses."""

    folder: Path
    image: Image
    network: Network
    config: Mapping[tuple[str, str], Mapping[str, str]]
    """Data of ConfigMaps and Secrets, by kind and name."""
    time_scale: float
    """Factor on the time between probes and before the first one."""


class Pod:
    """A running pod.

    Args:
        manifest: Mapping with `metadata` and `spec`.
        node: Node that the pod runs on.
        changed: Function that is called after each change of the pod's status.
    """

    def __init__(self, manifest: Object, node: Node, changed: Callable[[], None]) -> None:
        self.name: str = manifest["metadata"]["name"]
        self.labels: dict[str, str] = manifest["metadata"]["labels"]
        self.spec: Object = manifest["spec"]
        self.hostname: str = self.spec.get("hostname", self.name)
        self.phase = "Pending"
        self.ready = False
        self.has_started = False
        """Whether the startup probe, if any, has succeeded."""
        self.exit_codes: dict[str, int] = {}
        """Exit codes of containers that have ended, by name."""
        self.conditions: set[str] = set()
        self.cut_off = False
        """Whether the node is unreachable. The pod continues, but its status does not change."""
        self.terminating = False
        self.folder = node.folder / self.name
        self._metadata: Object = manifest["metadata"]
        self._node = node
        self._changed = changed
        self._container: Container | None = None
        self._lock = threading.Lock()  # a container must not be started and signaled concurrently
        self._killing: threading.Timer | None = None
        self.folder.mkdir()
        self._hosts = self.folder / "hosts"
        self._hosts.touch()
        self._volumes = {volume["name"]: self._volume(volume) for volume in self.spec["volumes"]}
        self._namespace, self.address = node.network.attach()
        self._thread = threading.Thread(target=self._run, name=self.name)

    def start(self) -> None:
        self._thread.start()

    def name_hosts(self, names: str) -> None:
        """Set the names of other pods, as lines of /etc/hosts."""
        own = f"127.0.0.1 localhost\n{self.address} {self.hostname}\n"
        with self._hosts.open("r+") as file:  # overwritten in place, because it is bind-mounted
            file.write((own + names).ljust(8192, "\n"))

    def terminate(self) -> None:
        """Send SIGTERM, and SIGKILL after the grace period, as for a deleted pod."""
        with self._lock:
            if self.terminating:
                return
            self.terminating = True
            self._end_container()

    def preempt(self) -> None:
        """Terminate with the condition of a disruption, as if preempted by another pod."""
        self.conditions.add(DISRUPTED)
        self.terminate()

    def kill(self) -> None:
        """Send SIGKILL to all processes."""
        with self._lock:  # a container may log before the pod knows that it has started
            if self._container is not None:
                self._container.signal(SIGKILL)

    def lose(self) -> None:
        """Lose the pod together with its node."""
        self.conditions.add(DISRUPTED)
        self.kill()
        self.cut_off = False
        self._report("Failed")

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the processes of the running container as (process id, command)."""
        with self._lock:
            assert self._container is not None
            return self._container.processes()

    def log(self) -> str:
        """Return the output of the pod's containers."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """Kill the pod if it is still running, and remove it."""
        with self._lock:
            self.terminating = True
            if self._container is not None:
                self._container.signal(SIGKILL)
        self._thread.join()
        self._node.network.detach(self._namespace)
        for volume in self._volumes.values():
            shutil.rmtree(volume)

    def _run(self) -> None:
        self._report("Running")
        # no container runs after the first one that fails
        failed = any(self._run_container(container) for container in self._containers())
        self._report("Failed" if failed else "Succeeded")

    def _containers(self) -> list[Object]:
        """Return the containers in order. Exactly one is not an init container."""
        (main,) = self.spec["containers"]
        return [*self.spec.get("initContainers", []), main]

    def _run_container(self, spec: Object) -> int:
        code = _NOT_STARTED
        try:
            with self._lock:
                if self.terminating:
                    return code
                self._container = container = self._start(spec)
            code = self._probe_until_end(container, spec)
        except Exception:
            self._say(traceback.format_exc())
        self.exit_codes[spec["name"]] = code
        if self._killing is not None:
            self._killing.cancel()
        return code

    def _start(self, spec: Object) -> Container:
        image = self._node.image
        root = self.folder / f"root-{spec['name']}"
        root.mkdir()
        env = image.env | {"HOSTNAME": self.hostname} | self._environment(spec)

        def expand(words: list[str]) -> list[str]:
            return [_expand(word, env) for word in words]

        command = expand(spec.get("command", image.entrypoint)) + expand(spec.get("args", []))
        mounts = [
            Mount(self._part(m["name"], m.get("subPath")), m["mountPath"], m.get("readOnly", False))
            for m in spec.get("volumeMounts", [])
        ]
        security = spec.get("securityContext", {})
        pod_security = self.spec.get("securityContext", {})
        user = User(
            pod_security.get("runAsUser", 0),
            pod_security.get("runAsGroup", 0),
            [pod_security["fsGroup"]] if "fsGroup" in pod_security else [],
            no_new_privileges=not security.get("allowPrivilegeEscalation", True),
            drop_capabilities="ALL" in security.get("capabilities", {}).get("drop", []),
        )
        assert user.user or not pod_security.get("runAsNonRoot"), "runAsNonRoot, and it is root"
        return Container(
            command,
            env,
            [*mounts, Mount(self._hosts, "/etc/hosts"), *image.mounts],
            workdir=image.workdir,
            root=root,
            read_only=security.get("readOnlyRootFilesystem", False),
            namespace=self._namespace,
            hostname=self.hostname,
            user=user,
            log=self.folder / f"{spec['name']}.log",
        )

    def _environment(self, spec: Object) -> dict[str, str]:
        config, env = self._node.config, dict[str, str]()
        for source in spec.get("envFrom", []):
            ((reference, of),) = source.items()
            kind = {"configMapRef": "ConfigMap", "secretRef": "Secret"}[reference]
            env |= config[kind, of["name"]]
        for entry in spec.get("env", []):
            if "value" in entry:
                env[entry["name"]] = _expand(entry["value"], env)
            elif key := entry["valueFrom"].get("configMapKeyRef"):
                data = config["ConfigMap", key["name"]]
                if key["key"] in data or not key.get("optional"):
                    env[entry["name"]] = data[key["key"]]
            else:
                env[entry["name"]] = self._field(entry["valueFrom"]["fieldRef"]["fieldPath"])
        return env

    def _field(self, path: str) -> str:
        fields = {"metadata.name": self.name, "status.podIP": self.address}
        fields["spec.nodeName"] = "node-of-" + self.name
        for kind in ("labels", "annotations"):
            for key, value in self._metadata.get(kind, {}).items():
                fields[f"metadata.{kind}['{key}']"] = value
        return fields[path]

    def _volume(self, volume: Object) -> Path:
        """Create a folder on this machine for a volume."""
        folder: Path = self.folder / f"volume-{volume['name']}"
        if "configMap" in volume:
            folder.mkdir()
            for key, value in self._node.config["ConfigMap", volume["configMap"]["name"]].items():
                (folder / key).write_text(value)
            return folder
        if volume["emptyDir"].get("medium") == "Memory":
            folder = Path("/dev/shm", f"{self._node.network.name}-{self.name}-{volume['name']}")
        folder.mkdir()
        folder.chmod(0o777)
        return folder

    def _part(self, volume: str, path: str | None) -> Path:
        """Return a volume's folder, or a subfolder with the same permissions."""
        whole: Path = self._volumes[volume]
        if path is None:
            return whole
        (whole / path).mkdir(exist_ok=True)
        (whole / path).chmod(whole.stat().st_mode)
        return whole / path

    def _probe_until_end(self, container: Container, spec: Object) -> int:
        """Probe a container until it ends, and end it if a probe fails. Returns the exit code."""
        port = {named["name"]: named["containerPort"] for named in spec.get("ports", [])}
        probes = {
            kind: Probe(spec[f"{kind}Probe"], self.address, port, self._node.time_scale)
            for kind in ("startup", "liveness", "readiness")
            if f"{kind}Probe" in spec
        }
        is_main = spec in self.spec["containers"]
        active = {"startup": probes.pop("startup")} if "startup" in probes else probes
        if active is probes and is_main:
            self._be_started(ready="readiness" not in probes)
        while True:
            due = min((probe.due for probe in active.values()), default=None)
            left = None if due is None or self.terminating else max(0.0, due - time.monotonic())
            if (code := container.wait(left)) is not None:
                self._be_ready(ready=False)
                return code
            for kind, probe in list(active.items()):
                if time.monotonic() < probe.due or (answer := probe.ask()) is None:
                    continue
                if kind == "readiness":
                    self._be_ready(ready=answer)
                elif not answer:
                    self._say(f"{spec['name']}: {kind} probe failed")
                    with self._lock:
                        self._end_container()
                    active = {}
                elif kind == "startup":
                    active = probes
                    self._be_started(ready="readiness" not in probes)

    def _be_started(self, *, ready: bool) -> None:
        self.has_started = True
        self._be_ready(ready=ready)
        self._changed()

    def _say(self, words: str) -> None:
        with (self.folder / "runner.log").open("a") as log:
            log.write(f"{words}\n")

    def _be_ready(self, *, ready: bool) -> None:
        if ready != self.ready and not self.cut_off:
            self.ready = ready
            self._changed()

    def _end_container(self) -> None:
        if self._container is not None and self._killing is None:
            grace = self.spec["terminationGracePeriodSeconds"]
            self._killing = threading.Timer(grace, self._container.signal, [SIGKILL])
            self._killing.daemon = True
            self._killing.start()
            self._container.signal(SIGTERM)

    def _report(self, phase: str) -> None:
        if self.phase not in ENDED and not self.cut_off:
            self.phase = phase
            self._changed()


def _expand(text: str, env: Mapping[str, str]) -> str:
    """Expand $(NAME) if the variable exists; $$ stands for $."""
    return re.sub(
        r"\$\$|\$\(([\w.-]+)\)",
        lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]),
        text,
    )
