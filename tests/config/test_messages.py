"""Messages for mistakes in a run file name the intended key."""

from pathlib import Path

import pytest

from dist_sae.config import Run, load_run
from dist_sae.config.messages import OTHER_NAMES, sections_by_key
from dist_sae.errors import ConfigError
from tests.runs import TINY, write_run

KINDS = "crosscoder_relu, jumprelu, jumprelu_tanh, relu, gated, clt_jumprelu"
ENDS = "and start and end with a letter or a digit"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        # the key's name in other tools
        ("train.learning_rate=1", "train.learning_rate: unknown key; did you mean lr?"),
        ("sae.d_sae=4", "sae.d_sae: unknown key; did you mean n_latents?"),
        (
            "sae.expansion_factor=8",
            "sae.expansion_factor: unknown key; did you mean n_latents (that factor times the "
            "model's width)?",
        ),
        ("hook_name=x", "hook_name: unknown key; did you mean activations.sites?"),
        (
            "sae.l1_coefficient=1",
            f"sae.l1_coefficient: unknown key; did you mean sparsity? it is a key of kind {KINDS}",
        ),
        # keys of another kind or section
        ("sae.sparsity=1", f"sae.sparsity: unknown key; it is a key of kind {KINDS}"),
        ("train.n_latents=4", "train.n_latents: unknown key; did you mean sae.n_latents?"),
        (
            "train.first_positions=1",
            "train.first_positions: unknown key; did you mean activations.exclude.first_positions?",
        ),
        # patterns are described in words
        (
            "name=My_Run",
            f"name: use at most 52 lower-case letters, digits, '-' and '.', {ENDS} (got 'My_Run')",
        ),
        (
            "cluster.namespace=X",
            "cluster.namespace: use at most 63 lower-case letters, digits and '-', "
            f"{ENDS} (got 'X')",
        ),
        (
            "cluster.trainer.memory=lots",
            "cluster.trainer.memory: write a number and a unit, such as 16Gi (got 'lots')",
        ),
        (
            "telemetry.pushgateway_url=host",
            "telemetry.pushgateway_url: write http://host:port or https://host (got 'host')",
        ),
        # sites under TransformerLens's names and module names
        (
            "activations.sites=[blocks.7.hook_resid_post]",
            "activations.sites.0: blocks.7.hook_resid_post is called resid_post.7 here",
        ),
        (
            "activations.sites=[blocks.11.attn.hook_z]",
            "activations.sites.0: blocks.11.attn.hook_z is called attn_z.11 here",
        ),
        (
            "activations.sites=[blocks.7.hook_mlp_out]",
            "activations.sites.0: blocks.7.hook_mlp_out is called mlp_out.7 here, taken before the "
            "norm that follows it (in Gemma 2 and 3)",
        ),
        (
            "activations.sites=[blocks.7.ln2.hook_normalized]",
            "activations.sites.0: blocks.7.ln2.hook_normalized is not a site: use mlp_in.7, the "
            "MLP's input, which is the norm's output with its weights",
        ),
        (
            "sae.k=many",
            "sae.k: input should be a valid integer, unable to parse string as an integer"
            " (got 'many')",
        ),
        (
            "activations.sites=[model.layers.7]",
            "activations.sites.0: model.layers.7 is called resid_post.7 here",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    tmp_path: Path, override: str, answer: str
) -> None:
    path = write_run(tmp_path, TINY)
    with pytest.raises(ConfigError) as caught:
        load_run(path, [override])
    assert str(caught.value) == f"{path}: {answer}"


def test_other_tools_names_lead_to_keys_that_exist_and_are_none_themselves() -> None:
    places = sections_by_key(Run)
    for name, key in OTHER_NAMES.items():
        section, _, last = key.rpartition(".")
        assert last == "kind" or section in places[last], key
        assert section not in places.get(name, {}), name


def test_patterns_are_in_the_schema() -> None:
    assert Run.model_json_schema()["properties"]["name"]["pattern"].startswith("^[a-z0-9]")
