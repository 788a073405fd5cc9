"""The interface of an object store, the whole of it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable


class Entry(NamedTuple):
    """An object, as a listing shows it."""

    key: str
    bytes: int
    age_seconds: float
    """Since it was last written, by the store's own clock: no other machine's enters."""


@runtime_checkable
class Meter(Protocol):
    """Takes metrics: `telemetry.exporter.Telemetry`."""

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
    """Takes metrics that nobody wants."""

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def add(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


UNMETERED: Meter = _Unmetered()


@runtime_checkable
class ObjectStore(Protocol):
    """Objects are written whole and never seen half-written. Keys are `/`-separated, relative.

    Every method raises a `StoreError` that names the store and the key. What an endpoint cannot do
    now is asked again until a deadline; then it is an `UnavailableError`.
    """

    @property
    def url(self) -> str:
        """Where the store is."""
        ...

    if TYPE_CHECKING:  # isinstance() would read it, and so try the endpoint out

        @property
        def exclusive(self) -> bool:
            """Whether of writers that race with `if_absent` exactly one wins.

            Some endpoints accept the condition and ignore it; that is tried out when first asked.
            """
            ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The object's bytes `[start, stop)`, as far as it has them.

        Raises:
            ObjectNotFoundError: There is no such object.
        """
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object durably.

        Writers that race with `if_absent` write different bytes: a writer whose answer was lost
        knows by them whether the object is its own.

        Returns:
            False when `if_absent` and the object exists already (which then stays as it is; where
            the store is not `exclusive`, unless another writer is at it in the same instant).
        """
        ...

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None when there is none."""
        ...

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose keys start with `prefix`; of those in one folder, in ascending order.

        Most endpoints sort whole keys, some one folder after the other.
        """
        ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys of `entries`."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; it is no error when there is none."""
        ...
