"""Parts of `dist-sae evaluate`."""
