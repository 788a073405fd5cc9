"""The dashboard of a dictionary's health: what it learns."""

from dist_sae.telemetry.dashboards.panels import Page, gauge, graph, number, stack
from dist_sae.telemetry.dashboards.queries import now, rate
from dist_sae.telemetry.dashboards.repeated import DEAD, FVU, L0

DICTIONARY = Page(
    "dictionary",
    "dist_sae: dictionary health",
    "What is learnt: reconstruction, use of latents, experts.",
    {
        "Does it reconstruct?": (
            FVU,
            gauge(
                graph,
                "dist_sae_train_row_explained_variance",
                "run, quantile",
                says="A low 0.05 line: some rows are not reconstructed at all.",
            ),
            gauge(
                graph,
                "dist_sae_train_site_fvu",
                "run, site",
                says="Of dictionaries that write several sites.",
            ),
            gauge(
                graph,
                "dist_sae_train_prefix_fvu",
                "run, prefix",
                says="Of matryoshka dictionaries: each prefix without the latents beyond it.",
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
                "Latents by log10 of how often they fire",
                "count",
                now("dist_sae_train_density_latents", "run, log10"),
                "A band that grows at `never` or the lowest numbers: latents die.",
            ),
            gauge(graph, "dist_sae_train_starved_share", says="If it grows, lower train.eps."),
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
        "What did the last evaluation say?": (
            gauge(number, "dist_sae_evaluate_fvu"),
            gauge(number, "dist_sae_evaluate_pca_fvu"),
            gauge(number, "dist_sae_evaluate_ce_recovered"),
            gauge(number, "dist_sae_evaluate_l0_latents"),
            gauge(number, "dist_sae_evaluate_dead_share"),
            gauge(number, "dist_sae_evaluate_step"),
        ),
    },
)
