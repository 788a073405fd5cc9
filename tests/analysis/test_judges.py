"""Judges that are models: a local classifier, and a language model at an endpoint."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from dist_sae.analysis.judges import open_judge, quarter
from dist_sae.commands.cli import main
from dist_sae.config import Run
from dist_sae.errors import ModelError
from dist_sae.report.outcome import read_outcomes
from dist_sae.storage import open_store
from tests.endpoint.server import OpenAIServer, endpoint_file, serving, texts_of
from tests.index.indexed import add_checkpoint, make_index, produced

WORDS = {"[PAD]": 0, "[UNK]": 1, "gold": 2, "the": 3, "of": 4}


def save_classifier(folder: Path, n_labels: int, **settings: Any) -> Any:
    """Save a random classifier with a word-level tokenizer; return the model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        initializer_range=1.0,
        **{"num_labels": n_labels, **settings},
    )
    model: Any = transformers.BertForSequenceClassification(config)
    model.eval()
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return model


def alone(model: Any, text: str) -> torch.Tensor:
    """Return the logits of one text, without padding."""
    ids = [WORDS.get(word, 1) for word in text.split()][:8]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()  # type: ignore[no-any-return]


TEXTS = ["gold", "the of", "gold gold the", "of x the gold of of the x gold gold", "x"] * 8


def test_a_classifier_gives_the_quarter_of_its_chance(tmp_path: Path) -> None:
    """A text's level comes from the second label and does not depend on the other texts.

    Texts are cut at the model's maximum length.
    """
    model = save_classifier(tmp_path, 2)
    model.classifier.weight.data *= 8
    margins = torch.stack(
        [alone(model, text) @ torch.tensor([-1.0, 1.0]).double() for text in TEXTS]
    )
    model.classifier.bias.data[1] -= margins.mean()
    model.save_pretrained(tmp_path)
    chances = [float(alone(model, text).softmax(0)[1]) for text in TEXTS]
    assert {quarter(chance) for chance in chances} >= {0, 3}
    assert open_judge(f"model:{tmp_path}").levels(TEXTS) == [quarter(c) for c in chances]


def test_a_label_is_named_where_there_are_several(tmp_path: Path) -> None:
    names = {0: "metal", 1: "war", 2: "food"}
    model = save_classifier(
        tmp_path,
        3,
        id2label=names,
        label2id={name: n for n, name in names.items()},
        problem_type="multi_label_classification",
    )
    expected = [quarter(float(alone(model, text).sigmoid()[2])) for text in TEXTS]
    assert open_judge(f"model:{tmp_path}#food").levels(TEXTS) == expected
    for name in (f"model:{tmp_path}", f"model:{tmp_path}#rivers"):
        with pytest.raises(ModelError, match="it has metal, war, food"):
            open_judge(name)


def test_a_model_without_that_head_is_no_classifier(tmp_path: Path) -> None:
    model = save_classifier(tmp_path, 2)
    model.bert.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"is not a trained classifier: classifier\.bias is missing"
    ):
        open_judge(f"model:{tmp_path}")
    with pytest.raises(ModelError, match="nowhere"):
        open_judge(f"model:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("chance", "level"), [(0, 0), (0.24, 0), (0.26, 1), (0.5, 2), (0.76, 3), (1, 3)]
)
def test_from_one_half_on_the_concept_is_there(chance: float, level: int) -> None:
    assert quarter(chance) == level


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = produced(tmp_path_factory.mktemp("run"))
    add_checkpoint(made)
    make_index(made)
    return made


