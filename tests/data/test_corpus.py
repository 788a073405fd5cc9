import gc
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dist_sae.config.data import DatasetCorpus, FilesCorpus, S3Config, SyntheticCorpus
from dist_sae.data import corpus as corpus_module
from dist_sae.data import corpus_files, formats
from dist_sae.data.corpus import Corpus, Document
from dist_sae.errors import AccessError, CorpusError
from tests.conftest import Bucket

# Blank texts between documents, a lone CR (which ends no line), characters of 1 to 4 bytes.
TEXTS = [
    "one",
    "",
    "  two words \u00e9 ",
    "\u00a0\u3000",
    "three\rlines\u2028in one",
    "\U0001f600",
    " \t",
]
DOCUMENTS = ["one", "two words \u00e9", "three\rlines\u2028in one", "\U0001f600"]


def files(*paths: Path | str, **options: Any) -> Corpus:
    return Corpus(FilesCorpus(files=tuple(map(str, paths)), **options), S3Config())


def read_all(corpus: Corpus) -> list[str]:
    """Return all texts, and check that documents are numbered from zero."""
    index = corpus.index()
    documents = list(corpus.read(index.files, index.spans))
    assert [document.number for document in documents] == list(range(len(documents)))
    assert sum(file.documents for file in index.files) == len(documents)
    return [document.text for document in documents]


def message(corpus: Corpus) -> str:
    """Return the error message of `index`, which must be one line."""
    with pytest.raises(CorpusError) as caught:
        corpus.index()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_json_lines(texts: list[str], field: str = "text") -> bytes:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(texts)]
    return "\n".join(lines).encode()  # without a newline at the end


def write_txt(path: Path) -> None:
    path.write_text("\n".join(TEXTS), newline="")


def write_jsonl(path: Path) -> None:
    path.write_bytes(as_json_lines(TEXTS))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(as_json_lines(TEXTS)))


def write_zstandard(path: Path) -> None:
    path.write_bytes(zstandard.compress(as_json_lines(TEXTS)))


def write_parquet(path: Path) -> None:
    columns = {"id": list(range(len(TEXTS))), "text": TEXTS}
    pq.write_table(pa.table(columns), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".txt": write_txt,
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gzip,
    ".jsonl.zst": write_zstandard,
    ".parquet": write_parquet,
}


