"""What is learnt."""

from dist_sae.telemetry.dashboards.panels import Page, Section, graph, number, stack
from dist_sae.telemetry.dashboards.queries import now, rate
from dist_sae.telemetry.dashboards.repeated import DEAD, FVU, L0

DICTIONARY = Page(
    "dictionary",
    "dist_sae: dictionary health",
    "What is learnt: reconstruction, use of latents, experts.",
    (
        Section(
            "Does it reconstruct?",
            (
                FVU,
                graph(
                    "Explained variance of rows, by quantile",
                    "count",
                    now("dist_sae_train_row_explained_variance", "run, quantile"),
                    says="A low 0.05 line: some rows are not reconstructed at all.",
                ),
                graph(
                    "Parts of the loss",
                    "count",
                    now("dist_sae_train_loss").named("loss"),
                    now("dist_sae_train_auxk_loss").named("AuxK"),
                    now("dist_sae_train_sparsity_loss").named("sparsity"),
                ),
            ),
        ),
        Section(
            "Does it use its latents?",
            (
                L0,
                DEAD,
                stack(
                    "Latents by log10 of how often they fire",
                    "count",
                    now("dist_sae_train_density_latents", "run, log10"),
                    "A band that grows at `never` or the lowest numbers: latents die.",
                ),
                graph(
                    "Latents that hardly learn",
                    "share",
                    now("dist_sae_train_starved_share"),
                    says="If it grows, lower train.eps.",
                ),
                graph(
                    "Latents stuck dead",
                    "per second",
                    rate("dist_sae_train_stuck_latents_total"),
                    says="Each is tied to the data again.",
                ),
                graph(
                    "Rows that the densities are of",
                    "count",
                    now("dist_sae_train_density_rows"),
                    now("dist_sae_train_latents").named("latents"),
                ),
            ),
        ),
        Section(
            "Are experts used evenly? (routed)",
            (
                graph(
                    "Busiest expert over the mean",
                    "count",
                    now("dist_sae_train_expert_load_ratio"),
                    limits=(2, 3),
                ),
                graph(
                    "Idle experts and rows dropped per second",
                    "count",
                    now("dist_sae_train_idle_experts").named("idle"),
                    rate("dist_sae_train_dropped_rows_total").named("dropped"),
                ),
                graph(
                    "Dead latents of the worst expert",
                    "share",
                    now("dist_sae_train_expert_dead_share"),
                ),
            ),
        ),
        Section(
            "What did the last evaluation say?",
            (
                number("Held-out FVU", "count", now("dist_sae_evaluate_fvu")),
                number("PCA's", "count", now("dist_sae_evaluate_pca_fvu")),
                number("Cross-entropy recovered", "share", now("dist_sae_evaluate_ce_recovered")),
                number("L0", "count", now("dist_sae_evaluate_l0_latents")),
                number("Dead latents", "share", now("dist_sae_evaluate_dead_share")),
                number("Of step", "count", now("dist_sae_evaluate_step")),
            ),
        ),
    ),
)
