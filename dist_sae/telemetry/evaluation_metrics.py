"""The part of the table (`metrics.py`) that `dist-sae evaluate` exports: held-out numbers."""

from dist_sae.telemetry.metric import Metric

_E = ("evaluate",)

EVALUATION = (
    Metric(
        "dist_sae_evaluate_step",
        "gauge",
        "steps",
        _E,
        "Step of the checkpoint that was evaluated.",
        short="step",
        title="Of step",
    ),
    Metric(
        "dist_sae_evaluate_rows",
        "gauge",
        "rows",
        _E,
        "Held-out rows behind FVU, L0 and densities.",
        short="rows",
        title="Rows",
        views=("detail",),
    ),
    Metric(
        "dist_sae_evaluate_fvu",
        "gauge",
        "1",
        _E,
        "Fraction of the variance that the reconstruction misses; 0 is perfect, 1 is the mean.",
        short="fvu",
        title="FVU",
        views=("card",),
    ),
    Metric(
        "dist_sae_evaluate_pca_fvu",
        "gauge",
        "1",
        _E,
        "FVU of a PCA with as many components as latents are active: the bar to beat.",
        short="pca_fvu",
        title="FVU of PCA",
        views=("detail",),
    ),
    Metric(
        "dist_sae_evaluate_l0_latents",
        "gauge",
        "latents",
        _E,
        "Latents active on a row, on average.",
        short="l0",
        title="L0",
        views=("card",),
    ),
    Metric(
        "dist_sae_evaluate_dead_share",
        "gauge",
        "share",
        _E,
        "Share of latents that had not fired for sae.dead_after_rows rows at the checkpoint; not "
        "known before so many.",
        short="dead_share",
        title="Dead latents",
        views=("card",),
    ),
    Metric(
        "dist_sae_evaluate_ce_recovered",
        "gauge",
        "share",
        _E,
        "Share of zero ablation's harm to the cross-entropy that splicing in the reconstruction "
        "avoids.",
        short="ce_recovered",
        title="CE recovered",
        views=("card",),
    ),
)
