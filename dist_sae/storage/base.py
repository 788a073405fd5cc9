"""The interface of an object store."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable


class Entry(NamedTuple):
    """One object in a listing."""

    key: str
    bytes: int
    age_seconds: float
    """Time since the last write, measured only by the store's own clock."""
    tag: str = ""
    """Identifier that the store gives this content (S3's ETag); empty if it gives none."""


@runtime_checkable
class Meter(Protocol):
    """Receiver of metrics; implemented by `telemetry.exporter.Telemetry`."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        ...


class _Unmetered:
    """Receiver that discards metrics."""

    def add(self, name: str, value: float, **labels: str) -> None: ...

    set = observe = add


UNMETERED: Meter = _Unmetered()


@runtime_checkable
class ObjectStore(Protocol):
    """Key-value store of whole objects; keys are relative and `/`-separated.

    A reader never sees a half-written object. Every method raises a `StoreError` that names the
    store and the key. While the endpoint is unavailable, a call is retried until a deadline; then
    it raises `UnavailableError`.
    """

    @property
    def url(self) -> str:
        """URL or path of the store."""
        ...

    if TYPE_CHECKING:  # at run time, isinstance() would read the property and probe the endpoint

        @property
        def exclusive(self) -> bool:
            """True if exactly one of several racing `if_absent` writers wins.

            Some endpoints accept the condition but ignore it. So the first time this is read, the
            store is probed.
            """
            ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read an object's bytes `[start, stop)`; fewer if the object ends earlier.

        Raises:
            ObjectNotFoundError: No object exists under the key.
        """
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object durably.

        Racing `if_absent` writers must write different bytes, because a writer that lost the
        response reads the object back to see whether it won.

        Returns:
            False if `if_absent` is set and the object already exists. The object is then unchanged,
            unless the store is not `exclusive` and another writer writes at the same instant.
        """
        ...

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        """Write an object durably, as `put` does, without having all of it in memory at once.

        Args:
            key: Key of the object.
            content: Function that yields the object's bytes in order, in pieces of any size. It is
                called again if the write has to start over.
        """
        ...

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None if the object does not exist."""
        ...

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the objects whose keys start with `prefix`, in ascending order within each folder.

        Most endpoints sort by the whole key, but some list one folder after another.
        """
        ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """List the keys that start with `prefix`, in the order of `entries`."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """Return the sorted names of the folders directly below `prefix`, without their contents.

        The prefix must end with a slash or be empty.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        ...

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove these objects, if they exist; in S3, a thousand per request."""
        ...
