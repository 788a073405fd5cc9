"""Output heads, compared with the modules of the whole models."""

from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import HeadlessError, ModelError
from dist_sae.models.head import load_head
from tests.models.test_huggingface import D, hf, save_model

NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gemma2": "model.norm",
    "mixtral": "model.norm",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: HuggingFaceModel(path=str(save_model(folder / name, name)), dtype="fp32")
        for name in (*NORMS, "bert")
    }


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_a_head_does_what_the_models_norm_and_head_do(
    models: dict[str, HuggingFaceModel], name: str
) -> None:
    """A head computes the logits of the model's final norm and unembedding.

    Unlike the head, the norm divides a row by its length, so the test divides too. Biases cancel.
    """
    head = load_head(models[name], "resid_post.1")
    model = hf.AutoModelForCausalLM.from_pretrained(models[name].path)
    norm, unembed = attrgetter(NORMS[name])(model), model.get_output_embeddings()
    rows = 1000 * torch.randn(1, 5, D, generator=torch.Generator().manual_seed(0))
    logits = (unembed(norm(rows)) - unembed(norm(-rows))) / 2
    centred = rows - rows.mean(-1, keepdim=True) if head.centres else rows
    assert head.centres == (name in ("gpt2", "gpt_neox"))
    length = centred.square().mean(-1, keepdim=True).sqrt()
    effects = centred / length * head.gain @ head.unembedding.T
    torch.testing.assert_close(effects, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.mean, unembed.weight.mean(0))


@pytest.mark.system
def test_heads_with_other_weights_have_other_digests(tmp_path: Path) -> None:
    """The digest of a head depends on norm, unembedding and precision, but not on the layers."""
    path = save_model(tmp_path / "m", "llama")
    config = HuggingFaceModel(path=str(path), dtype="fp32")
    digests = [load_head(config, site).digest for site in ("resid_post.0", "resid_post.1")]
    assert digests[0] == digests[1]
    digests.append(load_head(config.model_copy(update={"dtype": "bf16"}), "resid_post.0").digest)
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        model = hf.AutoModelForCausalLM.from_pretrained(path)
        model.get_parameter(name).data[0] += 1
        model.save_pretrained(tmp_path / name)
        changed = HuggingFaceModel(path=str(tmp_path / name), dtype="fp32")
        digests.append(load_head(changed, "resid_post.0").digest)
    assert len(set(digests)) == 4
    assert digests[-1] == digests[0]


@pytest.mark.system
def test_no_layer_is_read(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    whole = load_head(HuggingFaceModel(path=str(path), dtype="fp32"), "resid_post.0")
    tensors = hf.AutoModelForCausalLM.from_pretrained(path).state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    without = load_head(HuggingFaceModel(path=str(path), dtype="fp32"), "resid_post.0")
    assert torch.equal(whole.unembedding, without.unembedding)
    assert torch.equal(whole.gain, without.gain)


@pytest.mark.parametrize(
    ("name", "site", "text"),
    [
        ("llama", "mlp_in.1", "mlp_in.1 is not written to the residual stream"),
        ("llama", "attn_z.0", "attn_z.0 is not written to the residual stream"),
        ("gemma2", "mlp_out.1", "mlp_out.1 goes through a norm before it joins"),
        ("bert", "resid_post.1", "its files contain no head that predicts tokens"),
    ],
)
def test_a_site_or_model_without_a_direct_way_to_the_logits_is_refused(
    models: dict[str, HuggingFaceModel], name: str, site: str, text: str
) -> None:
    with pytest.raises(HeadlessError, match=text) as caught:
        load_head(models[name], site)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_head(HuggingFaceModel(path=str(tmp_path / "none")), "resid_post.0")
    assert "\n" not in str(caught.value)


@pytest.mark.system
def test_residual_outputs_of_models_without_a_norm_behind_them_are_taken(
    models: dict[str, HuggingFaceModel],
) -> None:
    for site in ("mlp_out.0", "attn_out.2", "resid_pre.0"):
        assert load_head(models["llama"], site).gain.shape == (D,)