@pytest.fixture(params=WRITERS)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with TEXTS, in each supported format."""
    path = tmp_path / f"sample{request.param}"
    WRITERS[request.param](path)
    return path


def test_every_format_gives_the_same_documents(sample: Path) -> None:
    assert read_all(files(sample, txt_documents="line")) == DOCUMENTS


def test_any_spans_give_what_reading_all_gives(sample: Path) -> None:
    corpus = files(sample, txt_documents="line")
    index = corpus.index()
    everything = list(corpus.read(index.files, index.spans))
    backwards = [d for span in index.spans[::-1] for d in corpus.read(index.files, [span])]
    assert backwards == everything[::-1]
    other_process = files(sample, txt_documents="line")
    assert list(other_process.read(index.files, index.spans[2:])) == everything[2:]


def test_neighbours_travel_together_in_large_corpora(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = files(sample, txt_documents="line").index()
    monkeypatch.setattr(corpus_module, "MOST_SPANS", 2)
    corpus = files(sample, txt_documents="line")
    index = corpus.index()
    assert [(span.first, span.count) for span in index.spans] == [(0, 2), (2, 2)]
    assert index.files == alone.files
    # a span of several documents includes the blank texts between them
    assert list(corpus.read(index.files, index.spans[1:])) == [
        Document(2, DOCUMENTS[2]),
        Document(3, DOCUMENTS[3]),
    ]
    assert read_all(corpus) == DOCUMENTS


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("line", ["a", "b", "c", "d"]),
        ("paragraph", ["a\nb", "c\r\nd"]),
        ("file", ["a\nb\n\n \n\u00a0\nc\r\nd"]),
    ],
)
def test_txt_documents_are_lines_paragraphs_or_files(
    tmp_path: Path, documents: str, expected: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n a\nb\n\n \n\u00a0\nc\r\nd\n\n".encode())  # with a byte order mark
    assert read_all(files(path, txt_documents=documents)) == expected


def test_files_follow_the_patterns_and_none_comes_twice(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "x[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = files(tmp_path / "b.txt", tmp_path / "**/*.txt", tmp_path / "x[1].txt")
    assert read_all(corpus) == ["b.txt", "a.txt", "sub/c.txt", "x[1].txt"]


def test_numbers_go_on_from_file_to_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("\n\n")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n')
    corpus = files(tmp_path / "*.txt", tmp_path / "c.jsonl")
    index = corpus.index()
    assert [file.documents for file in index.files] == [2, 0, 1]
    assert list(corpus.read(index.files, index.spans[2:])) == [Document(2, "three")]


def test_text_field_chooses_key_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_json_lines(TEXTS, "body"))
    pq.write_table(pa.table({"body": TEXTS, "text": [None] * len(TEXTS)}), tmp_path / "b.parquet")
    paths = (tmp_path / "a.jsonl", tmp_path / "b.parquet")
    assert read_all(files(*paths, text_field="body")) == DOCUMENTS * 2


def test_half_a_surrogate_pair_is_a_document_of_no_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\u00e9"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}')
    corpus = files(path)
    assert corpus.index().text_bytes == [2, 0, 4]
    assert read_all(corpus) == ["\u00e9", "a\ud800b", "\U0001f600"]


def test_null_is_no_document_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "b"}\n')
    pq.write_table(pa.table({"text": pa.array([None, "c", None])}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(" ")
    assert read_all(files(*(tmp_path / name for name in ("a.jsonl", "b.parquet", "c.txt")))) == [
        "b",
        "c",
    ]
    assert f"{tmp_path}/a.jsonl: 1 documents; skipped 1 records without text" in caplog.text
    assert f"{tmp_path}/b.parquet: 1 documents; skipped 2 records without text" in caplog.text
    assert f"{tmp_path}/c.txt: 0 documents" in caplog.text


def test_a_number_that_python_does_not_read_is_no_fault_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": ' + "1" * 5000 + "}")
    assert read_all(files(tmp_path / "a.jsonl")) == ["a"]


def test_zstandard_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(as_json_lines([t]) + b"\n") for t in TEXTS))
    assert read_all(files(path)) == DOCUMENTS


def test_s3_files_are_read_as_local_ones(bucket: Bucket, sample: Path) -> None:
    bucket.client.upload_file(str(sample), bucket.name, f"texts/{sample.name}")
    url = f"s3://{bucket.name}/texts/{sample.name}"
    config = FilesCorpus(files=(url,), txt_documents="line")
    remote = Corpus(config, S3Config(endpoint_url=bucket.endpoint_url))
    assert read_all(remote) == DOCUMENTS
    local = files(sample, txt_documents="line").index()
    assert remote.index().files[0].fingerprint == local.files[0].fingerprint
    assert remote.index().spans == local.spans


def test_s3_download_in_pieces_is_whole(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "PIECE_BYTES", 7)
    bucket.client.put_object(Bucket=bucket.name, Key="a.jsonl", Body=as_json_lines(TEXTS))
    config = FilesCorpus(files=(f"s3://{bucket.name}/a.jsonl",))
    assert read_all(Corpus(config, S3Config(endpoint_url=bucket.endpoint_url))) == DOCUMENTS


def test_s3_file_that_is_missing_is_named(bucket: Bucket) -> None:
    s3 = S3Config(endpoint_url=bucket.endpoint_url)
    url = f"s3://{bucket.name}/none.txt"
    assert message(Corpus(FilesCorpus(files=(url,)), s3)) == (
        f"{url}: no such object; correct corpus.files"
    )
    with pytest.raises(AccessError, match="no such bucket"):
        Corpus(FilesCorpus(files=("s3://no-such-bucket/a.txt",)), s3).index()


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert read_all(files("~/a.txt")) == read_all(files("~/*.txt")) == ["one"]


def test_the_home_of_nobody_is_no_folder() -> None:
    path = "~no such user/a.txt"
    assert message(files(path)) == f"{path}: no such file; correct corpus.files"


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    assert message(files(path)) == f"{path}: no such file; correct corpus.files"
    assert message(files(tmp_path / "*.txt")).startswith(f"{tmp_path}/*.txt: no such file")


@pytest.mark.parametrize("suffix", WRITERS)
def test_corpus_without_text_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    blank = as_json_lines(["", " \n"])
    match suffix:
        case ".txt":
            path.write_text(" \n\n")
        case ".parquet":
            pq.write_table(pa.table({"text": ["", None, " "]}), path)
        case ".jsonl":
            path.write_bytes(blank)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(blank))
        case ".jsonl.zst":
            path.write_bytes(zstandard.compress(blank))
    assert message(files(path)) == f"corpus: no documents in {path}; give files that contain text"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "a"}\n\n{"text": \n', ":3: not valid JSON: Expecting value"),
        (b'{"text": "a"}\n["b"]\n', ":2: not a JSON object; write one object per line"),
        (b'{"a\\n": 1}', ":1: no 'text' (it has 'a\\n'); set corpus.text_field"),
        (b'{"id": 1, "body": "a"}', ":1: no 'text' (it has id, body); set corpus.text_field"),
        (b'{"text": 3}', ":1: 'text' is int, not a string; set corpus.text_field"),
        (b'{"text": "a"}\n{"text": "\xff"}', ":2: not UTF-8; convert the file"),
        # nested deeper than Python's recursion limit
        (b'{"text": "a"}\n' + b"[" * 100_000, ":2: not valid JSON: "),
    ],
)
def test_bad_json_lines_are_named_by_file_and_line(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert message(files(path)).startswith(f"{path}{problem}")


@pytest.mark.parametrize("documents", ["line", "paragraph", "file"])
def test_txt_that_is_not_utf8_is_an_error(tmp_path: Path, documents: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("good\n\nna\u00efve".encode("latin-1"))
    problem = message(files(path, txt_documents=documents))
    assert problem == f"{path}:3: not UTF-8; convert the file"


def test_unknown_kind_of_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a")
    assert message(files(path)) == (
        f"{path}: unknown file type; use one of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet"
    )


def test_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    assert message(files(tmp_path / "a.txt")).endswith("a.txt: cannot be read: Is a directory")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut short", "cut to nothing", "other bytes"])
def test_damaged_file_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path)
    content = path.read_bytes()
    left = {"cut short": content[:-10], "cut to nothing": b""}
    path.write_bytes(left.get(damage, b"no such format" * 9))
    # so that the corpus is not empty without the damaged file
    (tmp_path / "whole.txt").write_text("a")
    assert message(files(tmp_path / "whole.txt", path)).startswith(f"{path}: ")


def test_damaged_pages_of_a_file_are_an_error(tmp_path: Path) -> None:
    sound = gzip.compress(as_json_lines([str(i) for i in range(1000)]))
    path = tmp_path / "a.jsonl.gz"
    # a wrong checksum at the end; a block of type 3, which does not exist, after the header
    for position, byte in ((len(sound) - 8, sound[-8] ^ 1), (10, 0b111)):
        damaged = bytearray(sound)
        damaged[position] = byte
        path.write_bytes(damaged)
        assert message(files(path)).startswith(f"{path}: cannot be unpacked: ")


def test_parquet_without_the_column_or_without_text_in_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    assert message(files(path)) == f"{path}: no 'text' (it has id, body); set corpus.text_field"
    problem = f"{path}: row 0: 'id' is int, not a string; set corpus.text_field"
    assert message(files(path, text_field="id")) == problem


@pytest.mark.parametrize("change", ["same length", "longer", "gone"])
def test_file_that_changed_since_the_plan_is_an_error(sample: Path, change: str) -> None:
    index = files(sample, txt_documents="line").index()
    other = list(TEXTS)
    if change == "gone":
        sample.unlink()
    else:
        other[0] = "two" if change == "same length" else "much longer"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.data.test_corpus.TEXTS", other)
            WRITERS[sample.name.removeprefix("sample")](sample)
    expected = "no such file; correct" if change == "gone" else "changed since the plan"
    with pytest.raises(CorpusError, match=expected):
        list(files(sample, txt_documents="line").read(index.files, index.spans))


def test_scratch_folder_goes_away_with_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    write_gzip(tmp_path / "a.jsonl.gz")
    corpus = files(tmp_path / "a.jsonl.gz")
    corpus.index()
    assert len(list(scratch.rglob("*.unpacked"))) == 1
    del corpus
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_synthetic_documents_are_their_numbers() -> None:
    assert read_all(Corpus(SyntheticCorpus(documents=3), S3Config())) == ["0", "1", "2"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the hub by a local data set, and return the recorded load requests."""
    asked: list[dict[str, Any]] = []

    def load(name: str, subset: str | None, **options: Any) -> datasets.Dataset:
        if name != "some/texts":
            raise ValueError(f"no such data set:\n{name}") from LookupError("not on the hub")
        asked.append({"subset": subset} | options)
        return datasets.Dataset.from_dict({"id": [*range(len(TEXTS) + 1)], "text": [*TEXTS, None]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(corpus_files, "dataset_commit", lambda *_: None)
    return asked


def test_data_set_gives_the_same_documents(hub: list[dict[str, Any]]) -> None:
    config = DatasetCorpus(name="some/texts", subset="en", split="test", revision="abc")
    corpus = Corpus(config, S3Config())
    assert read_all(corpus) == DOCUMENTS
    assert hub == [{"subset": "en", "split": "test", "revision": "abc"}]
    index = corpus.index()
    assert index.files[0].name == "some/texts"
    assert list(corpus.read(index.files, index.spans[2:3])) == [Document(2, DOCUMENTS[2])]


def test_data_set_is_read_in_slices(
    hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "SLICE_ROWS", 3)
    assert read_all(Corpus(DatasetCorpus(name="some/texts"), S3Config())) == DOCUMENTS


def test_data_set_errors_name_the_data_set(hub: list[dict[str, Any]]) -> None:
    problem = message(Corpus(DatasetCorpus(name="none"), S3Config()))
    assert problem == "corpus.name none: cannot be loaded: no such data set: none: not on the hub"
    problem = message(Corpus(DatasetCorpus(name="some/texts", text_field="body"), S3Config()))
    assert problem == "some/texts: no 'body' (it has id, text); set corpus.text_field"
    problem = message(Corpus(DatasetCorpus(name="some/texts", text_field="id"), S3Config()))
    assert problem == "some/texts: row 0: 'id' is int, not a string; set corpus.text_field"
