"""Tiny models split over two ranks, compared with the whole models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dist_sae.config.data import ActivationsConfig, HuggingFaceModel
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.errors import ModelError
from dist_sae.models import check_sites
from dist_sae.models.huggingface import HuggingFaceSource
from dist_sae.models.sites import blocks
from tests.forks import HANG_SECONDS, processes
from tests.models.sharded_worker import rank
from tests.models.test_huggingface import COMMON, LAYERS, random_tokens, save_model, sites_of

pytestmark = pytest.mark.system

hf: Any = transformers
EVEN = ("llama", "gpt_neox", "mistral", "qwen3", "gemma2", "mixtral")
"""Models split by transformers' tensor-parallel plan."""
THREE: dict[str, Any] = COMMON | {"hidden_size": 24, "num_attention_heads": 3}
KV: dict[str, Any] = {"num_key_value_heads": 3}
UNEVEN: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**THREE | {"hidden_size": 36, "num_attention_heads": 9}, **KV),
    "mistral": lambda: hf.MistralConfig(**THREE, **KV),
    "qwen2": lambda: hf.Qwen2Config(**THREE, **KV),
    "qwen3": lambda: hf.Qwen3Config(**THREE, **KV, head_dim=8),
    "gemma": lambda: hf.GemmaConfig(**THREE, **KV, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**THREE, **KV, head_dim=8, query_pre_attn_scalar=5),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**THREE, **KV, head_dim=8),
    "phi": lambda: hf.PhiConfig(**THREE),
    "starcoder2": lambda: hf.Starcoder2Config(**THREE, **KV),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**THREE),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **_without(THREE, "num_hidden_layers", "num_attention_heads"),
        num_layers=LAYERS,
        num_heads=3,
        attention_types=[[["global"], LAYERS]],
    ),
    "gptj": lambda: hf.GPTJConfig(**THREE, rotary_dim=4),
    "opt": lambda: hf.OPTConfig(**THREE, ffn_dim=40, word_embed_proj_dim=24),
    "bert": lambda: hf.BertConfig(**THREE),
}
"""Models split by DeepSpeed's AutoTP: three key-value heads on two ranks."""
CASES = (*(f"{name}-even" for name in EVEN), *(f"{name}-uneven" for name in UNEVEN))
BF16 = ("llama-even", "gemma2-even", "llama-uneven", "opt-uneven")
FROM_BF16 = ("llama", "gemma3_text", "gptj")
"""Models stored in bf16, with buffers for rotary angles, an embedding scale or positions."""
WIDE = {"hidden_size": 480, "intermediate_size": 1920, "num_hidden_layers": 8}
LARGE = {"large-even": 4, "large-uneven": 3}
LAST = "resid_post.7"
"""The site that is recorded in the models of `LARGE`, which have 118 MB.

These are loaded before the others, when there is no freed memory that could hide a peak.
"""
BATCH = random_tokens(9, 6)


def _without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def sites_of_case(case: str) -> tuple[str, ...]:
    name = case.partition("-")[0]
    return tuple(s for s in sites_of(name) if name != "opt" or not s.startswith("mlp"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceModel]:
    folder = tmp_path_factory.mktemp("models")
    paths = {f"{name}-even": save_model(folder / name, name) for name in (*EVEN, "gpt2")}
    for name, config in UNEVEN.items():
        paths[f"{name}-uneven"] = save_model(folder / f"{name}-3", name, config())
    models = {
        case: HuggingFaceModel(path=str(path), dtype="fp32", tensor_parallel=2)
        for case, path in paths.items()
    }
    for case, n_heads in LARGE.items():
        config = hf.LlamaConfig(**THREE | WIDE | {"num_attention_heads": n_heads})
        path = save_model(folder / case, "llama", config)
        models[case] = HuggingFaceModel(path=str(path), dtype="fp32", tensor_parallel=2)
    # no attention heads to split
    mamba = hf.MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=LAYERS)
    mamba.save_pretrained(folder / "mamba")
    models["mamba"] = HuggingFaceModel(path=str(folder / "mamba"), tensor_parallel=2)
    for case in BF16:
        models[f"{case}-bf16"] = models[case].model_copy(update={"dtype": "bf16"})
    for name in FROM_BF16:
        path = save_model(folder / f"{name}-half", name, UNEVEN[name](), torch.bfloat16)
        model = HuggingFaceModel(path=str(path), dtype="fp32", tensor_parallel=2)
        models[f"{name}-uneven-from-bf16"] = model
    return models


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, HuggingFaceModel]
) -> list[dict[str, Any]]:
    """Results of both ranks, by case."""
    outputs = [tmp_path_factory.mktemp("ranks") / str(number) for number in range(2)]
    cases = [*LARGE, *(set(models) - {"gpt2-even", "mamba", *LARGE})]
    settings = [
        (models[case].model_dump(), (LAST,) if case in LARGE else sites_of_case(case))
        for case in cases
    ]
    started = []
    for output, env in zip(outputs, rank_environments(2, 2), strict=True):
        process = processes.Process(
            target=rank, args=(settings, BATCH, str(output), env), daemon=True
        )
        process.start()
        started.append(process)
    for process in started:
        process.join(HANG_SECONDS)
        if process.exitcode is None:  # the rank hangs
            process.kill()
        assert process.exitcode == 0
    return [dict(zip(cases, torch.load(output), strict=True)) for output in outputs]


