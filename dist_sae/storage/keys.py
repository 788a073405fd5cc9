"""Filter for dist-sae's own objects in a store; skips others, with one warning per folder.

File managers, editors, network file systems and web consoles create foreign objects (`.DS_Store`,
`.nfs0001`, an empty `claims/`), and so do people (a copy of a checkpoint).
"""

import logging
import re
from collections.abc import Iterator

from dist_sae.storage.base import Entry, ObjectStore

logger = logging.getLogger(__name__)

PAGE = 1000  # numbers in a page, because one request lists this many keys
_DIGITS = 8  # of a number in a key
warned = set[tuple[str, str]]()
"""(store, folder) pairs for which this process has logged a warning."""


class KeyPattern:
    """Pattern for the keys of one kind of object.

    Args:
        folder: Common prefix, for example `units/`.
        rest: Regular expression for the rest of a key.
    """

    def __init__(self, folder: str, rest: str) -> None:
        self.folder = folder
        self._shape = re.compile(re.escape(folder) + rest, re.ASCII)

    def keys(self, store: ObjectStore, begin: str = "") -> Iterator[re.Match[str]]:
        """Yield a match for each existing key, or only for those whose rest starts with `begin`."""
        for key in store.keys(f"{self.folder}{begin}"):
            if match := self.match(store, key):
                yield match

    def entries(self, store: ObjectStore, begin: str = "") -> Iterator[tuple[re.Match[str], Entry]]:
        """Yield the match and the listing entry of each existing key; `begin` as in `keys`."""
        for entry in store.entries(f"{self.folder}{begin}"):
            if match := self.match(store, entry.key):
                yield match, entry

    def parse(self, key: str) -> re.Match[str] | None:
        """Match one of dist-sae's keys; return None for a foreign key."""
        return self._shape.fullmatch(key)

    def match(self, store: ObjectStore, key: str) -> re.Match[str] | None:
        """Match one of dist-sae's keys; log a warning and return None for a foreign key."""
        match = self.parse(key)
        if match is None:
            warn_of_foreign(store, self.folder, key)
        return match


class NumberedKeys(KeyPattern):
    """Keys of the form `<folder><number>.json`, with eight digits so that keys sort like numbers.

    Args:
        folder: Common prefix, for example `units/`.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, rf"(?P<number>\d{{{_DIGITS}}})\.json")

    def key(self, number: int) -> str:
        """Return the key of a number."""
        return f"{self.folder}{number:0{_DIGITS}d}.json"

    def numbers(self, store: ObjectStore, page: int | None = None) -> Iterator[int]:
        """Yield the numbers of existing objects; `page` limits them to that thousand."""
        for key in self.keys(store, self.page(page)):
            yield int(key["number"])

    def ages(self, store: ObjectStore, page: int | None = None) -> dict[int, float]:
        """Return the seconds since each object of `numbers` was written, by number."""
        found = self.entries(store, self.page(page))
        return {int(key["number"]): entry.age_seconds for key, entry in found}

    def page(self, page: int | None) -> str:
        """Return the digits that a page's numbers start with; an empty string for all pages."""
        return "" if page is None else f"{page:0{_DIGITS - 3}d}"


def warn_of_foreign(store: ObjectStore, folder: str, key: str) -> None:
    """Log a warning about a foreign object, once per folder and process."""
    if (store.url, folder) not in warned:
        warned.add((store.url, folder))
        logger.warning(
            "%s/%s: not a dist-sae object; this and similar objects in %s are ignored",
            store.url,
            key,
            folder,
        )
