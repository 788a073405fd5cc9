"""Every metric that the system exports, in one table. Imports no torch and no client library.

Every series carries, beside the labels below, `run` (its name), `role` (a program below) and
`rank` (of a trainer; of a producer its number times `model.shards` plus its rank within it). A
gauge has no series until its value is known; a counter begins at 0.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

EVERY_SERIES = ("run", "role", "rank")
"""Labels of every series."""

SHORT_LIVED = ("plan", "evaluate", "export", "report")
"""Programs that nobody can scrape: they push (`telemetry.pushgateway_url`)."""
ROLES = ("produce", "train", *SHORT_LIVED)
"""The programs that have metrics."""

PHASES = ("wait", "forward", "backward", "optimiser", "save", "rest")
"""Of a training step: they add up to its time. `wait` is for data."""
STAGES = ("tokenize", "forward", "pack", "store")
"""Of a producer, in the order of the work; they overlap."""
QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")
"""Of rows."""
NEVER = "never"
DENSITIES = (NEVER, *(f"{-7 + i / 2:.1f}" for i in range(14)))
"""Buckets of latents: the log10 of the share of rows that they fire on is at least this.

The first numbered one has the rarer ones too. Half a decade wide, to 0, every row.
"""
RARE = 1e-5
"""A latent that fires on a smaller share of rows fires rarely."""
STORE_ERRORS = (
    "AccessError",
    "StoreError",
    "StoreFullError",
    "UnavailableError",
)

_OPERATION_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metric(NamedTuple):
    """One row of the table. Names carry the unit; counters end in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """`1` where it has none."""
    roles: tuple[str, ...]
    """The programs that export it."""
    help: str
    labels: tuple[str, ...] = ()
    """Beside those of every series."""
    values: tuple[str, ...] = ()
    """What its one label can be, where that is known; a counter begins with all of them at 0."""
    buckets: tuple[float, ...] = ()
    """Of a histogram; the client's own if empty."""


_P, _T, _E = ("produce",), ("train",), ("evaluate",)

