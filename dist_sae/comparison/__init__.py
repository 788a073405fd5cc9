"""Comparison of several runs: their settings, numbers and latents."""
