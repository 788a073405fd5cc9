"""File formats of other tools, one module each."""

FORMATS = ("sae-lens", "sparsify", "dictionary-learning", "circuit-tracer")
"""Names of the formats that `dist-sae export` writes; the first is the default."""
INDEX_FORMATS = {
    "delphi": "the activations of the latent index",
    "neuronpedia": "latent pages, with explanations if there are any",
}
"""Formats that `dist-sae export` writes from the latent index, and what each contains."""
