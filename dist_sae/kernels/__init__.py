"""Sparse products and updates. `torch` runs anywhere, `native` on CPUs, `triton` on NVIDIA GPUs.

All of them take the non-zeros of a `[batch, n_latents]` matrix as `Entries` and never build the
dense matrix.
"""

from dist_sae.kernels.base import Adam, Entries, Kernels, Update, starts_of

__all__ = ["Adam", "Entries", "Kernels", "Update", "starts_of"]
