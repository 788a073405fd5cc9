"""F1 of latents as detectors of features, at the same L0 for every dictionary.

F1 falls with every additional active latent, so F1s at different L0s are not comparable.

Imports only torch, because sae-lens's Python, where dist_sae is not installed, imports this too.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def f1_at_l0(
    batches: Iterable[tuple[Tensor, Tensor]], W_dec: Tensor, directions: Tensor, l0: float
) -> float | None:
    """Return the mean F1 over latents, each scored on the feature closest to its decoder row.

    A latent counts as active where its code times its decoder norm exceeds a threshold. The
    threshold is the same for all latents, and is exceeded `l0` times per row on average. At a
    dictionary's own L0 this is the F1 of SynthSAEBench.

    Args:
        batches: Codes [rows, latents], and the strength of each feature [rows, features].
        W_dec: Decoder rows, [latents, d_in].
        directions: Directions of the features, [features, d_in].
        l0: Active latents per row.

    Returns:
        F1, or None if fewer than `l0` latents are active per row.
    """
    best = (normalize(W_dec, dim=1) @ normalize(directions, dim=1).T).abs().argmax(1)
    n_rows, sizes, latents, right = 0, list[Tensor](), list[Tensor](), list[Tensor]()
    fired = torch.zeros(len(W_dec), dtype=torch.int64)
    for codes, strengths in batches:
        fires, written = strengths[:, best] > 0, codes.abs() * W_dec.norm(dim=1)
        row, latent = written.nonzero(as_tuple=True)
        sizes.append(written[row, latent])
        latents.append(latent)
        right.append(fires[row, latent])
        fired += fires.sum(0)
        n_rows += len(codes)
    all_sizes = torch.cat(sizes)
    n_kept = round(l0 * n_rows)
    if n_kept > len(all_sizes):
        return None
    kept = all_sizes.topk(n_kept).indices
    active, hits = torch.cat(latents)[kept], torch.cat(right)[kept]
    found = torch.bincount(active, minlength=len(W_dec))
    true = torch.bincount(active[hits], minlength=len(W_dec))
    return float((2 * true / (found + fired).clamp(min=1)).mean())
