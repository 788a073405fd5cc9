"""Whether a model hub was out of reach, as far as an error tells."""

from collections.abc import Iterator

_OUT_OF_REACH = {  # of httpx, requests and huggingface_hub, none of which every program loads
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "PoolTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "Timeout",
}
_TOO_MANY, _SERVER_ERROR = 429, 500


def is_out_of_reach(error: BaseException) -> bool:
    """Whether the hub could not be asked or had no answer; waiting may mend that."""
    return any(
        type(cause).__name__ in _OUT_OF_REACH or _is_passing(cause) for cause in _causes(error)
    )


def _is_passing(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(status, int) and (status == _TOO_MANY or status >= _SERVER_ERROR)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
