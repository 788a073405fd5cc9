"""The part of the table (`metrics.py`) that trainers alone export."""

from dist_sae.telemetry.metric import DENSITIES, PHASES, QUANTILES, Metric

_T = ("train",)

TRAINING = (
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
    Metric(
        "dist_sae_train_worked_rows_per_second",
        "gauge",
        "rows/second",
        _T,
        "The same of the time in steps: without waiting for data, saving, and the beginning.",
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
        "Share of latents that have not fired for dead_after_rows; none before so many rows.",
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
        "Latents dead for another dead_after_rows: re-tied (TopK and its kin), or begun again.",
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
        "Time spent in training, waiting and the beginning included.",
    ),
    Metric(
        "dist_sae_train_phase_seconds_total",
        "counter",
        "seconds",
        _T,
        "The same by phase: `wait` for data (of whichever rank waits longest), `ranks` for slower "
        "ranks (on a CPU with the exchange between ranks), `begin` before the first step, `save` "
        "standing still for checkpoints. On a GPU the others are the GPU's time.",
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
        "dist_sae_train_repeated_rows_total",
        "counter",
        "rows",
        _T,
        "Rows of this rank that were read again, because its streams had fewer than planned.",
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
)
