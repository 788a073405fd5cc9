"""`dist-sae report`: charts, example texts of latents, and the page."""
