"""Which objects of a store are ours: all others are passed by, and named once.

File managers, editors, network file systems and consoles leave objects beside ours (`.DS_Store`,
`.nfs0001`, an empty `claims/`), and so do people (a copy of a checkpoint).
"""

import logging
import re
from collections.abc import Iterator

from dist_sae.storage.base import Entry, ObjectStore

logger = logging.getLogger(__name__)

_named: set[tuple[str, str]] = set()  # in this process


class OwnKeys:
    """The keys of one kind of object.

    Args:
        folder: What they begin with, for example `units/`.
        rest: Regular expression of all that follows.
    """

    def __init__(self, folder: str, rest: str) -> None:
        self.folder = folder
        self._shape = re.compile(re.escape(folder) + rest, re.ASCII)

    def keys(self, store: ObjectStore, begin: str = "") -> Iterator[re.Match[str]]:
        """The keys that there are, with the groups of `rest`; `begin`: the first part of `rest`."""
        for key in store.keys(f"{self.folder}{begin}"):
            if match := self.match(store, key):
                yield match

    def entries(self, store: ObjectStore, begin: str = "") -> Iterator[tuple[re.Match[str], Entry]]:
        """The objects that there are, each with its key as `keys` has it."""
        for entry in store.entries(f"{self.folder}{begin}"):
            if match := self.match(store, entry.key):
                yield match, entry

    def match(self, store: ObjectStore, key: str) -> re.Match[str] | None:
        """The key if it is ours; else None, and the first such key of this kind is named."""
        match = self._shape.fullmatch(key)
        if match is None:
            name_foreign(store, self.folder, key)
        return match


def name_foreign(store: ObjectStore, folder: str, key: str) -> None:
    """Warn, once for a folder of a store, that an object in it is not ours."""
    if (store.url, folder) not in _named:
        _named.add((store.url, folder))
        logger.warning(
            "%s/%s: not an object of dist-sae; such are passed by, here and in the rest of %s",
            store.url,
            key,
            folder,
        )
