"""Checks `train.deepspeed`, including for unknown keys, which DeepSpeed itself would ignore."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dist_sae.config import Run
from dist_sae.deepspeed import import_deepspeed
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.errors import ConfigError


class _RecordedConfig(dict[str, Any]):
    """A configuration that records which keys were looked up, whether or not they exist."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.keys_read.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> "_RecordedConfig":
        return self


def check_deepspeed(run: Run) -> None:
    """Refuse a DeepSpeed configuration that is invalid or has keys that DeepSpeed does not know.

    Raises:
        ConfigError: The configuration is invalid. The message has one line for every problem.
    """
    config = _RecordedConfig(deepspeed_config(run))
    if not run.train.deepspeed:
        return
    deepspeed = import_deepspeed()
    try:
        deepspeed.runtime.config.DeepSpeedConfig(config)
    except ValidationError as exc:
        raise ConfigError("\n".join(_explain(exc, run.train.deepspeed))) from exc
    except Exception as exc:  # of many types; the derived keys are valid, so the user's are not
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise ConfigError(f"train.deepspeed: DeepSpeed rejects it: {reason}") from exc
    constants = vars(deepspeed.runtime.constants)  # some are looked up later, by the engine
    known = config.keys_read | {v for k, v in constants.items() if k.isupper() and type(v) is str}
    unknown = [key for key in run.train.deepspeed if key not in known]
    if unknown:
        raise ConfigError(
            "\n".join(f"train.deepspeed.{key}: {_hint(key, config.keys_read)}" for key in unknown)
        )


def _explain(exc: ValidationError, given: Mapping[str, Any]) -> list[str]:
    """Explain the errors of one of DeepSpeed's pydantic models, with the full path of each key."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    fields = {
        name for model in DeepSpeedConfigModel.__subclasses__() for name in model.model_fields
    }
    lines = []
    for error in exc.errors():
        path = _path(given, error["loc"]) or [str(key) for key in error["loc"]]
        if error["type"] == "extra_forbidden":
            problem = _hint(path[-1], fields)
        elif path:
            problem = f"{error['msg']} ({error['input']!r})"
        else:  # the error is about several keys, and its input is the whole model
            problem = " ".join(error["msg"].split())
        lines.append(f"{'.'.join(['train.deepspeed', *path])}: {problem}")
    return lines


def _path(given: Any, loc: tuple[int | str, ...]) -> list[str] | None:
    """Find the full path of the keys `loc`, which may start at any depth of the user's settings."""
    if not loc or not isinstance(given, Mapping):
        return None
    if loc[0] in given:
        return [str(key) for key in loc]
    for key, value in given.items():
        if found := _path(value, loc):
            return [str(key), *found]
    return None


def _hint(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"did you mean {close[0]}?" if close else "see DeepSpeed's documentation for its keys"
    return f"unknown to DeepSpeed; {hint}"
