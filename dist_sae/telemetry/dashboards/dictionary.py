"""The dashboard of a dictionary's health: what it learns."""

from dist_sae.telemetry.dashboards.panels import Page, gauge, graph, number, stack
from dist_sae.telemetry.dashboards.queries import now, rate
from dist_sae.telemetry.dashboards.repeated import DEAD, FVU, L0

DICTIONARY = Page(
    "dictionary",
    "dist_sae: dictionary health",
    "What the dictionary learns: reconstruction, use of latents, experts.",
    {
        "Does it reconstruct?": (
            FVU,
            gauge(
                graph,
                "dist_sae_train_row_explained_variance",
                "run, quantile",
                description="If the 0.05 line is low, some rows are not reconstructed at all.",
            ),
            gauge(
                graph,
                "dist_sae_train_site_fvu",
                "run, site",
                description="For dictionaries that write several sites.",
            ),
            gauge(
                graph,
                "dist_sae_train_prefix_fvu",
                "run, prefix",
                description="For matryoshka dictionaries: each prefix without later latents.",
                width=12,
            ),
            graph(
                "Parts of the loss",
                "count",
                now("dist_sae_train_loss").named("loss"),
                now("dist_sae_train_auxk_loss").named("AuxK"),
                now("dist_sae_train_sparsity_loss").named("sparsity"),
                width=12,
            ),
        ),
        "Does it use its latents?": (
            L0,
            DEAD,
            stack(
                "Latents by log10 of firing frequency",
                "count",
                now("dist_sae_train_density_latents", "run, log10"),
                "If the bands `never` or the lowest numbers grow, latents are dying.",
            ),
            gauge(
                graph, "dist_sae_train_starved_share", description="If it grows, lower train.eps."
            ),
            graph(
                "Latents stuck dead",
                "per second",
                rate("dist_sae_train_stuck_latents_total"),
                description="Each is tied to the data again, or initialised again.",
            ),
            graph(
                "Rows used for densities",
                "count",
                now("dist_sae_train_density_rows"),
                now("dist_sae_train_latents").named("latents"),
            ),
        ),
        "Are experts used evenly? (routed)": (
            gauge(graph, "dist_sae_train_expert_load_ratio", limits=(2, 3)),
            graph(
                "Idle experts and rows dropped per second",
                "count",
                now("dist_sae_train_idle_experts").named("idle"),
                rate("dist_sae_train_dropped_rows_total").named("dropped"),
            ),
            gauge(graph, "dist_sae_train_expert_dead_share"),
        ),
        "What did the last evaluation find?": (
            gauge(number, "dist_sae_evaluate_fvu"),
            gauge(number, "dist_sae_evaluate_pca_fvu"),
            gauge(number, "dist_sae_evaluate_ce_recovered"),
            gauge(number, "dist_sae_evaluate_l0_latents"),
            gauge(number, "dist_sae_evaluate_dead_share"),
            gauge(number, "dist_sae_evaluate_step"),
        ),
    },
)
