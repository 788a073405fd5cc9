"""Other tools' formats, a file for each."""

FORMATS = ("sae-lens", "sparsify", "dictionary-learning", "circuit-tracer")
"""Names of the formats that `dist-sae export` writes; the first is the default."""
CACHE = "delphi"
"""Name of the format that it writes from the latent index."""
