"""What `dist-sae report` is made of: charts, example texts of latents, the page."""
