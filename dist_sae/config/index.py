"""The section `index`: content of the latent index, and the processes that make it."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from dist_sae.config.base import Section, Shape

IndexName = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9.-]{0,50}[a-z0-9])?$",
        "use lower-case letters, digits, '-' and '.', at most 52 of them, with a letter or a digit "
        "first and last",
    ),
]


class IndexConfig(Section):
    """Content of the latent index of a trained dictionary, and the processes that make it."""

    name: IndexName | None = None
    """Folder of the index within the run's `index/`; null takes the checkpoint's step, so indexes
    of several checkpoints lie side by side."""
    rows: PositiveInt | Literal["all"] = "all"
    """Rows of the activation set to index, of whole units, held-out ones first; all takes every
    unit that has not been deleted."""
    examples: PositiveInt = Field(64, le=4096)
    """Largest activations of each latent that are kept with their text's place."""
    decile_examples: NonNegativeInt = Field(2, le=100)
    """Further examples of each latent from each tenth of its activations, by chance."""
    postings: Literal["all", "none"] | Annotated[float, Field(gt=0, lt=1)] = "all"
    """Whether all activations of each latent are kept, none, or those of this share of the rows."""
    pairs: NonNegativeInt = 200_000
    """Rows on which latents that are active together are counted; 0 counts none."""
    neighbours: NonNegativeInt = Field(16, le=256)
    """Latents with the nearest decoder directions that are kept for each; 0 leaves them out. The
    search takes 20 minutes of one core at a million latents, whatever their number."""
    output_tokens: NonNegativeInt = 10
    """Tokens whose logits a latent's decoder row raises most, and as many that it lowers most, by
    the model's head; 0 leaves them out (their cost is n_latents x vocabulary x width)."""
    workers: NonNegativeInt = 1
    """Number of workers in a local run and on a cluster, each of `latent_shards` processes; with 0
    a run makes no index, and `dist-sae index` still does."""
    latent_shards: PositiveInt = 1
    """Ranks over which a worker shards the dictionary; more than 1 where a device cannot hold
    it."""

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is in an index."""
        return self.model_dump(mode="json", exclude={"name", "workers", "latent_shards"})
