"""The progress that `dist-sae run` shows."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from dist_sae.training import progress
from dist_sae.training.progress import ProgressView

PRODUCING = {"role": "produce", "done": 2, "total": 1000, "busiest": "forward"}
TRAINING: dict[str, Any] = {
    "role": "train",
    "done": 300,
    "total": 400,
    "fvu": 0.1904,
    "l0_latents": 50.27,
    "dead_share": 0.1077,
    "rows_per_second": 1_024_673.4,
    "product_share": 0.31,
    "phases": {"wait": 6.2, "forward": 2.0, "backward": 1.8},
}


def shown(*, terminal: bool) -> list[str]:
    """Return the lines that are shown after two producers and a trainer have reported.

    On a terminal, these are the final lines.
    """
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, legacy_windows=False)
    with ProgressView(console) as view:
        view.begin("plan")
        view.show("producer-0", PRODUCING | {"rows_per_second": 40_000})
        view.show("producer-1", PRODUCING | {"done": 1, "rows_per_second": 5_613})
        view.show("trainer-0", TRAINING | {"done": 200})
        view.show("trainer-0", TRAINING)
        if terminal:
            with console.capture() as capture:
                console.print(view)
            lines = [Text.from_ansi(line).plain.rstrip() for line in capture.get().splitlines()]
            return lines[-3:]
    return out.getvalue().splitlines()


def test_bars_fit_80_columns_and_say_what_limits_the_run() -> None:
    produce, train, limit = shown(terminal=True)
    assert produce.startswith("produce ")
    # the rate is the sum over both producers, and the number of units is the larger one
    assert produce.endswith("45,613 rows/s")
    assert " 75% " in train
    assert train.endswith("1,024,673 rows/s  fvu 0.190  l0 50.3  dead 10.8%")
    assert limit == "limit: data: trainers wait 62% of the time; producers' slowest stage: forward"
    assert max(map(len, (produce, train, limit))) <= 80


def test_a_limit_that_is_longer_than_a_line_is_shown_whole() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=50, legacy_windows=False)
    with ProgressView(console) as view:
        view.show("producer-0", PRODUCING)
        view.show("trainer-0", TRAINING)
        with console.capture() as capture:
            console.print(view)
    said = " ".join(Text.from_ansi(capture.get()).plain.split())
    assert "limit: data: trainers wait 62% of the time; producers' slowest stage: forward" in said


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, produce, train = shown(terminal=False)  # the other reports came within ten seconds
    assert plan == "plan ..."
    assert produce == "produce 2/1,000  40,000 rows/s"
    assert train.startswith(
        "train 200/400  1,024,673 rows/s  fvu 0.190  l0 50.3  dead 10.8%  limit: "
    )
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    *_, produce, _, last = shown(terminal=False)
    assert produce.startswith("produce 2/1,000  ")  # although the other producer has reported 1
    assert last.startswith("train 300/400  0:00:00 left  ")


def test_units_at_hand_count_and_give_a_time_before_the_first_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a minute of loading does not count, so 350 of 1,000 rows in 20 s leave 37 s."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    now = [0.0]
    monkeypatch.setattr("dist_sae.training.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    record: dict[str, Any] = {"role": "produce", "done": 0, "total": 1000}
    said: tuple[tuple[str, dict[str, Any]], ...] = (
        ("producer-0", {"at_hand": 0, "doing": "loading the model"}),
        ("producer-0", {"at_hand": 0}),
        ("producer-0", {"at_hand": 150, "rows_per_second": 15}),
        ("producer-1", {"at_hand": 200, "rows_per_second": 20}),
        ("producer-0", {"done": 150, "at_hand": 0}),
    )
    with ProgressView(Console(file=out, width=80)) as view:
        for (process, numbers), now[0] in zip(said, (0.0, 30.0, 40.0, 50.0, 50.0), strict=True):
            view.show(process, record | numbers)
    assert out.getvalue().splitlines() == [
        "produce 0/1,000  loading the model",
        "produce 0/1,000  loading the model",
        "produce 150/1,000  0:00:57 left  15 rows/s",
        "produce 350/1,000  0:00:37 left  35 rows/s",
        # a unit that is stored is not also in progress
        "produce 350/1,000  0:00:37 left  35 rows/s",
    ]


def test_a_plan_says_what_it_does_and_what_came_of_it() -> None:
    out = io.StringIO()
    record: dict[str, Any] = {"role": "plan", "total": 1}
    with ProgressView(Console(file=out, width=80)) as view:
        view.show("plan", record | {"done": 0.25, "doing": "counting tokens"})
        view.show("plan", record | {"done": 1, "said": "12 units"})
    assert out.getvalue().splitlines() == ["plan 25%  counting tokens", "plan: 12 units"]


def test_the_end_is_told_once() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, width=80)) as view:
        for _ in range(2):
            view.show("trainer-0", TRAINING | {"done": 400})
    (line,) = out.getvalue().splitlines()
    assert line == "train 400/400  1,024,673 rows/s  fvu 0.190  l0 50.3  dead 10.8%"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_is_shown_once(*, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, legacy_windows=False)
    with ProgressView(console) as view:
        view.show("producer-0", PRODUCING)
        for text in ("unit 1 is [slow]", "another", "unit 12 is [slow]"):
            view.warn("WARNING", text)
    lines = Text.from_ansi(out.getvalue()).plain
    assert "warning: unit 1 is [slow]" in lines
    assert "unit 12" not in lines
    assert lines.count("warning: another") == 1


def test_a_run_that_stands_still_says_so() -> None:
    """Any rank may be the one that waits. Its first step after that ends the message."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    with ProgressView(console) as view:

        def lines(process: str, record: dict[str, Any]) -> list[str]:
            view.show(process, record)
            with console.capture() as capture:
                console.print(view)
            return [Text.from_ansi(line).plain.rstrip() for line in capture.get().splitlines()]

        lines("producer-0", PRODUCING)
        lines("trainer-0", TRAINING | {"phases": {"forward": 1.0}, "worked_rows_per_second": 7.0})
        waiting = {"role": "train", "done": 300, "total": 400, "waiting_seconds": 24.4}
        *_, train, limit = lines("trainer-1", waiting)
        assert train.endswith("waits for data, 24 s  fvu 0.190  l0 50.3  dead 10.8%")
        assert limit.startswith("limit: data: trainers wait 100% of the time; producers' slowest")
        *_, train, limit = lines("trainer-1", waiting | {"waiting_seconds": 0.0})
        assert train.endswith(" 7 rows/s  fvu 0.190  l0 50.3  dead 10.8%")
        assert limit.startswith("limit: the forward pass")
        unknown = {name: value for name, value in TRAINING.items() if name != "dead_share"}
        lines("trainer-1", waiting)
        *_, train, _ = lines("trainer-2", unknown)
        assert train.endswith("rows/s  fvu 0.190  l0 50.3  dead ?")


