from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_sae.commands.cli import main
from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import HubUnavailableError, ModelError
from dist_sae.hub import is_unavailable
from dist_sae.models.loading import errors_of
from dist_sae.producing import planner as planning
from tests.runs import TINY, write_run


class ConnectError(Exception):
    """An error with the name of httpx's error, by which it is recognized."""


class HfHubHTTPError(Exception):
    """An error with a response and status, like huggingface_hub's, by which it is recognized."""

    def __init__(self, status: int) -> None:
        self.response = SimpleNamespace(status_code=status)


def caused_by(cause: Exception) -> Exception:
    error = OSError("cannot be loaded")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "passing"),
    [
        (ConnectError(), True),
        (HfHubHTTPError(429), True),
        (HfHubHTTPError(503), True),
        (HfHubHTTPError(404), False),
        (HfHubHTTPError(401), False),
        (KeyError("config"), False),
    ],
    ids=str,
)
def test_what_waiting_may_mend_is_told_from_what_the_user_must(
    cause: Exception, *, passing: bool
) -> None:
    assert is_unavailable(cause) is passing
    assert is_unavailable(caused_by(cause)) is passing
    config = HuggingFaceModel(path="org/name")
    with pytest.raises(ModelError) as raised, errors_of(config):
        raise caused_by(cause)
    assert isinstance(raised.value, HubUnavailableError) is passing
    assert raised.value.exit_code == (75 if passing else 2)


def test_a_hub_that_is_away_before_there_is_a_plan_may_be_a_wrong_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise HubUnavailableError("model.path org/nmae: cannot be loaded")

    monkeypatch.setattr(planning, "check_sites", away)
    assert main(["plan", str(write_run(tmp_path, TINY))]) == 2
