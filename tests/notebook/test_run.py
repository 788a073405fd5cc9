"""An opened run: its checkpoints, its rows with their origin and text, and error messages."""

import json
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset

import dist_sae
from dist_sae import DistSaeError, OpenedRun, open_run
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import Run
from dist_sae.data.consumers import Retired
from dist_sae.data.shard import SHARDS, manifest_key
from dist_sae.data.work_queue import Worker
from dist_sae.index.build import index
from dist_sae.storage import open_store
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry
from tests.conftest import Bucket
from tests.notebook.raw import (
    SCALE,
    fill,
    initialised,
    language_run,
    save_dictionary,
    save_language_model,
)
from tests.runs import TINY, make_run
from tests.world import joined, open_activation_set


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A produced run of synthetic activations, with checkpoints at steps 4 and 10."""
    run = make_run(tmp_path_factory.mktemp("tiny"), TINY)
    fill(run)
    for step in (4, 10):
        save_dictionary(run, initialised(run, 8, step), step)
    return run


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("language")
    run = language_run(folder, save_language_model(folder / "model"))
    save_dictionary(run, initialised(run, 24, 1), 7)
    return run


@pytest.fixture
def run(made: Run) -> OpenedRun:
    return open_run(Path(made.store.runs) / made.name)


def test_importing_it_imports_nothing_else() -> None:
    """Looking up an unknown name imports nothing either. The package has the stub's names."""
    code = "import sys, dist_sae; dir(dist_sae); hasattr(dist_sae, 'x'); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = [name for name in loaded if name.startswith("dist_sae")]
    assert ours == ["dist_sae"]
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(loaded)
    stub = (Path(dist_sae.__file__).parent / "__init__.pyi").read_text()
    names = re.findall(r"import (\w+) as \1$", stub, re.M)
    assert len(names) > 5
    assert {"__version__", *names} <= set(dir(dist_sae))
    assert all(getattr(dist_sae, name).__name__ == name for name in names)
    lazy = {name for name in dir(dist_sae) if getattr(dist_sae, name).__class__ is type}
    assert lazy <= set(names)


def test_a_run_is_opened_by_folder_file_or_url(made: Run, tmp_path: Path) -> None:
    folder = Path(made.store.runs) / made.name
    for place in (folder, str(folder), folder.as_uri(), folder / "run.yaml"):
        opened = open_run(place)
        assert opened.config.name == "tiny"
        assert opened.steps() == [4, 10]
    assert repr(opened) == f"OpenedRun({folder}: topk, 32 latents, synthetic)"
    assert open_run(folder, ["train.keep_checkpoints=9"]).config.train.keep_checkpoints == 9
    with pytest.raises(DistSaeError, match="no such file; give the path of a run file"):
        open_run(tmp_path / "nothing")
    with pytest.raises(DistSaeError, match=r"has no run\.yaml; pass a run file, or the folder of"):
        open_run(tmp_path)


def test_a_run_is_opened_in_a_bucket(made: Run, bucket: Bucket) -> None:
    for path in (Path(made.store.runs) / made.name).rglob("*"):
        if path.is_file():
            key = f"runs/{path.relative_to(made.store.runs)}"
            bucket.client.put_object(Bucket=bucket.name, Key=key, Body=path.read_bytes())
    endpoint = [f"store.s3.endpoint_url={bucket.endpoint_url}"]
    opened = open_run(f"s3://{bucket.name}/runs/tiny", endpoint)
    assert opened.steps() == [4, 10]
    local = open_run(Path(made.store.runs) / made.name)
    assert torch.equal(opened.dictionary().W_dec, local.dictionary().W_dec)
    assert next(opened.rows()).acts.shape[1] == 8


def test_a_dictionary_is_that_of_its_checkpoint(run: OpenedRun, made: Run) -> None:
    assert not torch.equal(run.dictionary().W_enc, run.dictionary(4).W_enc)
    torch.testing.assert_close(run.dictionary().mean, torch.full((8,), 0.125 / SCALE))
    for step, dictionary in (
        (10, run.dictionary()),
        (10, run.dictionary(10)),
        (4, run.dictionary(4)),
    ):
        assert dictionary.step == step
        stored = Checkpoints(open_store(made.store.runs), "tiny", 1).open(step)
        for name, tensor in dictionary.sae.state_dict().items():
            # loading normalizes the rows again
            torch.testing.assert_close(tensor, stored.read(name))
        assert not any(parameter.requires_grad for parameter in dictionary.parameters())
    with pytest.raises(
        DistSaeError, match=r"/tiny: has no checkpoint of step 5; available steps: 4, 10$"
    ):
        run.dictionary(5)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    opened = OpenedRun(make_run(tmp_path, TINY))
    assert opened.steps() == []
    with pytest.raises(DistSaeError, match=r"has no checkpoint yet; run `dist-sae train` first$"):
        opened.dictionary()
    with pytest.raises(DistSaeError, match=r"has no checkpoint of step 5; available steps: none$"):
        opened.dictionary(5)
    with pytest.raises(DistSaeError, match=r"has no plan yet; run `dist-sae plan` first$"):
        opened.rows()