def test_an_index_tells_its_rows_then_its_entries_and_no_limit() -> None:
    record: dict[str, Any] = {"role": "index", "total": 40}
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80, legacy_windows=False)
        with ProgressView(console) as view:
            view.show("trainer-0", TRAINING)
            view.show("index-0", record | {"done": 9, "rows_per_second": 9_000.4})
            view.show("index-1", record | {"done": 40, "rows_per_second": 3_000})
            view.show(
                "index-1", {"role": "merge", "done": 1, "total": 2, "entries_per_second": 5e6}
            )
            with console.capture() as capture:
                console.print(view)
        lines = [Text.from_ansi(line).plain.rstrip() for line in capture.get().splitlines()]
        if terminal:
            *_, index, merge = filter(None, lines)
            assert "limit" not in "".join(lines)
            assert index.startswith("index ")
            assert index.endswith("12,000 rows/s")
            assert merge.endswith("5,000,000 entries/s")
        else:
            assert out.getvalue().splitlines()[1:] == [
                "index 9/40  9,000 rows/s",
                "index 40/40  12,000 rows/s",
                "merge 1/2  5,000,000 entries/s",
            ]


def test_a_part_whose_last_word_is_missing_is_shown_as_done() -> None:
    """The planner exits before it reports that the plan is done."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, legacy_windows=False)
    with ProgressView(console) as view:
        view.show("plan", {"role": "plan", "done": 0.0, "total": 1.0, "doing": "reading the text"})
        view.show("producer-0", PRODUCING)
        view.begin("evaluate")
        with console.capture() as capture:
            console.print(view)
    lines = [Text.from_ansi(line).plain.rstrip() for line in capture.get().splitlines()]
    plan, produce = (
        [line for line in lines if line.startswith(name)][-1] for name in ("plan", "produce")
    )
    assert "100%" in plan
    assert "100%" in produce
    assert "reading the text" not in plan
