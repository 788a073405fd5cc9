"""Temporary files that sort records into parts, so that each part fits into memory."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import StoreFullError


class Spool:
    """Records in parts, in a temporary folder that is deleted at the end.

    Args:
        dtype: Type of a record.
        n_parts: Number of parts. Each part is one file.
    """

    def __init__(self, dtype: np.dtype[Any], n_parts: int) -> None:
        self._dtype = dtype
        self._n_parts = n_parts
        self._folder = tempfile.TemporaryDirectory(prefix="dist-sae-")
        self.bytes = 0
        """Number of bytes written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def add(self, parts: NDArray[np.integer[Any]], records: NDArray[Any]) -> None:
        """Append records.

        Args:
            parts: Part of each record.
            records: The records.

        Raises:
            StoreFullError: The folder of temporary files has no space.
        """
        order = np.argsort(parts, kind="stable")
        ends = np.bincount(parts, minlength=self._n_parts).cumsum()
        self.bytes += records.nbytes
        for part, here in enumerate(np.split(order, ends[:-1])):
            if len(here):
                try:
                    with self._path(part).open("ab") as file:
                        file.write(records[here].tobytes())
                except OSError as exc:
                    raise StoreFullError.of_temporary(f"{self.bytes:,} bytes", exc) from exc

    def read(self, part: int) -> NDArray[Any]:
        """Read the records of a part, in the order in which they were added."""
        path = self._path(part)
        return np.fromfile(path, self._dtype) if path.exists() else np.zeros(0, self._dtype)

    def _path(self, part: int) -> Path:
        return Path(self._folder.name, str(part))
