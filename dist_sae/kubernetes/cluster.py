"""A namespace of a cluster; the only module that uses the official Kubernetes client.

Objects are plain mappings, as `jobs.py` renders them. Errors of the client are mapped here.
"""

import copy
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple

import urllib3
import yaml
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, list_kube_config_contexts, load_kube_config
from kubernetes.utils.quantity import parse_quantity

from dist_sae.config.cluster import ClusterConfig
from dist_sae.errors import ClusterError, ForbiddenError, NotStartedError, RejectedError
from dist_sae.kubernetes.jobs import JOBSET_VERSION
from dist_sae.kubernetes.pods import Object

MANAGER = "dist-sae"
"""Field manager of applied objects."""

_KUBECONFIG = "~/.kube/config"
_ROLE = "role dist-sae-researcher of k8s/base"
_NODES_ROLE = "cluster role dist-sae-nodes of k8s/base"
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
POD_SECONDS = 3.0
"""A pod that takes longer to answer is passed over."""
"""Time limit for a pod's answer: a network policy may drop it silently."""
PAGE_OBJECTS = 500
"""Objects that are asked for at a time: pods take about 10 kB each."""
_WATCH_SECONDS = 20
_UNREADABLE = (ConfigException, OSError, yaml.YAMLError)
_NO_CONTENT = 204
_NOT_FOUND = 404
_EXPIRED = 410
"""Status of a watch that starts before what the server remembers."""


class _Resource(NamedTuple):
    version: str
    plural: str

    @property
    def base(self) -> str:
        return f"/apis/{self.version}" if "/" in self.version else f"/api/{self.version}"


_RESOURCES = {
    "ConfigMap": _Resource("v1", "configmaps"),
    "Service": _Resource("v1", "services"),
    "NetworkPolicy": _Resource("networking.k8s.io/v1", "networkpolicies"),
    "Pod": _Resource("v1", "pods"),
    "Job": _Resource("batch/v1", "jobs"),
    "JobSet": _Resource(JOBSET_VERSION, "jobsets"),
    "Workload": _Resource("kueue.x-k8s.io/v1beta2", "workloads"),
    "Event": _Resource("v1", "events"),
}


