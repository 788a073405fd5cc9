"""The file that describes an endpoint: its URL, model, prices and request parameters."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, ValidationError

from dist_sae.config.base import Section
from dist_sae.errors import ConfigError


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is not an http(s) URL; for example http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "must not have a user, password, query or fragment; keys do not belong in this file"
        )
    return url.rstrip("/")


class EndpointSettings(Section):
    """The settings in an endpoint file, which contains no key."""

    url: Annotated[str, AfterValidator(_check_url)]
    """Base URL, the part before `/chat/completions`: `http://127.0.0.1:8000/v1`."""
    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the API key. If it is not set, requests have no key."""
    concurrency: PositiveInt = 8
    """Number of concurrent requests."""
    timeout_seconds: float = Field(120, gt=0)
    """Timeout of one request."""
    patience_seconds: float = Field(600, gt=0)
    """How long a request is retried while the endpoint is unavailable or limits the rate."""
    tokenizer: str | None = None
    """Folder or hub name of the model's tokenizer, whose chat template is used to count input
    tokens. null assumes four bytes of UTF-8 per token."""
    input_price: NonNegativeFloat | None = None
    """Price of a million input tokens; null for no price."""
    output_price: NonNegativeFloat | None = None
    """Price of a million output tokens; null for no price."""
    currency: str = "USD"
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Additional fields of each request, such as `reasoning_effort: low`. They override the default
    `temperature: 0` and `max_tokens`; null removes a field."""


def read_endpoint(path: str) -> EndpointSettings:
    """Read an endpoint file.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong. The message is one line.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        settings = EndpointSettings.model_validate(content)
    except OSError as exc:
        raise ConfigError(f"--endpoint: {path}: {exc.strerror}; name a readable file") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--endpoint: {path}: is not YAML; write `url:` and `model:`") from exc
    except ValidationError as exc:
        error = exc.errors(include_input=False)[0]
        key = ".".join(map(str, error["loc"])) or "the file"
        known = ", ".join(EndpointSettings.model_fields)
        said = error["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--endpoint: {path}: {key}: {said}; keys are {known}") from exc
    if fixed := sorted({"model", "messages", "stream", "n"} & set(settings.parameters)):
        raise ConfigError(f"--endpoint: {path}: parameters.{fixed[0]}: cannot be set here")
    if (settings.input_price is None) != (settings.output_price is None):
        raise ConfigError(f"--endpoint: {path}: set both input_price and output_price, or neither")
    return settings
