"""The latent index: what each latent of a trained dictionary does, on all rows of a set."""
