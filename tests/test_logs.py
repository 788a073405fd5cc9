import logging

import pytest

from dist_sae import logs


def test_what_is_not_known_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logs.progress("train", 1, 2, fvu=0.25, slow=None, phases={"wait": 1.0})
    assert caplog.messages == ["train 1/2 fvu=0.25"]
