"""The errors that users see: `DistSaeError` and its subclasses.

Errors of third-party libraries are converted in one place per library: those of boto3 in
`storage/s3_errors.py`, those of kubernetes in `kubernetes/cluster.py`, and so on. A message says in
one sentence what is wrong, where, and what to do. Any other exception is a bug: exit code 1 and a
traceback.
"""

import tempfile
from typing import Self

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_CRASHED = 70
"""Exit code of a bug in a pod that counts its lives (see `storage/lives.py`)."""
EXIT_RESUMABLE = 75

_MOST_NAMED = 3


class DistSaeError(Exception):
    """An error that the user can fix, printed without a traceback. Each class has an exit code.

    Names of classes are values of the label `error` of metrics, so they do not change.
    """

    exit_code = EXIT_USER


class ConfigError(DistSaeError):
    """The run file or an override is not valid. The message has one line per problem."""


class ArgumentError(DistSaeError, ValueError):
    """An argument of a notebook function does not fit the run, the dictionary or the model."""


class CorpusError(DistSaeError):
    """The text cannot be read, is empty or is too small."""


class ModelError(DistSaeError):
    """The language model cannot be loaded, or does not have a site."""


class HubUnavailableError(ModelError, CorpusError):
    """The Hugging Face hub does not respond. A restart continues."""

    exit_code = EXIT_RESUMABLE


class LacksWeightsError(ModelError):
    """Some of a model's weights are missing from its files.

    Attributes:
        names: Names of the missing weights.
    """

    def __init__(self, path: str, names: list[str]) -> None:
        shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        super().__init__(f"model.path {path}: {len(names)} weights are missing ({shown})")
        self.names = names


class HeadlessError(ModelError):
    """The model has no head that predicts tokens, so it has no cross-entropy."""


class PlanMismatchError(DistSaeError):
    """The store has no plan, or it has a plan or a run with different settings."""


class NoIndexError(DistSaeError):
    """The run has no complete latent index."""


class LatentNotFoundError(DistSaeError):
    """The dictionary does not have a latent with this index."""


class NonFiniteError(DistSaeError):
    """A NaN or infinity was found, before it could reach the weights or the store."""


class JobsFailedError(NonFiniteError):
    """Jobs of a sweep stopped at a NaN or infinity. All other jobs were trained to the end."""


class DivergedError(DistSaeError):
    """Ranks disagree on a value that must be equal on all ranks."""


class RankLostError(DistSaeError):
    """Another rank is lost or hung. A restart continues from the last checkpoint."""

    exit_code = EXIT_RESUMABLE


class LivesSpentError(DistSaeError):
    """A pod was restarted too many times in a row without making progress."""


class PartFailedError(DistSaeError):
    """Another part of the run has failed and will not be restarted."""


class AbandonedError(DistSaeError):
    """No run has read the activation set for `store.consumer_expiry_hours`, so producers stop."""


class RunTakenError(DistSaeError):
    """Another process is training this run. A restart continues once that process has ended."""

    exit_code = EXIT_RESUMABLE


class DataExhaustedError(DistSaeError):
    """The activation set has fewer rows than the run needs, or the rows were deleted after use."""


class UnitMissingError(DistSaeError):
    """A unit is missing and no producer is running. A restart continues once producers run."""

    exit_code = EXIT_RESUMABLE


class TelemetryError(DistSaeError):
    """The server for metrics cannot be started."""


class ProcessFailedError(DistSaeError):
    """A process of a local run failed. This error has its message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ClusterError(DistSaeError):
    """A Kubernetes cluster cannot be reached or refuses a request."""


class ForbiddenError(ClusterError):
    """The user does not have a permission on the cluster."""


class NotStartedError(ClusterError):
    """A container has no log yet."""


class RejectedError(ClusterError):
    """The cluster rejects an object because it is invalid or a change that is not allowed."""


class EndpointError(DistSaeError):
    """A language model's endpoint refuses a request or sends an unexpected response."""


class EndpointUnavailableError(EndpointError):
    """The endpoint does not respond or is rate-limited. The same command continues later.

    Attributes:
        pause_seconds: Time to wait, as requested by the endpoint.
    """

    exit_code = EXIT_RESUMABLE

    def __init__(self, message: str, pause_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds


class StoreError(DistSaeError):
    """An operation on the object store failed.

    Attributes:
        url: URL of the store.
        key: Key of the object, or None if the error concerns the whole store.
    """

    def __init__(self, message: str, *, url: str, key: str | None = None) -> None:
        place = url if key is None else f"{url.rstrip('/')}/{key}"
        super().__init__(f"{place}: {message}")
        self.url = url
        self.key = key


class ObjectNotFoundError(StoreError):
    """The object does not exist."""


class AccessError(StoreError):
    """Credentials are missing or rejected, or the bucket does not exist."""


class UnavailableError(StoreError):
    """The endpoint cannot be reached or keeps failing. A restart continues."""

    exit_code = EXIT_RESUMABLE


class StoreFullError(StoreError):
    """The store has no space for the object."""

    @classmethod
    def of_temporary(cls, what: str, cause: OSError) -> Self:
        """Create the error for a temporary folder without enough space.

        Args:
            what: Size and content of the file, for the message.
            cause: Error of the operating system.
        """
        return cls(
            f"cannot store {what} temporarily ({cause.strerror}); free some space, or set "
            f"TMPDIR to another folder",
            url=tempfile.gettempdir(),
        )


class CorruptObjectError(StoreError):
    """The bytes do not match their checksum or schema."""


class Stopped(DistSaeError):  # noqa: N818 - not an error: a requested stop
    """The program was asked to stop, and its progress is saved."""

    exit_code = EXIT_RESUMABLE
