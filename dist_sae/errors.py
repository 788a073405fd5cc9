"""The tree of errors that users see: `DistSaeError` and below.

Third-party errors are mapped once, in the module that is their door (boto3 in
`storage/s3_errors.py`, kubernetes in `kubernetes/cluster.py`, ...). A message says what, where
and what to do, in one sentence. Anything outside this tree is a bug: exit 1, with a traceback.
"""

import tempfile
from typing import Self

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_CRASHED = 70
"""A bug, in a pod that counts its lives (`storage/lives.py`)."""
EXIT_RESUMABLE = 75

_MOST_NAMED = 3


class DistSaeError(Exception):
    """An error that the user can fix; printed as one line, and the exit code is its own."""

    exit_code = EXIT_USER


class ConfigError(DistSaeError):
    """The run file or an override is not valid. The message has one line per problem."""


class ArgumentError(DistSaeError, ValueError):
    """An argument of a function for notebooks does not fit the run, dictionary or model."""


class CorpusError(DistSaeError):
    """The text cannot be read, is empty or is too small."""


class ModelError(DistSaeError):
    """The language model cannot be loaded, or lacks a site."""


class HubUnavailableError(ModelError, CorpusError):
    """The hub of models and data sets does not answer; a restart continues."""

    exit_code = EXIT_RESUMABLE


class LacksWeightsError(ModelError):
    """A model's files lack some of its weights.

    Attributes:
        names: Names of the missing weights.
    """

    def __init__(self, path: str, names: list[str]) -> None:
        shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        super().__init__(f"model.path {path}: {len(names)} weights are missing ({shown})")
        self.names = names


class HeadlessError(ModelError):
    """The model predicts no tokens, so it has no cross-entropy."""


class PlanMismatchError(DistSaeError):
    """The store already holds a plan or a run made with other settings."""


class NoIndexError(DistSaeError):
    """The run has no complete latent index."""


class LatentNotFoundError(DistSaeError):
    """The dictionary has no latent of this number."""


class NonFiniteError(DistSaeError):
    """A NaN or infinity was found before it reached the weights or the store."""


class JobsFailedError(NonFiniteError):
    """Jobs of a sweep ended by a NaN or infinity; the others have been trained to their ends."""


class DivergedError(DistSaeError):
    """Ranks disagree on a value that must be the same on all."""


class RankLostError(DistSaeError):
    """Another rank is gone or hung; a restart continues from the last checkpoint."""

    exit_code = EXIT_RESUMABLE


class LivesSpentError(DistSaeError):
    """Too many lives of a pod in a row made no progress."""


class PartFailedError(DistSaeError):
    """Another part of the run has failed for good."""


class AbandonedError(DistSaeError):
    """No run has read the activation set for so long that producers end."""


class RunTakenError(DistSaeError):
    """Another process is training this run; a restart after its end continues."""

    exit_code = EXIT_RESUMABLE


class DataExhaustedError(DistSaeError):
    """The activation set has fewer rows than the run asks for."""


class UnitMissingError(DistSaeError):
    """A unit is missing and no producer is at work; a restart beside producers continues."""

    exit_code = EXIT_RESUMABLE


class TelemetryError(DistSaeError):
    """Metrics cannot be served."""


class ProcessFailedError(DistSaeError):
    """A process of a local run failed; carries its error message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ClusterError(DistSaeError):
    """A Kubernetes cluster cannot be reached, or refuses a request."""


class ForbiddenError(ClusterError):
    """The user lacks a permission on the cluster."""


class NotStartedError(ClusterError):
    """A container has no log yet."""


class RejectedError(ClusterError):
    """The cluster rejects an object as invalid, or as an impossible change."""


class EndpointError(DistSaeError):
    """An endpoint of a language model refuses, or answers something else."""


class EndpointUnavailableError(EndpointError):
    """The endpoint does not answer or asks to wait; the same command goes on with what is left.

    Attributes:
        pause_seconds: Time that it asks to wait.
    """

    exit_code = EXIT_RESUMABLE

    def __init__(self, message: str, pause_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds


class StoreError(DistSaeError):
    """An operation on the object store failed.

    Attributes:
        url: The store.
        key: The object's key, or None if the error concerns the whole store.
    """

    def __init__(self, message: str, *, url: str, key: str | None = None) -> None:
        place = url if key is None else f"{url.rstrip('/')}/{key}"
        super().__init__(f"{place}: {message}")
        self.url = url
        self.key = key


class ObjectNotFoundError(StoreError):
    """The object does not exist."""


class AccessError(StoreError):
    """Credentials are missing or refused, or the bucket does not exist."""


class UnavailableError(StoreError):
    """The endpoint cannot be reached or keeps failing; a restart continues."""

    exit_code = EXIT_RESUMABLE


class StoreFullError(StoreError):
    """The store has no space for the object."""

    @classmethod
    def of_temporary(cls, what: str, cause: OSError) -> Self:
        """The error of a folder for temporary files that has no space.

        Args:
            what: Size and content of the file.
            cause: What the system said.
        """
        return cls(
            f"cannot hold {what} for a while ({cause.strerror}); free some space, or set TMPDIR to "
            f"another folder",
            url=tempfile.gettempdir(),
        )


class CorruptObjectError(StoreError):
    """The bytes do not match their checksum or schema."""


class Stopped(DistSaeError):  # noqa: N818 - not an error: a requested stop
    """The program was asked to stop; its progress is saved."""

    exit_code = EXIT_RESUMABLE