class Cluster:
    """A namespace, accessed with the user's kubeconfig at the first request.

    Every method raises a `ClusterError` if there is no such kubeconfig or context, if the cluster
    does not answer, or if it refuses access.

    Args:
        config: Names the namespace, and the context of the kubeconfig.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.namespace = config.namespace
        self._file = os.environ.get("KUBECONFIG") or _KUBECONFIG
        self._context = config.context

    @cached_property
    def _client(self) -> ApiClient:
        settings = Configuration()
        settings.retries = urllib3.Retry(2, backoff_factor=0.2)
        # no messages about attempts that are retried
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        try:
            load_kube_config(self._file, context=self._context, client_configuration=settings)
        except _UNREADABLE as exc:
            raise ClusterError(
                f"{self._origin}: no kubeconfig that can be used ({_line(exc)}); log in to the "
                f"cluster, set KUBECONFIG or correct cluster.context"
            ) from exc
        return ApiClient(settings)

    @cached_property
    def _hasty_client(self) -> ApiClient:
        """A client that does not retry."""
        settings = copy.copy(self._client.configuration)
        settings.retries = urllib3.Retry(0)
        return ApiClient(settings)

    @property
    def _origin(self) -> str:
        """Kubeconfig and context, for messages."""
        name = self._context
        if name is None:
            with suppress(*_UNREADABLE):
                name = list_kube_config_contexts(self._file)[1]["name"]
        return f"context {name} of {self._file}" if name else self._file

    def apply(self, obj: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply; returns the resulting object.

        Raises:
            RejectedError: It is invalid, or changes an immutable field.
        """
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if dry_run else {}
        path = self._path(obj["kind"], obj["metadata"]["name"])
        applied = self._ask("PATCH", path, query, obj, "application/apply-patch+yaml")
        assert applied is not None
        return applied

    def get(self, kind: str, name: str) -> Object | None:
        """Get an object; None if it does not exist."""
        return self._ask("GET", self._path(kind, name), may_lack=True)

    def find(self, kind: str, selector: Mapping[str, str]) -> list[Object]:
        """List objects with these labels, oldest first; empty if the kind is not installed."""
        return self._list(kind, selector)[0]

    def warnings(self) -> list[Object]:
        """Warning events of the namespace, oldest first."""
        events = self._list_all(self._path("Event"), {"fieldSelector": "type=Warning"})[0]
        return sorted(events, key=lambda event: event["metadata"]["creationTimestamp"])

    def follow(self, kind: str, selector: Mapping[str, str]) -> Iterator[list[Object]]:
        """Yield the result of `find` at once and after every change, sometimes unchanged."""
        while True:
            found, version = self._list(kind, selector)
            yield found
            query = self._selecting(selector) | {"watch": "1", "resourceVersion": version}
            query |= {"timeoutSeconds": str(_WATCH_SECONDS)}
            path = self._path(kind)
            with self._mapped(path):
                try:
                    with self._send("GET", path, query) as answer:
                        next(iter(answer), None)
                except ApiException as exc:
                    if exc.status != _EXPIRED:
                        raise
                except urllib3.exceptions.HTTPError:  # the next listing reports the error
                    continue

    def delete(self, obj: Object) -> None:
        """Begin to delete this object (by uid); it goes after the objects that it owns."""
        metadata = obj["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": metadata["uid"]},
        }
        path = self._path(obj["kind"], metadata["name"])
        self._ask("DELETE", path, body=body, may_lack=True)

    def logs(
        self, pod: str, container: str, *, follow: bool, tail: int | None, stamped: bool = False
    ) -> Iterator[str]:
        """Log lines of a container, with times if `stamped`; with `follow` until it ends.

        Raises:
            NotStartedError: The container has not started.
        """
        query = {"container": container}
        query |= {"follow": "true"} if follow else {}
        query |= {"timestamps": "true"} if stamped else {}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        path = f"{self._path('Pod', pod)}/log"
        with self._mapped(path), self._send("GET", path, query, patient=follow) as answer:
            if answer.status == _NO_CONTENT:
                raise NotStartedError(
                    f"{self._origin}: pod {pod} has no node yet; dist-sae status shows why"
                )
            for line in answer:
                yield line.decode(errors="replace").rstrip("\n")

    def proxy(self, pod: str, port: int, path: str) -> str:
        """Ask a pod through the API server, without retries, and return its answer."""
        whole = f"{self._path('Pod', f'{pod}:{port}')}/proxy/{path}"
        with self._mapped(whole):
            try:
                text: str = self._send("GET", whole, hasty=True).data.decode()
            except urllib3.exceptions.HTTPError as exc:
                if not isinstance(_reason(exc), urllib3.exceptions.ReadTimeoutError):
                    raise
                raise ClusterError(
                    f"{self._origin}: pod {pod} does not answer on port {port} within "
                    f"{POD_SECONDS:g} s; check whether a network policy blocks the API server"
                ) from exc
            return text

    def nodes(self) -> list[Object]:
        """The nodes of the cluster.

        Raises:
            ForbiddenError: The user may only see the namespace.
        """
        return self._list_all("/api/v1/nodes", {})[0]

    def _list(self, kind: str, selector: Mapping[str, str]) -> tuple[list[Object], str]:
        path, query = self._path(kind), self._selecting(selector)
        found, resource_version = self._list_all(path, query, may_lack=True)
        version = _RESOURCES[kind].version  # items of a list lack version and kind
        items: list[Object] = [{"apiVersion": version, "kind": kind, **item} for item in found]
        items.sort(key=lambda obj: obj["metadata"]["creationTimestamp"])
        return items, resource_version

    def _list_all(
        self, path: str, query: Mapping[str, str], *, may_lack: bool = False
    ) -> tuple[list[Object], str]:
        """Items of a list, page by page, and their version; empty if `may_lack` and it lacks."""
        items, token = list[Object](), ""
        while True:
            page = {**query, "limit": str(PAGE_OBJECTS)} | ({"continue": token} if token else {})
            answer = self._ask("GET", path, page, may_lack=may_lack)
            if answer is None:
                return [], ""
            items += answer["items"]
            metadata = answer.get("metadata", {})
            token = metadata.get("continue", "")
            if not token:
                return items, metadata.get("resourceVersion", "")

    def _selecting(self, selector: Mapping[str, str]) -> dict[str, str]:
        return {"labelSelector": ",".join(f"{key}={value}" for key, value in selector.items())}

    def _path(self, kind: str, name: str | None = None) -> str:
        resource = _RESOURCES[kind]
        path = f"{resource.base}/namespaces/{self.namespace}/{resource.plural}"
        return f"{path}/{name}" if name else path

    def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        *,
        may_lack: bool = False,
    ) -> Object | None:
        """Send a request and return the answer; None if `may_lack` and it does not exist."""
        with self._mapped(path):
            try:
                answer = self._send(method, path, query, body, content)
            except ApiException as exc:
                if may_lack and exc.status == _NOT_FOUND:
                    return None
                raise
            found: Object = json.loads(answer.data)
            return found

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        *,
        patient: bool = False,
        hasty: bool = False,
    ) -> urllib3.HTTPResponse:
        seconds = None if patient else POD_SECONDS if hasty else _ANSWER_SECONDS
        client = self._hasty_client if hasty else self._client
        answer: urllib3.HTTPResponse = client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, seconds),
        )
        return answer

    @contextmanager
    def _mapped(self, path: str) -> Iterator[None]:
        """Map the client's errors about this path to ours."""
        try:
            yield
        except ApiException as exc:
            raise self._refusal(exc, path) from exc
        except urllib3.exceptions.HTTPError as exc:
            server = self._client.configuration.host
            why = type(_reason(exc)).__name__
            raise ClusterError(
                f"{self._origin}: {server} does not answer ({why}); check the network, the "
                f"context and your login"
            ) from exc

    def _refusal(self, exc: ApiException, path: str) -> ClusterError:
        status = _status_of(exc)
        said = status.get("message") or _line(exc.reason or exc)
        match exc.status:
            case 401:
                return ClusterError(f"{self._origin}: your login is refused; log in again")
            case 403:
                return self._forbidden(said)
            case 404:
                return self._not_found(status, said, path)
            case 400 if path.endswith("/log"):  # a node's answer
                return NotStartedError(f"{self._origin}: {_line(said)}")
            case 422:
                return RejectedError(_line(said))
            case _:
                return ClusterError(f"{self._origin}: {_line(said)}")

    def _not_found(self, status: dict[str, Any], said: str, path: str) -> ClusterError:
        kind, jobset = (status.get("details") or {}).get("kind"), _RESOURCES["JobSet"]
        if not status and path.startswith(jobset.base):
            return ClusterError(
                f"{self._origin}: the cluster does not know {jobset.version}; install JobSet, "
                f"or set cluster.jobset: false"
            )
        if kind == "namespaces":
            return ClusterError(
                f"namespace {self.namespace} does not exist; create it "
                f"(kubectl apply -k k8s/base) or correct cluster.namespace"
            )
        if kind == "pods/log":  # a node that does not know the pod yet
            return NotStartedError(f"{self._origin}: {_line(said)}")
        return ClusterError(f"{self._origin}: {_line(said)}")

    def _forbidden(self, said: str) -> ClusterError:
        found = re.search(
            r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]*)"', said
        )
        if not found and "denied the request" in said:  # JobSet's webhook, or somebody's policy
            return RejectedError(_line(said))
        if not found:  # a quota
            return ClusterError(f"{self._origin}: {_line(said)}")
        nodes = found["resource"] == "nodes"
        where = "of the cluster" if nodes else f"in namespace {self.namespace}"
        return ForbiddenError(
            f"{self._origin}: {found['user']} may not {found['verb']} {found['resource']} {where}; "
            f"{_NODES_ROLE if nodes else _ROLE} would allow it"
        )


def amount(quantity: str | float) -> Decimal:
    """Parse a quantity as Kubernetes writes it."""
    number: Decimal = parse_quantity(quantity)
    return number


def _status_of(exc: ApiException) -> dict[str, Any]:
    """The `Status` in the API server's answer; empty if there is none."""
    with suppress(ValueError, TypeError):
        status = json.loads(exc.body)
        if isinstance(status, dict) and status.get("kind") == "Status":
            return status
    return {}


def _reason(exc: BaseException) -> BaseException:
    """The cause that urllib3 wraps."""
    return getattr(exc, "reason", None) or exc


def _line(error: object) -> str:
    return " ".join(str(error).split())
