"""The latent index: what each latent of a trained dictionary does on every row of its data."""
