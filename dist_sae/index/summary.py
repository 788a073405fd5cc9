"""The summary of a complete index."""

from typing import Any

from dist_sae.index.layout import IndexFolder, IndexManifest
from dist_sae.index.records import bucket_records, unit_records
from dist_sae.storage import ObjectStore

_PARTS = {
    "neighbours": "nearest latents",
    "output_tokens": "output tokens",
    "pairs": "coactive latents",
}
"""Settings of the index, each with the part of a latent's page that the value 0 omits."""


def summary(store: ObjectStore, folder: IndexFolder, manifest: IndexManifest) -> dict[str, Any]:
    """Summarize a complete index.

    Returns:
        `index` (its path or URL), `step`, `units`, `deleted_units`, `rows`, `fvu`, `l0`, `entries`,
        `never_fired` (latents), `bytes` by table, and `left_out` if the function of that name
        returns anything.
    """
    without = {"buckets": (), "sample": ()}  # these fields take 84 kB of memory for 64 buckets
    records = [
        record.model_copy(update=without) for record in unit_records(store, folder, manifest)
    ]
    buckets = list(bucket_records(store, folder, manifest))
    rows = sum(record.rows for record in records)
    total = sum(record.squared_total for record in records)
    return {
        "index": f"{store.url}/{folder.prefix.rstrip('/')}",
        "step": manifest.step,
        "units": sum(not record.deleted for record in records),
        "deleted_units": len(manifest.deleted) + sum(record.deleted for record in records),
        "rows": rows,
        "fvu": sum(record.squared_error for record in records) / total if total else None,
        "l0": sum(record.active for record in records) / rows if rows else None,
        "entries": sum(bucket.entries for bucket in buckets),
        "never_fired": sum(bucket.never_fired for bucket in buckets),
        "bytes": {
            "rows": sum(record.origin.bytes for record in records if record.origin),
            "latents": sum(bucket.latents.bytes for bucket in buckets),
            "examples": sum(bucket.examples.bytes for bucket in buckets),
            "postings": sum(p.stored.bytes for bucket in buckets for p in bucket.postings),
            "pairs": sum(bucket.pairs.bytes for bucket in buckets if bucket.pairs),
        },
        **({"left_out": "; ".join(missing)} if (missing := left_out(manifest)) else {}),
    }


def left_out(manifest: IndexManifest) -> list[str]:
    """List the parts that this index lacks, each with the reason."""
    found = [
        f"{part} (index.{key}: 0)" for key, part in _PARTS.items() if not manifest.settings[key]
    ]
    if manifest.settings["neighbours"] and not manifest.compared:
        found.append(
            "nearest latents (latents of this kind write different sites, so they cannot be "
            "compared)"
        )
    if manifest.settings["output_tokens"] and manifest.head == "":
        found.append("output tokens (no language-model head is available for the site)")
    if not manifest.postings_share:
        found.append("postings (index.postings: none)")
    return found
