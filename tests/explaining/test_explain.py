"""`dist-sae explain` against a server that answers by rules, and how explanations are displayed."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dist_sae import retry
from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.explaining.explanations import explanations_of
from dist_sae.explaining.scoring import Verdict, VerdictCounts
from dist_sae.explaining.stored import ExplanationSet, sets
from dist_sae.index.query import Index
from dist_sae.report.build import report
from dist_sae.storage import open_store
from tests.endpoint.server import OpenAIServer, endpoint_file, serving
from tests.explaining.rules import reply
from tests.explaining.words import LENGTH, documents, word, words_run

pytestmark = pytest.mark.system

SETTINGS = ["--tokens", str(LENGTH), "--silent", "20"]
REQUESTS = 7
"""Requests for a latent with 20 active, 20 silent and 20 near-miss passages: one for the
explanation, and six that judge ten passages each.
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return words_run(tmp_path_factory.mktemp("words"))


class Asking:
    """The `explain` command with a test server."""

    def __init__(self, run: Run, server: OpenAIServer, folder: Path) -> None:
        self.server = server
        self.run = run
        self.place = f"{run.store.runs}/{run.name}"
        self._file = folder / "endpoint.yaml"
        self.settings(patience_seconds=30.0)

    def settings(self, **settings: Any) -> None:
        self._file.write_text(endpoint_file(self.server, **settings))

    def __call__(self, *more: str) -> int:
        return main(["explain", self.place, "--endpoint", str(self._file), *SETTINGS, *more])

    def told(self, latent: int, name: str = "tests") -> Any:
        index = Index(open_store(self.run.store.runs), self.run.name)
        (told,) = explanations_of(latent, [ExplanationSet(index, name)])
        return told

    def judged(self, latent: int) -> list[Verdict]:
        index = Index(open_store(self.run.store.runs), self.run.name)
        found = ExplanationSet(index, "tests").get(latent)
        assert found
        return list(found.judged)


