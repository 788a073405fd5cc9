"""The dashboard of a latent index while it is built."""

from dist_sae.telemetry.dashboards.panels import Page, graph, number
from dist_sae.telemetry.dashboards.queries import alive, by_rank, growth, now, rate

INDEX = Page(
    "index",
    "dist_sae: latent index",
    "The latent index while it is built: units, then buckets of latents.",
    {
        "Are its workers healthy?": (
            number("Live workers", "count", alive("index"), width=6),
            number(
                "Units being encoded",
                "count",
                now("dist_sae_index_claimed_units", how="sum"),
                width=6,
            ),
            number(
                "Buckets being merged",
                "count",
                now("dist_sae_index_claimed_buckets", how="sum"),
                width=6,
            ),
            number(
                "Units and buckets taken over",
                "count",
                growth("dist_sae_index_takeovers_total"),
                "From workers that had died.",
                width=6,
            ),
        ),
        "How long will the index take?": (
            graph(
                "Units encoded",
                "count",
                now("dist_sae_index_plan_units").named("planned"),
                now("dist_sae_index_units").named("encoded"),
                description="Stage 1. Stage 2 starts when all units are encoded.",
                width=12,
            ),
            graph(
                "Buckets merged",
                "count",
                now("dist_sae_index_plan_buckets").named("planned"),
                now("dist_sae_index_buckets").named("merged"),
                description="Stage 2. With the last bucket, the index is complete.",
                width=12,
            ),
            graph(
                "Rows encoded",
                "rows/s",
                *by_rank(rate("dist_sae_index_rows_total", "run, rank"), lowest=True),
                width=12,
            ),
            graph(
                "Entries",
                "per second",
                rate("dist_sae_index_entries_total").named("encoded"),
                rate("dist_sae_index_merged_entries_total").named("merged"),
                description="An entry is the activation of one latent on one row.",
                width=12,
            ),
        ),
        "What limits the index?": (
            graph(
                "Waiting for other workers",
                "share",
                rate("dist_sae_index_waited_seconds_total", "run, waited_for").over(
                    now("dist_sae_index_plan_units", how="count"), on="run"
                ),
                description="Mean over workers. The last units or buckets are being processed by "
                "others.",
            ),
            graph(
                "Pace of the last unit",
                "rows/s",
                *by_rank(now("dist_sae_index_rows_per_second", "run, rank"), lowest=True),
                description="A worker that lags has a slow device, or a slow connection to the "
                "store.",
            ),
            graph(
                "Memory of workers",
                "bytes",
                *by_rank(now("dist_sae_process_resident_memory_bytes", "run, rank", role="index")),
            ),
        ),
    },
    ranks="index",
)
