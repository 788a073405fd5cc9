"""Validation of objects as in a Kubernetes API server, as far as possible without one.

Checks strict schemas of the core kinds (kubernetes-validate), schemas and CEL rules of custom
resource definitions, and the restricted pod security standard. The definitions (JobSet, Kueue,
Prometheus Operator) are not in the repository. They are read from the folder `DIST_SAE_CRDS`, or
else from `../shared/data/crds`. If that folder does not exist, tests that need them are skipped.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cel_expr_python import cel

VERSIONS = ("1.31", "1.34", "1.37")
Object = dict[str, Any]

_FOLDER = Path(
    os.environ.get("DIST_SAE_CRDS", Path(__file__).parents[3] / "shared" / "data" / "crds")
)
needs_definitions = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"no custom resource definitions in {_FOLDER} (DIST_SAE_CRDS)"
)
_OTHERS = (".x-k8s.io", ".coreos.com")
"""Suffixes of the API groups of other projects."""


def check(obj: Object, version: str = VERSIONS[-1]) -> None:
    """Raise an error if an object is invalid.

    Objects of other projects are checked only if their definitions are available.
    """
    if obj["apiVersion"].partition("/")[0].endswith(_OTHERS):
        if _FOLDER.is_dir():
            check_custom(obj)
        for job in jobs_of(obj):
            kubernetes_validate.validate(job, version, strict=True)
    else:
        kubernetes_validate.validate(obj, version, strict=True)


def check_custom(obj: Object, old: Object | None = None) -> None:
    """Check an object against its definition, and with `old`, against rules about changes too."""
    schema = _schema(obj["apiVersion"], obj["kind"])
    # not jsonschema.validate, because it checks the schema every time, which takes a second
    jsonschema.Draft202012Validator(_strict(schema)).validate(obj)
    for rule in broken_rules(schema, obj, old):
        raise AssertionError(rule)


def jobs_of(jobset: Object) -> Iterator[Object]:
    """Yield the Jobs that the JobSet controller would create. Yields none for other kinds."""
    for replicated in jobset.get("spec", {}).get("replicatedJobs", []):
        name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
        template = replicated["template"]
        yield {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {**template.get("metadata", {}), "name": name},
            "spec": template["spec"],
        }


def templates_of(obj: Object) -> Iterator[Object]:
    """Yield the pod templates in an object."""
    if obj["kind"] == "JobSet":
        for job in jobs_of(obj):
            yield job["spec"]["template"]
    elif "template" in obj.get("spec", {}):
        yield obj["spec"]["template"]


def security_faults(template: Object) -> Iterator[str]:
    """Yield violations of the restricted pod security standard, and of a read-only root."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or pod.get("runAsUser", 0) == 0:
        yield "may run as root"
    if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    for shared in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(shared):
            yield shared
    allowed = {"name", "configMap", "emptyDir", "secret", "projected", "downwardAPI"}
    allowed |= {"csi", "ephemeral", "persistentVolumeClaim"}
    for volume in spec.get("volumes", []):
        if volume.keys() - allowed:
            yield f"volume {volume}"
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} has capabilities"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']} may write its root"


def broken_rules(schema: Object, value: Any, old: Any | None, path: str = "") -> Iterator[str]:
    """Yield the CEL rules that a value breaks. Rules about changes need the old value."""
    for rule in schema.get("x-kubernetes-validations", []):
        if ("oldSelf" not in rule["rule"] or old is not None) and not _holds(
            rule["rule"], value, old
        ):
            yield f"{path or '.'}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                before = old.get(key) if isinstance(old, dict) else None
                yield from broken_rules(inner, value[key], before, f"{path}.{key}")
    if isinstance(value, list) and "items" in schema:
        keys = schema.get("x-kubernetes-list-map-keys", [])
        before = {tuple(o.get(k) for k in keys): o for o in old or []} if keys else {}
        for item in value:
            was = before.get(tuple(item.get(k) for k in keys)) if keys else None
            yield from broken_rules(schema["items"], item, was, f"{path}[]")


def _holds(rule: str, value: Any, old: Any) -> bool:
    variables = {"self": cel.Type.DYN, "oldSelf": cel.Type.DYN}
    expression = cel.NewEnv(variables=variables).compile(rule)
    return bool(expression.eval(data={"self": value, "oldSelf": old}).value())


@cache
def _definitions() -> dict[tuple[str, str], Object]:
    """Return the definitions by API group and kind."""
    found = [yaml.load(path.read_text(), Loader=yaml.CSafeLoader) for path in _FOLDER.iterdir()]
    return {(crd["spec"]["group"], crd["spec"]["names"]["kind"]): crd for crd in found}


@cache
def _schema(api_version: str, kind: str) -> Object:
    group, _, version = api_version.partition("/")
    versions = _definitions()[group, kind]["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == version)
    found: Object = schema
    return found


def _strict(schema: Object) -> Object:
    """Convert a definition's schema to a JSON Schema that refuses unknown keys."""
    strict = {key: schema[key] for key in schema.keys() & _KEYWORDS}
    if schema.get("x-kubernetes-int-or-string"):
        strict = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        strict["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        strict["additionalProperties"] = False
        if "metadata" in schema["properties"] and not schema["properties"]["metadata"].get(
            "properties"
        ):  # the API server checks the metadata, not the definition
            strict["properties"]["metadata"] = {"type": "object"}
    if "items" in schema:
        strict["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    return strict


_KEYWORDS = {
    "type",
    "required",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
}