@pytest.fixture
def asking(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(reply) as server:
        yield Asking(run, server, tmp_path)


def test_nothing_is_sent_without_the_word(
    asking: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents 0 and 1 can be explained. Latent 3 is too rare, and 4 never fires."""
    assert asking("--latents", "0", "1", "3", "4") == 0
    said = capsys.readouterr().out
    assert not asking.server.bodies
    assert f"{2 * REQUESTS} requests (0 answers are cached)" in said
    assert "nothing was sent; add --yes to send the requests" in said
    assert sets(Index(open_store(asking.run.store.runs), "words")) == []


def test_a_rule_is_scored_as_by_hand(asking: Asking, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores of latents 0 and 1 match values worked out by hand.

    Latent 0 fires on two words, in 30 documents each. The explainer sees the stronger one, word 10,
    more often. The judge says yes only in the upper deciles, so recall is 10 of 20, and all 20
    silent passages are judged correctly. Latent 1 fires on one word, and every verdict is correct.
    """
    assert asking("--latents", "0", "1", "3", "4", "--yes", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["latents"], found["explained"], found["too_rare"]) == (4, 2, 2)
    assert found["mean_balanced_accuracy"] == (0.75 + 1) / 2
    assert len(asking.server.bodies) == 2 * REQUESTS
    told = asking.told(0)
    assert told.explanation == f"the word {word(10)}"
    assert (told.score.active, told.score.random) == (VerdictCounts(10, 20), VerdictCounts(0, 20))
    assert told.score.deciles == (*5 * [VerdictCounts(0, 2)], *5 * [VerdictCounts(2, 2)])
    assert told.score.balanced_accuracy == 0.75
    assert told.score.f1 == pytest.approx(2 / 3)
    assert told.score.near == VerdictCounts(0, 20)
    for judged in asking.judged(0):
        assert judged.document is not None
        assert judged.yes == (10 in documents()[judged.document])
    assert asking.told(1).score.balanced_accuracy == 1
    (table,) = Path(asking.place).glob("index/*/explanations/tests-*.parquet")
    rows = pq.read_table(table).to_pylist()
    assert [row["latent"] for row in rows] == [0, 1, 3, 4]
    assert (rows[0]["active_yes"], rows[0]["active_passages"]) == (10, 20)
    assert [row["explanation"] is None for row in rows] == [False, False, True, True]


def test_the_judge_sees_no_marks_and_other_passages_than_the_explainer(asking: Asking) -> None:
    """Latent 2 is used because no other test explains it, so no answer is cached."""
    assert asking("--latents", "2", "--yes") == 0
    shown, *judged = (body["messages"][-1]["content"] for body in asking.server.bodies)
    assert "<<" in shown
    texts, others = (
        re.findall(r"^Passage \d+: (.*)$", text, re.MULTILINE)
        for text in (shown.replace("<<", "").replace(">>", ""), "\n".join(judged))
    )
    assert len(texts) == 20
    assert len(others) == 60
    assert not any("<<" in text for text in others)
    assert not set(texts) & set(others)


def test_the_same_command_asks_only_what_is_left(
    asking: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    """The endpoint fails after four answers, and the next command must not pay for them again."""
    server = asking.server
    asking.settings(patience_seconds=0.05, concurrency=1, model="other")
    server.reply = lambda body: _away(server, 4, body)
    assert asking("--latents", "1", "2", "--yes") == 75
    answered = len([body for body in server.bodies if "done" in body])
    assert answered == 4
    server.faults, server.reply = [], reply
    server.bodies.clear()
    assert asking("--latents", "1", "2") == 0
    left = 2 * REQUESTS - answered
    assert f"{left} requests ({answered} answers are cached)" in capsys.readouterr().out
    assert asking("--latents", "1", "2", "--yes") == 0
    assert len(server.bodies) == left
    server.bodies.clear()
    assert asking("--latents", "1", "2") == 0
    assert not server.bodies
    assert asking.told(2, "other").explanation == f"the word {word(13)}"


def _away(server: OpenAIServer, after: int, body: Any) -> str:
    """Answer and mark the request. After `after` answers, fail every later request."""
    body["done"] = True
    if sum("done" in each for each in server.bodies) >= after:
        server.faults = [(503, {}, {"error": {"message": "away"}})] * 10_000
    return reply(body)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ((401, {}, {"error": {"message": "who?"}}), 2, "requires a key; set OPENAI_API_KEY"),
        ((200, {}, b"{"), 2, "the response is not a chat completion"),
        ((400, {}, {"error": {"message": "too long"}}), 2, "HTTP 400 (too long)"),
    ],
)
def test_a_refusal_is_one_line(
    asking: Asking, capsys: pytest.CaptureFixture[str], fault: Any, code: int, said: str
) -> None:
    asking.settings(model="refusing")
    asking.server.faults = [fault] * 20
    assert asking("--latents", "1", "--yes") == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]


