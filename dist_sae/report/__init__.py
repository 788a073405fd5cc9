"""Parts of `dist-sae report`: charts, example texts of latents, the page."""
