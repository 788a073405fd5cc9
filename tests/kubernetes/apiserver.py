"""An in-process Kubernetes API server over HTTP, with all that `dist_sae.kubernetes` relies on.

It has server-side apply with defaults, conflicts and immutable fields; dry runs; strict validation;
the permissions of k8s/base/researchers.yaml; labels; watches; foreground deletion; logs; and the
proxy to pods. Its only controllers create the Jobs of a JobSet and the pods of a Job, and collect
garbage. Tests take the role of nodes, for example to start and end pods.
"""

import copy
import itertools
import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

from tests.kubernetes import apply, schemas
from tests.kubernetes.apply import NotFoundError, RefusedError
from tests.kubernetes.containers import names_of, scheduled, state_of

Object = dict[str, Any]
Key = tuple[str, str]
"""Plural and name."""

TOKEN = "researcher-token"
_ROLES = Path(__file__).parents[2] / "k8s/base/researchers.yaml"
_KINDS = {
    "configmaps": "ConfigMap",
    "services": "Service",
    "networkpolicies": "NetworkPolicy",
    "pods": "Pod",
    "jobs": "Job",
    "jobsets": "JobSet",
    "workloads": "Workload",
    "events": "Event",
}
_PATHS = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>log|proxy)(?:/(?P<rest>.*))?)?)?"
)
_WAIT_SECONDS = 30.0
_INDEX = "batch.kubernetes.io/job-completion-index"


