"""Every metric that the system exports, in one table. Imports no torch and no client library."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One row of the table. Names carry the unit; counters end in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric(
        "dist_sae_run_info", "gauge", "1; the labels say what runs.", ("run", "role", "version")
    ),
    Metric("dist_sae_produce_rows_total", "counter", "Rows written to the activation set."),
    Metric(
        "dist_sae_produce_excluded_rows_total",
        "counter",
        "Rows left out of the activation set, by reason.",
        ("reason",),
    ),
    Metric(
        "dist_sae_produce_refused_documents_total",
        "counter",
        "Documents left out because the tokenizer refused them.",
    ),
    Metric("dist_sae_produce_units_total", "counter", "Units written by this producer."),
    Metric(
        "dist_sae_produce_seconds_total",
        "counter",
        "Time spent in each stage; stages overlap.",
        ("stage",),
    ),
    Metric(
        "dist_sae_produce_wait_seconds",
        "gauge",
        "Time this producer has waited for consumers (store.max_ahead_units) or other producers.",
    ),
    Metric(
        "dist_sae_store_requests_total",
        "counter",
        "Requests to the S3 endpoint, repeated ones included, by HTTP status.",
        ("operation", "status"),
    ),
    Metric("dist_sae_store_retries_total", "counter", "Requests that had to be repeated."),
    Metric(
        "dist_sae_store_bytes_total",
        "counter",
        "Bytes read (in) and written (out).",
        ("direction",),
    ),
    Metric(
        "dist_sae_store_request_seconds",
        "histogram",
        "Time until the headers of an answer.",
        ("operation",),
    ),
    Metric("dist_sae_train_step", "gauge", "Steps done."),
    Metric("dist_sae_train_steps", "gauge", "Steps that the run will do."),
    Metric("dist_sae_train_rows_total", "counter", "Rows that this rank has trained on."),
    Metric(
        "dist_sae_train_rows_per_second",
        "gauge",
        "Rows per second since the last report, all ranks.",
    ),
    Metric("dist_sae_train_fvu", "gauge", "Fraction of variance unexplained on the last batch."),
    Metric("dist_sae_train_heldout_fvu", "gauge", "The same on held-out rows, at the last save."),
    Metric(
        "dist_sae_train_auxk_loss", "gauge", "AuxK loss on the last batch, before its coefficient."
    ),
    Metric(
        "dist_sae_train_sparsity_loss",
        "gauge",
        "Penalty on codes (routed: loads), last batch, weighted.",
    ),
    Metric("dist_sae_train_l0_latents", "gauge", "Latents active per row on the last batch."),
    Metric(
        "dist_sae_train_dead_share",
        "gauge",
        "Share of latents that have not fired for dead_after_rows.",
    ),
    Metric(
        "dist_sae_train_starved_share",
        "gauge",
        "Share of latents whose gradients are below 10 eps of Adam: lower train.eps if it grows.",
    ),
    Metric(
        "dist_sae_train_stuck_latents_total",
        "counter",
        "Latents that were dead for another dead_after_rows; TopK and its kin re-tie them.",
    ),
    Metric(
        "dist_sae_train_expert_load_ratio",
        "gauge",
        "Rows that the busiest expert was sent since the last report, over the mean.",
    ),
    Metric(
        "dist_sae_train_idle_experts", "gauge", "Experts that got no row since the last report."
    ),
    Metric("dist_sae_train_expert_dead_share", "gauge", "Share of dead latents, worst expert."),
    Metric(
        "dist_sae_train_dropped_rows_total",
        "counter",
        "Rows that an expert of this rank had no room for (sae.capacity).",
    ),
    Metric("dist_sae_train_gradient_norm", "gauge", "Norm of the global gradient before clipping."),
    Metric("dist_sae_train_learning_rate", "gauge", "Learning rate of the last step."),
    Metric("dist_sae_train_wait_seconds_total", "counter", "Time this rank stood still for data."),
    Metric(
        "dist_sae_train_step_seconds_total", "counter", "Time spent in steps, waiting included."
    ),
    Metric(
        "dist_sae_train_save_stall_seconds_total",
        "counter",
        "Time this rank stood still for checkpoints.",
    ),
    Metric(
        "dist_sae_checkpoint_damaged_total",
        "counter",
        "Checkpoints found damaged, so that the one before was taken.",
    ),
    Metric("dist_sae_checkpoint_step", "gauge", "Step of the last durable checkpoint."),
    Metric(
        "dist_sae_checkpoint_seconds",
        "gauge",
        "From the copy of the last checkpoint until it was durable.",
    ),
    Metric("dist_sae_checkpoint_bytes", "gauge", "Size of the last checkpoint."),
)
