"""Documents of units, read from the activation set or from the run's files.

    texts/<checksum>.json    the texts of a unit's documents, as a JSON array

Without stored texts, each producer on another machine would fetch and unpack the whole corpus for
a few spans of it, again after every preemption. So the planner, which reads the whole corpus
anyway, stores each unit's documents in the set before it publishes the plan. If the set is a local
folder and the text is not in S3, the text is instead read from the run's files.
"""

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from dist_sae.config import Run
from dist_sae.config.base import folder_of
from dist_sae.config.data import FilesCorpus, SyntheticCorpus
from dist_sae.data.corpus import Corpus, Document, combined_checksum
from dist_sae.data.plan import Plan
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import KeyPattern
from dist_sae.storage.records import READS

logger = logging.getLogger(__name__)

TEXTS = KeyPattern("texts/", r"(?P<checksum>[0-9a-f]{32})\.json")
_WRITERS = 16  # requests in flight
_AT_ONCE = 64  # units in memory


def stores_texts(run: Run) -> bool:
    """Return whether the documents of a new plan are stored in its activation set."""
    corpus = run.corpus
    is_remote = isinstance(corpus, FilesCorpus) and any(f.startswith("s3://") for f in corpus.files)
    is_shared = folder_of(run.store.activations) is None  # machines share the store but no disk
    return not isinstance(corpus, SyntheticCorpus) and (is_remote or is_shared)


def store_texts(
    store: ObjectStore,
    corpus: Corpus,
    plan: Plan,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Store the documents of all units that are not stored yet.

    Args:
        store: Object store of the activation set.
        corpus: Corpus of the run.
        plan: Plan whose texts are to be stored; it need not be published yet.
        on_progress: Progress callback for the number of units done.

    Raises:
        CorpusError: The text has changed since it was indexed.
    """
    stored = {key["checksum"] for key in TEXTS.keys(store)}
    checksums = plan.text_checksums or ()
    missing = [unit for unit, checksum in enumerate(checksums) if checksum not in stored]
    with ThreadPoolExecutor(_WRITERS) as pool:
        for done in range(0, len(missing), _AT_ONCE):
            on_progress(len(checksums) - len(missing) + done)
            packed = {
                _key(checksums[unit]): _pack(
                    corpus.read(plan.files, plan.units[unit], checksums[unit])
                )
                for unit in missing[done : done + _AT_ONCE]
            }
            list(pool.map(store.put, packed.keys(), packed.values()))


class PlannedText:
    """Reads the documents of units.

    Args:
        run: Run whose corpus is read.
        plan: Plan of the activation set.
        store: Object store of the activation set.
    """

    def __init__(self, run: Run, plan: Plan, store: ObjectStore) -> None:
        self._plan, self._store = plan, store
        self._corpus = Corpus(run.corpus, run.store.s3)
        self._first_numbers = list(accumulate((f.documents for f in plan.files), initial=0))

    def read(self, unit: int) -> list[Document]:
        """Read the documents of a unit.

        Raises:
            CorpusError: The text differs from the plan's.
            CorruptObjectError: The stored text is damaged or gone.
        """
        plan, spans = self._plan, self._plan.units[unit]
        checksum = None if plan.text_checksums is None else plan.text_checksums[unit]
        if not plan.texts_stored:
            return self._corpus.read(plan.files, spans, checksum)
        assert checksum is not None
        numbers = (
            self._first_numbers[span.file] + span.first + i
            for span in spans
            for i in range(span.count)
        )
        return list(map(Document, numbers, self._stored(checksum)))

    def _stored(self, checksum: str) -> Iterable[str]:
        """Read stored texts; retry if the checksum does not match."""
        key, fault = _key(checksum), ""
        for _ in range(READS):
            try:
                texts: list[str] = json.loads(self._store.get(key).decode(*_ENCODING))
                if combined_checksum(texts) == checksum:
                    return texts
                fault = "does not match its checksum"
            except ObjectNotFoundError:
                fault = "is gone"
                break
            except (ValueError, TypeError, AttributeError):
                fault = "is damaged"
            logger.warning("%s/%s: %s; reading it again", self._store.url, key, fault)
        raise CorruptObjectError(
            f"{fault}; delete it and run `dist-sae plan` again", url=self._store.url, key=key
        )


_ENCODING = ("utf-8", "surrogatepass")  # JSON may contain half a surrogate pair


def _pack(documents: list[Document]) -> bytes:
    return json.dumps([d.text for d in documents], ensure_ascii=False).encode(*_ENCODING)


def _key(checksum: str) -> str:
    """Return a key that depends only on content, so planners of different plans never collide."""
    return f"{TEXTS.folder}{checksum}.json"