@pytest.mark.parametrize("heldout", [True, False])
def test_rows_are_those_of_the_set_in_order(run: OpenedRun, made: Run, *, heldout: bool) -> None:
    """Tokens of synthetic documents are row numbers, 64 per document.

    A batch has the rows of one unit.
    """
    known = open_activation_set(made)
    units = known.plan.heldout_units if heldout else known.plan.train_units
    expected = joined(known.rows(units, 10**6))
    batches = list(run.rows(heldout=heldout))
    assert [set(batch.units.tolist()) for batch in batches] == [{unit} for unit in units]
    assert torch.equal(torch.cat([batch.acts for batch in batches]), expected)
    for batch in batches:
        assert torch.equal(batch.rows, torch.arange(len(batch.rows)))
        assert torch.equal(batch.tokens.long(), 64 * batch.documents.long() + batch.positions)
    again = list(run.rows(heldout=heldout, batch_rows=300))
    assert [len(batch.acts) for batch in again[:-1]] == (len(expected) // 300) * [300]
    assert len(again[-1].acts) == len(expected) % 300
    for column, whole in zip(zip(*again, strict=True), zip(*batches, strict=True), strict=True):
        assert torch.equal(torch.cat(column), torch.cat(whole))


@pytest.mark.parametrize(("limit", "sizes"), [(700, [256, 256, 188]), (512, [256, 256]), (5, [5])])
def test_a_limit_is_kept(run: OpenedRun, limit: int, sizes: list[int]) -> None:
    assert [len(batch.acts) for batch in run.rows(batch_rows=256, limit=limit)] == sizes
    assert sum(len(batch.acts) for batch in run.rows(limit=limit)) == limit


def test_units_and_numpy(run: OpenedRun) -> None:
    (batch,) = run.rows(2)
    assert set(batch.units.tolist()) == {2}
    arrays = batch.numpy()
    assert arrays.keys() == {"acts", "tokens", "positions", "documents", "units", "rows"}
    assert arrays["acts"].shape == (len(batch.acts), 8)
    assert [int(each.units[0]) for each in run.rows([3, 1])] == [3, 1]
    assert len(list(run.rows(range(2), batch_rows=10**6))) == 1


def test_mistakes_get_one_line(run: OpenedRun) -> None:
    with pytest.raises(DistSaeError, match=r"^unit 5: .*activations has units 0 to 4$"):
        run.rows(5)
    with pytest.raises(DistSaeError, match=r"^site resid_post\.7: .* has only synthetic$"):
        run.rows(site="resid_post.7")
    with pytest.raises(DistSaeError, match=r"^batch_rows: 0 is not a positive number$"):
        run.rows(batch_rows=0)
    for load in (run.model, run.tokenizer):
        with pytest.raises(DistSaeError, match=r"^model\.kind: synthetic: run tiny has no lang"):
            load()
    with pytest.raises(DistSaeError, match=r"^model\.kind: synthetic: run tiny has no language"):
        run.dictionary().active_on("some text")


def test_units_that_are_gone_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A unit may have been deleted after use, or not produced yet.

    A requested unit raises an error, and any other is logged as a warning.
    """
    made = make_run(tmp_path, TINY)
    fill(made)
    store = open_store(made.store.activations)
    opened = OpenedRun(made)
    pending = opened.rows(0)
    store.put("retired.json", seal(Retired(below=2)))
    for key, _ in list(SHARDS.entries(store)):
        if int(key["unit"]) < 2:
            store.delete(key[0])
    with pytest.raises(
        DistSaeError, match=r"the rows of unit 0 were deleted after use \(store\.re"
    ):
        next(pending)  # the unit was deleted after `rows` was called
    store.delete(manifest_key(3))
    with pytest.raises(DistSaeError, match=r"the rows of unit 1 were deleted .* from 2 on still"):
        opened.rows([2, 1])
    with pytest.raises(DistSaeError, match=r"unit 3 has not been produced; run `dist-sae produce`"):
        opened.rows(3)
    assert [int(batch.units[0]) for batch in opened.rows()] == [2]
    expected = "reading 1 of 4 training units: 2 were deleted after use, 1 are not produced yet"
    assert [m.partition(": ")[2] for m in caplog.messages if "training units" in m] == [expected]
    store.delete(manifest_key(2))
    with pytest.raises(DistSaeError, match=r"none of 4 training units exist \(2 deleted after"):
        opened.rows()


def test_plain_webdataset_reads_the_shards(run: OpenedRun, made: Run) -> None:
    # WebDataset leaves its files to be closed by the garbage collector
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(run.shards(), shardshuffle=False))
    blocks = [safetensors.torch.load(sample["safetensors"])["acts"] for sample in samples]
    assert torch.equal(torch.cat(blocks), torch.cat([batch.acts for batch in run.rows()]))
    assert len(run.shards(heldout=True)) == 1


def texts_of(run: Run) -> list[str]:
    lines = Path(run.store.activations).with_name("text.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_text_around_a_row_is_the_documents(language: Run) -> None:
    """Tokens are bytes, and a window has 24 of them on either side."""
    opened = open_run(Path(language.store.runs) / "language")
    texts = texts_of(language)
    batch = next(opened.rows(heldout=True, batch_rows=150))
    for row in (0, 30, 149):
        text, at = texts[int(batch.documents[row])], int(batch.positions[row])
        found = opened.text(batch, row)
        assert found.token == text[at]
        assert found.before == text[max(0, at - 24) : at]
        assert found.after == text[at + 1 : at + 25]
        assert str(found) == f"{found.before}[{found.token}]{found.after}"
    wrong = batch._replace(tokens=batch.tokens + 1)
    with pytest.raises(
        DistSaeError, match=r"is not the text that the activations were computed from"
    ):
        opened.text(wrong, 0)


@pytest.mark.system
def test_the_index_leads_back_to_the_text(language: Run) -> None:
    """The index's largest activations equal the rows' activations, rounded to 11 bits."""
    opened = open_run(Path(language.store.runs) / "language")
    with pytest.raises(DistSaeError, match=r"has no latent index yet; run `dist-sae index`$"):
        opened.index()
    index(opened.config, Worker("i"), threading.Event(), Telemetry("language", "index", None))
    asked = opened.index()
    with pytest.raises(DistSaeError, match=r"has no index mine; it has: "):
        opened.index("mine")
    batches = [*opened.rows(), *opened.rows(heldout=True)]
    codes = opened.dictionary().encode(torch.cat([batch.acts for batch in batches]), dense=True)
    latent = int((codes > 0).sum(0).argmax())
    page = asked.latent(latent)
    assert page.firings == int((codes[:, latent] > 0).sum())
    assert page.largest[0].act == pytest.approx(float(codes[:, latent].max()), rel=2**-11)
    texts = texts_of(language)
    for example in page.examples[:3]:
        found = opened.text(example)
        assert found.token == texts[example.document][example.position]


def test_other_sites_of_the_set_can_be_read(language: Run) -> None:
    opened = open_run(Path(language.store.runs) / "language")
    one, other = (next(opened.rows(0, site=site)) for site in (None, "attn_out.0"))
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.acts, other.acts)


def test_the_model_is_the_whole_one_and_can_generate(language: Run) -> None:
    opened = open_run(Path(language.store.runs) / "language")
    model, tokenizer = opened.model(), opened.tokenizer()
    tokens = tokenizer("some text", return_tensors="pt").input_ids
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    with opened.dictionary().steer(model, 3, 5.0):
        out = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 12)
    assert seen == [9, 1, 1]  # later steps use the key-value cache
    assert model(tokens).past_key_values.get_seq_length() == 9


def test_the_latents_of_a_text_are_those_of_its_rows(
    language: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The first texts are documents of the set that are shorter than a context.

    The last one has two contexts.
    """
    opened = open_run(Path(language.store.runs) / "language")
    dictionary = opened.dictionary()
    batch = next(opened.rows(0))
    texts = texts_of(language)
    numbers = sorted(set(batch.documents.tolist()))
    assert {len(texts[number]) > 79 for number in numbers} == {False}
    for number in numbers[:3]:
        text, ours = texts[number], (batch.documents == number).nonzero()[:, 0]
        ours = ours[batch.positions[ours].argsort()]  # rows of a unit are shuffled
        codes = dictionary.encode(batch.acts[ours], dense=True)
        found = dictionary.active_on(text, top=2)
        assert "".join(token.token for token in found) == text
        acts, latents = codes.topk(2, dim=1)
        assert [token.latents for token in found] == latents.tolist()
        torch.testing.assert_close(torch.tensor([token.acts for token in found]), acts)
    assert not caplog.messages
    long = 100 * "x" + text
    found = dictionary.active_on(long, top=3)
    assert [token.token for token in found] == list(long)
    assert all(len(token.latents) == 3 for token in found)
    (said,) = caplog.messages
    assert said == (
        f"the text has {len(long)} tokens and is read as 2 contexts of at most 80, as in training"
    )
    with pytest.raises(DistSaeError, match=r"^text: has no tokens; give some text$"):
        dictionary.active_on("")


def test_the_latents_of_a_text_need_no_decoder(language: Run, tmp_path: Path) -> None:
    """The encoder is not read again for the next text either, so its files may be gone."""
    runs = tmp_path / "r"
    shutil.copytree(language.store.runs, runs)
    opened = open_run(runs / "language")
    dictionary = opened.dictionary()
    for weight in ("W_dec", "W_enc"):
        for part in runs.rglob(f"{weight}-*"):
            part.unlink()
        for text in ("some text", "other words"):
            expected = dictionary.active_on(text, top=3)
            found = opened.active_on(text, top=3, step=7)
            assert [token.latents for token in found] == [token.latents for token in expected]
            for one, other in zip(found, expected, strict=True):
                assert one.acts == pytest.approx(other.acts, rel=1e-5)
    with pytest.raises(DistSaeError, match=r"has no checkpoint of step 5; available steps: 7$"):
        opened.active_on("some text", step=5)


def test_an_index_is_searched_by_token_pattern_and_text(language: Run) -> None:
    telemetry = Telemetry(language.name, "index", None)
    index(language, Worker("i"), threading.Event(), telemetry)
    opened = open_run(Path(language.store.runs) / "language")
    of_run, tokenizer = opened.index(), opened.tokenizer()
    (e,) = tokenizer("e", add_special_tokens=False).input_ids
    shares = {}
    for latent in range(of_run.n_latents):
        tokens = [example.token for example in of_run.latent(latent).largest]
        if len(tokens) >= 8 and e in tokens:
            shares[latent] = tokens.count(e) / len(tokens)
    found = of_run.search("e", top=99)
    assert {match.latent: match.share for match in found} == shares
    assert [match.share for match in found] == sorted(shares.values(), reverse=True)
    assert of_run.search(regex="^e$", top=2) == found[:2]
    assert of_run.active_on("some text") == opened.active_on("some text")
    mistakes: tuple[dict[str, Any], ...] = (
        {"token": "ee"},
        {"regex": "("},
        {},
        {"token": "e", "regex": "e"},
    )
    problems = (
        r'^token: "ee" is not one token',
        "^regex: ",
        *2 * ["^search: give either a token or a"],
    )
    for given, problem in zip(mistakes, problems, strict=True):
        with pytest.raises(DistSaeError, match=problem):
            of_run.search(**given)


def test_tokens_that_training_leaves_out_have_no_latents(language: Run) -> None:
    exclude = language.activations.exclude.model_copy(update={"first_positions": 3})
    activations = language.activations.model_copy(update={"exclude": exclude})
    # without a plan, no settings are pinned
    store = language.store.model_copy(update={"activations": "/nowhere"})
    other = language.model_copy(update={"activations": activations, "store": store})
    opened = OpenedRun(other)
    reader = open_run(Path(language.store.runs) / "language").dictionary()
    from dist_sae.notebook.texts import TextReader, strongest

    rows = TextReader(opened.config).read("some")
    found = strongest(rows, reader.encode(rows.acts), 4)
    assert [len(token.latents) for token in found] == [0, 0, 4, 4]  # BOS is the first of the three


def test_a_model_that_is_gone_is_named(language: Run) -> None:
    """Rows can be read without the model."""
    opened = open_run(Path(language.store.runs) / "language")
    model = Path(language.store.activations).with_name("model")
    away = model.rename(model.with_name("away"))
    try:
        assert next(opened.rows(0)).acts.shape[1] == 24
        gone = rf"^model\.path {model}: cannot be loaded: no such folder here, and on "
        for load in (opened.model, opened.tokenizer, lambda: opened.dictionary().active_on("x")):
            with pytest.raises(DistSaeError, match=gone):
                load()
    finally:
        away.rename(model)
