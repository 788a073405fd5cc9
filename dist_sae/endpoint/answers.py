"""Questions to a language model: priced in advance, sent concurrently, and paid for once.

<folder>/<2 digits>/<digest>.json                 sealed; one per answered question

The digest covers everything that decides an answer: the endpoint's URL, the model, the messages and
the parameters. Each answer is stored as soon as it arrives. So if the program is stopped, the same
command sends only the questions without a stored answer.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from typing import Any, Literal, NamedTuple

from dist_sae import logs
from dist_sae.endpoint.client import Client, Completion
from dist_sae.endpoint.settings import EndpointSettings
from dist_sae.errors import ConfigError, ModelError
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import KeyPattern
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 4  # assumed bytes of UTF-8 per token if no tokenizer is set
_LIMITS = ("max_completion_tokens", "max_tokens")
_READERS = 16
_REMEDY = "delete it, and rerun the command"


class Message(NamedTuple):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(NamedTuple):
    """The messages of one request."""

    messages: tuple[Message, ...]
    most_tokens: int
    """Longest answer, in tokens."""


class Estimate(NamedTuple):
    """The requests, tokens and price of a list of questions, estimated before sending any."""

    requests: int
    """Number of distinct questions without a stored answer."""
    kept: int
    """Number of distinct questions with a stored answer."""
    input_tokens: int
    is_exact: bool
    """Whether the model's own tokenizer counted the input tokens."""
    most_output_tokens: int
    """Number of output tokens if all answers have the maximum length."""
    most_price: float | None
    """Price if all answers have the maximum length; None if the endpoint file has no prices."""
    currency: str

    def sentence(self, url: str) -> str:
        """Return the estimate as a sentence."""
        if not self.requests:
            return f"{url}: all {self.kept:,} answers are cached; no requests needed"
        about = "" if self.is_exact else "about "
        price = "the endpoint file has no prices"
        if self.most_price is not None:
            price = f"at most {about}{self.most_price:,.4g} {self.currency}"
        return (
            f"{url}: {self.requests:,} requests ({self.kept:,} answers are cached), "
            f"{about}{self.input_tokens:,} input tokens, at most {self.most_output_tokens:,} "
            f"output tokens; {price}"
        )


class Answer(Record):
    """A stored answer."""

    schema_version: Literal[1] = 1
    model: str
    text: str
    is_whole: bool
    """False if the answer was truncated at its maximum length."""
    input_tokens: int | None
    """Number of input tokens according to the endpoint; None if the endpoint did not report it."""
    output_tokens: int | None


