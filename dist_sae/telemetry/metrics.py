"""Every metric that the system exports, in one table. Imports no torch and no client library.

In addition to the labels below, every series has `run` (its name), `role` (the program) and `rank`
(a trainer's rank; a producer's number times `model.tensor_parallel` plus its rank within the
model). A gauge has no series until its value is known. A counter starts at 0.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dist_sae.telemetry.metric import EVERY_SERIES, STAGES, STORE_ERRORS, Metric, View
from dist_sae.telemetry.training_metrics import TRAINING

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OPERATION_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)

METRICS = (
    # the process
    Metric(
        "dist_sae_run_info",
        "Always 1. The labels give the version, and the name of the run's Kubernetes objects.",
        labels=("version", "kubernetes_name"),
    ),
    Metric(
        "dist_sae_build_info",
        "Always 1. The labels give the versions of dist_sae, Python and torch.",
        labels=("version", "python", "torch"),
    ),
    Metric("dist_sae_process_start_timestamp_seconds", "Unix time at which this process started."),
    Metric("dist_sae_process_resident_memory_bytes", "Resident host memory of this process."),
    Metric(
        "dist_sae_process_device_memory_bytes",
        "Memory of this process's GPU: allocated to tensors, reserved by torch, and total.",
        labels=("state",),
        values=("allocated", "reserved", "total"),
    ),
    Metric(
        "dist_sae_run_finished",
        "1 once this process has finished its work; 0 before, and if it stopped or failed.",
    ),
    Metric(
        "dist_sae_run_failed",
        "1 if this process ended with an error, which the label names (errors.py, or `bug`).",
        labels=("error",),
    ),
    Metric("dist_sae_job_seconds", "Run time of this program."),
    Metric("dist_sae_job_end_timestamp_seconds", "Unix time at which this program ended."),
    Metric(
        "dist_sae_rank_up",
        "1 if this rank's own page could be read for this scrape of a pod's endpoint.",
    ),
    # the plan
    Metric("dist_sae_plan_units", "Units in the plan."),
    Metric("dist_sae_plan_documents", "Documents in the plan's units."),
    Metric("dist_sae_plan_train_rows", "Estimated rows of one training pass."),
    # producers
    Metric("dist_sae_produce_rows_total", "Rows written to the activation set."),
    Metric(
        "dist_sae_produce_tokens_total",
        "Tokens that the model has processed, without padding; grows with every batch.",
    ),
    Metric(
        "dist_sae_produce_excluded_rows_total",
        "Rows left out of the activation set, by reason.",
        labels=("reason",),
        values=("padding", "special_token", "first_position", "over_norm"),
    ),
    Metric(
        "dist_sae_produce_refused_documents_total",
        "Documents left out because the tokenizer refused them.",
    ),
    Metric("dist_sae_produce_units_total", "Units written by this producer."),
    Metric(
        "dist_sae_produce_ready_units",
        "Existing units of all producers, as last seen by this producer.",
    ),
    Metric(
        "dist_sae_produce_producers", "Number of producers in the run file (processes.producers)."
    ),
    Metric("dist_sae_produce_plan_units", "Units of the plan."),
    Metric(
        "dist_sae_produce_max_ahead_units",
        "store.max_ahead_units: producers start no unit that is further ahead of the slowest "
        "consumer.",
    ),
    Metric("dist_sae_produce_claimed_units", "Units that this producer is working on."),
    Metric(
        "dist_sae_produce_takeovers_total",
        "Units taken over from producers that stopped renewing their claims.",
    ),
    Metric(
        "dist_sae_produce_seconds_total",
        "Time spent in each stage; stages overlap.",
        labels=("stage",),
        values=STAGES,
    ),
    Metric(
        "dist_sae_produce_wait_seconds",
        "Time this producer has waited for consumers (store.max_ahead_units) or other producers.",
    ),
    Metric(
        "dist_sae_produce_waited_seconds_total",
        "Waiting time of this producer, by cause; while it grows for `consumers`, trainers are "
        "the limit.",
        labels=("waited_for",),
        values=("consumers", "producers"),
    ),
    # stores
    Metric(
        "dist_sae_store_requests_total",
        "Requests to the S3 endpoint, retries included, by HTTP status.",
        labels=("operation", "status"),
    ),
    Metric("dist_sae_store_retries_total", "Requests that were retried."),
    Metric(
        "dist_sae_store_bytes_total",
        "Bytes read (in) and written (out).",
        labels=("direction",),
        values=("in", "out"),
    ),
    Metric(
        "dist_sae_store_request_seconds",
        "Time until the headers of a response arrive.",
        labels=("operation",),
        buckets=_REQUEST_SECONDS,
    ),
    Metric(
        "dist_sae_store_operation_seconds",
        "Time of an operation on any store, including all requests, bodies and retries.",
        labels=("operation",),
        values=("get", "put", "size", "list", "delete"),
        buckets=_OPERATION_SECONDS,
    ),
    Metric(
        "dist_sae_store_errors_total",
        "Operations that failed for good, by error (errors.py); a missing object is not an error.",
        labels=("error",),
        values=STORE_ERRORS,
    ),
    *TRAINING,
    # the latent index
    Metric("dist_sae_index_plan_units", "Units that the index covers."),
    Metric("dist_sae_index_plan_buckets", "Buckets of latents of the index."),
    Metric("dist_sae_index_units", "Units encoded by all workers, as last seen by this worker."),
    Metric("dist_sae_index_buckets", "Buckets merged by all workers, as last seen by this worker."),
    Metric("dist_sae_index_claimed_units", "Units that this worker is encoding."),
    Metric("dist_sae_index_claimed_buckets", "Buckets that this worker is merging."),
    Metric(
        "dist_sae_index_takeovers_total",
        "Units and buckets taken over from workers that stopped renewing their claims.",
    ),
    Metric(
        "dist_sae_index_waited_seconds_total",
        "Time this worker waited for the last units or buckets, which others are processing.",
        labels=("waited_for",),
        values=("units", "buckets"),
    ),
    Metric("dist_sae_index_rows_total", "Rows that this worker has encoded."),
    Metric("dist_sae_index_entries_total", "Active latents, summed over the rows encoded."),
    Metric("dist_sae_index_merged_entries_total", "Entries of the buckets that were merged."),
    Metric(
        "dist_sae_index_rows_per_second",
        "Rows encoded per second by this worker, in the last unit and the wait before it.",
    ),
    # held-out numbers
    Metric(
        "dist_sae_evaluate_step", "Step of the checkpoint that was evaluated.", "Evaluated step"
    ),
    Metric(
        "dist_sae_evaluate_rows",
        "Held-out rows behind FVU, L0 and densities.",
        "Rows",
        views=("detail",),
    ),
    Metric(
        "dist_sae_evaluate_fvu",
        "Fraction of the variance that the reconstruction misses; 0 is perfect, 1 is the mean.",
        "FVU",
        views=("card",),
    ),
    Metric(
        "dist_sae_evaluate_pca_fvu",
        "FVU of a PCA with as many components as latents are active: the bar to beat.",
        "FVU of PCA",
        views=("detail",),
    ),
    Metric(
        "dist_sae_evaluate_l0_latents",
        "Latents active on a row, on average.",
        "L0",
        recorded_as="l0",
        views=("card",),
    ),
    Metric(
        "dist_sae_evaluate_dead_share",
        "Share of latents that had not fired for sae.dead_after_rows rows at the checkpoint; "
        "unknown before that many rows.",
        "Dead latents",
        views=("card",),
    ),
    Metric(
        "dist_sae_evaluate_ce_recovered",
        "Share of the increase in cross-entropy under zero ablation that splicing in the "
        "reconstruction avoids.",
        "CE recovered",
        views=("card",),
    ),
)
TABLE = {metric.name: metric for metric in METRICS}
"""The metrics by name."""


def render_table() -> str:
    """Render the table in Markdown (`dist-sae config metrics`)."""
    rows = [
        f"| `{m.name}` | {m.kind} | {m.unit} | {_labels(m)} | {', '.join(m.roles)} | "
        + m.help.replace("|", "\\|")
        + " |"
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
            f"Besides the labels below, every series has {every}: the run's name, the program,",
            "and the number of the process (a trainer's rank; a producer's number times",
            "`model.tensor_parallel` plus its rank within the model). A gauge has no series until",
            "its value is known. A counter starts at 0. Histograms have `_bucket`, `_sum` and",
            "`_count`.",
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
    """Return the metrics that a program exports."""
    return (metric for metric in METRICS if role in metric.roles)


def recorded(role: str) -> dict[str, Metric]:
    """Return the metrics that a program's records contain, by short name."""
    return {metric.short: metric for metric in metrics_of(role) if metric.short}


def gauges(role: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Yield the full name, value and labels of each gauge in a record.

    Args:
        role: The program that exports the gauges.
        record: Numbers by short name, or by short name and label. None means unknown.
    """
    for short, metric in recorded(role).items():
        value = record.get(short)
        if isinstance(value, Mapping):
            (label,) = metric.labels
            yield from ((metric.name, number, {label: key}) for key, number in value.items())
        elif value is not None:
            yield metric.name, value, {}


def listed(view: View) -> Iterator[Metric]:
    """Return the metrics that a view shows, in the order of the table."""
    return (metric for metric in METRICS if view in metric.views)