def test_passing_failures_are_waited_for(asking: Asking) -> None:
    asking.settings(model="slow")
    asking.server.faults = [
        (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        (500, {}, {"error": {"message": "broken"}}),
    ]
    assert asking("--latents", "1", "--yes") == 0
    assert asking.told(1, "slow").score.balanced_accuracy == 1
    assert len(asking.server.bodies) == REQUESTS + 2


def test_answers_that_cannot_be_read_are_counted(
    asking: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    """One judgment of ten passages is not a list, and latent 1 gets no explanation."""
    asking.settings(model="vague", concurrency=1)

    def vague(body: Any) -> str:
        text = reply(body)
        is_first = not any(each.get("vague") for each in asking.server.bodies)
        if text.endswith(word(12)):
            return "I cannot tell. EXPLANATION:"
        if text.startswith("[") and is_first:
            body["vague"] = True
            return "yes to all"
        return text

    asking.server.reply = vague
    assert asking("--latents", "1", "2", "--yes", "--json") == 0
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert (found["unreadable"], found["unanswered_passages"]) == (1, 10)
    assert found["judged_passages"] == 60
    assert "vague: no explanation in 1 answers, 0 of them truncated" in said
    assert "no list of verdicts in 1 answers, 0 of them truncated at --most-tokens" in said
    assert "the first starts with 'yes to all'" in said
    assert asking("--latents", "1", "--yes") == 0
    assert "mean_balanced_accuracy none: no explanation was judged\n" in capsys.readouterr().out
    told = asking.told(2, "vague").score
    assert told.unanswered == 10
    assert told.active.of + told.random.of + told.near.of == 50


def test_another_way_of_making_a_set_is_refused(
    asking: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    asking.settings(model="twice")
    assert asking("--latents", "1", "--yes") == 0
    assert asking("--latents", "1", "--yes", "--shown", "10") == 2
    said = capsys.readouterr().err
    assert "was created with settings at_once=10 per_decile=2 shown=20 " in said
    assert "choose another --name" in said
    assert asking("--latents", "1", "--yes", "--shown", "10", "--name", "ten") == 0
    assert asking.told(1, "ten").explanation
    assert asking("--latents", "99", "--name", "none") == 2
    assert "latent 99: " in capsys.readouterr().err
    assert asking("--latents", "1", "--name", "A/B") == 2
    assert "--name A/B: use lower-case letters" in capsys.readouterr().err


def test_a_judge_of_its_own_is_asked_for_verdicts_alone(
    asking: Asking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asking.settings(model="explainer")
    with serving(reply) as judge:
        file = tmp_path / "judge.yaml"
        file.write_text(endpoint_file(judge, model="judge"))
        assert asking("--latents", "1", "--judge", str(file)) == 0
        assert "1 requests" in (said := capsys.readouterr().out)
        assert "6 requests" in said
        assert asking("--latents", "1", "--judge", str(file), "--yes") == 0
        assert (len(asking.server.bodies), len(judge.bodies)) == (1, REQUESTS - 1)
    index = Index(open_store(asking.run.store.runs), "words")
    record = ExplanationSet(index, "explainer").record()
    assert record
    assert (record.made.explainer, record.made.judge) == ("explainer", "judge")


def test_explanations_are_shown_in_the_terminal_and_in_the_report(
    asking: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    asking.settings(model="shown")
    assert asking("--latents", "1", "--yes") == 0
    capsys.readouterr()
    assert main(["latents", asking.place, "1"]) == 0
    said = capsys.readouterr().out
    assert f'explained "the word {word(12)}"' in said
    assert "shown; detection 1.00 (0." in said
    assert main(["latents", asking.place, "1", "--json"]) == 0
    (view,) = json.loads(capsys.readouterr().out)
    assert "shown" in [told["set"] for told in view["explanations"]]
    place = Path(report(asking.run))
    assert f"the word {word(12)}" in place.read_text()
    before = place.stat().st_mtime_ns
    asking.settings(model="later")
    assert asking("--latents", "1", "--yes") == 0
    report(asking.run)
    assert place.stat().st_mtime_ns > before
    assert "later; detection 1.00" in place.read_text()


def test_what_delphi_found_is_read(
    asking: Asking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files have the format of eai-delphi 0.1.3."""
    folder = tmp_path / "results"
    for name in ("explanations", "scores/detection"):
        (folder / name).mkdir(parents=True)
    explanations = folder / "explanations"
    (explanations / "resid_pre.0_latent1.txt").write_text('"A word."')
    unread = '"Explanation could not be parsed."'
    (explanations / "resid_pre.0_latent2.txt").write_text(unread)
    examples = [
        {"activating": True, "distance": 9, "prediction": True},
        {"activating": True, "distance": 0, "prediction": False},
        {"activating": False, "distance": -1.0, "prediction": False},
        {"activating": False, "distance": 0.25, "prediction": True},
        {"activating": False, "distance": -1.0, "prediction": None},
    ]
    scores = folder / "scores/detection/resid_pre.0_latent1.txt"
    scores.write_text(json.dumps(examples))
    command = ["explain", asking.place, "--from-delphi"]
    assert main([*command, str(folder)]) == 0
    told = asking.told(1, "delphi")
    assert told.explanation == "A word."
    assert told.score[:3] == (VerdictCounts(1, 2), VerdictCounts(0, 1), VerdictCounts(1, 1))
    assert (told.score.deciles[0], told.score.deciles[9]) == (
        VerdictCounts(0, 1),
        VerdictCounts(1, 1),
    )
    assert (told.score.balanced_accuracy, told.score.unanswered) == (0.75, 1)
    assert main([*command, str(tmp_path)]) == 2
    assert "has no explanations/resid_pre.0_latent<n>.txt" in capsys.readouterr().err
    scores.write_text('[{"activating": true}]')
    assert main([*command, str(folder)]) == 2
    assert "an example lacks 'prediction'" in capsys.readouterr().err
    (explanations / "resid_pre.0_latent99.txt").write_text('"A word."')
    assert main([*command, str(folder)]) == 2
    assert "the index has latents 0 to 5" in capsys.readouterr().err