def relative_error(acts: Tensor, wanted: Tensor) -> float:
    mask = BATCH[1]
    return float((acts.float() - wanted.float())[mask].norm() / wanted[mask].float().norm())


@pytest.mark.parametrize("case", [*CASES, *(f"{name}-uneven-from-bf16" for name in FROM_BF16)])
def test_two_ranks_give_what_one_gives(
    models: dict[str, HuggingFaceModel], shared: list[dict[str, Any]], case: str
) -> None:
    """Two ranks give one rank's rows at every site, and neither rank holds the whole model."""
    config = models[case].model_copy(update={"tensor_parallel": 1})
    source = HuggingFaceSource(config, sites_of_case(case))
    expected = source.run(*BATCH)
    weights = sum(p.numel() for p in blocks(source.model).parameters())
    for acts, here, _ in (one[case] for one in shared):
        assert acts.keys() == expected.keys()
        for site, wanted in expected.items():
            assert relative_error(acts[site], wanted) <= 1e-5, site
        assert here < (0.55 if "-even" in case else 0.8) * weights


@pytest.mark.parametrize("case", LARGE)
def test_no_rank_ever_holds_the_whole_model(
    models: dict[str, HuggingFaceModel], shared: list[dict[str, Any]], case: str
) -> None:
    """No rank holds more than its slices, here a half or two thirds, not even while loading."""
    size = sum(file.stat().st_size for file in Path(models[case].path).glob("*.safetensors"))
    for of_rank in shared:
        _, weights, peak = of_rank[case]
        assert 4 * weights < 0.7 * size
        assert peak < 4 * weights + 0.15 * size


@pytest.mark.parametrize("case", BF16)
def test_two_ranks_round_to_bf16_as_one_does(
    models: dict[str, HuggingFaceModel], shared: list[dict[str, Any]], case: str
) -> None:
    """Two ranks in bf16 are about as close to the exact run as one rank in bf16.

    They are compared with the exact run, because deeper layers amplify differences in rounding.
    """
    sites = sites_of_case(case)
    config = models[case].model_copy(update={"tensor_parallel": 1})
    exact = HuggingFaceSource(config, sites).run(*BATCH)
    one = HuggingFaceSource(config.model_copy(update={"dtype": "bf16"}), sites).run(*BATCH)
    for acts, _, _ in (one[f"{case}-bf16"] for one in shared):
        for site, wanted in exact.items():
            assert acts[site].dtype == torch.bfloat16
            error = relative_error(acts[site], wanted)
            assert error <= 1.5 * relative_error(one[site], wanted) + 1e-3, site
            if site.endswith(".0"):
                assert relative_error(acts[site], one[site]) <= 1e-2, site


@pytest.mark.parametrize(
    ("name", "shards", "words"),
    [
        (
            "llama-even",
            3,
            r"cannot be divided over 3 ranks \(llama with 4 heads and 2 key-value heads\); ",
        ),
        ("llama-uneven", 4, r"use one of 1, 2, 3$"),
        ("mamba", 2, r"neither transformers nor DeepSpeed can divide mamba; use 1$"),
        ("gpt2-even", 2, r"neither transformers nor DeepSpeed can divide gpt2; use 1$"),
    ],
)
def test_ranks_that_cannot_hold_a_model_are_refused(
    models: dict[str, HuggingFaceModel], name: str, shards: int, words: str
) -> None:
    config = models[name].model_copy(update={"tensor_parallel": shards})
    with pytest.raises(ModelError, match=words):
        check_sites(
            config, ActivationsConfig(sites=("resid_post.1",), context_tokens=16)
        )  # raised before anything is planned
