"""A run's namespace on a cluster: the only module that talks to the official client.

Objects are plain mappings, as `jobs.py` renders them. Errors are mapped here, once.
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
"""Field manager of all that is applied."""

_KUBECONFIG = "~/.kube/config"
_ROLE = "role dist-sae-researcher of k8s/base"
_NODES_ROLE = "cluster role dist-sae-nodes of k8s/base"
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
_POD_SECONDS = 3.0
"""For a pod's answer: a network policy that drops it looks like one that never comes."""
_WATCH_SECONDS = 20
_UNREADABLE = (ConfigException, OSError, yaml.YAMLError)
_NO_CONTENT = 204
_NOT_FOUND = 404
_EXPIRED = 410
"""Of a watch whose beginning the server has forgotten."""


class _Resource(NamedTuple):
    version: str
    plural: str

    @property
    def base(self) -> str:
        return f"/apis/{self.version}" if "/" in self.version else f"/api/{self.version}"


_RESOURCES = {
    "ConfigMap": _Resource("v1", "configmaps"),
    "Service": _Resource("v1", "services"),
    "Pod": _Resource("v1", "pods"),
    "Job": _Resource("batch/v1", "jobs"),
    "JobSet": _Resource(JOBSET_VERSION, "jobsets"),
}


class Cluster:
    """A namespace, as the user's kubeconfig lets them see it. Opened when it is first asked.

    Every method raises a `ClusterError` if there is no such kubeconfig or context, if the cluster
    does not answer, or if it does not let the user.

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
        # an attempt that failed is no news while another one follows
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        try:
            load_kube_config(self._file, context=self._context, client_configuration=settings)
        except _UNREADABLE as exc:
            raise ClusterError(
                f"{self._place}: no kubeconfig that can be used ({_line(exc)}); log in to the "
                f"cluster, set KUBECONFIG or correct cluster.context"
            ) from exc
        return ApiClient(settings)

    @cached_property
    def _hasty(self) -> ApiClient:
        """The same without a second attempt."""
        settings = copy.copy(self._client.configuration)
        settings.retries = urllib3.Retry(0)
        return ApiClient(settings)

    @property
    def _place(self) -> str:
        """What led here, for messages."""
        name = self._context
        if name is None:
            with suppress(*_UNREADABLE):
                name = list_kube_config_contexts(self._file)[1]["name"]
        return f"context {name} of {self._file}" if name else self._file

    def apply(self, obj: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply; returns the object as it is then, or would be.

        Raises:
            RejectedError: It is not valid, or would change what cannot be changed.
        """
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if dry_run else {}
        path = self._path(obj["kind"], obj["metadata"]["name"])
        applied = self._ask("PATCH", path, query, obj, "application/apply-patch+yaml")
        assert applied is not None
        return applied

    def get(self, kind: str, name: str) -> Object | None:
        """An object, if it exists."""
        return self._ask("GET", self._path(kind, name), may_lack=True)

    def find(self, kind: str, selector: Mapping[str, str]) -> list[Object]:
        """All that bear these labels, the oldest first; none where nobody knows the kind."""
        return self._list(kind, selector)[0]

    def follow(self, kind: str, selector: Mapping[str, str]) -> Iterator[list[Object]]:
        """What `find` gives, at once and after every change; now and then without one."""
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
                except urllib3.exceptions.HTTPError:  # the next listing tells what is wrong
                    continue

    def delete(self, obj: Object) -> None:
        """Begin to delete an object, this very one; it is gone when all that it owns is."""
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
        """Lines of a container, with the time of each if `stamped`; with `follow` until it ends.

        Raises:
            NotStartedError: It has not begun.
        """
        query = {"container": container}
        query |= {"follow": "true"} if follow else {}
        query |= {"timestamps": "true"} if stamped else {}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        path = f"{self._path('Pod', pod)}/log"
        with self._mapped(path), self._send("GET", path, query, patient=follow) as answer:
            if answer.status == _NO_CONTENT:
                raise NotStartedError(
                    f"{self._place}: pod {pod} has no node yet; dist-sae status says why"
                )
            for line in answer:
                yield line.decode(errors="replace").rstrip("\n")

    def proxy(self, pod: str, port: int, path: str) -> str:
        """What a pod answers, asked once through the API server, which may never hear of it."""
        whole = f"{self._path('Pod', f'{pod}:{port}')}/proxy/{path}"
        with self._mapped(whole):
            try:
                text: str = self._send("GET", whole, hasty=True).data.decode()
            except urllib3.exceptions.HTTPError as exc:
                if not isinstance(_reason(exc), urllib3.exceptions.ReadTimeoutError):
                    raise
                raise ClusterError(
                    f"{self._place}: pod {pod} does not answer on port {port} within "
                    f"{_POD_SECONDS:g} s; see whether a network policy keeps the API server from it"
                ) from exc
            return text

    def nodes(self) -> list[Object]:
        """The nodes of the cluster.

        Raises:
            ForbiddenError: The user sees only their namespace.
        """
        answer = self._ask("GET", "/api/v1/nodes")
        assert answer is not None
        nodes: list[Object] = answer["items"]
        return nodes

    def _list(self, kind: str, selector: Mapping[str, str]) -> tuple[list[Object], str]:
        answer = self._ask("GET", self._path(kind), self._selecting(selector), may_lack=True)
        if answer is None:
            return [], ""
        version = _RESOURCES[kind].version  # the items of a list do not say what they are
        items = [{"apiVersion": version, "kind": kind} | item for item in answer["items"]]
        items.sort(key=lambda obj: obj["metadata"]["creationTimestamp"])
        return items, answer["metadata"]["resourceVersion"]

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
        """One request and its answer; None if there is no such thing and `may_lack`."""
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
        seconds = None if patient else _POD_SECONDS if hasty else _ANSWER_SECONDS
        client = self._hasty if hasty else self._client
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
        """Raise the client's errors as ours; they happen about this path."""
        try:
            yield
        except ApiException as exc:
            raise self._refusal(exc, path) from exc
        except urllib3.exceptions.HTTPError as exc:
            server = self._client.configuration.host
            why = type(_reason(exc)).__name__
            raise ClusterError(
                f"{self._place}: {server} does not answer ({why}); check the network, the "
                f"context and your login"
            ) from exc

    def _refusal(self, exc: ApiException, path: str) -> ClusterError:
        status = _status_of(exc)
        said = status.get("message") or _line(exc.reason or exc)
        match exc.status:
            case 401:
                return ClusterError(f"{self._place}: your login is refused; log in again")
            case 403:
                return self._forbidden(said)
            case 404:
                return self._lacking(status, said, path)
            case 400 if path.endswith("/log"):  # a node's answer
                return NotStartedError(f"{self._place}: {_line(said)}")
            case 422:
                return RejectedError(_line(said))
            case _:
                return ClusterError(f"{self._place}: {_line(said)}")

    def _lacking(self, status: dict[str, Any], said: str, path: str) -> ClusterError:
        kind, jobset = (status.get("details") or {}).get("kind"), _RESOURCES["JobSet"]
        if not status and path.startswith(jobset.base):
            return ClusterError(
                f"{self._place}: the cluster does not know {jobset.version}; install JobSet, "
                f"or set cluster.jobset: false"
            )
        if kind == "namespaces":
            return ClusterError(
                f"namespace {self.namespace} does not exist; create it "
                f"(kubectl apply -k k8s/base) or correct cluster.namespace"
            )
        if kind == "pods/log":  # a node that has not heard of the pod yet
            return NotStartedError(f"{self._place}: {_line(said)}")
        return ClusterError(f"{self._place}: {_line(said)}")

    def _forbidden(self, said: str) -> ClusterError:
        found = re.search(
            r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]*)"', said
        )
        if not found and "denied the request" in said:  # JobSet's webhook, or somebody's policy
            return RejectedError(_line(said))
        if not found:  # a quota
            return ClusterError(f"{self._place}: {_line(said)}")
        nodes = found["resource"] == "nodes"
        where = "of the cluster" if nodes else f"in namespace {self.namespace}"
        return ForbiddenError(
            f"{self._place}: {found['user']} may not {found['verb']} {found['resource']} {where}; "
            f"{_NODES_ROLE if nodes else _ROLE} would allow it"
        )


def amount(quantity: str | float) -> Decimal:
    """A quantity as Kubernetes writes it, as a number."""
    number: Decimal = parse_quantity(quantity)
    return number


def _status_of(exc: ApiException) -> dict[str, Any]:
    """The `Status` that the API server explains itself with, if it does."""
    with suppress(ValueError, TypeError):
        status = json.loads(exc.body)
        if isinstance(status, dict) and status.get("kind") == "Status":
            return status
    return {}


def _reason(exc: BaseException) -> BaseException:
    """What is behind urllib3's many words."""
    return getattr(exc, "reason", None) or exc


def _line(error: object) -> str:
    return " ".join(str(error).split())
