"""Panels that several dashboards share."""

from dist_sae.telemetry.dashboards.panels import gauge, graph
from dist_sae.telemetry.dashboards.queries import now, rate, recorded

STEP_SECONDS = "dist_sae_train_step_seconds_total"
PHASE_SHARE = "run_phase:dist_sae_train_phase:share5m"
CHECKPOINT_LIMITS = (1800, 3600)
DEAD_LIMITS = (0.1, 0.2)

FVU = graph(
    "FVU",
    "count",
    now("dist_sae_train_fvu").named("batch"),
    now("dist_sae_train_heldout_fvu").named("held out"),
    description="Should fall, then level off. 1 is no better than predicting the mean.",
)
L0 = gauge(graph, "dist_sae_train_l0_latents")
DEAD = graph(
    "Dead and rarely firing latents",
    "share",
    now("dist_sae_train_dead_share").named("dead"),
    now("dist_sae_train_rare_share").named("rare"),
    limits=DEAD_LIMITS,
)
UNITS = graph(
    "Units",
    "count",
    now("dist_sae_train_plan_units").named("planned"),
    now("dist_sae_train_ready_units").named("ready"),
    now("dist_sae_train_reached_units").named("reached"),
    description="In the first pass, trainers wait when reached catches up with ready; later all "
    "units exist.",
)
BACKLOG = graph(
    "Backlog of units",
    "count",
    now("dist_sae_train_backlog_units").named("waiting"),
    now("dist_sae_produce_max_ahead_units").named("limit"),
    description="While units are being produced: at 0, producers are the limit; near the limit "
    "line, trainers are.",
)
STAGES = graph(
    "Where producers' time goes",
    "count",
    # if ranks share a model, only the first one exports stages and the plan
    rate("dist_sae_produce_seconds_total", "run, stage").over(
        now("dist_sae_produce_plan_units", how="count"), on="run"
    ),
    description="Seconds per second, mean over producers. Stages overlap; the one closest to 1 is "
    "the limit.",
)
WAITING_PRODUCERS = recorded("run_waited_for:dist_sae_produce_waited:share5m")
