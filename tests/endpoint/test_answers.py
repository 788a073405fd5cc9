"""Requests to an endpoint: what they cost, that no answer is paid for twice, and what fails."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_sae import retry
from dist_sae.endpoint.answers import Endpoint, Message, Question
from dist_sae.endpoint.settings import EndpointSettings, read_endpoint
from dist_sae.errors import (
    ConfigError,
    CorruptObjectError,
    EndpointError,
    EndpointUnavailableError,
)
from dist_sae.storage import open_store
from tests.endpoint.server import OpenAIServer, endpoint_file, serving, texts_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """A server that answers with the last word of the question. Retries pause for milliseconds."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: body["messages"][-1]["content"].split()[-1]) as found:
        yield found


def opened(server: OpenAIServer, folder: Path, **settings: Any) -> Endpoint:
    found = EndpointSettings(url=server.url, model="tests", **settings)
    return Endpoint(found, open_store(str(folder)), "run/answers")


def question(text: str, most_tokens: int = 5) -> Question:
    return Question((Message("system", "Say it."), Message("user", text)), most_tokens)


def test_each_question_is_paid_once(server: OpenAIServer, tmp_path: Path) -> None:
    endpoint = opened(server, tmp_path)
    first = endpoint.ask([question("a b"), question("a c"), question("a b")])
    assert [answer.text for answer in first] == ["b", "c", "b"]
    assert len(server.bodies) == 2
    again = opened(server, tmp_path)
    assert again.estimate([question("a b"), question("a d")]).kept == 1
    more = again.ask([question("a d"), question("a c"), question("a b")])
    assert [answer.text for answer in more] == ["d", "c", "b"]
    assert texts_of(server.bodies[2:]) == ["a d"]


def test_a_question_is_another_with_another_model_limit_or_parameter(
    server: OpenAIServer, tmp_path: Path
) -> None:
    opened(server, tmp_path).ask([question("a b")])
    assert opened(server, tmp_path).estimate([question("a b", 6)]).requests == 1
    other = opened(server, tmp_path, parameters={"top_p": 0.5})
    assert other.estimate([question("a b")]).requests == 1
    faster = opened(server, tmp_path, concurrency=3, input_price=1, output_price=2)
    assert faster.estimate([question("a b")]).requests == 0


def test_the_estimate_is_exact_in_requests_and_bounds_the_price(
    server: OpenAIServer, tmp_path: Path
) -> None:
    """Each question has 7 + 4 bytes, and 11 / 4 rounds up to 3 tokens."""
    endpoint = opened(server, tmp_path, input_price=2.0, output_price=10.0)
    estimate = endpoint.estimate([question("abcd"), question("efgh"), question("abcd")])
    assert not server.bodies
    assert estimate[:5] == (2, 0, 6, False, 10)
    assert estimate.most_price == pytest.approx((6 * 2 + 10 * 10) / 1e6)
    assert "2 requests (0 answers are cached), about 6 input tokens" in estimate.sentence(
        "http://x"
    )
    assert opened(server, tmp_path).estimate([question("abcd")]).most_price is None
    limited = opened(server, tmp_path, parameters={"max_tokens": None, "max_completion_tokens": 9})
    assert limited.estimate([question("abcd")]).most_output_tokens == 9
    limited.ask([question("abcd")])
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 9


