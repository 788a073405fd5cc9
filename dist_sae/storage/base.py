"""The interface of an object store."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable


class Entry(NamedTuple):
    """One object in a listing."""

    key: str
    bytes: int
    age_seconds: float
    """Time since the last write, by the store's own clock alone."""
    tag: str = ""
    """The store's name for this content (S3's ETag); empty where it has none."""


@runtime_checkable
class Meter(Protocol):
    """Receives metrics; implemented by `telemetry.exporter.Telemetry`."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        ...


class _Unmetered:
    """Discards metrics."""

    def add(self, name: str, value: float, **labels: str) -> None: ...

    set = observe = add


UNMETERED: Meter = _Unmetered()


@runtime_checkable
class ObjectStore(Protocol):
    """Key-value store of whole objects; keys are relative and `/`-separated.

    A reader never sees a half-written object. Every method raises a `StoreError` that names the
    store and the key. A call that the endpoint cannot answer now is retried until a deadline, then
    raises `UnavailableError`.
    """

    @property
    def url(self) -> str:
        """The store's URL or path."""
        ...

    if TYPE_CHECKING:  # isinstance() would read it, and so probe the endpoint

        @property
        def exclusive(self) -> bool:
            """True if exactly one of several racing `if_absent` writers wins.

            Some endpoints accept the condition and ignore it, so the first read probes the store.
            """
            ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read an object's bytes `[start, stop)`; fewer if the object ends earlier.

        Raises:
            ObjectNotFoundError: There is no such object.
        """
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object durably.

        Racing `if_absent` writers must write different bytes: a writer that lost the answer reads
        the object back to see whether it won.

        Returns:
            False when `if_absent` is set and the object already exists. It is then left unchanged,
            unless the store is not `exclusive` and another writer writes at the same instant.
        """
        ...

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        """Write an object durably, as `put` does, without ever holding the whole of it.

        Args:
            key: Of the object.
            content: Makes its bytes, in order, in pieces of any size. It is called again where a
                write has to begin anew.
        """
        ...

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None when there is none."""
        ...

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the objects whose keys start with `prefix`, ascending within a folder.

        Most endpoints sort by whole key; some list one folder after another.
        """
        ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """List the keys of `entries`."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below `prefix`, which ends with a slash or is empty; sorted.

        What is in them is not listed.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        ...

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove these objects, where they exist: in S3 a thousand with each request."""
        ...
