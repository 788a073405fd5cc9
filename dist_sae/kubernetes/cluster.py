"""Client for one namespace of a cluster. No other module uses the official Kubernetes client.

Objects are plain mappings, as `jobs.py` renders them. The client's exceptions are mapped to ours.
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
"""Field manager for server-side apply."""

_KUBECONFIG = "~/.kube/config"
_ROLE = "role dist-sae-researcher of k8s/base"
_NODES_ROLE = "cluster role dist-sae-nodes of k8s/base"
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
"""Connect and read timeouts of requests to the API server."""
POD_SECONDS = 3.0
"""Read timeout of requests to a pod. Short, because a network policy may drop them silently."""
PAGE_OBJECTS = 500
"""Number of objects per page of a list. A pod takes about 10 kB."""
_WATCH_SECONDS = 20
_UNREADABLE = (ConfigException, OSError, yaml.YAMLError)
_NO_CONTENT = 204
_NOT_FOUND = 404
_EXPIRED = 410
"""HTTP status of a watch whose resource version is older than the server's history."""


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
    """Client for a namespace. Loads the user's kubeconfig at the first request.

    Every method raises a `ClusterError` if the kubeconfig or its context does not exist, or if the
    cluster does not respond or denies access.

    Args:
        config: Namespace, and context of the kubeconfig.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.namespace = config.namespace
        self._file = os.environ.get("KUBECONFIG") or _KUBECONFIG
        self._context = config.context

    @cached_property
    def _client(self) -> ApiClient:
        settings = Configuration()
        settings.retries = urllib3.Retry(2, backoff_factor=0.2)
        # urllib3 would log every attempt that is retried
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
        """Client that does not retry."""
        settings = copy.copy(self._client.configuration)
        settings.retries = urllib3.Retry(0)
        return ApiClient(settings)

    @property
    def _origin(self) -> str:
        """Context and kubeconfig, for error messages."""
        name = self._context
        if name is None:
            with suppress(*_UNREADABLE):
                name = list_kube_config_contexts(self._file)[1]["name"]
        return f"context {name} of {self._file}" if name else self._file

    def apply(self, obj: Object, *, dry_run: bool = False) -> Object:
        """Apply an object on the server side and return the result.

        Raises:
            RejectedError: The object is invalid, or changes an immutable field.
        """
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if dry_run else {}
        path = self._path(obj["kind"], obj["metadata"]["name"])
        applied = self._ask("PATCH", path, query, obj, "application/apply-patch+yaml")
        assert applied is not None
        return applied

    def get(self, kind: str, name: str) -> Object | None:
        """Return an object, or None if it does not exist."""
        return self._ask("GET", self._path(kind, name), may_lack=True)

    def find(self, kind: str, selector: Mapping[str, str]) -> list[Object]:
        """Return objects with these labels, oldest first. Empty if the kind is not installed."""
        return self._list(kind, selector)[0]

    def warnings(self) -> list[Object]:
        """Return the namespace's warning events, oldest first."""
        events = self._list_all(self._path("Event"), {"fieldSelector": "type=Warning"})[0]
        return sorted(events, key=lambda event: event["metadata"]["creationTimestamp"])

    def follow(self, kind: str, selector: Mapping[str, str]) -> Iterator[list[Object]]:
        """Yield the result of `find` immediately and after every change, sometimes unchanged."""
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
        """Start to delete the object with this uid. The objects that it owns are deleted first."""
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
        """Yield a container's log lines, prefixed with timestamps if `stamped`.

        With `follow`, also yields new lines until the container ends.

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
        """Send a GET request to a pod through the API server and return the body. Not retried."""
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
        """Return the cluster's nodes.

        Raises:
            ForbiddenError: The user may not list nodes.
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
        """Return the items of all pages and the list's resource version.

        Both are empty if the list does not exist and `may_lack` is set.
        """
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
        """Send a request and return the JSON of the response; None for a 404 if `may_lack`."""
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
        """Raise the client's exceptions about this path as ours."""
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
            case 400 if path.endswith("/log"):  # the kubelet's response
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
        if kind == "pods/log":  # the kubelet does not know the pod yet
            return NotStartedError(f"{self._origin}: {_line(said)}")
        return ClusterError(f"{self._origin}: {_line(said)}")

    def _forbidden(self, said: str) -> ClusterError:
        found = re.search(
            r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]*)"', said
        )
        if not found and "denied the request" in said:  # by JobSet's webhook or an admission policy
            return RejectedError(_line(said))
        if not found:  # for example, a quota is exceeded
            return ClusterError(f"{self._origin}: {_line(said)}")
        nodes = found["resource"] == "nodes"
        where = "of the cluster" if nodes else f"in namespace {self.namespace}"
        return ForbiddenError(
            f"{self._origin}: {found['user']} may not {found['verb']} {found['resource']} {where}; "
            f"{_NODES_ROLE if nodes else _ROLE} would allow it"
        )


def amount(quantity: str | float) -> Decimal:
    """Parse a Kubernetes quantity, such as `500m` or `2Gi`."""
    number: Decimal = parse_quantity(quantity)
    return number


def _status_of(exc: ApiException) -> dict[str, Any]:
    """Return the `Status` object in the API server's response, or an empty mapping."""
    with suppress(ValueError, TypeError):
        status = json.loads(exc.body)
        if isinstance(status, dict) and status.get("kind") == "Status":
            return status
    return {}


def _reason(exc: BaseException) -> BaseException:
    """Return the cause that urllib3 wrapped in the exception, or the exception itself."""
    return getattr(exc, "reason", None) or exc


def _line(error: object) -> str:
    return " ".join(str(error).split())