METRICS = (
    # the process
    Metric("dist_sae_run_info", "gauge", "1", ROLES, "1; the labels say what runs.", ("version",)),
    Metric(
        "dist_sae_build_info",
        "gauge",
        "1",
        ROLES,
        "1; the labels say of what it is built.",
        ("version", "python", "torch"),
    ),
    Metric(
        "dist_sae_process_start_timestamp_seconds",
        "gauge",
        "seconds",
        ROLES,
        "Unix time at which this process began.",
    ),
    Metric(
        "dist_sae_process_resident_memory_bytes",
        "gauge",
        "bytes",
        ROLES,
        "Memory of the host that this process holds.",
    ),
    Metric(
        "dist_sae_process_device_memory_bytes",
        "gauge",
        "bytes",
        ("produce", "train", "evaluate", "report"),
        "Memory of this process's GPU: in tensors, held by torch, and there in all.",
        ("state",),
        ("allocated", "reserved", "total"),
    ),
    Metric(
        "dist_sae_run_finished",
        "gauge",
        "1",
        ROLES,
        "1 once this process has done all of its part; 0 before, and if it stopped or failed.",
    ),
    Metric(
        "dist_sae_run_failed",
        "gauge",
        "1",
        ROLES,
        "1 when this process ends by an error, which the label names (errors.py, or `bug`).",
        ("error",),
    ),
    Metric(
        "dist_sae_job_seconds",
        "gauge",
        "seconds",
        SHORT_LIVED,
        "How long this program took.",
    ),
    Metric(
        "dist_sae_job_end_timestamp_seconds",
        "gauge",
        "seconds",
        SHORT_LIVED,
        "Unix time at which it ended.",
    ),
    Metric(
        "dist_sae_rank_up",
        "gauge",
        "1",
        ("produce", "train"),
        "1 if this rank's own page could be read for this scrape; of a pod's endpoint.",
    ),
    # the plan
    Metric("dist_sae_plan_units", "gauge", "units", ("plan",), "Units that the plan has."),
    Metric("dist_sae_plan_documents", "gauge", "documents", ("plan",), "Documents in them."),
    Metric(
        "dist_sae_plan_train_rows",
        "gauge",
        "rows",
        ("plan",),
        "Estimate of the rows that one pass trains on.",
    ),
    # producers
    Metric(
        "dist_sae_produce_rows_total", "counter", "rows", _P, "Rows written to the activation set."
    ),
    Metric(
        "dist_sae_produce_tokens_total",
        "counter",
        "tokens",
        _P,
        "Tokens that the model has run over, padding left out; grows with every batch.",
    ),
    Metric(
        "dist_sae_produce_excluded_rows_total",
        "counter",
        "rows",
        _P,
        "Rows left out of the activation set, by reason.",
        ("reason",),
        ("padding", "special_token", "first_position", "over_norm"),
    ),
    Metric(
        "dist_sae_produce_refused_documents_total",
        "counter",
        "documents",
        _P,
        "Documents left out because the tokenizer refused them.",
    ),
    Metric(
        "dist_sae_produce_units_total", "counter", "units", _P, "Units written by this producer."
    ),
    Metric(
        "dist_sae_produce_ready_units",
        "gauge",
        "units",
        _P,
        "Units that exist, whoever wrote them, as far as this producer has seen.",
    ),
    Metric("dist_sae_produce_plan_units", "gauge", "units", _P, "Units that there will be."),
    Metric(
        "dist_sae_produce_max_ahead_units",
        "gauge",
        "units",
        _P,
        "store.max_ahead_units: no unit so far ahead of the slowest consumer is begun.",
    ),
    Metric(
        "dist_sae_produce_claimed_units",
        "gauge",
        "units",
        _P,
        "Units that this producer has in hand.",
    ),
    Metric(
        "dist_sae_produce_takeovers_total",
        "counter",
        "units",
        _P,
        "Units taken over from a producer that had not renewed its claim.",
    ),
    Metric(
        "dist_sae_produce_seconds_total",
        "counter",
        "seconds",
        _P,
        "Time spent in each stage; stages overlap.",
        ("stage",),
        STAGES,
    ),
    Metric(
        "dist_sae_produce_wait_seconds",
        "gauge",
        "seconds",
        _P,
        "Time this producer has waited for consumers (store.max_ahead_units) or other producers.",
    ),
    Metric(
        "dist_sae_produce_waited_seconds_total",
        "counter",
        "seconds",
        _P,
        "The same by whom it waited for; while it grows for `consumers`, trainers are the limit.",
        ("waited_for",),
        ("consumers", "producers"),
    ),
    # stores
    Metric(
        "dist_sae_store_requests_total",
        "counter",
        "requests",
        ROLES,
        "Requests to the S3 endpoint, repeated ones included, by HTTP status.",
        ("operation", "status"),
    ),
    Metric(
        "dist_sae_store_retries_total",
        "counter",
        "requests",
        ROLES,
        "Requests that had to be repeated.",
    ),
    Metric(
        "dist_sae_store_bytes_total",
        "counter",
        "bytes",
        ROLES,
        "Bytes read (in) and written (out).",
        ("direction",),
        ("in", "out"),
    ),
    Metric(
        "dist_sae_store_request_seconds",
        "histogram",
        "seconds",
        ROLES,
        "Time until the headers of an answer.",
        ("operation",),
    ),
    Metric(
        "dist_sae_store_operation_seconds",
        "histogram",
        "seconds",
        ROLES,
        "Time of an operation on any store, with all its requests, bodies and repeats.",
        ("operation",),
        ("get", "put", "size", "list", "delete"),
        _OPERATION_SECONDS,
    ),
    Metric(
        "dist_sae_store_errors_total",
        "counter",
        "operations",
        ROLES,
        "Operations that failed for good, by error (errors.py); a missing object is an answer.",
        ("error",),
        STORE_ERRORS,
    ),
    # training: how far
    Metric(
        "dist_sae_train_info",
        "gauge",
        "1",
        _T,
        "1; the labels say what is trained.",
        ("kind", "site", "device"),
    ),
    Metric("dist_sae_train_ranks", "gauge", "ranks", _T, "Ranks that the job is to have."),
    Metric("dist_sae_train_latents", "gauge", "latents", _T, "Width of the whole dictionary."),
    Metric("dist_sae_train_step", "gauge", "steps", _T, "Steps done."),
    Metric("dist_sae_train_steps", "gauge", "steps", _T, "Steps that the run will do."),
    Metric(
        "dist_sae_train_rows_total", "counter", "rows", _T, "Rows that this rank has trained on."
    ),
    Metric(
        "dist_sae_train_rows_per_second",
        "gauge",
        "rows/second",
        _T,
        "Rows per second since the last report, all ranks.",
    ),
    # training: the loss
    Metric("dist_sae_train_loss", "gauge", "1", _T, "What is minimised, on the last batch."),
    Metric(
        "dist_sae_train_fvu",
        "gauge",
        "1",
        _T,
        "Fraction of variance unexplained on the last batch.",
    ),
    Metric(
        "dist_sae_train_heldout_fvu",
        "gauge",
        "1",
        _T,
        "The same on held-out rows, at the last save.",
    ),
    Metric(
        "dist_sae_train_row_explained_variance",
        "gauge",
        "1",
        _T,
        "1 - |x - x_hat|^2 / |x - mean|^2 of single rows of the last batch: its quantiles, "
        "mean over ranks.",
        ("quantile",),
        QUANTILES,
    ),
    Metric(
        "dist_sae_train_auxk_loss",
        "gauge",
        "1",
        _T,
        "AuxK loss on the last batch, before its coefficient.",
    ),
    Metric(
        "dist_sae_train_sparsity_loss",
        "gauge",
        "1",
        _T,
        "Penalty on codes (routed: loads), last batch, weighted.",
    ),
    Metric(
        "dist_sae_train_gradient_norm",
        "gauge",
        "1",
        _T,
        "Norm of the global gradient before clipping.",
    ),
    Metric("dist_sae_train_learning_rate", "gauge", "1", _T, "Learning rate of the last step."),
    # training: the dictionary
    Metric(
        "dist_sae_train_l0_latents",
        "gauge",
        "latents",
        _T,
        "Latents active per row on the last batch.",
    ),
    Metric(
        "dist_sae_train_dead_share",
        "gauge",
        "share",
        _T,
        "Share of latents that have not fired for dead_after_rows.",
    ),
    Metric(
        "dist_sae_train_rare_share",
        "gauge",
        "share",
        _T,
        "Share of latents that fire on fewer than 1 in 100,000 rows, dead ones included; of the "
        "rows of train_density_latents.",
    ),
    Metric(
        "dist_sae_train_density_latents",
        "gauge",
        "latents",
        _T,
        "Latents by the share of rows that they fire on, half a decade each: log10 of it is from "
        "the label on; `never`: on none. Of the last one to two dead_after_rows in this process.",
        ("log10",),
        DENSITIES,
    ),
    Metric(
        "dist_sae_train_density_rows",
        "gauge",
        "rows",
        _T,
        "Rows that train_density_latents and train_rare_share are of.",
    ),
    Metric(
        "dist_sae_train_starved_share",
        "gauge",
        "share",
        _T,
        "Share of latents whose gradients are below 10 eps of Adam: lower train.eps if it grows.",
    ),
    Metric(
        "dist_sae_train_stuck_latents_total",
        "counter",
        "latents",
        _T,
        "Latents that were dead for another dead_after_rows; TopK and its kin re-tie them.",
    ),
    # training: how evenly the work is shared out
    Metric(
        "dist_sae_train_shard_load_ratio",
        "gauge",
        "1",
        _T,
        "Active entries of the busiest shard over the mean, on the last batch; 1 is even.",
    ),
    Metric(
        "dist_sae_train_expert_load_ratio",
        "gauge",
        "1",
        _T,
        "Rows that the busiest expert was sent since the last report, over the mean.",
    ),
    Metric(
        "dist_sae_train_idle_experts",
        "gauge",
        "experts",
        _T,
        "Experts that got no row since the last report.",
    ),
    Metric(
        "dist_sae_train_expert_dead_share",
        "gauge",
        "share",
        _T,
        "Share of dead latents, worst expert.",
    ),
    Metric(
        "dist_sae_train_dropped_rows_total",
        "counter",
        "rows",
        _T,
        "Rows that an expert of this rank had no room for (sae.capacity).",
    ),
    # training: where time goes
    Metric(
        "dist_sae_train_step_seconds_total",
        "counter",
        "seconds",
        _T,
        "Time spent in steps, waiting included.",
    ),
    Metric(
        "dist_sae_train_phase_seconds_total",
        "counter",
        "seconds",
        _T,
        "The same by phase: `wait` for data, `save` standing still for checkpoints. On a GPU "
        "forward, backward and optimiser are the GPU's time.",
        ("phase",),
        PHASES,
    ),
    Metric(
        "dist_sae_train_product_seconds",
        "gauge",
        "seconds",
        _T,
        "Time of the bare encoder product of a step on this rank: the fastest of small samples.",
    ),
    Metric(
        "dist_sae_train_product_share",
        "gauge",
        "share",
        _T,
        "Its share of a step since the last report. The limit is 1: no other dense work is needed.",
    ),
    Metric(
        "dist_sae_train_wait_seconds_total",
        "counter",
        "seconds",
        _T,
        "Time this rank stood still for data.",
    ),
    Metric(
        "dist_sae_train_loader_stalls_total",
        "counter",
        "steps",
        _T,
        "Steps whose batch was not there: they waited for more than 10 ms.",
    ),
    Metric(
        "dist_sae_train_loaded_batches",
        "gauge",
        "batches",
        _T,
        "Batches that the loader held ready at the last report; 0 while data is the limit.",
    ),
    Metric(
        "dist_sae_train_save_stall_seconds_total",
        "counter",
        "seconds",
        _T,
        "Time this rank stood still for checkpoints.",
    ),
    # training: the data ahead of it, seen by rank 0
    Metric(
        "dist_sae_train_plan_units", "gauge", "units", _T, "Training units of the activation set."
    ),
    Metric("dist_sae_train_ready_units", "gauge", "units", _T, "Those that exist."),
    Metric(
        "dist_sae_train_reached_units",
        "gauge",
        "units",
        _T,
        "How far this run has read: all units below this number, in the order of the plan.",
    ),
    Metric(
        "dist_sae_train_backlog_units",
        "gauge",
        "units",
        _T,
        "Units that exist and that this run has not reached.",
    ),
    # checkpoints
    Metric(
        "dist_sae_checkpoint_damaged_total",
        "counter",
        "checkpoints",
        _T,
        "Checkpoints found damaged, so that the one before was taken.",
    ),
    Metric(
        "dist_sae_checkpoint_step", "gauge", "steps", _T, "Step of the last durable checkpoint."
    ),
    Metric(
        "dist_sae_checkpoint_timestamp_seconds",
        "gauge",
        "seconds",
        _T,
        "Unix time at which the last checkpoint became durable; none until there is one.",
    ),
    Metric(
        "dist_sae_checkpoint_seconds",
        "gauge",
        "seconds",
        _T,
        "From the copy of the last checkpoint until it was durable.",
    ),
    Metric("dist_sae_checkpoint_bytes", "gauge", "bytes", _T, "Size of the last checkpoint."),
    # evaluation, of the newest checkpoint on held-out rows
    Metric("dist_sae_evaluate_step", "gauge", "steps", _E, "Step of what was evaluated."),
    Metric("dist_sae_evaluate_rows", "gauge", "rows", _E, "Rows behind FVU and L0."),
    Metric("dist_sae_evaluate_fvu", "gauge", "1", _E, "Fraction of variance unexplained."),
    Metric(
        "dist_sae_evaluate_pca_fvu",
        "gauge",
        "1",
        _E,
        "That of a PCA with as many components as latents are active.",
    ),
    Metric("dist_sae_evaluate_l0_latents", "gauge", "latents", _E, "Latents active per row."),
    Metric("dist_sae_evaluate_dead_share", "gauge", "share", _E, "Share of dead latents."),
    Metric(
        "dist_sae_evaluate_ce_recovered",
        "gauge",
        "share",
        _E,
        "Share of zero ablation's harm to the cross-entropy that the reconstruction avoids.",
    ),
)


