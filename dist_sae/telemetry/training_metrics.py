"""The part of the metric table (`metrics.py`) that trainers export."""

from dist_sae.telemetry.metric import DENSITIES, PHASES, QUANTILES, Metric

TRAINING = (
    # training: progress
    Metric(
        "dist_sae_train_info",
        "Always 1. The labels give the kind of dictionary, its sites and the device.",
        labels=("kind", "site", "device"),
    ),
    Metric("dist_sae_train_ranks", "Number of ranks of the job, from the run file."),
    Metric("dist_sae_train_latents", "Width of the whole dictionary."),
    Metric("dist_sae_train_step", "Steps done.", "Steps", text="step {:,.0f}", views=("status",)),
    Metric("dist_sae_train_steps", "Steps of the whole run."),
    Metric("dist_sae_train_rows_total", "Rows that this rank has trained on."),
    # training: the loss
    Metric("dist_sae_train_loss", "Training loss on the last batch.", "Loss"),
    Metric(
        "dist_sae_train_fvu",
        "Fraction of variance unexplained on the last batch.",
        "FVU",
        text="fvu {:.3f}",
        views=("status", "progress"),
    ),
    Metric(
        "dist_sae_train_site_fvu",
        "Fraction of variance unexplained on the last batch, by site, where several are written.",
        "FVU by site",
        labels=("site",),
    ),
    Metric(
        "dist_sae_train_prefix_fvu",
        "Fraction of variance unexplained by each nested dictionary (matryoshka) on the last "
        "batch, by its number of latents.",
        "FVU of nested dictionaries, by latents",
        labels=("prefix",),
    ),
    Metric(
        "dist_sae_train_heldout_fvu",
        "Fraction of variance unexplained on held-out rows, at the last save.",
        "Held-out FVU",
        text="held-out {:.3f}",
        views=("status",),
    ),
    Metric(
        "dist_sae_train_row_explained_variance",
        "Quantiles of 1 - |x - x_hat|^2 / |x - mean|^2 over the rows of the last batch, mean over "
        "ranks.",
        "Explained variance of rows, by quantile",
        recorded_as="explained_variance",
        labels=("quantile",),
        values=QUANTILES,
    ),
    Metric(
        "dist_sae_train_auxk_loss",
        "AuxK loss on the last batch, before its coefficient; with gated dictionaries the loss of "
        "the gates.",
        "AuxK loss",
    ),
    Metric(
        "dist_sae_train_sparsity_loss",
        "Sparsity penalty (routed: balance penalty) on the last batch, with its coefficient.",
        "Sparsity loss",
    ),
    Metric(
        "dist_sae_train_gradient_norm",
        "Norm of the global gradient before clipping.",
        "Gradient norm",
    ),
    Metric("dist_sae_train_learning_rate", "Learning rate of the last step.", "Learning rate"),
    # training: the dictionary
    Metric(
        "dist_sae_train_l0_latents",
        "Latents active per row on the last batch.",
        "L0",
        text="l0 {:.3g}",
        views=("status", "progress"),
    ),
    Metric(
        "dist_sae_train_dead_share",
        "Share of latents that have not fired for dead_after_rows; unknown before that many rows.",
        "Dead latents",
        text="dead {:.1%}",
        views=("status", "progress"),
    ),
    Metric(
        "dist_sae_train_rare_share",
        "Share of latents that fire on fewer than 1 in 100,000 rows, dead ones included, over the "
        "rows of train_density_rows.",
        "Rarely firing latents",
    ),
    Metric(
        "dist_sae_train_density_latents",
        "Latents by log10 of the share of rows on which they fire, in buckets of half a decade, "
        "labelled by their lower edges; `never`: on no row. Over the last one to two "
        "dead_after_rows of this process.",
        "Latents by log10 of firing frequency",
        recorded_as="density",
        labels=("log10",),
        values=DENSITIES,
    ),
    Metric(
        "dist_sae_train_density_rows",
        "Rows over which train_density_latents and train_rare_share are counted.",
        "Rows used for densities",
    ),
    Metric(
        "dist_sae_train_starved_share",
        "Share of latents whose Adam updates are dominated by eps (gradients below 10 eps): lower "
        "train.eps if it grows.",
        "Latents that hardly learn",
    ),
    Metric(
        "dist_sae_train_stuck_latents_total",
        "Latents that stayed dead for another dead_after_rows, and were re-tied to the data (TopK "
        "and its variants) or initialised again.",
    ),
    # training: how evenly the work is distributed
    Metric(
        "dist_sae_train_shard_load_ratio",
        "Active entries of the busiest latent shard over the mean, on the last batch; 1 is even.",
        "Busiest shard over the mean",
    ),
    Metric(
        "dist_sae_train_expert_load_ratio",
        "Rows sent to the busiest expert since the last report, over the mean.",
        "Busiest expert over the mean",
    ),
    Metric(
        "dist_sae_train_idle_experts",
        "Experts that received no row since the last report.",
        "Idle experts",
    ),
    Metric(
        "dist_sae_train_expert_dead_share",
        "Share of dead latents of the worst expert.",
        "Dead latents of the worst expert",
    ),
    Metric(
        "dist_sae_train_dropped_rows_total",
        "Rows that an expert on this rank dropped because it was full (sae.capacity).",
    ),
    # training: where time goes
    Metric(
        "dist_sae_train_rows_per_second",
        "Rows per second since the last report, all ranks.",
        "All time",
        text="{:,.0f} rows/s",
        views=("status",),
    ),
    Metric(
        "dist_sae_train_worked_rows_per_second",
        "Rows per second of all ranks, counting only time in steps: without the start, saving and "
        "waiting for data.",
        "Time in steps",
        text="{:,.0f} rows/s in steps",
        views=("status", "progress"),
    ),
    Metric(
        "dist_sae_train_step_seconds_total", "Time in training, including waiting and the start."
    ),
    Metric(
        "dist_sae_train_phase_seconds_total",
        "Time in training by phase: `wait` for data (on the rank that waits longest), `ranks` in "
        "collectives (for slower ranks, and for the network), `begin` before the first step, "
        "`save` blocked by checkpoints, `others` in steps of other jobs of a sweep. All "
        "other phases are the GPU's time where there is one.",
        labels=("phase",),
        values=PHASES,
    ),
    Metric(
        "dist_sae_train_phase_share",
        "Share of the time since the last report by phase, mean over ranks; exported by rank 0.",
        labels=("phase",),
    ),
    Metric(
        "dist_sae_train_slowest_ratio",
        "Compute time of the slowest rank since the last report, without waiting and collectives, "
        "over the median rank's; exported by rank 0. The labels name the rank and its host.",
        labels=("slowest", "host"),
    ),
    Metric(
        "dist_sae_train_product_seconds",
        "Time of the bare encoder product of a step on this rank: the fastest of small samples.",
        "Bare encoder product",
    ),
    Metric(
        "dist_sae_train_product_share",
        "Share of step time that the bare encoder product takes, since the last report. The "
        "maximum is 1, because no other dense work is needed.",
        "Encoder product",
        views=("status", "progress"),
    ),
    Metric("dist_sae_train_wait_seconds_total", "Time this rank waited for data."),
    Metric(
        "dist_sae_train_loader_stalls_total",
        "Steps that waited for their batch for more than 10 ms.",
    ),
    Metric(
        "dist_sae_train_repeated_rows_total",
        "Rows of this rank that were read again because its streams had fewer than planned.",
    ),
    Metric(
        "dist_sae_train_loaded_batches",
        "Batches that the loader had ready at the last step; 0 while data is the limit.",
    ),
    Metric("dist_sae_train_save_stall_seconds_total", "Time this rank was blocked by checkpoints."),
    # training: the data ahead, as seen by rank 0
    Metric("dist_sae_train_plan_units", "Training units of the activation set."),
    Metric("dist_sae_train_ready_units", "Training units that exist."),
    Metric(
        "dist_sae_train_reached_units",
        "How far this run has read: all units below this number, in the order of the plan.",
    ),
    Metric("dist_sae_train_backlog_units", "Units that exist and that this run has not reached."),
    # checkpoints
    Metric(
        "dist_sae_checkpoint_damaged_total",
        "Checkpoints found damaged, so that an earlier one was used.",
    ),
    Metric("dist_sae_checkpoint_step", "Step of the last durable checkpoint."),
    Metric(
        "dist_sae_checkpoint_timestamp_seconds",
        "Unix time at which the last checkpoint became durable; none until there is one.",
    ),
    Metric(
        "dist_sae_checkpoint_seconds",
        "Time from the copy of the last checkpoint until it was durable.",
        "Time until a checkpoint is durable",
        views=("status",),
    ),
    Metric("dist_sae_checkpoint_bytes", "Size of the last checkpoint."),
)
