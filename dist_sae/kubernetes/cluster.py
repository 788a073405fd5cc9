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
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 30.0
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
                f"{self._origin}: cannot use the kubeconfig ({_one_line(exc)}); log in to the "
                f"cluster, set KUBECONFIG or correct cluster.context"
            ) from exc
        return ApiClient(settings)

    @cached_property
    def _client_without_retries(self) -> ApiClient:
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
        applied = self._request("PATCH", path, query, obj, "application/apply-patch+yaml")
        assert applied is not None
        return applied

    def get(self, kind: str, name: str) -> Object | None:
        """Return an object, or None if it does not exist."""
        return self._request("GET", self._path(kind, name), missing_ok=True)

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
            query = self._label_query(selector) | {"watch": "1", "resourceVersion": version}
            query |= {"timeoutSeconds": str(_WATCH_SECONDS)}
            path = self._path(kind)
            with self._mapped(path):
                try:
                    with self._send("GET", path, query) as response:
                        next(iter(response), None)
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
        self._request("DELETE", path, body=body, missing_ok=True)

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
        seconds = None if follow else _READ_SECONDS
        with self._mapped(path), self._send("GET", path, query, timeout=seconds) as response:
            if response.status == _NO_CONTENT:
                raise NotStartedError(
                    f"{self._origin}: pod {pod} has no node yet; dist-sae status shows why"
                )
            for line in response:
                yield line.decode(errors="replace").rstrip("\n")

    def proxy(self, pod: str, port: int, path: str) -> str:
        """Send a GET request to a pod through the API server and return the body. Not retried."""
        whole = f"{self._path('Pod', f'{pod}:{port}')}/proxy/{path}"
        with self._mapped(whole):
            try:
                text: str = self._send(
                    "GET", whole, timeout=POD_SECONDS, retries=False
                ).data.decode()
            except urllib3.exceptions.HTTPError as exc:
                if not isinstance(_reason(exc), urllib3.exceptions.ReadTimeoutError):
                    raise
                raise ClusterError(
                    f"{self._origin}: pod {pod} does not respond on port {port} within "
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
        path, query = self._path(kind), self._label_query(selector)
        found, resource_version = self._list_all(path, query, missing_ok=True)
        version = _RESOURCES[kind].version  # items of a list lack version and kind
        items: list[Object] = [{"apiVersion": version, "kind": kind, **item} for item in found]
        items.sort(key=lambda obj: obj["metadata"]["creationTimestamp"])
        return items, resource_version

    def _list_all(
        self, path: str, query: Mapping[str, str], *, missing_ok: bool = False
    ) -> tuple[list[Object], str]:
        """Return the items of all pages and the list's resource version.

        Both are empty if the list does not exist and `missing_ok` is set.
        """
        items, token = list[Object](), ""
        while True:
            page = {**query, "limit": str(PAGE_OBJECTS)} | ({"continue": token} if token else {})
            response = self._request("GET", path, page, missing_ok=missing_ok)
            if response is None:
                return [], ""
            items += response["items"]
            metadata = response.get("metadata", {})
            token = metadata.get("continue", "")
            if not token:
                return items, metadata.get("resourceVersion", "")

    def _label_query(self, selector: Mapping[str, str]) -> dict[str, str]:
        return {"labelSelector": ",".join(f"{key}={value}" for key, value in selector.items())}

    def _path(self, kind: str, name: str | None = None) -> str:
        resource = _RESOURCES[kind]
        path = f"{resource.base}/namespaces/{self.namespace}/{resource.plural}"
        return f"{path}/{name}" if name else path

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        *,
        missing_ok: bool = False,
    ) -> Object | None:
        """Send a request and return the JSON of the response; None for a 404 if `missing_ok`."""
        with self._mapped(path):
            try:
                response = self._send(method, path, query, body, content)
            except ApiException as exc:
                if missing_ok and exc.status == _NOT_FOUND:
                    return None
                raise
            found: Object = json.loads(response.data)
            return found

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        *,
        timeout: float | None = _READ_SECONDS,
        retries: bool = True,
    ) -> urllib3.HTTPResponse:
        client = self._client if retries else self._client_without_retries
        response: urllib3.HTTPResponse = client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, timeout),
        )
        return response

    @contextmanager
    def _mapped(self, path: str) -> Iterator[None]:
        """Raise the client's exceptions about this path as ours."""
        try:
            yield
        except ApiException as exc:
            raise self._error_of(exc, path) from exc
        except urllib3.exceptions.HTTPError as exc:
            server = self._client.configuration.host
            why = type(_reason(exc)).__name__
            raise ClusterError(
                f"{self._origin}: {server} does not respond ({why}); check the network, the "
                f"context and your login"
            ) from exc

    def _error_of(self, exc: ApiException, path: str) -> ClusterError:
        status = _status_of(exc)
        message = status.get("message") or _one_line(exc.reason or exc)
        match exc.status:
            case 401:
                return ClusterError(
                    f"{self._origin}: the cluster rejected your login; log in again"
                )
            case 403:
                return self._forbidden(message)
            case 404:
                return self._not_found(status, message, path)
            case 400 if path.endswith("/log"):  # the kubelet's response
                return NotStartedError(f"{self._origin}: {_one_line(message)}")
            case 422:
                return RejectedError(_one_line(message))
            case _:
                return ClusterError(f"{self._origin}: {_one_line(message)}")

    def _not_found(self, status: dict[str, Any], message: str, path: str) -> ClusterError:
        kind, jobset = (status.get("details") or {}).get("kind"), _RESOURCES["JobSet"]
        if not status and path.startswith(jobset.base):
            return ClusterError(
                f"{self._origin}: the cluster does not have {jobset.version}; install JobSet, "
                f"or set cluster.jobset: false"
            )
        if kind == "namespaces":
            return ClusterError(
                f"namespace {self.namespace} does not exist; create it "
                f"(kubectl apply -k k8s/base) or correct cluster.namespace"
            )
        if kind == "pods/log":  # the kubelet does not know the pod yet
            return NotStartedError(f"{self._origin}: {_one_line(message)}")
        return ClusterError(f"{self._origin}: {_one_line(message)}")

    def _forbidden(self, message: str) -> ClusterError:
        found = re.search(
            r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]*)"', message
        )
        # by JobSet's webhook or an admission policy
        if not found and "denied the request" in message:
            return RejectedError(_one_line(message))
        if not found:  # for example, a quota is exceeded
            return ClusterError(f"{self._origin}: {_one_line(message)}")
        nodes = found["resource"] == "nodes"
        where = "of the cluster" if nodes else f"in namespace {self.namespace}"
        return ForbiddenError(
            f"{self._origin}: {found['user']} may not {found['verb']} {found['resource']} {where}; "
            f"{_NODES_ROLE if nodes else _ROLE} allows it"
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


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
