"""A local folder as an object store; the default."""

import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dist_sae.config.base import folder_of
from dist_sae.errors import AccessError, ObjectNotFoundError, StoreError, StoreFullError
from dist_sae.storage.base import Entry

logger = logging.getLogger(__name__)

_TEMPORARY = ".partial"  # suffix of files that are still being written; never listed
_RACES = 100


class LocalStore:
    """Stores objects as files; one rename (or link) after fsync makes a write visible."""

    def __init__(self, url: str) -> None:
        folder = folder_of(url)
        assert folder is not None
        self.root = Path(folder)
        self._read_only = False  # until a write fails

    @property
    def url(self) -> str:
        return str(self.root)

    @property
    def exclusive(self) -> bool:
        return True

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._errors(key), (self.root / key).open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    @contextmanager
    def file(self, key: str) -> Iterator[Path]:
        """Yield the path of an object's file, for readers that need a file instead of bytes."""
        with self._errors(key):
            yield self.root / key

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        return self._write(key, (data,), if_absent=if_absent)

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        self._write(key, content(), if_absent=False)

    def _write(self, key: str, pieces: Iterable[bytes], *, if_absent: bool) -> bool:
        path = self.root / key
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
        with self._errors(key):
            try:
                with _create(partial) as file:
                    file.writelines(pieces)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
                    try:
                        os.link(partial, path)  # fails when the file exists, unlike rename
                    except FileExistsError:
                        return False
                else:
                    partial.replace(path)
                _sync_folder(path.parent)
                return True
            finally:
                with suppress(FileNotFoundError):
                    partial.unlink()

    def size(self, key: str) -> int | None:
        with self._errors(key):
            try:
                return (self.root / key).stat().st_size
            except FileNotFoundError:
                return None

    def keys(self, prefix: str = "") -> Iterator[str]:
        found = []
        with self._errors(prefix or None):
            top = self.root / prefix.rpartition("/")[0]
            for folder, folders, names in os.walk(top, onerror=_unless_gone):
                folders[:] = [name for name in folders if not _is_system_folder(name)]
                inside = Path(folder).relative_to(self.root)
                found += [(inside / n).as_posix() for n in names if not n.endswith(_TEMPORARY)]
        yield from sorted(key for key in found if key.startswith(prefix))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        now = None
        for key in self.keys(prefix):
            with self._errors(key):
                try:
                    there = (self.root / key).stat()
                except FileNotFoundError:  # deleted since it was listed
                    continue
            now = now or self._now()
            yield Entry(key, there.st_size, max(0.0, now - there.st_mtime))

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix or None):
            try:
                with os.scandir(self.root / prefix) as found:
                    names = [entry.name for entry in found if entry.is_dir()]
            except FileNotFoundError:
                return []
        return sorted(name for name in names if not _is_system_folder(name))

    def delete(self, key: str) -> None:
        path = self.root / key
        with self._errors(key), suppress(FileNotFoundError):
            path.unlink()
            with suppress(OSError):  # not empty, or gone
                path.parent.rmdir()

    def delete_many(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.delete(key)

    def _now(self) -> float:
        """Return the time by the clock that dates files; on a network file system, the server's."""
        probe = self.root / f"{uuid.uuid4().hex[:12]}{_TEMPORARY}"
        try:
            probe.touch(exist_ok=False)
            os.utime(probe)  # a server may date new files by the client's clock, but not this call
            return probe.stat().st_mtime
        except OSError:
            if not self._read_only:
                self._read_only = True
                logger.warning(
                    "%s: not writable; ages of objects are measured by this machine's clock",
                    self.url,
                )
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    @contextmanager
    def _errors(self, key: str | None) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            kind, problem = StoreError, f"{exc.strerror or exc}"
            if isinstance(exc, FileNotFoundError):
                kind, problem = ObjectNotFoundError, "no such object"
            elif exc.errno in (errno.ENOSPC, errno.EDQUOT):
                kind = StoreFullError
                problem = "no space left; free some and start the same command again to continue"
            elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                kind = AccessError
                problem = f"{exc.strerror}; check the folder's owner and permissions"
            raise kind(problem, url=self.url, key=key) from exc


def _is_system_folder(folder: str) -> bool:
    """Return whether a folder is for snapshots, trash etc., which are often large or unreadable."""
    return folder.startswith(".") or folder == "lost+found"


def _unless_gone(exc: OSError) -> None:
    """Ignore a folder that was deleted during the listing; raise other errors."""
    if not isinstance(exc, FileNotFoundError):
        raise exc


def _create(path: Path) -> BinaryIO:
    """Create a file and its missing parent folders."""
    for _ in range(_RACES):
        with suppress(FileNotFoundError):
            return path.open("xb")
        new = [folder for folder in path.parents if not folder.exists()]
        with suppress(FileNotFoundError):  # another process has just deleted the empty folder
            path.parent.mkdir(parents=True, exist_ok=True)
        for folder in new:
            _sync_folder(folder.parent)
    return path.open("xb")


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a new file survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has deleted the object, and the folder with it
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
