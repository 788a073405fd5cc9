"""The dashboard of a training job, by rank."""

from dist_sae.telemetry.dashboards.panels import Page, gauge, graph, number, stack
from dist_sae.telemetry.dashboards.queries import (
    Query,
    age,
    alive,
    by_rank,
    growth,
    now,
    rate,
    slowest_ranks,
)
from dist_sae.telemetry.dashboards.repeated import BACKLOG, CHECKPOINT_LIMITS, STEP_SECONDS, UNITS


def _phases(phases: str) -> Query:
    """Query the share of these phases (`a|b`) in the time of all ranks."""
    return rate("dist_sae_train_phase_seconds_total", phase=phases).over(rate(STEP_SECONDS))


TRAINER = Page(
    "trainer",
    "dist_sae: trainer",
    "A training job by rank: pace, phases, data, checkpoints, memory.",
    {
        "Is it healthy?": (
            gauge(graph, "dist_sae_train_loss"),
            gauge(graph, "dist_sae_train_gradient_norm"),
            gauge(graph, "dist_sae_train_learning_rate"),
            graph(
                "Ranks",
                "count",
                alive("train").named("live"),
                now("dist_sae_train_ranks").named("wanted"),
            ),
            graph(
                "Memory",
                "bytes",
                *by_rank(now("dist_sae_process_resident_memory_bytes", "run, rank", role="train")),
            ),
            graph(
                "GPU memory",
                "bytes",
                *by_rank(
                    now("dist_sae_process_device_memory_bytes", "run, rank, state", role="train")
                ),
            ),
        ),
        "How long will it take?": (
            graph(
                "Rows by rank",
                "rows/s",
                *by_rank(rate("dist_sae_train_rows_total", "run, rank"), lowest=True),
                width=12,
            ),
            graph(
                "Rows of the job",
                "rows/s",
                now("dist_sae_train_rows_per_second").named("all time"),
                now("dist_sae_train_worked_rows_per_second").named("time in steps"),
                width=12,
            ),
            graph(
                "Rows read again, of streams that ended early",
                "rows/s",
                rate("dist_sae_train_repeated_rows_total"),
                width=12,
            ),
            graph(
                "Steps",
                "count",
                now("dist_sae_train_step").named("done"),
                now("dist_sae_train_steps").named("wanted"),
                width=12,
            ),
        ),
        "What limits it?": (
            stack(
                "Phases, mean of the chosen ranks",
                "count",
                rate("dist_sae_train_phase_seconds_total", "run, rank, phase").averaged(
                    "run, phase"
                ),
                "Seconds per second.",
            )._replace(width=12),
            graph(
                "Waiting for data",
                "share",
                *by_rank(
                    rate("dist_sae_train_wait_seconds_total", "run, rank").over(
                        rate(STEP_SECONDS, "run, rank")
                    )
                ),
                says="For its own; all wait meanwhile. One rank alone: its way to the store "
                "is slower.",
                limits=(0.05,),
                width=12,
            ),
            graph(
                "With other ranks",
                "share",
                *by_rank(
                    rate("dist_sae_train_phase_seconds_total", "run, rank", phase="ranks").over(
                        rate(STEP_SECONDS, "run, rank")
                    ),
                    lowest=True,
                ),
                says="The one with the least keeps the others waiting.",
            ),
            graph(
                "Exchange against compute",
                "share",
                _phases("ranks").named("with other ranks"),
                _phases("forward|backward|optimiser").named("compute"),
                says="Mean of the ranks. On a GPU an exchange for which no rank waits is compute.",
            ),
            graph(
                "Ranks that the others wait for",
                "share",
                slowest_ranks(),
                says="Time with other ranks of those that spend least in it, and their nodes; on a "
                "cluster with kube-state-metrics.",
            ),
            graph(
                "Slowest rank over the median",
                "count",
                now("dist_sae_train_slowest_ratio", "run, slowest, host"),
                says="By time at work; the labels name it. At 1 all are alike.",
            ),
            graph(
                "Encoder product's share of a step",
                "share",
                *by_rank(now("dist_sae_train_product_share", "run, rank"), lowest=True),
                says="The nearer to 1, the less there is to gain.",
            ),
            graph(
                "Bare encoder product",
                "seconds",
                *by_rank(now("dist_sae_train_product_seconds", "run, rank")),
                says="A rank above the others has a slower device.",
            ),
            graph(
                "Batches ready",
                "count",
                *by_rank(now("dist_sae_train_loaded_batches", "run, rank"), lowest=True),
                says="0: data is the limit.",
            ),
            graph(
                "Stalls of the loader",
                "per second",
                *by_rank(rate("dist_sae_train_loader_stalls_total", "run, rank")),
            ),
            gauge(graph, "dist_sae_train_shard_load_ratio", says="The others wait for it."),
            UNITS._replace(width=12),
            BACKLOG._replace(width=12),
        ),
        "What would a crash cost?": (
            graph(
                "Checkpoint age",
                "seconds",
                age("dist_sae_checkpoint_timestamp_seconds"),
                limits=CHECKPOINT_LIMITS,
            ),
            gauge(graph, "dist_sae_checkpoint_seconds"),
            graph(
                "Standing still for them",
                "share",
                *by_rank(
                    rate("dist_sae_train_save_stall_seconds_total", "run, rank").over(
                        rate(STEP_SECONDS, "run, rank")
                    )
                ),
            ),
            number("Size", "bytes", now("dist_sae_checkpoint_bytes"), width=8),
            number("Step of the last", "count", now("dist_sae_checkpoint_step"), width=8),
            number(
                "Damaged",
                "count",
                growth("dist_sae_checkpoint_damaged_total"),
                limits=(1,),
                width=8,
            ),
        ),
    },
    ranks="train",
)
