"""The section `index`: the content of the latent index and the processes that build it."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from dist_sae.config.base import Section, Shape

IndexName = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9.-]{0,50}[a-z0-9])?$",
        "use at most 52 lower-case letters, digits, '-' and '.', and start and end with a letter "
        "or a digit",
    ),
]


class IndexConfig(Section):
    """Content of the latent index of a trained dictionary, and the processes that build it."""

    name: IndexName | None = None
    """Folder of the index within the run's `index/`. null: the checkpoint's step, so that each
    checkpoint can have its own index."""
    rows: PositiveInt | Literal["all"] = "all"
    """Number of rows of the activation set to index, in whole units, starting with the held-out
    units. all: every unit that has not been deleted."""
    examples: PositiveInt = Field(64, le=4096)
    """Number of largest activations to store per latent, with their places in the text."""
    decile_examples: NonNegativeInt = Field(2, le=100)
    """Number of further examples per latent, drawn at random from each tenth of its activations."""
    postings: Literal["all", "none"] | Annotated[float, Field(gt=0, lt=1)] = "all"
    """Which activations of each latent to store. A number: those on this share of the rows."""
    pairs: NonNegativeInt = 200_000
    """Number of rows on which to count which latents are active together. 0 turns this off."""
    neighbours: NonNegativeInt = Field(16, le=256)
    """Number of nearest latents, by decoder direction, to store per latent. 0 turns this off. At a
    million latents the search takes 20 minutes of one core, for any number above 0."""
    output_tokens: NonNegativeInt = 10
    """Number of tokens to store per latent whose logits its decoder row raises most, and as many
    that it lowers most. 0 turns this off. The cost is n_latents x vocabulary x width."""
    workers: NonNegativeInt = 1
    """Number of workers, each with `latent_shards` processes, in a local run and on a cluster. 0: a
    run builds no index, but `dist-sae index` still does."""
    latent_shards: PositiveInt = 1
    """Number of ranks over which a worker shards the dictionary. Use more than 1 if the dictionary
    does not fit on one device."""

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the content of an index."""
        return self.model_dump(mode="json", exclude={"name", "workers", "latent_shards"})
