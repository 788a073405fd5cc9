"""The dashboard of producers, which run language models."""

from dist_sae.telemetry.dashboards.panels import Page, graph, number
from dist_sae.telemetry.dashboards.queries import alive, by_rank, growth, now, rate
from dist_sae.telemetry.dashboards.repeated import BACKLOG, STAGES, WAITING_PRODUCERS

PRODUCERS = Page(
    "producers",
    "dist_sae: producers",
    "The language models: speed, stages, units, excluded rows.",
    {
        "Are they healthy?": (
            number(
                "Live producers",
                "count",
                alive("produce"),
                of=now("dist_sae_produce_producers"),
                width=6,
            ),
            number(
                "Units in progress",
                "count",
                now("dist_sae_produce_claimed_units", how="sum"),
                width=6,
            ),
            number(
                "Units taken over",
                "count",
                growth("dist_sae_produce_takeovers_total"),
                "From producers that had died.",
                width=6,
            ),
            number(
                "Documents refused",
                "count",
                growth("dist_sae_produce_refused_documents_total"),
                limits=(1,),
                width=6,
            ),
        ),
        "How long will it take?": (
            graph(
                "Rows by producer",
                "rows/s",
                *by_rank(rate("dist_sae_produce_rows_total", "run, rank"), lowest=True),
            ),
            graph(
                "Tokens by producer",
                "per second",
                *by_rank(rate("dist_sae_produce_tokens_total", "run, rank"), lowest=True),
            ),
            graph(
                "Units",
                "count",
                now("dist_sae_produce_plan_units").named("planned"),
                now("dist_sae_produce_ready_units").named("ready"),
            ),
        ),
        "What limits them?": (
            STAGES,
            graph(
                "Waiting",
                "share",
                WAITING_PRODUCERS,
                description="For consumers: trainers are the limit. For producers: no unit is left "
                "to claim.",
            ),
            BACKLOG,
            graph(
                "Forward pass by producer",
                "count",
                *by_rank(rate("dist_sae_produce_seconds_total", "run, rank", stage="forward")),
                description="Seconds per second.",
            ),
            graph(
                "Units by producer",
                "per second",
                *by_rank(rate("dist_sae_produce_units_total", "run, rank"), lowest=True),
            ),
            graph(
                "Memory",
                "bytes",
                *by_rank(
                    now("dist_sae_process_resident_memory_bytes", "run, rank", role="produce")
                ),
            ),
        ),
        "What is left out?": (
            graph(
                "Rows left out",
                "rows/s",
                rate("dist_sae_produce_excluded_rows_total", "run, reason"),
                width=12,
            ),
            graph(
                "Share of rows left out",
                "share",
                rate("dist_sae_produce_excluded_rows_total", "run, reason").over(
                    rate("dist_sae_produce_tokens_total"), on="run"
                ),
                width=12,
            ),
        ),
    },
    ranks="produce",
)