class ApiServer:
    """API server with the namespace `dist-sae`. `TOKEN` is the token of a researcher."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[Key, Object] = {}
        self.namespaces = {"dist-sae"}
        self.groups = {"", "batch", "networking.k8s.io", "jobset.x-k8s.io"}
        self.nodes: list[Object] = []
        self.rules = _rules()
        self.admission: Callable[[Object], str | None] = lambda _: None
        """Admission webhook: returns the reason to deny an object, or None."""
        self.watches = 0
        """Number of watches started so far."""
        self.followers = 0
        """Number of requests so far that follow a log."""
        self.logs: dict[str, list[str]] = {}
        """Log lines by pod, or by `pod/container`. Each line begins with a timestamp."""
        self.ports: dict[str, int] = {}
        """Ports on this machine that serve the pods' metrics, by pod."""
        self._applied: dict[tuple[Key, str], Object] = {}
        self._events: list[tuple[int, str, Key, Object]] = []
        self._versions = itertools.count(1)
        self._ids = itertools.count()
        self._http = _Http(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def write_kubeconfig(self, path: Path, token: str = TOKEN) -> None:
        """Write a kubeconfig with the context `test`."""
        url = f"http://127.0.0.1:{self._http.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "users": [{"name": "ada", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "here", "user": "ada"}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(config))

    # methods for tests

    def names(self, kind: str) -> list[str]:
        with self.changed:
            return sorted(name for plural, name in self.objects if _KINDS[plural] == kind)

    def the(self, kind: str, name: str) -> Object:
        with self.changed:
            return copy.deepcopy(self.objects[_plural(kind), name])

    def pods(self, part: str) -> list[str]:
        """Return the names of a part's pods, newest last."""
        with self.changed:
            return [
                name
                for (plural, name), obj in self.objects.items()
                if plural == "pods"
                and obj["metadata"]["labels"]["app.kubernetes.io/component"] == part
            ]

    def set(self, kind: str, name: str, **fields: Any) -> None:
        """Change top-level fields of an object, as a controller would."""
        with self.changed:
            key = (_plural(kind), name)
            self._store(key, {**self.objects[key], **fields}, "MODIFIED")

    def run_pod(self, name: str) -> None:
        ready = [{"type": "Ready", "status": "True"}]
        self.set("Pod", name, status={"phase": "Running", "conditions": ready})

    def fail_pod(self, name: str, **status: Any) -> str:
        """End a pod with a failure, and return the name of the pod that replaces it."""
        with self.changed:
            self.set("Pod", name, status={"phase": "Failed"} | status)
            metadata = self.objects["pods", name]["metadata"]
            job = self.objects["jobs", metadata["ownerReferences"][0]["name"]]
            return self._make_pod(job, metadata["labels"][_INDEX])

    def condition(self, kind: str, name: str, which: str, message: str = "") -> None:
        conditions = [{"type": which, "status": "True", "message": message}]
        self.set(kind, name, status={"conditions": conditions})

    def end_pod(self, name: str) -> None:
        """Remove a deleted pod, as its node does once the pod has ended."""
        with self.changed:
            self._remove(("pods", name))

    def create(self, obj: Object) -> None:
        """Create an object as another user."""
        with self.changed:
            self._create((_plural(obj["kind"]), obj["metadata"]["name"]), copy.deepcopy(obj))

    def edit(self, kind: str, name: str, manager: str, change: Object) -> None:
        """Apply server-side as another manager, with force."""
        with self.changed:
            key = (_plural(kind), name)
            self._applied[key, manager] = change
            self._store(key, apply.merge(self.objects[key], {}, change), "MODIFIED")

    def await_(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the objects holds."""
        with self.changed:
            assert self.changed.wait_for(condition, _WAIT_SECONDS)

    def say(self, pod: str, second: int, text: str) -> None:
        with self.changed:
            stamp = f"2026-01-01T00:00:{second:02d}.000000000Z"
            self.logs.setdefault(pod, []).append(f"{stamp} {text}")
            self.changed.notify_all()

    # requests of clients

    def answer(self, handler: "_Handler", method: str) -> None:
        url = urlsplit(handler.path)
        query = dict(parse_qsl(url.query))
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else {}
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "Unauthorized", "Unauthorized")
        found = _PATHS.fullmatch(unquote(url.path))
        if not found or (found["group"] or "") not in self.groups:
            raise RefusedError(404, None, "404 page not found")
        plural, name, sub = found["plural"], found["name"], found["sub"]
        key = (plural, name or "")
        self._authorize(method, found, query, exists=key in self.objects)
        if plural == "nodes":
            return handler.send(json.dumps({"kind": "NodeList", "items": self.nodes}).encode())
        if sub == "log":
            pieces = self._log(name, query)
            return handler.send(b"", 204) if pieces is None else handler.stream(pieces)
        if sub == "proxy":
            return handler.send(self._proxy(name, found["rest"]))
        with self.changed:
            match method:
                case "PATCH":
                    assert handler.headers["Content-Type"] == "application/apply-patch+yaml"
                    result = self._apply(key, body, query)
                case "DELETE":
                    result = self._delete(key, body)
                case "GET" if name:
                    result = self._existing(key)
                case "GET" if query.get("watch"):
                    self.watches += 1
                    self.changed.notify_all()
                    return handler.stream(self._watch(plural, query))
                case _:
                    result = self._list(plural, query)
            return handler.send(json.dumps(result).encode())

    def _authorize(
        self, method: str, path: "re.Match[str]", query: Object, *, exists: bool
    ) -> None:
        resource = "/".join(filter(None, [path["plural"], path["sub"]]))
        read = "watch" if query.get("watch") else "get" if path["name"] else "list"
        verbs = {"GET": [read], "DELETE": ["delete"], "PATCH": ["patch"]}[method]
        if method == "PATCH" and not exists:
            verbs = [*verbs, "create"]
        group = path["group"] or ""
        for verb in verbs:
            if (group, resource, verb) not in self.rules:
                named = ".".join(filter(None, [resource, group]))
                where = f'in the namespace "{path["namespace"]}"' if path["namespace"] else "at all"
                raise RefusedError(
                    403,
                    "Forbidden",
                    f'{named} is forbidden: User "ada" cannot {verb} resource "{resource}" in API '
                    f'group "{group}" {where}',
                )
        if method == "PATCH" and (name := path["namespace"]) not in self.namespaces:
            raise NotFoundError("namespaces", str(name))

    def _apply(self, key: Key, body: Object, query: Object) -> Object:
        manager = query["fieldManager"]
        assert query["fieldValidation"] == "Strict"
        kind, name = body["kind"], body["metadata"]["name"]
        assert (_plural(kind), name) == key
        live = self.objects.get(key)
        try:
            _check(json.dumps(body))
        except Exception as exc:
            said = f'{kind} "{name}" is invalid: {str(exc).splitlines()[0]}'
            raise RefusedError(422, "Invalid", said) from exc
        if denial := self.admission(body):
            said = f'admission webhook "policy.example.org" denied the request: {denial}'
            raise RefusedError(403, "Forbidden", said)
        managed = {who: theirs for (other, who), theirs in self._applied.items() if other == key}
        if live and live["metadata"].get("ownerReferences"):
            managed["manager"] = {"spec": live["spec"]}
        for who, theirs in managed.items():
            if who != manager and (where := apply.find_conflict(theirs, body)):
                said = f'Apply failed with 1 conflict: conflict with "{who}": {where}'
                raise RefusedError(409, "Conflict", said)
        new = apply.with_defaults(apply.merge(live or {}, managed.get(manager, {}), body))
        if live:
            apply.check_immutable(live, new)
        if query.get("dryRun") != "All":
            self._applied[key, manager] = copy.deepcopy(body)
            if live is None:
                return self._create(key, new)
            if new != live:
                self._store(key, new, "MODIFIED")
                if kind == "Job":
                    self._scale(key)
        return new

    def _scale(self, key: Key) -> None:
        """Create and delete pods as the Job controller does when the number of indexes changes."""
        job = self.objects[key]
        pods = {self.objects[k]["metadata"]["labels"][_INDEX]: k for k in self._dependents(job)}
        wanted = [str(index) for index in range(job["spec"]["completions"])]
        for index in pods.keys() - {*wanted}:
            self.begin_deletion(pods[index])
        for index in wanted:
            if index not in pods:
                self._make_pod(job, index)

    def _create(self, key: Key, obj: Object) -> Object:
        number = next(self._ids)
        created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
        obj.setdefault("status", {})
        obj["metadata"] |= {
            "uid": f"uid-{number}",
            "creationTimestamp": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "managedFields": [{"manager": "dist-sae", "operation": "Apply"}],
        }
        self._store(key, obj, "ADDED")
        if obj["kind"] == "JobSet":
            for job in copy.deepcopy(list(schemas.jobs_of(obj))):
                job["metadata"]["ownerReferences"] = [_owner(obj)]
                self._create(("jobs", job["metadata"]["name"]), job)
        if obj["kind"] == "Job":
            self._scale(key)
        return obj

    def _make_pod(self, job: Object, index: str) -> str:
        pod = copy.deepcopy(job["spec"]["template"]) | {"apiVersion": "v1", "kind": "Pod"}
        name = f"{job['metadata']['name']}-{index}-{next(self._ids):05d}"
        pod["metadata"] |= {"name": name, "ownerReferences": [_owner(job)]}
        pod["metadata"]["labels"][_INDEX] = index
        pod["status"] = {"phase": "Pending"}
        self._create(("pods", name), pod)
        return name

    def _store(self, key: Key, obj: Object, event: str) -> None:
        obj = copy.deepcopy(obj)
        version = next(self._versions)
        obj["metadata"]["resourceVersion"] = str(version)
        self.objects[key] = obj
        self._events.append((version, event, key, obj))
        self.changed.notify_all()

    def _existing(self, key: Key) -> Object:
        if key not in self.objects:
            raise NotFoundError(*key)
        return self.objects[key]

    def _list(self, plural: str, query: Object) -> Object:
        items = [o for key, o in self.objects.items() if key[0] == plural and _selected(o, query)]
        items = [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in items]
        metadata = {"resourceVersion": str(next(self._versions))}
        first = int(query.get("continue", "0"))
        end = first + int(query["limit"])
        if end < len(items):
            metadata["continue"] = str(end)
        return {"kind": "List", "metadata": metadata, "items": items[first:end]}

    def _watch(self, plural: str, query: Object) -> Iterator[bytes]:
        since, seen = int(query["resourceVersion"]), 0
        until = time.monotonic() + int(query["timeoutSeconds"])
        while True:
            with self.changed:
                fresh, seen = self._events[seen:], len(self._events)
                if not fresh and not self.changed.wait(max(until - time.monotonic(), 0)):
                    return
            for version, event, key, obj in fresh:
                if version > since and key[0] == plural and _selected(obj, query):
                    yield json.dumps({"type": event, "object": obj}).encode() + b"\n"

    def _delete(self, key: Key, options: Object) -> Object:
        obj = self._existing(key)
        if options["preconditions"]["uid"] != obj["metadata"]["uid"]:
            raise RefusedError(409, "Conflict", "the UID in the precondition does not match")
        assert options["propagationPolicy"] == "Foreground"
        self.begin_deletion(key)
        return obj

    def begin_deletion(self, key: Key) -> None:
        obj = self.objects[key]
        dependents = self._dependents(obj)
        running = key[0] == "pods" and obj["status"]["phase"] == "Running"
        if not dependents and not running:
            return self._remove(key)
        if "deletionTimestamp" not in obj["metadata"]:
            metadata = {**obj["metadata"], "deletionTimestamp": "2026-01-02T00:00:00Z"}
            self._store(key, {**obj, "metadata": metadata}, "MODIFIED")
            for dependent in dependents:
                self.begin_deletion(dependent)
        return None

    def _dependents(self, obj: Object) -> list[Key]:
        uid = obj["metadata"]["uid"]
        return [
            key
            for key, other in self.objects.items()
            if any(o["uid"] == uid for o in other["metadata"].get("ownerReferences", []))
        ]

    def _remove(self, key: Key) -> None:
        obj = self.objects.pop(key)
        self._applied = {who: body for who, body in self._applied.items() if who[0] != key}
        self._events.append((next(self._versions), "DELETED", key, obj))
        self.changed.notify_all()
        for owner in obj["metadata"].get("ownerReferences", []):
            above = (_plural(owner["kind"]), owner["name"])
            waits = "deletionTimestamp" in self.objects.get(above, obj)["metadata"]
            if above in self.objects and waits and not self._dependents(self.objects[above]):
                self._remove(above)

    def _log(self, name: str, query: Object) -> Iterator[bytes] | None:
        with self.changed:
            pod, container = self._existing(("pods", name)), query["container"]
            assert container in names_of(pod)
            if scheduled(pod) == "False":
                return None
            if not (state := state_of(pod, container)):
                raise NotFoundError("pods/log", name)
            if state == "waiting":
                said = f'container "{container}" in pod "{name}" is waiting to start'
                raise RefusedError(400, "BadRequest", said)
        return self._log_lines(name, container, query)

    def _log_lines(self, name: str, container: str, query: Object) -> Iterator[bytes]:
        with self.changed:
            self.followers += "follow" in query
            self.changed.notify_all()
            whose = f"{name}/{container}" if f"{name}/{container}" in self.logs else name
        at = max(0, len(self.logs.get(whose, [])) - int(query.get("tailLines", 1_000_000)))
        while True:
            with self.changed:
                lines = self.logs.get(whose, [])[at:]
                pod = self.objects.get(("pods", name))
                ended = pod is None or state_of(pod, container) != "running"
                if not lines and (ended or "follow" not in query):
                    return
                if not lines:
                    self.changed.wait()
            at += len(lines)
            for line in lines:
                shown = line if "timestamps" in query else line.partition(" ")[2]
                yield shown.encode() + b"\n"

    def _proxy(self, name: str, path: str) -> bytes:
        if not (port := self.ports.get(name.partition(":")[0])):
            raise RefusedError(503, "ServiceUnavailable", "error trying to reach service: refused")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
            page: bytes = answer.read()
        return page


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, api: ApiServer) -> None:
        self.api = api
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client stopped watching
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered, so a response is one packet
    server: _Http

    def send(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, pieces: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for piece in pieces:
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None: ...

    def _respond(self) -> None:
        try:
            self.server.api.answer(self, self.command)
        except RefusedError as refusal:
            self.send(refusal.body(), refusal.code)

    do_GET = do_PATCH = do_DELETE = _respond  # noqa: N815


def _rules() -> set[tuple[str, str, str]]:
    """Return (API group, resource, verb) of everything that the roles permit."""
    roles = [r for r in yaml.load_all(_ROLES.read_text(), yaml.CSafeLoader) if "rules" in r]
    return {
        triple
        for role in roles
        for rule in role["rules"]
        for triple in itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"])
    }


def _plural(kind: str) -> str:
    return next(plural for plural, each in _KINDS.items() if each == kind)


def _owner(obj: Object) -> Object:
    return {"kind": obj["kind"], **{k: obj["metadata"][k] for k in ("name", "uid")}}


def _selected(obj: Object, query: Object) -> bool:
    if fields := query.get("fieldSelector"):
        return bool(fields == f"type={obj['type']}")
    wanted = dict(pair.split("=", 1) for pair in query["labelSelector"].split(","))
    return wanted.items() <= (obj["metadata"].get("labels") or {}).items()


@cache
def _check(body: str) -> None:
    """Check an object against the schemas. Valid objects are cached."""
    schemas.check(json.loads(body))
