"""Only the planned text is read. Files are identified by content, wherever they are."""

import json
import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from dist_sae.config.data import DatasetCorpus, FilesCorpus, S3Config
from dist_sae.data.corpus import Corpus, CorpusIndex, Document
from dist_sae.errors import CorpusError
from tests.conftest import Bucket
from tests.data.test_corpus import WRITERS, as_json_lines, files

COMMIT = "c" * 40
LINES = ["one", "two", "three", "four"]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(corpus: Corpus, index: CorpusIndex, *spans: int) -> list[str]:
    """Return the texts of a unit with these spans, or of all spans."""
    unit = spans or range(len(index.spans))
    checksums = index.checksums([unit])
    chosen = [index.spans[i] for i in unit]
    found = corpus.read(index.files, chosen, checksums[0] if checksums else None)
    return [document.text for document in found]


def unchanged_but_for(path: Path, change: Callable[[], object]) -> None:
    """Call `change`, then restore the file's times."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_written_anew_between_two_units_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", *LINES)
    corpus = files(path, txt_documents="line")
    index = corpus.index()
    assert read(corpus, index, 2, 0) == ["three", "one"]
    write(path, "zero", *LINES)
    with pytest.raises(CorpusError, match=f"^{path}: changed since the plan was made; restore it"):
        read(corpus, index, 2, 0)


def test_a_change_that_size_and_time_do_not_show_is_named(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", *LINES), write(tmp_path / "b.txt", "five", "six")
    corpus = files(a, b, txt_documents="line")
    index = corpus.index()
    assert read(corpus, index, 4, 1) == ["five", "two"]
    unchanged_but_for(a, lambda: write(a, "one", "TWO", *LINES[2:]))
    with pytest.raises(CorpusError, match=f"^{a}: changed since the plan was made"):
        read(corpus, index, 4, 1)


def test_a_plan_without_checksums_still_notices_a_new_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", *LINES)
    corpus = files(path, txt_documents="line")
    index = corpus.index()._replace(digests=None)
    assert read(corpus, index) == LINES
    write(path, *LINES, "five")
    with pytest.raises(CorpusError, match="changed since the plan was made"):
        read(corpus, index)


def test_a_file_written_anew_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checksums in the plan, the change is noticed by the file's state."""
    path = write(tmp_path / "a.txt", *LINES)
    corpus = files(path, txt_documents="line")
    index = corpus.index()._replace(digests=None)
    monkeypatch.setattr(
        "dist_sae.data.corpus.Document",
        lambda number, text: write(path, "1", "2", text) and Document(number, text),
    )
    with pytest.raises(CorpusError, match="changed since the plan was made"):
        read(corpus, index)


def test_lines_that_no_longer_parse_are_a_change_not_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_json_lines(LINES))
    corpus = files(path)
    index = corpus.index()
    unchanged_but_for(path, lambda: path.write_bytes(b"x" * len(as_json_lines(LINES))))
    with pytest.raises(CorpusError, match="changed since the plan was made"):
        read(corpus, index, 1)


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_are_found_by_their_content(tmp_path: Path, suffix: str) -> None:
    """Files are found by content after a move, a rename, a reordering, or a swap of their names."""
    a, b = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    WRITERS[suffix](a)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.data.test_corpus.TEXTS", LINES)
        WRITERS[suffix](b)
    planned = files(a, b, txt_documents="line")
    index = planned.index()
    texts = read(planned, index)
    a.rename(tmp_path / "swap")
    b.rename(a)
    (tmp_path / "swap").rename(b)
    assert read(files(a, b, txt_documents="line"), index) == texts
    (tmp_path / "new").mkdir()
    moved = [path.rename(tmp_path / "new" / f"{path.name[::-1]}{suffix}") for path in (a, b)]
    here = files(*moved, txt_documents="line")
    assert read(here, index) == texts
    assert here.consists_of(index.files)
    other = write(tmp_path / "other.txt", "something else")
    assert not files(*moved, other).consists_of(index.files)
    with pytest.raises(CorpusError, match=f"none has the content that {a} had when the plan"):
        read(files(other), index, 0)


def test_a_planned_path_is_known_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt", *LINES)
    monkeypatch.chdir(tmp_path)
    index = files("a.txt", txt_documents="line").index()
    monkeypatch.chdir("/")
    assert read(files("a.txt", txt_documents="line"), index) == LINES


def test_a_file_that_grows_while_it_is_indexed_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", *LINES)
    corpus = files(path, txt_documents="line")

    def grow(_: int) -> None:  # called at the first document
        write(path, *LINES, "five")

    with pytest.raises(CorpusError, match="changed while it was being read; plan again"):
        corpus.index(grow)


def test_an_object_that_is_another_one_is_named(bucket: Bucket) -> None:
    def put(key: str, *lines: str) -> None:
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=as_json_lines([*lines]))

    put("a b#1.jsonl", *LINES)
    put("b%20?.jsonl", "five")
    s3 = S3Config(endpoint_url=bucket.endpoint_url)
    first, second = (f"s3://{bucket.name}/{key}" for key in ("a b#1.jsonl", "b%20?.jsonl"))
    config = FilesCorpus(files=(first, second))
    index = Corpus(config, s3).index()
    assert read(Corpus(config, s3), index) == [*LINES, "five"]
    put("a b#1.jsonl", *LINES[::-1])
    with pytest.raises(CorpusError, match=r"a b#1\.jsonl: changed since the plan was made"):
        read(Corpus(config, s3), index)


def test_a_data_set_that_is_another_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    config = DatasetCorpus(name=str(folder))

    def open_set(*lines: str) -> Corpus:
        datasets.config.HF_DATASETS_CACHE = tmp_path / "cache" / "-".join(lines)
        (folder / "train.jsonl").write_bytes(as_json_lines([*lines]))
        return Corpus(config, S3Config())

    index = open_set(*LINES).index()
    assert read(open_set(*LINES), index, 3, 1) == ["four", "two"]
    assert open_set(*LINES).consists_of(index.files)
    assert not open_set(*LINES[::-1]).consists_of(index.files)
    with pytest.raises(CorpusError, match="set: changed since the plan was made"):
        read(open_set(*LINES[::-1]), index, 3, 1)
    with pytest.raises(CorpusError, match="set: changed since the plan was made"):
        read(open_set("one"), index, 3, 1)


class _Hub(BaseHTTPRequestHandler):
    """A hub that reports the same commit for every revision of every data set."""

    def do_GET(self) -> None:
        answer = json.dumps({"id": "some/texts", "sha": COMMIT}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


def test_a_data_set_on_the_hub_stays_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def load(*_: object, revision: str | None, **__: object) -> datasets.Dataset:
        asked.append(revision)
        return datasets.Dataset.from_dict({"text": LINES})

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = Corpus(DatasetCorpus(name="some/texts"), S3Config())
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
        )
        threading.Thread(target=server.serve_forever).start()
        try:
            index = corpus.index()
        finally:
            server.shutdown()
    assert index.commit == COMMIT
    assert read(corpus, index) == LINES
    assert asked == [COMMIT]


def test_a_hub_that_does_not_answer_leaves_the_content(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = datasets.Dataset.from_dict({"text": [*LINES, "", None]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    index = Corpus(DatasetCorpus(name="some/texts"), S3Config()).index()
    assert index.commit is None
    assert index.checksums([[0, 1]])
    assert "the hub did not report a commit" in caplog.text