def test_tokens_are_counted_with_the_chat_template(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:
        chat_template = "there is one"

        def apply_chat_template(self, chat: list[dict[str, str]], **settings: Any) -> str:
            assert settings == {"tokenize": False, "add_generation_prompt": True}
            return " ".join(f"{message['role']} {message['content']}" for message in chat) + " <a>"

        def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
            assert settings == {"add_special_tokens": False}
            return {"input_ids": list(range(len(text.split())))}

    monkeypatch.setattr("dist_sae.models.loading.load_plain_tokenizer", lambda _: Tokenizer())
    estimate = opened(server, tmp_path, tokenizer="folder").estimate([question("a b c")])
    assert (estimate.input_tokens, estimate.is_exact) == (8, True)


def test_it_waits_for_an_endpoint_that_is_away(
    server: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure is logged at once, with the endpoint's message, in case waiting does not
    help.
    """
    server.faults = [
        (500, {}, {"error": "no such model"}),
        (0, {}, b""),
        (503, {}, b"<html>Bad Gateway</html>"),
        (429, {"Retry-After": "0.05"}, {"error": {"message": "slow down", "code": "rate_limit"}}),
    ]
    (answer,) = opened(server, tmp_path).ask([question("a b")])
    assert answer.text == "b"
    assert len(server.bodies) == 5
    said, *_ = caplog.messages  # repeated only after a while
    assert re.search(r": HTTP 500 \(no such model\); .*; retrying for up to \d+ s$", said)


def test_its_patience_ends_and_answers_stay(server: OpenAIServer, tmp_path: Path) -> None:
    endpoint = opened(server, tmp_path, patience_seconds=0.05, concurrency=1)
    endpoint.ask([question("a b")])
    server.faults = [(500, {}, {"error": "broken"})] * 1000
    with pytest.raises(EndpointUnavailableError, match=r"HTTP 500 \(broken\)") as raised:
        endpoint.ask([question("a b"), question("a c")])
    assert raised.value.exit_code == 75
    server.faults = []
    assert [a.text for a in endpoint.ask([question("a b"), question("a c")])] == ["b", "c"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((401, {}, {"error": {"message": "who?"}}), "requires a key; set OPENAI_API_KEY"),
        ((404, {}, {"error": {"message": "no model"}}), "has no tests at http"),
        ((400, {}, {"message": "too long"}), r"HTTP 400 \(too long\): refuses the request"),
        ((429, {}, {"error": {"code": "insufficient_quota"}}), "the account has no credit left"),
        ((200, {}, b"<html>"), "the response is not a chat completion"),
        ((200, {}, {"choices": []}), "the response is not a chat completion"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "HTTP 302"),
    ],
)
def test_it_does_not_repeat_what_waiting_does_not_mend(
    server: OpenAIServer, tmp_path: Path, fault: Any, said: str
) -> None:
    server.faults = [fault]
    with pytest.raises(EndpointError, match=said) as raised:
        opened(server, tmp_path).ask([question("a b")])
    assert not isinstance(raised.value, EndpointUnavailableError)
    assert len(server.bodies) == 1


def test_a_refusal_ends_the_wait_for_other_answers(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the refusal ends the retries, the first question is retried for a minute."""
    monkeypatch.setattr(retry, "STOPPING_RETRY_SECONDS", 0.05)
    waits = threading.Event()

    def reply(body: Any) -> Any:
        if body["messages"][-1]["content"] == "first":
            waits.set()
            return 503, {}, {"error": "away"}
        waits.wait()
        return 400, {}, {"error": "too long"}

    server.reply = reply
    endpoint, started = opened(server, tmp_path, patience_seconds=60), time.monotonic()
    with pytest.raises(EndpointError, match="too long"):
        endpoint.ask([question("first"), question("second")])
    assert time.monotonic() - started < 30


def test_an_answer_that_takes_too_long_names_the_limit(
    server: OpenAIServer, tmp_path: Path
) -> None:
    ended = threading.Event()

    def reply(_: Any) -> str:
        ended.wait()
        return "yes"

    server.reply = reply
    endpoint = opened(server, tmp_path, timeout_seconds=0.1, patience_seconds=0.1)
    with pytest.raises(EndpointUnavailableError, match=r"within 0\.1 s; .* timeout_seconds"):
        endpoint.ask([question("a b")])
    ended.set()


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    monkeypatch.setenv("OTHER", "secret\n")
    (answer,) = opened(server, tmp_path, key_variable="OTHER").ask([question("a b")])
    assert answer.text == "b"
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(EndpointError, match="rejects the key in OPENAI_API_KEY") as raised:
        opened(server, tmp_path).ask([question("a c")])
    assert "wrong" not in str(raised.value)
    assert not any("secret" in path.read_text() for path in tmp_path.rglob("*.json"))


def test_requests_run_side_by_side_up_to_the_limit(server: OpenAIServer, tmp_path: Path) -> None:
    barrier = threading.Barrier(3)  # each answer waits until three requests are in progress

    def reply(_: Any) -> str:
        barrier.wait(timeout=30)
        return "yes"

    server.reply = reply
    opened(server, tmp_path, concurrency=3).ask([question(f"a {n}") for n in range(9)])
    assert server.most_at_once == 3


def test_an_answer_that_was_cut_says_so(server: OpenAIServer, tmp_path: Path) -> None:
    server.reply = lambda _: "one two three"
    answers = opened(server, tmp_path).ask([question("a", 2), question("b", 3)])
    assert [(a.text, a.is_whole) for a in answers] == [("one two", False), ("one two three", True)]
    assert [a.output_tokens for a in answers] == [2, 3]


def test_a_damaged_answer_is_refused(server: OpenAIServer, tmp_path: Path) -> None:
    endpoint = opened(server, tmp_path)
    endpoint.ask([question("a b")])
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(CorruptObjectError, match="delete it, and rerun the command"):
        endpoint.ask([question("a b")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file: Input should be"),
        ("url: ftp://x/v1\nmodel: m", "url: is not an http"),
        ("url: http://user:pw@x/v1\nmodel: m", "keys do not belong in this file"),
        ("url: http://x/v1", "model: Field required"),
        ("url: http://x/v1\nmodel: m\napi_key: abc", "api_key: Extra inputs are not permitted"),
        ("url: http://x/v1\nmodel: m\ninput_price: 1", "set both input_price and output_price"),
        ("url: http://x/v1\nmodel: m\nparameters: {n: 2}", "parameters.n: cannot be set"),
        ("{", "is not YAML"),
    ],
)
def test_mistakes_of_the_file_are_told(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "endpoint.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said) as raised:
        read_endpoint(str(path))
    assert "\n" not in str(raised.value)
    assert "abc" not in str(raised.value)
    assert "pw" not in str(raised.value)


def test_the_file_is_read(server: OpenAIServer, tmp_path: Path) -> None:
    path = tmp_path / "endpoint.yaml"
    path.write_text(endpoint_file(server, concurrency=2))
    assert read_endpoint(str(path)).concurrency == 2
    with pytest.raises(ConfigError, match="name a readable file"):
        read_endpoint(str(tmp_path / "none.yaml"))
