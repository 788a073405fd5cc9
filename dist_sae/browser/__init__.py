"""Local web pages for a latent index: lists, search, latents, texts."""
