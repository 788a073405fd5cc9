"""Requests for chat completions. No other module talks to an endpoint."""

import logging
import os
import threading
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from dist_sae.endpoint.settings import EndpointSettings
from dist_sae.errors import DistSaeError, EndpointError, EndpointUnavailableError
from dist_sae.retry import Retrier

logger = logging.getLogger(__name__)

_RETRIED = {408, 409, 425, 429}
_REFUSED = {401, 403}
_NOT_FOUND = 404
_SERVER_ERROR = 500
_OK = 200
_QUOTA_CODES = {
    "insufficient_quota",
    "billing_hard_limit_reached",
}  # 429, but retrying does not help
_MESSAGE_CHARACTERS = 200  # characters of an endpoint's message
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Completion(NamedTuple):
    """An endpoint's response to one request."""

    text: str
    is_whole: bool
    """False if the text was truncated at its maximum length."""
    input_tokens: int | None
    """Number of input tokens according to the endpoint; None if the endpoint does not report it."""
    output_tokens: int | None


class Client:
    """Sends requests to one endpoint. Threads may share one instance.

    Args:
        settings: The settings of the endpoint.
        stopping: Once set, requests are retried for a few seconds only.
    """

    def __init__(self, settings: EndpointSettings, stopping: threading.Event) -> None:
        self._settings = settings
        self._url = f"{settings.url}/chat/completions"
        self._key = os.environ.get(settings.key_variable, "").strip()
        self._session = requests.Session()
        adapter = HTTPAdapter(pool_maxsize=settings.concurrency)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._session.auth = self._authorise  # or requests would replace the key by one from .netrc
        self._patiently = Retrier(
            settings.patience_seconds, stopping, EndpointUnavailableError, logger
        )
        place = urlsplit(settings.url)
        if self._key and place.scheme == "http" and place.hostname not in _LOOPBACK:
            logger.warning(
                "%s: the key in %s is sent unencrypted", settings.url, settings.key_variable
            )

    def complete(self, body: Mapping[str, Any]) -> Completion:
        """Send one request. Retry while the endpoint is unavailable or limits the rate.

        Raises:
            EndpointUnavailableError: The endpoint did not respond within `patience_seconds`.
            EndpointError: The endpoint refuses the request, or its response is not a chat
                completion.
        """
        return self._patiently(lambda: self._attempt(body), _least_pause)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _attempt(self, body: Mapping[str, Any]) -> Completion:
        url = self._settings.url
        try:
            answer = self._session.post(
                self._url,
                json=body,
                timeout=(min(30.0, self._settings.timeout_seconds), self._settings.timeout_seconds),
                allow_redirects=False,  # never send the key to another host
            )
        except requests.ReadTimeout as exc:
            raise EndpointUnavailableError(
                f"{url}: no response within {self._settings.timeout_seconds:g} s; raise "
                f"timeout_seconds or lower concurrency; rerun the same command to continue"
            ) from exc
        except (requests.ConnectionError, requests.Timeout) as exc:
            raise EndpointUnavailableError(
                f"{url}: does not respond ({type(exc).__name__}); rerun the same command to "
                f"continue"
            ) from exc
        except (requests.RequestException, ValueError) as exc:
            raise EndpointError(f"{url}: the request failed: {exc}") from exc
        if answer.status_code != _OK:
            self._fail(answer)
        try:
            return _completion(answer.json())
        except (ValueError, TypeError, LookupError, AttributeError) as exc:
            raise EndpointError(
                f"{url}: the response is not a chat completion ({type(exc).__name__}: {exc}); is "
                f"it the base URL of an OpenAI-compatible endpoint?"
            ) from exc

    def _fail(self, answer: requests.Response) -> NoReturn:
        url, status = self._settings.url, answer.status_code
        code, said = _error_details(answer)
        about = f"{url}: HTTP {status}" + (f" ({said})" if said else "")
        if code in _QUOTA_CODES:
            raise EndpointError(f"{about}: the account has no credit left; cached answers are kept")
        if status in _RETRIED or status >= _SERVER_ERROR:
            raise EndpointUnavailableError(
                f"{about}; rerun the same command to continue", _retry_after(answer)
            )
        if status in _REFUSED:
            of = "rejects the key in" if self._key else "requires a key; set"
            raise EndpointError(f"{about}: {of} {self._settings.key_variable}")
        if status == _NOT_FOUND:
            raise EndpointError(
                f"{about}: has no {self._settings.model} at {self._url}; check url (it often ends "
                f"in /v1) and model"
            )
        raise EndpointError(f"{about}: refuses the request")


def _completion(content: Any) -> Completion:
    choice = content["choices"][0]
    usage = content.get("usage") or {}
    return Completion(
        text=str(choice["message"].get("content") or ""),
        is_whole=choice.get("finish_reason") != "length",
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
    )


def _error_details(answer: requests.Response) -> tuple[str, str]:
    """Return an error's code, and its message on one line."""
    try:
        content = answer.json()
    except ValueError:
        return "", " ".join(answer.text.split())[:_MESSAGE_CHARACTERS]
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return "", " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
    said = str(error.get("message") or error.get("detail") or "")
    return str(error.get("code") or ""), " ".join(said.split())[:_MESSAGE_CHARACTERS]


def _retry_after(answer: requests.Response) -> float:
    """Return the seconds to wait that `Retry-After` states as a number or a date (RFC 9110)."""
    value = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError):
        return 0.0


def _least_pause(exc: DistSaeError) -> float:
    return exc.pause_seconds if isinstance(exc, EndpointUnavailableError) else 0.0
