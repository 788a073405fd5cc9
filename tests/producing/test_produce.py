"""Producers, with a stand-in for the model: side by side, dying, stopped, and given bad data."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dist_sae.data.work_queue
import dist_sae.logs
import dist_sae.producing.loop
import dist_sae.producing.planner
from dist_sae.config import Run
from dist_sae.data.consumers import Consumers
from dist_sae.data.shard import Rows, manifest_key, read_block, read_manifest
from dist_sae.data.work_queue import Worker, WorkQueue
from dist_sae.errors import CorpusError, ModelError, NonFiniteError, Stopped, StoreFullError
from dist_sae.models.forward import Forward, in_step
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.producing.unit_queue import unit_queue
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metric import STAGES
from tests.runs import DOCUMENT_ROWS, make_run
from tests.telemetry.scrape import values
from tests.world import Letters, RowNumbers, Wrapped, batches, fill, open_units, same

UNITS = 17
SITES = ("resid_pre.0", "mlp_out.3")


class Hooked(RowNumbers):
    """Calls a function before each forward pass, with how many have been."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self._before = before
        self._calls = 0

    def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self._before(self._calls)
        self._calls += 1
        return super().run(tokens, mask)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path)
    assert len(plan(run).units) == UNITS
    return run


@pytest.fixture
def store(run: Run) -> ObjectStore:
    return open_store(run.store.activations)


def start(run: Run, worker: str, stopping: threading.Event | None = None) -> None:
    telemetry = Telemetry("world", "produce", None)
    produce(run, Worker(worker), stopping or threading.Event(), telemetry)


def with_source(monkeypatch: pytest.MonkeyPatch, source: RowNumbers) -> None:
    monkeypatch.setattr(dist_sae.producing.loop, "build_source", lambda *_: source)


def with_store(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    monkeypatch.setattr(dist_sae.producing.loop, "open_store", lambda *_: store)


def rows_of(store: ObjectStore, unit: int, site: str = "synthetic") -> Rows:
    shard = read_manifest(store, unit).sites[site]
    blocks = [read_block(store, shard, number) for number in range(len(shard.blocks))]
    return Rows(*map(torch.cat, zip(*blocks, strict=True)))


def made(store: ObjectStore) -> list[int]:
    """The units that exist; each must be whole."""
    units = [int(key[6:14]) for key in store.keys("units/")]
    for unit in units:
        assert len(rows_of(store, unit).acts) == read_manifest(store, unit).rows
    return units


def test_progress_counts_rows_within_a_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 17 units of one batch is said when it is at hand and when it exists."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(
        dist_sae.logs,
        "progress",
        lambda _role, done, total, **numbers: said.append({"done": done, "of": total} | numbers),
    )
    monkeypatch.setattr(dist_sae.logs.PacedProgress, "is_due", lambda _: True)
    made = fill(make_run(tmp_path), RowNumbers(), monkeypatch)
    said = [record for record in said if "units" in record]
    assert {record["of"] for record in said} == {sum(made.rows_of_units)} == {128 * 16}
    assert said[0] | {"done": 0, "at_hand": 0, "units": 0, "doing": "loads the model"} == said[0]
    assert any(record["at_hand"] for record in said)
    reached = [record["done"] + record["at_hand"] for record in said]
    assert reached == sorted(reached)
    assert (said[-1]["done"], said[-1]["at_hand"], said[-1]["units"]) == (2048, 0, 17)


