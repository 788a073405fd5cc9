"""Index outlines: the objects that show an index's progress, without its tables."""

from dist_sae.config import Run
from dist_sae.index.layout import IndexFolder, IndexManifest, index_name
from dist_sae.storage import open_store
from dist_sae.storage.records import seal


def write_outline(run: Run, step: int, encoded: int = 3, merged: int = 2) -> IndexFolder:
    """Write the outline of a partly finished index of 3 units and 2 buckets.

    Args:
        run: Run of the index.
        step: Step of the checkpoint.
        encoded: Number of encoded units.
        merged: Number of merged buckets.
    """
    manifest = IndexManifest(
        name=index_name(run, step),
        run=run.name,
        created_by="w",
        step=step,
        checkpoint="",
        plan="",
        site="synthetic",
        scale=1.0,
        n_latents=32,
        bucket_latents=16,
        units=(0, 1, 4),
        planned_rows=6000,
        settings=run.index.deciding(),
        seed=0,
    )
    folder = IndexFolder(run.name, manifest.name)
    store = open_store(run.store.runs, run.store.s3)
    store.put(folder.manifest, seal(manifest))
    for unit in manifest.units[:encoded]:
        store.put(folder.units.key(unit), b"{}")
    for bucket in range(merged):
        store.put(folder.buckets.key(bucket), b"{}")
    return folder
