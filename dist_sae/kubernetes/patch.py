"""Strategic merge of a patch into a pod template, as in `kubectl patch`. Pure.

Mappings are merged, and null removes a key. Lists that Kubernetes merges (`containers` by name,
`volumeMounts` by path) are merged item by item. Every other list is replaced. `$patch: delete` in
an item of a list removes the item. `$patch: replace` in a mapping replaces the whole mapping.
https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/
"""

from typing import Any

from dist_sae.errors import ConfigError

_MERGED_BY = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "claims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
"""Key that identifies the items of each merged list (`patchMergeKey` in the Kubernetes API)."""
_DIRECTIVE = "$patch"


def merge_patch(original: Any, patch: Any, path: str) -> Any:
    """Merge a patch into a mapping, a list or a value, and return the result as a new object.

    Args:
        path: Place of the patch in the run file, for messages.

    Raises:
        ConfigError: An item of a merged list lacks its key, or a directive is unknown.
    """
    if isinstance(patch, dict):
        _check_directive(patch, path)
        replaces = patch.get(_DIRECTIVE) == "replace" or not isinstance(original, dict)
        merged = {} if replaces else dict(original)
        for key, value in patch.items():
            if value is None:
                merged.pop(key, None)
            elif key != _DIRECTIVE:
                merged[key] = merge_patch(merged.get(key), value, f"{path}.{key}")
        return merged
    name = path.rpartition(".")[2]
    if isinstance(patch, list) and name in _MERGED_BY:
        return _merge_items(original or [], patch, _MERGED_BY[name], path)
    return patch


def _merge_items(original: list[Any], patch: list[Any], key: str, path: str) -> list[Any]:
    merged = {item[key]: item for item in original}
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise ConfigError(f"{path}: every item needs a {key}, because items are merged by it")
        if item.get(_DIRECTIVE) == "delete":
            merged.pop(item[key], None)
        else:
            merged[item[key]] = merge_patch(merged.get(item[key]), item, f"{path}[{item[key]}]")
    return list(merged.values())


def _check_directive(patch: dict[str, Any], path: str) -> None:
    if patch.get(_DIRECTIVE) not in (None, "replace", "merge"):
        raise ConfigError(
            f"{path}.{_DIRECTIVE}: use replace or merge, or delete in an item of a merged list"
        )
