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
    "A training job by rank: speed, phases, data, checkpoints, memory.",
    {
        "Is it healthy?": (
            gauge(graph, "dist_sae_train_loss"),
            gauge(graph, "dist_sae_train_gradient_norm"),
            gauge(graph, "dist_sae_train_learning_rate"),
            graph(
                "Ranks",
                "count",
                alive("train").named("live"),
                now("dist_sae_train_ranks").named("expected"),
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
                "Rows read again because streams ended early",
                "rows/s",
                rate("dist_sae_train_repeated_rows_total"),
                width=12,
            ),
            graph(
                "Steps",
                "count",
                now("dist_sae_train_step").named("done"),
                now("dist_sae_train_steps").named("planned"),
                width=12,
            ),
        ),
        "What limits it?": (
            stack(
                "Phases, mean of the selected ranks",
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
                description="Waiting for its own data; other ranks wait too. If only one rank "
                "waits, its connection to the store is slower.",
                limits=(0.05,),
                width=12,
            ),
            graph(
                "Time in collectives",
                "share",
                *by_rank(
                    rate("dist_sae_train_phase_seconds_total", "run, rank", phase="ranks").over(
                        rate(STEP_SECONDS, "run, rank")
                    ),
                    lowest=True,
                ),
                description="The rank with the lowest share keeps the others waiting.",
            ),
            graph(
                "Collectives and compute",
                "share",
                _phases("ranks").named("collectives"),
                _phases("forward|backward|optimiser").named("compute"),
                description="Mean over ranks. At ZeRO stages 1 and 2, DeepSpeed's collectives "
                "count as compute.",
            ),
            graph(
                "Ranks that the others wait for",
                "share",
                slowest_ranks(),
                description="Time in collectives of the ranks that spend the least in them, with "
                "their nodes. Needs kube-state-metrics.",
            ),
            graph(
                "Slowest rank over the median",
                "count",
                now("dist_sae_train_slowest_ratio", "run, slowest, host"),
                description="Ratio of compute times; the labels name the rank. 1: all are equally "
                "fast.",
            ),
            graph(
                "Encoder product's share of a step",
                "share",
                *by_rank(now("dist_sae_train_product_share", "run, rank"), lowest=True),
                description="The closer to 1, the less there is to gain.",
            ),
            graph(
                "Bare encoder product",
                "seconds",
                *by_rank(now("dist_sae_train_product_seconds", "run, rank")),
                description="A rank above the others has a slower device.",
            ),
            graph(
                "Batches ready",
                "count",
                *by_rank(now("dist_sae_train_loaded_batches", "run, rank"), lowest=True),
                description="0: data is the limit.",
            ),
            graph(
                "Loader stalls",
                "per second",
                *by_rank(rate("dist_sae_train_loader_stalls_total", "run, rank")),
            ),
            gauge(
                graph,
                "dist_sae_train_shard_load_ratio",
                description="The others wait for this shard.",
            ),
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
                "Time blocked by checkpoints",
                "share",
                *by_rank(
                    rate("dist_sae_train_save_stall_seconds_total", "run, rank").over(
                        rate(STEP_SECONDS, "run, rank")
                    )
                ),
            ),
            number("Checkpoint size", "bytes", now("dist_sae_checkpoint_bytes"), width=8),
            number("Last checkpointed step", "count", now("dist_sae_checkpoint_step"), width=8),
            number(
                "Damaged checkpoints",
                "count",
                growth("dist_sae_checkpoint_damaged_total"),
                limits=(1,),
                width=8,
            ),
        ),
    },
    ranks="train",
)