def test_every_row_is_stored_once_with_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    fill(run, RowNumbers(), monkeypatch)
    store = open_store(run.store.activations)
    assert made(store) == list(range(UNITS))
    seen = []
    for unit in range(UNITS):
        rows = rows_of(store, unit)
        assert rows.acts[:, 0].tolist() == rows.tokens.tolist()
        assert (rows.tokens % DOCUMENT_ROWS).tolist() == rows.positions.tolist()
        assert (rows.tokens // DOCUMENT_ROWS).tolist() == rows.documents.tolist()
        ordered = rows.tokens.tolist()
        assert ordered != sorted(ordered)
        seen += ordered
    assert sorted(seen) == list(range(128 * DOCUMENT_ROWS))


def test_two_producers_share_the_units(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither begins before both have a unit; each unit is written once."""
    both = threading.Barrier(2)

    def build(*_: object) -> Hooked:
        return Hooked(lambda calls: (both.wait(60), None)[1] if calls == 0 else None)

    monkeypatch.setattr(dist_sae.producing.loop, "build_source", build)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(start, run, worker) for worker in ("a", "b")]:
            done.result(timeout=120)
    assert made(store) == list(range(UNITS))
    assert len(list(store.keys("shards/"))) == UNITS
    assert {read_manifest(store, unit).producer for unit in range(UNITS)} == {"a", "b"}
    assert list(store.keys("claims/")) == []

    alone = make_run(tmp_path / "alone")
    fill(alone, RowNumbers(), monkeypatch)
    assert same(batches(open_units(run), range(20)), batches(open_units(alone), range(20)))


def test_a_finished_set_is_left_alone_and_no_model_is_loaded(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_source(monkeypatch, RowNumbers())
    start(run, "a")
    before = {key: store.get(key) for key in store.keys("")}
    monkeypatch.delattr(dist_sae.producing.loop, "build_source")
    start(run, "b")
    assert {key: store.get(key) for key in store.keys("")} == before


def test_the_model_is_compared_before_a_unit_is_claimed(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are read for it, for longer than a claim lives. Not for a finished set."""
    claims: list[list[str]] = []
    monkeypatch.setattr(
        dist_sae.producing.loop,
        "check_model",
        lambda *_: claims.append(list(store.keys("claims/"))),
    )
    with_source(monkeypatch, RowNumbers())
    for name in ("a", "b"):
        start(run, name)
    assert claims == [[]]


def test_claims_live_while_the_model_is_loaded(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take longer than their lease."""
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.1)
    renewed = threading.Event()

    class Watched(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == "claims/00000000.json" and not if_absent:
                renewed.set()
            return super().put(key, data, if_absent=if_absent)

    def build(*_: object) -> RowNumbers:
        assert renewed.wait(60)
        return RowNumbers()

    with_store(monkeypatch, Watched(store))
    monkeypatch.setattr(dist_sae.producing.loop, "build_source", build)
    start(run, "slow")
    assert made(store) == list(range(UNITS))
    assert list(store.keys("claims/")) == []


def test_a_dead_producers_unit_is_taken_over(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two units were claimed by one that is gone; its lease is over in .2 s."""
    monkeypatch.setattr(dist_sae.data.work_queue, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.2)
    dead = unit_queue(store, plan(run), Worker("dead"), threading.Event(), Consumers(store, 1.0))
    assert (dead.take(), dead.take()) == (0, 1)
    with_source(monkeypatch, RowNumbers())
    start(run, "b")
    assert made(store) == list(range(UNITS))


def test_a_zombie_that_finishes_late_changes_nothing(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended for longer than its lease; another producer does all the rest and its unit."""
    monkeypatch.setattr(WorkQueue, "renew", lambda _: None)
    monkeypatch.setattr(dist_sae.data.work_queue, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dist_sae.data.work_queue, "LEASE_SECONDS", 0.2)

    def others_finish(calls: int) -> None:
        if calls == 0:
            with monkeypatch.context() as m:
                with_source(m, RowNumbers())
                start(run, "fast")
            before.update({key: store.get(key) for key in store.keys("units/")})

    before: dict[str, bytes] = {}
    with_source(monkeypatch, Hooked(others_finish))
    start(run, "zombie")
    assert len(before) == UNITS
    assert {key: store.get(key) for key in store.keys("units/")} == before
    assert {read_manifest(store, unit).producer for unit in made(store)} == {"fast"}


@pytest.mark.parametrize("at", [0, 1, 5, UNITS - 1])
def test_a_stop_leaves_whole_units_only_and_no_claim(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    stopping = threading.Event()
    with_source(monkeypatch, Hooked(lambda calls: stopping.set() if calls == at else None))
    if at < UNITS - 1:
        with pytest.raises(Stopped):
            start(run, "a", stopping)
    else:  # the last one is complete: nothing is left to stop
        start(run, "a", stopping)
    assert list(store.keys("claims/")) == []
    assert len(made(store)) == at + 1
    with_source(monkeypatch, RowNumbers())
    start(run, "b")
    assert made(store) == list(range(UNITS))


def test_a_stop_within_a_unit_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = letters_run(tmp_path, monkeypatch, ["abcdefgh"] * 40)
    stopping = threading.Event()
    source = LetterSource(before=lambda calls: stopping.set() if calls == 0 else None)
    with_source(monkeypatch, source)
    with pytest.raises(Stopped, match="stopped within unit 0"):
        start(run, "a", stopping)
    assert list(open_store(run.store.activations).keys()) == ["plan.json"]


def test_a_unit_claimed_in_the_instant_of_a_stop_is_released(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preparing thread is about to claim unit 1 when the model fails at unit 0."""
    claiming, released = threading.Event(), threading.Event()

    class Slow(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == "claims/00000001.json":
                claiming.set()
                released.wait(0.3)  # never set in time: the release comes after this claim
            return super().put(key, data, if_absent=if_absent)

    def fail(calls: int) -> None:
        claiming.wait(60)
        raise ModelFailureError

    def release_all(self: WorkQueue) -> None:
        real(self)
        released.set()

    real = WorkQueue.release_all
    monkeypatch.setattr(WorkQueue, "release_all", release_all)
    with_store(monkeypatch, Slow(store))
    with_source(monkeypatch, Hooked(fail))
    with pytest.raises(ModelFailureError):
        start(run, "a")
    assert list(store.keys("claims/")) == []


class ModelFailureError(Exception):
    pass


def test_a_kill_between_shard_and_manifest_leaves_no_unit(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is the last thing written: all shards are there before it."""
    seen = {}

    class Full(Wrapped):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key == manifest_key(2):
                seen.update(json.loads(data)["sites"]["synthetic"])
                raise StoreFullError("no space left", url=self.url, key=key)
            return super().put(key, data, if_absent=if_absent)

    with_source(monkeypatch, RowNumbers())
    with monkeypatch.context() as m:
        with_store(m, Full(store))
        with pytest.raises(StoreFullError):
            start(run, "a")
    assert store.size(seen["key"]) == seen["bytes"]
    assert made(store) == [0, 1]
    assert list(store.keys("claims/")) == []
    start(run, "a")
    assert made(store) == list(range(UNITS))


def test_nan_is_reported_with_its_place_and_stops_a_producer_that_waits_for_others(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preparing thread waits for a live producer's claim on the only other unit."""
    documents = [span.first for span in plan(run).units[0]]
    number = documents[3] * DOCUMENT_ROWS + 5

    class Broken(RowNumbers):
        def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
            acts = super().run(tokens, mask)["synthetic"]
            acts[tokens == number, 1] = torch.inf
            return {"synthetic": acts}

    for unit in range(1, UNITS):
        store.put(f"claims/{unit:08d}.json", b'{"worker": "other", "until": 1e12}')
    with_source(monkeypatch, Broken())
    stopping = threading.Event()
    rescue = threading.Timer(20, stopping.set)  # else a mistake would hang
    rescue.start()
    with pytest.raises(NonFiniteError) as caught:
        start(run, "a", stopping)
    assert rescue.is_alive()
    rescue.cancel()
    assert f"synthetic: NaN or infinity in document {documents[3]} at position 5;" in str(
        caught.value
    )
    assert list(store.keys("units/")) == []
    assert list(store.keys("shards/")) == []
    assert not store.size("claims/00000000.json")


def test_what_overflows_the_storage_type_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row numbers above 65,504 do not fit fp16."""
    corpus = {"documents": 5000}
    run = make_run(tmp_path, corpus=corpus, activations={"dtype": "fp16", "unit_rows": 20_000})
    with pytest.raises(NonFiniteError, match=r"wider .*activations\.dtype"):
        fill(run, RowNumbers(), monkeypatch)


class LetterSource(RowNumbers):
    """At the first site (token, position); at the second the negative. "z" is huge, there."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self._before = before
        self._calls = 0

    def run(self, tokens: Tensor, _: Tensor) -> dict[str, Tensor]:
        self._before(self._calls)
        self._calls += 1
        offsets = torch.arange(tokens.shape[1]).expand(tokens.shape)
        acts = torch.stack([tokens, offsets], dim=-1).float()
        huge = 1 + 1e6 * (tokens == ord("z"))
        return {SITES[0]: acts, SITES[1]: -acts * huge[..., None]}


def letters_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], batch_tokens: int = 20
) -> Run:
    """A planned run over a jsonl file, with `Letters` as tokenizer; contexts of BOS + 4 letters."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = make_run(
        folder,
        model={"kind": "huggingface", "path": "none", "batch_tokens": batch_tokens},
        corpus={"kind": "files", "files": [str(corpus)]},
        activations={
            "sites": SITES,
            "context_tokens": 5,
            "streams": 2,
            "unit_rows": 40,
            "block_rows": 16,
            "exclude": {"first_positions": 2, "over_norm": 100.0},
        },
        train={"site": SITES[0], "batch_rows": 8, "rows": 8},
    )
    for module in (dist_sae.producing.planner, dist_sae.producing.loop):
        monkeypatch.setattr(module, "build_tokenizer", lambda *_: Letters())
    monkeypatch.setattr(dist_sae.producing.planner, "check_sites", lambda *_: {})
    plan(run)
    return run


TEXTS = ["abcdefgh" + "xyz"[n % 3] * (n % 6) for n in range(60)]


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, ObjectStore]:
    run = letters_run(tmp_path, monkeypatch, TEXTS)
    with_source(monkeypatch, LetterSource())
    return run, open_store(run.store.activations)


def test_what_is_left_out_is_counted_and_adds_up(letters: tuple[Run, ObjectStore]) -> None:
    """Of the first two of a context one is BOS; "z" is too large at the second site."""
    run, store = letters
    start(run, "a")
    tokens = "".join(TEXTS)
    contexts = sum(-(-len(text) // 4) for text in TEXTS)
    counts: Counter[str] = Counter()
    stored = ""
    slots = 0
    for unit in made_letters(store):
        manifest = read_manifest(store, unit)
        counts.update(manifest.excluded)
        stored += "".join(map(chr, rows_of(store, unit, SITES[0]).tokens.tolist()))
        slots += manifest.rows + sum(manifest.excluded.values())
        assert manifest.documents == len(plan(run).units[unit])
    assert counts["special_token"] == contexts
    assert counts["first_position"] == contexts
    first = Counter(text[i] for text in TEXTS for i in range(0, len(text), 4))
    expected = Counter(tokens) - first
    assert counts["over_norm"] == expected.pop("z") > 0
    assert Counter(stored) == expected
    assert slots == len(tokens) + contexts + counts["padding"]


def made_letters(store: ObjectStore) -> list[int]:
    return [int(key[6:14]) for key in store.keys("units/")]


def test_all_sites_hold_the_same_rows_in_the_same_order(letters: tuple[Run, ObjectStore]) -> None:
    run, store = letters
    start(run, "a")
    for unit in made_letters(store):
        one, other = (rows_of(store, unit, site) for site in SITES)
        assert torch.equal(one.acts, -other.acts)
        for a, b in zip(one[1:], other[1:], strict=True):
            assert torch.equal(a, b)


def check_same_units(store: ObjectStore, other: Run) -> None:
    there = open_store(other.store.activations)
    for unit in made_letters(store):
        assert same(rows_of(store, unit, SITES[1]), rows_of(there, unit, SITES[1]))


def test_units_do_not_depend_on_how_the_model_is_batched(
    letters: tuple[Run, ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = letters
    start(run, "a")
    (tmp_path / "b").mkdir()
    other = letters_run(tmp_path / "b", monkeypatch, TEXTS, batch_tokens=400)
    start(other, "a")
    check_same_units(store, other)


class SmallMemory(LetterSource):
    """Has room for so many tokens; the first error is a device's, the others are this machine's."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._room, self._error = room, error

    def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.sizes.append(tokens.numel())
        if tokens.numel() > self._room:
            error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            if len(self.sizes) > 1:
                error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
            raise self._error or error
        return super().run(tokens, mask)


def test_a_model_that_runs_out_of_memory_gets_smaller_batches_from_then_on(
    letters: tuple[Run, ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = letters
    start(run, "a")
    (tmp_path / "b").mkdir()
    other = letters_run(tmp_path / "b", monkeypatch, TEXTS, batch_tokens=40)
    source = SmallMemory(room=10)
    with_source(monkeypatch, source)
    start(other, "a")
    check_same_units(store, other)
    assert source.sizes[:3] == [40, 20, 10]
    assert max(source.sizes[3:]) <= 10


@pytest.mark.parametrize(
    ("room", "error", "expected", "words"),
    [
        (4, None, ModelError, "a single context of 5 tokens does not fit into memory"),
        (10, RuntimeError("another"), RuntimeError, "^another$"),
    ],
)
def test_what_no_smaller_batch_mends_is_an_error(
    letters: tuple[Run, ObjectStore],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    error: Exception | None,
    expected: type[Exception],
    words: str,
) -> None:
    run, store = letters
    with_source(monkeypatch, SmallMemory(room, error))
    with pytest.raises(expected, match=words):
        start(run, "a")
    assert made_letters(store) == []


@pytest.mark.parametrize("rank", ["leads", "follows"])
def test_ranks_that_share_a_model_do_not_try_again(rank: str) -> None:
    source = SmallMemory(room=10)
    run = in_step(source.run)
    tokens = torch.ones(8, 5, dtype=torch.int32)
    everything = torch.ones(8, 5, dtype=torch.bool)
    forward = Forward(SimpleNamespace(run=run), None)
    work = partial(forward, tokens, everything) if rank == "leads" else partial(run, tokens)
    with pytest.raises(
        ModelError, match=r"lower model\.batch_tokens or raise model\.tensor_parallel"
    ):
        work(everything)
    assert len(source.sizes) == 1


def test_a_refused_document_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fussy(Letters):
        def __call__(self, texts: Sequence[str]) -> list[list[int]]:
            if any("?" in text for text in texts):
                raise TypeError("TextEncodeInput must be text")
            return super().__call__(texts)

    run = letters_run(tmp_path, monkeypatch, [*TEXTS, "ab?", "cdefghij?", "k\ud800"])
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: Fussy())
    with_source(monkeypatch, LetterSource())
    start(run, "a")
    store = open_store(run.store.activations)
    manifests = [read_manifest(store, unit) for unit in made_letters(store)]
    assert sum(m.refused for m in manifests) == 3
    assert sum(m.documents for m in manifests) == len(TEXTS) + 3
    assert sum("the tokenizer refuses it" in message for message in caplog.messages) == 3
    documents = torch.cat([rows_of(store, m.unit, SITES[0]).documents for m in manifests])
    assert not set(documents.tolist()) & {60, 61, 62}
    assert (
        sum("1 of 63 documents contain half a surrogate" in text for text in caplog.messages) == 1
    )


def test_metrics_count_rows_and_units(letters: tuple[Run, ObjectStore]) -> None:
    run, store = letters
    telemetry = Telemetry("world", "produce", None)
    produce(run, Worker("a"), threading.Event(), telemetry)
    manifests = [read_manifest(store, unit) for unit in made_letters(store)]
    found = values(telemetry.render().decode())
    assert found["dist_sae_produce_units_total",] == len(manifests)
    assert found["dist_sae_produce_ready_units",] == len(manifests)
    assert found["dist_sae_produce_plan_units",] == len(manifests)
    assert found["dist_sae_produce_claimed_units",] == 0
    assert found["dist_sae_produce_rows_total",] == sum(m.rows for m in manifests)
    for reason in ("padding", "special_token", "first_position", "over_norm"):
        counted = found["dist_sae_produce_excluded_rows_total", reason]
        assert counted == sum(m.excluded[reason] for m in manifests)
    tokens = sum(m.rows + sum(m.excluded.values()) - m.excluded["padding"] for m in manifests)
    assert found["dist_sae_produce_tokens_total",] == tokens
    for stage in STAGES:
        assert found["dist_sae_produce_seconds_total", stage] > 0
    shards = sum(site.bytes for m in manifests for site in m.sites.values())
    assert found["dist_sae_store_bytes_total", "out"] > shards
    assert found["dist_sae_store_operation_seconds_count", "put"] >= 2 * len(manifests)


def test_a_corpus_that_changed_is_an_error_and_writes_nothing(
    letters: tuple[Run, ObjectStore], tmp_path: Path
) -> None:
    run, store = letters
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n" + corpus.read_text())  # everything is one byte later
    with pytest.raises(CorpusError, match=r"corpus\.jsonl"):
        start(run, "a")
    assert list(store.keys()) == ["plan.json"]


class FirstLetters(Letters):
    """Finds `n` tokens in every document, whatever the plan expected."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[: self._n] for ids in super().__call__(texts)]


def test_a_unit_without_a_token_is_an_error_that_says_so(
    letters: tuple[Run, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = letters
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: FirstLetters(0))
    with pytest.raises(CorpusError, match=r"unit 0: none of its .* documents has a token"):
        start(run, "a")
    assert list(store.keys()) == ["plan.json"]


def test_a_unit_whose_rows_are_all_left_out_exists_and_is_empty(
    letters: tuple[Run, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of one letter have nothing after the first two positions."""
    run, store = letters
    monkeypatch.setattr(dist_sae.producing.loop, "build_tokenizer", lambda *_: FirstLetters(1))
    start(run, "a")
    manifests = [read_manifest(store, unit) for unit in made_letters(store)]
    assert len(manifests) == len(plan(run).units)
    assert {manifest.rows for manifest in manifests} == {0}
