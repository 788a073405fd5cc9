"""Models whose activations can be recorded, and models that are refused before planning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.config.data import ActivationsConfig, HuggingFaceModel
from dist_sae.errors import ModelError
from dist_sae.models import check_sites
from dist_sae.models.check import relative_error
from dist_sae.models.huggingface import HuggingFaceSource
from dist_sae.models.loading import errors_of
from tests.models.test_huggingface import (
    COMMON,
    HEADS,
    LAYERS,
    VOCABULARY,
    D,
    hf,
    random_tokens,
    save_model,
    whole,
)

KV: dict[str, Any] = COMMON | {"num_key_value_heads": 2}
NO_POSITIONS = {key: value for key, value in KV.items() if key != "max_position_embeddings"}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8}
MAMBA |= {"mamba_n_groups": 1}
PER_LAYER: dict[str, Any] = KV | {"head_dim": 8, "sliding_window": 4, "num_kv_shared_layers": 1}
PER_LAYER |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VISION: dict[str, Any] = {"depth": LAYERS, "hidden_size": 32, "num_heads": 2, "out_hidden_size": D}
VISION |= {"intermediate_size": 16, "deepstack_visual_indexes": [1]}
LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": HEADS}

RECORDED: dict[str, Callable[[], Any]] = {
    # these use the number of layers in their computation
    "minicpm3": lambda: hf.MiniCPM3Config(**COMMON, **LATENT),
    "esmc": lambda: hf.AutoConfig.for_model(
        "esmc", **{key: COMMON[key] for key in COMMON if key != "max_position_embeddings"}
    ),
    # the shapes of some weights depend on the number of layers
    "esm": lambda: hf.EsmConfig(**COMMON, mask_token_id=2, position_embedding_type="rotary"),
    "gemma3n": lambda: hf.Gemma3nTextConfig(
        **PER_LAYER, laurel_rank=4, altup_num_inputs=LAYERS + 1, activation_sparsity_pattern=None
    ),
    "gemma4": lambda: hf.Gemma4TextConfig(**PER_LAYER, global_head_dim=8),
    # these have no setting for the number of layers
    "mamba": lambda: hf.MambaConfig(vocab_size=50, hidden_size=D, num_hidden_layers=LAYERS),
    "mamba2": lambda: hf.Mamba2Config(
        vocab_size=50, hidden_size=D, num_hidden_layers=LAYERS, num_heads=4, head_dim=12, n_groups=1
    ),
    "jamba": lambda: hf.JambaConfig(
        **KV,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **NO_POSITIONS, lru_width=D, attention_window_size=4
    ),
    "falcon_h1": lambda: hf.FalconH1Config(**KV, **MAMBA, mamba_d_ssm=48),
    "bamba": lambda: hf.BambaConfig(**KV, **MAMBA, attn_layer_indices=[1]),
    # its vision tower has the same number of layers
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=KV | {"head_dim": 8, "rope_parameters": ROPE}, vision_config=VISION
    ),
    # these loop over all layers before the first one runs
    "big_bird": lambda: hf.BigBirdConfig(**COMMON),
}
KINDS: dict[str, Any] = {
    "esm": hf.AutoModelForMaskedLM,
    "esmc": hf.AutoModel,
    "qwen3_vl": hf.AutoModel,
    "big_bird": hf.AutoModelForMaskedLM,
}


def saved(folder: Path, name: str, config: Any) -> HuggingFaceModel:
    encoder = "bert" if name in {"esm", "big_bird"} else name
    path = save_model(folder, encoder, config, kind=KINDS.get(name))
    return HuggingFaceModel(path=str(path), dtype="fp32")


def recorded(*sites: str, context_tokens: int = 16) -> ActivationsConfig:
    return ActivationsConfig(sites=sites, context_tokens=context_tokens)


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_a_model_without_its_upper_layers_is_the_model(tmp_path: Path, name: str) -> None:
    """A model without its upper layers gives the same rows as the whole model.

    The expected hidden states are those of transformers for each context alone.
    """
    model = saved(tmp_path, name, RECORDED[name]())
    sites = ("resid_pre.0", "resid_post.0", "resid_post.1")
    lengths = (11, 4, 1)
    tokens, mask = random_tokens(*lengths)
    found = HuggingFaceSource(model, sites).run(tokens, mask)
    full = whole(model)
    for row, n in enumerate(lengths):
        out = full(input_ids=tokens[row : row + 1, :n].long(), output_hidden_states=True)
        states = out.hidden_states
        # hidden states of these leave out the embeddings
        if name.startswith("mamba"):
            states = (full.embeddings(tokens[row : row + 1, :n].long()), *states)
        for site, state in zip(sites, states, strict=False):
            wanted = state.movedim(0, 2).flatten(2) if state.dim() == 4 else state
            assert wanted.std() > 0.01
            torch.testing.assert_close(
                found[site][row : row + 1, :n], wanted, rtol=1e-4, atol=1e-5, msg=site
            )


@pytest.mark.parametrize("name", ["gemma3n", "qwen3_vl"])
def test_rows_that_are_the_whole_models_are_admitted(tmp_path: Path, name: str) -> None:
    sites = ("resid_pre.0", "resid_post.1", "mlp_in.0", "mlp_inner.1", "mlp_out.1", "attn_z.2")
    check_sites(saved(tmp_path, name, RECORDED[name]()), recorded(*sites))


@torch.no_grad()
def test_falcons_alibi_is_added_once(tmp_path: Path) -> None:
    """Falcon's ALiBi bias is added once.

    The expected value is softmax((q k + alibi) / sqrt(d)) with slopes 2^-2, 2^-4, 2^-6, 2^-8 for
    four heads.
    """
    config = hf.FalconConfig(
        **COMMON | {"ffn_hidden_size": 40}, alibi=True, new_decoder_architecture=False,
        multi_query=False, parallel_attn=False, bias=True,
    )  # fmt: skip
    model = saved(tmp_path, "falcon", config)
    full = whole(model)
    text = (tmp_path / "config.json").read_text()  # settings that transformers would follow
    asked = '{"attn_implementation": "eager", "output_attentions": true,'
    (tmp_path / "config.json").write_text(text.replace("{", asked, 1))
    tokens, mask = random_tokens(9, 9)
    x = full.h[0].input_layernorm(full.word_embeddings(tokens.long()))
    fused = full.h[0].self_attention.query_key_value(x).view(*x.shape[:2], HEADS, 3, D // HEADS)
    q, k, v = (part.transpose(1, 2) for part in fused.unbind(3))
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None, None]
    scores = (q @ k.transpose(2, 3) + slopes * torch.arange(9)) / (D // HEADS) ** 0.5
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    z = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = HuggingFaceSource(model, ("attn_z.0",)).run(tokens, mask)["attn_z.0"]
    torch.testing.assert_close(found.clone(), z, rtol=1e-5, atol=1e-5)


def test_an_error_is_relative_to_its_row() -> None:
    """Errors are relative to each row, so an attention sink does not hide rows that are 3 % wrong.

    A row that consists of rounding errors alone is not an error.
    """
    wanted = torch.ones(4, D)
    wanted[0] *= 100
    wrong = wanted.clone()
    wrong[2] *= 1.03
    assert relative_error(wrong, wanted) == pytest.approx(0.03, rel=1e-3)
    wanted[3] *= 1e-9
    assert relative_error(wanted + 1e-6 * (wanted < 0.5), wanted) < 1e-3


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    "config",
    [
        hf.LlamaConfig(**KV | {"max_position_embeddings": 8}, rope_parameters=DYNAMIC),
        hf.Gemma3TextConfig(  # with separate frequencies for each type of layer
            **KV | {"max_position_embeddings": 8, "head_dim": 8},
            layer_types=["full_attention"] * LAYERS,
            rope_parameters={"full_attention": DYNAMIC, "sliding_attention": DYNAMIC},
        ),
    ],
    ids=["llama", "gemma3"],
)
def test_rows_do_not_depend_on_what_ran_before(tmp_path: Path, config: Any) -> None:
    """Rows do not depend on earlier batches.

    Frequencies of dynamic RoPE would be those of the longest context so far.
    """
    source = HuggingFaceSource(saved(tmp_path, "llama", config), ("resid_post.1",))
    tokens, mask = random_tokens(12)
    first = source.run(tokens, mask)["resid_post.1"].clone()
    source.run(*random_tokens(40))
    assert torch.equal(source.run(tokens, mask)["resid_post.1"], first)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3}
LONGROPE |= {"long_factor": [2.0] * 3}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder and decoder": (
        lambda: hf.T5Config(vocab_size=50, d_model=D, d_kv=6, d_ff=40, num_layers=2, num_heads=4),
        "model.path .*: t5 is an encoder-decoder",
    ),
    "rotary positions": (
        lambda: hf.LlamaConfig(**KV | {"max_position_embeddings": 32}),
        "activations.context_tokens: 48: .* supports 32 positions; lower it to 32",
    ),
    "learned positions": (
        lambda: hf.RobertaConfig(**COMMON | {"max_position_embeddings": 48}),
        "activations.context_tokens: 48: .* has 46 learned positions; lower it to 46",
    ),
    "two sets of frequencies": (
        lambda: hf.Phi3Config(
            **KV, rope_parameters=LONGROPE, original_max_position_embeddings=32
        ),
        "activations.context_tokens: 48: .* depend on their batch; lower it to 32",
    ),
    "attention that changes for good": (
        lambda: hf.BigBirdConfig(**COMMON, block_size=4),
        "activations.context_tokens: 48: .* not after a shorter batch; lower it to 44",
    ),
    "vocabulary": (
        lambda: hf.LlamaConfig(**KV | {"vocab_size": 49}),
        "the tokenizer produces tokens up to 49, but the model has embeddings for 0 to 48",
    ),
    "shared layers": (
        lambda: hf.AlbertConfig(**COMMON, embedding_size=8),
        "no list of 3 layers found",
    ),
    "padding changes rows": (
        lambda: hf.FNetConfig(**COMMON, use_tpu_fourier_optimizations=False),
        "resid_post.1: rows in a batch with padding differ by .* from those of each context alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    config = make()
    kind = hf.AutoModel if name != "encoder and decoder" else hf.AutoModelForSeq2SeqLM
    model = HuggingFaceModel(path=str(save_model(tmp_path, "bert", config, kind=kind)))
    with pytest.raises(ModelError, match=words) as refused:
        check_sites(model, recorded("resid_post.1", context_tokens=48))
    assert "\n" not in str(refused.value)


def test_a_large_model_is_checked_without_its_weights(tmp_path: Path) -> None:
    """Checking a large model needs only its configuration and its tokenizer."""
    save_model(tmp_path, "llama")
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    hf.LlamaConfig(**KV | large | {"num_attention_heads": 32}).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = HuggingFaceModel(path=str(tmp_path))
    check_sites(model, recorded("mlp_out.31"))
    with pytest.raises(ModelError, match=r"mlp_out\.32: the model has layers 0 to 31"):
        check_sites(model, recorded("resid_post.2", "mlp_out.32"))


def test_a_token_without_an_embedding_is_one_line(tmp_path: Path) -> None:
    source = HuggingFaceSource(saved(tmp_path, "llama", None), ("resid_post.0",))
    tokens = torch.full((1, 2), VOCABULARY, dtype=torch.int32)
    with pytest.raises(
        ModelError, match="produces token 50, but the model has embeddings for 0 to"
    ):
        source.run(tokens, torch.ones_like(tokens, dtype=torch.bool))


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    (path / "model.safetensors").unlink()
    torch.save({"weight": Touch(tmp_path / "reached")}, path / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match="has no safetensors weights, and loading pickled ones"
    ) as error:
        check_sites(
            HuggingFaceModel(path=str(path)),
            ActivationsConfig(sites=("resid_post.0",), context_tokens=64),
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "reached").exists()


def test_a_hub_without_safetensors_is_told_in_the_same_way() -> None:
    """A hub model without safetensors gets the same error as a folder without them.

    The message is that of transformers 5.23 with `use_safetensors=True`.
    """
    config = HuggingFaceModel(path="org/name")
    with (
        pytest.raises(ModelError, match="org/name: has no safetensors weights"),
        errors_of(config),
    ):
        raise OSError(
            "org/name does not appear to have a file named model.safetensors or "
            "model.safetensors.index.json and thus cannot be loaded with `safetensors`."
        )
