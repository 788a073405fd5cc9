"""Runs beside one another: what differs between them, their numbers, their latents."""
