"""A local page on a latent index: lists, search, latents, texts."""
