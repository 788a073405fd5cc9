"""The overview, which is the first dashboard to look at."""

from dist_sae.telemetry.dashboards.panels import Page, gauge, graph, number, stack, table
from dist_sae.telemetry.dashboards.queries import (
    Query,
    age,
    alive,
    now,
    pending_pods,
    rate,
    recorded,
    restarts,
)
from dist_sae.telemetry.dashboards.repeated import (
    BACKLOG,
    CHECKPOINT_LIMITS,
    DEAD,
    DEAD_LIMITS,
    FVU,
    L0,
    PHASE_SHARE,
    STAGES,
    UNITS,
    WAITING_PRODUCERS,
)

OVERVIEW = Page(
    "overview",
    "dist_sae: overview",
    "Is it healthy, how long will it take, what limits it?",
    {
        "Is it healthy?": (
            table(
                "Alerts",
                Query('ALERTS{alertname=~"DistSae.*"}', ""),
                "Alerts firing or pending, for all runs; monitoring/runbook.md says what to do.",
            ),
            number("Trainer ranks", "count", alive("train"), of=now("dist_sae_train_ranks")),
            number("Producers", "count", alive("produce"), of=now("dist_sae_produce_producers")),
            number(
                "Checkpoint age",
                "seconds",
                age("dist_sae_checkpoint_timestamp_seconds"),
                "The training time that a crash would lose.",
                CHECKPOINT_LIMITS,
            ),
            gauge(number, "dist_sae_train_fvu"),
            gauge(number, "dist_sae_train_l0_latents"),
            gauge(number, "dist_sae_train_dead_share", limits=DEAD_LIMITS),
            graph(
                "Pods pending",
                "count",
                pending_pods(),
                description="By part, from kube-state-metrics. `dist-sae status` shows why they "
                "are pending.",
                width=12,
            ),
            graph("Restarts within an hour", "count", restarts(), width=12),
        ),
        "How long will it take?": (
            number("Trained", "share", recorded("run:dist_sae_train_step:share"), width=6),
            number(
                "Training left",
                "seconds",
                recorded("run:dist_sae_train_left:seconds"),
                "At the pace of the last ten minutes.",
                width=6,
            ),
            number("Produced", "share", recorded("run:dist_sae_produce_units:share"), width=6),
            number(
                "Producing left",
                "seconds",
                recorded("run:dist_sae_produce_left:seconds"),
                "At the pace of the last ten minutes; none while nothing is produced.",
                width=6,
            ),
            graph(
                "Rows",
                "rows/s",
                rate("dist_sae_train_rows_total").named("trained"),
                rate("dist_sae_produce_rows_total").named("produced"),
                width=12,
            ),
            UNITS._replace(width=12),
        ),
        "What limits it?": (
            stack(
                "Where trainers' time goes",
                "share",
                recorded(PHASE_SHARE),
                "`wait`: producers or the store are the limit; `ranks`: the slowest rank is.",
            ),
            STAGES,
            graph(
                "Who waits for whom",
                "share",
                recorded(PHASE_SHARE, phase="wait").named("trainers wait for data"),
                WAITING_PRODUCERS.named("keep producers waiting"),
                limits=(0.05,),
            ),
            graph(
                "Encoder product's share of a step",
                "share",
                now("dist_sae_train_product_share", how="avg"),
                description="The closer to 1, the less there is to gain.",
            ),
            BACKLOG,
            graph("Store", "bytes/s", rate("dist_sae_store_bytes_total", "run, direction")),
        ),
        "Does it learn?": (FVU, L0, DEAD),
    },
)
