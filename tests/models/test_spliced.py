"""Losses of whole models with an edited site, compared with plain transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import HeadlessError, LacksWeightsError
from dist_sae.models.huggingface import HuggingFaceSource
from dist_sae.models.spliced import SplicedModel
from tests.models.test_huggingface import CONFIGS, LAYERS, D, hf, random_tokens, save_model

DECODERS = ("llama", "gpt2", "gpt_neox")
MASK = 2
LAST = f"resid_post.{LAYERS - 1}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceModel]:
    folder = tmp_path_factory.mktemp("models")
    kinds = {"bert": hf.AutoModelForMaskedLM}
    return {
        name: HuggingFaceModel(
            path=str(save_model(folder / name, name, kind=kinds.get(name))), dtype="fp32"
        )
        for name in (*DECODERS, "mixtral", "bert")
    }


def plain_losses(config: HuggingFaceModel, tokens: Tensor) -> Tensor:
    model = hf.AutoModelForCausalLM.from_pretrained(config.path).eval()
    with torch.no_grad():
        logits = model(tokens.long()).logits[:, :-1]
    logs = logits.double().log_softmax(-1)
    losses: Tensor = -logs.gather(2, tokens[:, 1:].long()[..., None])[..., 0]
    return losses.float()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.0", "attn_z.2"])
def test_losses_are_the_plain_models_and_the_identity_changes_nothing(
    models: dict[str, HuggingFaceModel], name: str, site: str
) -> None:
    spliced = SplicedModel(models[name], (site,))
    tokens, mask = random_tokens(8, 8)
    clean = spliced.losses(tokens, mask)
    torch.testing.assert_close(clean, plain_losses(models[name], tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(clean, spliced.losses(tokens, mask, {site: lambda acts: acts}))
    assert torch.equal(clean, spliced.losses(tokens, mask, {site: torch.clone}))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_an_edit_goes_on_through_the_rest_of_the_model(
    models: dict[str, HuggingFaceModel], name: str
) -> None:
    """An edit affects the rest of the model.

    If the last residual stream is set to zero, the logits are those of a zero vector.
    """
    spliced = SplicedModel(models[name], (LAST,))
    tokens, mask = random_tokens(6, 6)
    losses = spliced.losses(tokens, mask, {LAST: torch.zeros_like})
    model = hf.AutoModelForCausalLM.from_pretrained(models[name].path).eval()
    norm = {
        "llama": "model.norm",
        "gpt2": "transformer.ln_f",
        "gpt_neox": "gpt_neox.final_layer_norm",
    }
    final = model.get_submodule(norm[name])(torch.zeros(D))
    expected = -model.get_output_embeddings()(final).log_softmax(0)[tokens[:, 1:].long()]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    # edits do not persist
    assert not torch.allclose(losses, spliced.losses(tokens, mask), atol=0.01)


def test_the_edit_sees_what_the_source_gives(models: dict[str, HuggingFaceModel]) -> None:
    tokens, mask = random_tokens(6, 3)
    acts = HuggingFaceSource(models["gpt2"], ("mlp_out.1",)).run(tokens, mask)["mlp_out.1"]
    seen: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    SplicedModel(models["gpt2"], ("mlp_out.1",)).losses(tokens, mask, {"mlp_out.1": record})
    assert len(seen) == 1
    assert torch.allclose(seen[0][mask], acts[mask], atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_losses_of_padded_batches_are_nan_at_padding_and_unchanged_elsewhere(
    models: dict[str, HuggingFaceModel], name: str
) -> None:
    spliced = SplicedModel(models[name], ("resid_post.1",))
    tokens, mask = random_tokens(9, 4)
    losses = spliced.losses(tokens, mask)
    assert losses.shape == (2, 8)
    assert torch.equal(losses.isnan(), ~mask[:, 1:])
    alone = spliced.losses(tokens[1:, :4], mask[1:, :4])
    assert torch.allclose(losses[1:, :3], alone, atol=1e-5)


def test_an_encoder_predicts_masked_tokens(models: dict[str, HuggingFaceModel]) -> None:
    """An encoder predicts masked tokens: about a seventh of all, and never the first.

    Each prediction sees the tokens before and after it, except masked ones.
    """
    spliced = SplicedModel(models["bert"], ("resid_post.1",))
    assert spliced.masked
    tokens, mask = random_tokens(40, 40)
    predicted = spliced.predicted(tokens, mask)
    assert predicted.shape == (2, 39)
    assert 2 * (39 // 7) <= int(predicted.sum()) <= 2 * (39 // 7 + 1)
    shown = tokens.long().clone()
    shown[:, 1:][predicted] = MASK
    model = hf.AutoModelForMaskedLM.from_pretrained(models["bert"].path).eval()
    with torch.no_grad():
        logs = model(shown).logits.double().log_softmax(-1)[:, 1:]
    wanted = -logs.gather(2, tokens[:, 1:].long()[..., None])[..., 0].float()
    losses = spliced.losses(tokens, mask)
    assert torch.equal(losses.isnan(), ~predicted)
    torch.testing.assert_close(losses[predicted], wanted[predicted], rtol=1e-5, atol=1e-5)
    zeroed = spliced.losses(tokens, mask, {"resid_post.1": torch.zeros_like})
    assert not torch.allclose(zeroed[predicted], wanted[predicted], atol=0.01)


def test_which_tokens_are_masked_does_not_depend_on_the_batch(
    models: dict[str, HuggingFaceModel],
) -> None:
    """The choice of masked tokens does not depend on the batch.

    A context of two tokens has one masked token.
    """
    spliced = SplicedModel(models["bert"], ("resid_post.1",))
    lengths = (30, 9, 2, 1)
    tokens, mask = random_tokens(*lengths)
    together, losses = spliced.predicted(tokens, mask), spliced.losses(tokens, mask)
    for row, n in enumerate(lengths):
        cut = tokens[row : row + 1, :n], mask[row : row + 1, :n]
        alone = spliced.predicted(*cut)
        assert torch.equal(together[row, : n - 1], alone[0])
        assert not together[row, n - 1 :].any()
        assert int(alone.sum()) >= min(n - 1, 1)
        if n > 1:
            same = losses[row : row + 1, : n - 1]
            assert torch.allclose(same, spliced.losses(*cut), atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*DECODERS, "mixtral", "bert"])
def test_what_sees_ahead_is_told_by_what_it_does(
    models: dict[str, HuggingFaceModel], name: str, dtype: str
) -> None:
    """Models that see later tokens are detected by their outputs, also in half precision.

    In half precision, experts round differently in every batch.
    """
    config = models[name].model_copy(update={"dtype": dtype})
    assert SplicedModel(config, ("resid_post.0",)).masked == (name == "bert")


def test_models_that_predict_no_tokens_say_why(tmp_path: Path) -> None:
    """Models that cannot predict tokens are refused with the reason.

    They are a bare encoder, an encoder whose tokenizer has no mask token, and a decoder without a
    head.
    """
    bare = HuggingFaceModel(path=str(save_model(tmp_path / "bare", "bert")))
    with pytest.raises(
        HeadlessError, match=r"its files contain no head that predicts tokens \(no "
    ):
        SplicedModel(bare, ("resid_post.0",))
    config = CONFIGS["bert"]()
    maskless = save_model(tmp_path / "maskless", "llama", config, kind=hf.AutoModelForMaskedLM)
    with pytest.raises(HeadlessError, match="its tokenizer has no mask token"):
        SplicedModel(HuggingFaceModel(path=str(maskless)), ("resid_post.0",))
    cut = save_model(tmp_path / "cut", "llama", kind=hf.AutoModel)
    with pytest.raises(HeadlessError, match=r"\(no lm_head.weight\)"):
        SplicedModel(HuggingFaceModel(path=str(cut)), ("resid_post.0",))
    damaged = save_model(tmp_path / "damaged", "llama")
    text = (
        (damaged / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    (damaged / "config.json").write_text(text)
    with pytest.raises(LacksWeightsError, match=r"layers\.3"):
        SplicedModel(HuggingFaceModel(path=str(damaged)), ("resid_post.0",))