def passage(body: Mapping[str, Any]) -> str:
    found = re.search(r"Passage:\n(.*)\n\nDigit:", body["messages"][-1]["content"], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """An endpoint that replies 3 if a passage contains a number ending in 7, else 0."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: "3" if "7 " in passage(body) else "0") as found:
        yield found


def asked(
    capsys: pytest.CaptureFixture[str], run: Run, server: OpenAIServer, folder: Path, *words: str
) -> tuple[int, str, str]:
    (folder / "endpoint.yaml").write_text(endpoint_file(server, input_price=1, output_price=4))
    place, file = f"{run.store.runs}/{run.name}", str(folder / "endpoint.yaml")
    code = main(
        ["analyse", "sensitivity", place, "--passage", "1", *words, "--endpoint", file, "--json"]
    )
    return code, *capsys.readouterr()


SAMPLE = ("--filter", "re:[78] ", "--share", ".05")


@pytest.mark.system
def test_a_language_model_is_asked_after_its_cost_and_once(
    run: Run, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("--ask", "3=llm:numbers that end with 7", *SAMPLE)
    code, out, _ = asked(capsys, run, server, tmp_path, *ask)
    assert code == 0
    estimate = json.loads(out)["estimate"]
    assert server.bodies == []
    assert estimate["most_output_tokens"] == 8 * estimate["requests"]
    assert estimate["most_price"] > 0
    code, out, _ = asked(capsys, run, server, tmp_path, *ask, "--yes")
    assert code == 0
    (numbers,) = json.loads(out)["asked"]
    assert len(server.bodies) == estimate["requests"] == numbers["passages"]
    assert "Concept: numbers that end with 7\n" in texts_of(server.bodies)[0]
    pattern = ("--ask", "3=re:7 ", *SAMPLE)
    _, out, _ = asked(capsys, run, server, tmp_path, *pattern)
    (same,) = json.loads(out)["asked"]
    assert numbers | {"judge": ""} == same | {"judge": ""}
    code, out, _ = asked(capsys, run, server, tmp_path, *ask)  # all replies are stored
    assert (code, json.loads(out)["asked"]) == (0, [numbers])
    assert len(server.bodies) == estimate["requests"]
    (outcome,) = read_outcomes(open_store(run.store.runs), run.name)
    assert outcome.settings["endpoint"] == {"url": server.url, "model": "tests"}


@pytest.mark.system
@pytest.mark.parametrize("words", ["2 of 3", "7", "none", ""])
def test_answers_that_are_no_level_are_refused_if_many(
    run: Run, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    server.reply = lambda _: words
    ask = ("--ask", f"3=llm:answers of {words or 'nothing'}", *SAMPLE, "--yes")
    code, _, errors = asked(capsys, run, server, tmp_path, *ask)
    assert code == 2
    assert re.search(r"(\d+) of \1 answers have no level from 0 to 3", errors)


@pytest.mark.system
def test_few_answers_that_are_no_level_are_left_out_and_counted(
    run: Run, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = server.reply
    server.reply = lambda body: "?" if passage(body).startswith("77") else reply(body)
    ask = ("--ask", "3=llm:with a few answers that are none", *SAMPLE, "--yes")
    code, _, _ = asked(capsys, run, server, tmp_path, *ask)
    assert code == 0
    (outcome,) = read_outcomes(open_store(run.store.runs), run.name)
    left_out = sum(passage(body).startswith("77") for body in server.bodies)
    assert left_out
    assert f"{left_out} of {len(server.bodies)} answers had no level" in outcome.caveats[0]
    (numbers,) = outcome.numbers["asked"]
    assert numbers["passages"] == len(server.bodies) - left_out


def test_what_cannot_be_asked_is_one_line(
    run: Run, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{run.store.runs}/{run.name}"
    assert main(["analyse", "sensitivity", place, "--ask", "3=llm:rivers"]) == 2
    assert "--endpoint: missing; give a YAML file" in capsys.readouterr().err
    code, _, errors = asked(capsys, run, server, tmp_path, "--ask", "3=llm: ")
    assert code == 2
    assert "describe the concept" in errors
    sample = ("--filter", "llm:rivers", "--share", ".1")
    code, _, errors = asked(capsys, run, server, tmp_path, "--ask", "3=re:7", *sample)
    assert code == 2
    assert "--filter: judges every passage" in errors
