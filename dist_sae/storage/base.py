"""The interface of an object store, the whole of it."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable


@runtime_checkable
class ObjectStore(Protocol):
    """Objects are written whole and never seen half-written. Keys are `/`-separated, relative.

    Every method raises a `StoreError` that names the store and the key.
    """

    @property
    def url(self) -> str:
        """Where the store is."""
        ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The object's bytes `[start, stop)`, as far as it has them.

        Raises:
            ObjectNotFoundError: There is no such object.
        """
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object durably.

        Returns:
            False when `if_absent` and the object exists already (which then stays as it is).
        """
        ...

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None when there is none."""
        ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """All keys that start with `prefix`, in ascending order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; it is no error when there is none."""
        ...
