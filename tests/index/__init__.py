"""Tests of the latent index."""
