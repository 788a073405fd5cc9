"""Tiny models that two ranks hold together, against the same models whole (SCIENCE D16)."""

import socket
from typing import Any

import pytest
import torch

from dist_sae.config.data import SITE_NAMES, HuggingFaceModel
from dist_sae.errors import ModelError
from dist_sae.models import check_sites
from dist_sae.models.huggingface import HuggingFaceSource
from tests.data.dataplane import processes
from tests.models.sharded_worker import rank
from tests.models.test_huggingface import LAYERS, random_tokens, save_model

NAMES = ("llama", "gpt_neox", "mistral", "qwen3", "gemma2", "mixtral")
SITES = tuple(f"{site}.{layer}" for site in SITE_NAMES for layer in range(LAYERS))
BATCH = random_tokens(9, 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: HuggingFaceModel(path=str(save_model(folder / name, name)), dtype="fp32", shards=2)
        for name in (*NAMES, "gpt2")
    }


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, HuggingFaceModel]
) -> list[dict[str, Any]]:
    """What each of the two ranks gave, by model."""
    outputs = [tmp_path_factory.mktemp("ranks") / str(number) for number in range(2)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [models[name].model_dump() for name in NAMES]
    started = []
    for number, output in enumerate(outputs):
        env = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = processes.Process(
            target=rank, args=(settings, SITES, BATCH, str(output), env), daemon=True
        )
        process.start()
        started.append(process)
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    return [dict(zip(NAMES, torch.load(output), strict=True)) for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_what_one_gives(
    models: dict[str, HuggingFaceModel], shared: list[dict[str, Any]], name: str
) -> None:
    """At every site, on both ranks; and neither held the whole model."""
    source = HuggingFaceSource(models[name].model_copy(update={"shards": 1}), SITES)
    tokens, mask = BATCH
    expected = source.run(tokens, mask)
    weights = sum(p.numel() for p in source._model.parameters())
    embeddings = source._model.get_input_embeddings().weight.numel()
    for acts, here in (one[name] for one in shared):
        assert acts.keys() == expected.keys()
        for site, wanted in expected.items():
            error = (acts[site] - wanted)[mask].norm() / wanted[mask].norm()
            assert float(error) <= 1e-5, site
        assert here - embeddings < 0.6 * (weights - embeddings)


@pytest.mark.parametrize(
    ("name", "shards", "words"),
    [
        ("llama", 3, r"3 ranks cannot hold .* \(llama with 4 heads, 2 key-value heads, 40 inter"),
        ("llama", 4, r"use one of 1, 2$"),
        ("gpt2", 2, r"transformers has no plan to divide gpt2; use 1$"),
    ],
)
def test_ranks_that_cannot_hold_a_model_are_refused(
    models: dict[str, HuggingFaceModel], name: str, shards: int, words: str
) -> None:
    config = models[name].model_copy(update={"shards": shards})
    with pytest.raises(ModelError, match=words):
        check_sites(config, SITES)  # before anything is planned