def render_table() -> str:
    """The table in Markdown, for people (`dist-sae config metrics`)."""
    rows = [
        f"| `{m.name}` | {m.kind} | {m.unit} | {_labels(m)} | {', '.join(m.roles)} | {m.help} |"
        for m in METRICS
    ]
    head = ["| metric | kind | unit | labels | exported by | |", "|---|---|---|---|---|---|"]
    every = ", ".join(f"`{label}`" for label in EVERY_SERIES)
    return "\n".join(
        [
            "# Metrics",
            "",
            "Generated by `dist-sae config metrics` from `dist_sae/telemetry/metrics.py`.",
            "",
            f"Every series carries, beside its own labels, {every}: the run's name, the program,",
            "and which of its processes it is (a trainer's rank; a producer's number times",
            "`model.shards` plus its rank within the model). A gauge has no series until its value",
            "is known, a counter begins at 0. Histograms have `_bucket`, `_sum` and `_count`.",
            "",
            *head,
            *rows,
            "",
        ]
    )


def _labels(metric: Metric) -> str:
    values = f" ({', '.join(metric.values)})" if metric.values else ""
    return ", ".join(f"`{label}`" for label in metric.labels) + values


def metrics_of(role: str) -> Iterator[Metric]:
    """Those that a program exports: a producer says nothing of training."""
    return (metric for metric in METRICS if role in metric.roles)
