"""Explanations of latents by a language model, and how well they predict where latents fire."""