class Endpoint:
    """A language model that answers questions.

    Args:
        settings: URL, model and prices of the endpoint.
        store: Store for the answers.
        folder: Folder in the store, for example `<run>/answers`.
    """

    def __init__(self, settings: EndpointSettings, store: ObjectStore, folder: str) -> None:
        self._settings = settings
        self._store = store
        self._folder = folder

    @property
    def url(self) -> str:
        """Base URL of the endpoint."""
        return self._settings.url

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._settings.model

    def cached(self, questions: Iterable[Question]) -> list[Answer | None]:
        """Return the stored answer of each question, or None. Sends no requests.

        Raises:
            CorruptObjectError: A stored answer is damaged.
        """
        digests, there = [self._digest(question) for question in questions], self._cached_digests()
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(lambda d: self._read(d) if d in there else None, digests))

    def estimate(self, questions: Iterable[Question]) -> Estimate:
        """Count and price the questions that would have to be sent. Sends no requests.

        Raises:
            ConfigError: The tokenizer cannot be read, or has no chat template.
        """
        of = self._by_digest(questions)
        there = self._cached_digests()
        new = [question for digest, question in of.items() if digest not in there]
        tokens = sum(map(self._count, new))
        most = sum(self._most_tokens(question) for question in new)
        return Estimate(
            requests=len(new),
            kept=len(of) - len(new),
            input_tokens=tokens,
            is_exact=self._settings.tokenizer is not None,
            most_output_tokens=most,
            most_price=self._price(tokens, most),
            currency=self._settings.currency,
        )

    def ask(self, questions: Sequence[Question], what: str = "ask") -> list[Answer]:
        """Answer questions, in order. Questions with a stored answer are not sent again.

        Args:
            questions: The questions. Equal questions are sent once.
            what: Name of the work in progress reports.

        Raises:
            EndpointUnavailableError: The endpoint did not respond within `patience_seconds`. Its
                earlier answers are stored.
            EndpointError: The endpoint refuses a request, or its response is not valid.
        """
        digests = [self._digest(question) for question in questions]
        of = self._by_digest(questions)
        there = self._cached_digests()
        found: dict[str, Answer] = {}
        kept = [digest for digest in of if digest in there]
        with ThreadPoolExecutor(_READERS) as pool:
            found |= zip(kept, pool.map(self._read, kept), strict=True)
        new = [digest for digest in of if digest not in there]
        stopping = threading.Event()
        client = Client(self._settings, stopping)
        progress = logs.RateLimitedProgress(what)

        def complete(digest: str) -> Answer:
            return self._store_answer(digest, client.complete(self._body(of[digest])))

        pool = ThreadPoolExecutor(self._settings.concurrency)
        asked = {pool.submit(complete, digest): digest for digest in new}
        try:
            for number, done in enumerate(as_completed(asked), 1):
                found[asked[done]] = done.result()
                progress(number, len(new))
        finally:
            stopping.set()  # other threads that retry give up soon
            pool.shutdown(cancel_futures=True)  # requests in flight finish and are stored
            client.close()
        if new:
            self._log_usage([found[digest] for digest in new])
        return [found[digest] for digest in digests]

    def _by_digest(self, questions: Iterable[Question]) -> dict[str, Question]:
        return {self._digest(question): question for question in questions}

    def _body(self, question: Question) -> dict[str, Any]:
        body = {
            "model": self._settings.model,
            "messages": [message._asdict() for message in question.messages],
            "temperature": 0,
            "max_tokens": question.most_tokens,
            **self._settings.parameters,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _digest(self, question: Question) -> str:
        decides = {"url": self._settings.url, "body": self._body(question)}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _most_tokens(self, question: Question) -> int:
        body = self._body(question)
        limits = [body[name] for name in _LIMITS if isinstance(body.get(name), int)]
        return limits[0] if limits else question.most_tokens

    def _count(self, question: Question) -> int:
        if self._settings.tokenizer is not None:
            return self._counter(question.messages)
        n_bytes = sum(len(message.content.encode()) for message in question.messages)
        return -(-n_bytes // _TOKEN_BYTES)

    @cached_property
    def _counter(self) -> Callable[[Sequence[Message]], int]:
        from dist_sae.config.data import HuggingFaceModel  # loads transformers
        from dist_sae.models.loading import load_plain_tokenizer

        name = self._settings.tokenizer
        assert name is not None
        try:
            tokenizer = load_plain_tokenizer(HuggingFaceModel(path=name))
        except (ModelError, ValueError) as exc:
            raise ConfigError(f"--endpoint: tokenizer {name}: cannot be read: {exc}") from exc
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"--endpoint: tokenizer {name}: has no chat template; remove the tokenizer "
                f"setting to estimate tokens instead"
            )

        def count(messages: Sequence[Message]) -> int:
            chat = [message._asdict() for message in messages]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        return count

    def _price(self, input_tokens: int, output_tokens: int) -> float | None:
        settings = self._settings
        if settings.input_price is None or settings.output_price is None:
            return None
        return (input_tokens * settings.input_price + output_tokens * settings.output_price) / 1e6

    def _cached_digests(self) -> set[str]:
        """Return the digests of the stored answers."""
        keys = KeyPattern(f"{self._folder}/", r"[0-9a-f]{2}/(?P<digest>[0-9a-f]{64})\.json")
        return {match["digest"] for match in keys.keys(self._store)}

    def _key(self, digest: str) -> str:
        return f"{self._folder}/{digest[:2]}/{digest}.json"

    def _read(self, digest: str) -> Answer:
        return read_record(Answer, self._store, self._key(digest), _REMEDY)

    def _store_answer(self, digest: str, completion: Completion) -> Answer:
        answer = Answer(model=self._settings.model, **completion._asdict())
        self._store.put(self._key(digest), seal(answer))
        return answer

    def _log_usage(self, answers: Sequence[Answer]) -> None:
        counts: Mapping[str, list[int | None]] = {
            "input": [answer.input_tokens for answer in answers],
            "output": [answer.output_tokens for answer in answers],
        }
        known = {kind: [n for n in of if n is not None] for kind, of in counts.items()}
        if any(len(of) < len(answers) for of in known.values()):
            logger.info("%s: %d answers; token usage not reported", self.url, len(answers))
            return
        spent = {kind: sum(of) for kind, of in known.items()}
        price = self._price(spent["input"], spent["output"])
        logger.info(
            "%s: %d answers, %d input and %d output tokens%s",
            self.url,
            len(answers),
            spent["input"],
            spent["output"],
            "" if price is None else f", {price:.4g} {self._settings.currency}",
        )
