"""A training job, rank by rank."""

from dist_sae.telemetry.dashboards.panels import Page, gauge, graph, number, stack
from dist_sae.telemetry.dashboards.queries import age, alive, growth, now, rate
from dist_sae.telemetry.dashboards.repeated import BACKLOG, CHECKPOINT_LIMITS, STEP_SECONDS, UNITS

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
                now("dist_sae_process_resident_memory_bytes", "run, rank", role="train"),
            ),
            graph(
                "GPU memory",
                "bytes",
                now("dist_sae_process_device_memory_bytes", "run, rank, state", role="train"),
            ),
        ),
        "How long will it take?": (
            graph("Rows by rank", "rows/s", rate("dist_sae_train_rows_total", "run, rank")),
            graph(
                "Rows of the job",
                "rows/s",
                now("dist_sae_train_rows_per_second").named("all time"),
                now("dist_sae_train_worked_rows_per_second").named("time in steps"),
            ),
            graph(
                "Rows read again, of streams that ended early",
                "rows/s",
                rate("dist_sae_train_repeated_rows_total"),
            ),
            graph(
                "Steps",
                "count",
                now("dist_sae_train_step").named("done"),
                now("dist_sae_train_steps").named("wanted"),
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
            ),
            graph(
                "Waiting for data",
                "share",
                rate("dist_sae_train_wait_seconds_total", "run, rank").over(
                    rate(STEP_SECONDS, "run, rank")
                ),
                says="For its own; all wait meanwhile. One rank alone: its way to the store "
                "is slower.",
                limits=(0.05,),
            ),
            graph(
                "With other ranks",
                "share",
                rate("dist_sae_train_phase_seconds_total", "run, rank", phase="ranks").over(
                    rate(STEP_SECONDS, "run, rank")
                ),
                says="The one with the least keeps the others waiting.",
            ),
            graph(
                "Encoder product's share of a step",
                "share",
                now("dist_sae_train_product_share", "run, rank"),
                says="The nearer to 1, the less there is to gain.",
            ),
            gauge(
                graph,
                "dist_sae_train_product_seconds",
                "run, rank",
                says="A rank above the others has a slower device.",
            ),
            graph(
                "Batches ready",
                "count",
                now("dist_sae_train_loaded_batches", "run, rank"),
                says="0: data is the limit.",
            ),
            graph(
                "Stalls of the loader",
                "per second",
                rate("dist_sae_train_loader_stalls_total", "run, rank"),
            ),
            UNITS,
            BACKLOG,
            gauge(graph, "dist_sae_train_shard_load_ratio", says="The others wait for it."),
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
                rate("dist_sae_train_save_stall_seconds_total", "run, rank").over(
                    rate(STEP_SECONDS, "run, rank")
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
