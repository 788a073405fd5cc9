"""Sections for the store, the model, the corpus and the activation set."""

import os
import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from dist_sae.config.base import Section, StoreUrl

SITE_NAMES = ("resid_pre", "resid_post", "mlp_in", "mlp_inner", "mlp_out", "attn_out", "attn_z")
SYNTHETIC_SITE = "synthetic"
_OTHER = "@other"
"""Suffix of the names of sites in `model.other`."""


_LAYERS = r"(?:transformer\.|model\.)*(?:layers|h|blocks)\.(?P<layer>\d+)"
_SAME_ROWS = {  # TransformerLens hooks and module names with the same activations as a site
    r"blocks\.(?P<layer>\d+)\.hook_resid_pre": "resid_pre",
    r"blocks\.(?P<layer>\d+)\.hook_resid_post": "resid_post",
    r"blocks\.(?P<layer>\d+)\.hook_mlp_out": "mlp_out",
    r"blocks\.(?P<layer>\d+)\.hook_attn_out": "attn_out",
    r"blocks\.(?P<layer>\d+)\.mlp\.hook_post": "mlp_inner",
    r"blocks\.(?P<layer>\d+)\.attn\.hook_z": "attn_z",
    _LAYERS: "resid_post",
    rf"{_LAYERS}\.mlp": "mlp_out",
    rf"{_LAYERS}\.(self_attn|attn|attention)": "attn_out",
}
_BEFORE_NORM = {"mlp_out", "attn_out"}
_NORMALIZED = r"blocks\.(?P<layer>\d+)\.(?:ln2\.hook_normalized|hook_mlp_in)"


def _check_site(site: str) -> str:
    shape = rf"({'|'.join(SITE_NAMES)})\.\d+({_OTHER})?"
    if site == SYNTHETIC_SITE or re.fullmatch(shape, site, re.ASCII):
        return site
    for shape, name in _SAME_ROWS.items():
        if there := re.fullmatch(shape, site):
            norm = name in _BEFORE_NORM
            raise ValueError(
                f"{site} is called {name}.{there['layer']} here"
                + (", taken before the norm that follows it (in Gemma 2 and 3)" * norm)
            )
    if there := re.fullmatch(_NORMALIZED, site):
        raise ValueError(
            f"{site} is not a site: use mlp_in.{there['layer']}, the MLP's input, which is the "
            f"norm's output with its weights"
        )
    raise ValueError(
        f"{site!r} is not a site: use NAME.LAYER with NAME one of {', '.join(SITE_NAMES)}, "
        f"for example resid_post.7"
    )


Site = Annotated[str, AfterValidator(_check_site)]


def layer_of(site: str) -> int:
    """Return the layer number in the name of a language model's site."""
    return int(site.rpartition(".")[2])


def _check_endpoint(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} has no scheme: write http://host:port or https://host")
    return url


def _check_corpus_file(name: str) -> str:
    scheme, separator, rest = name.partition("://")
    bucket, _, key = rest.partition("/")
    if separator and not (scheme == "s3" and bucket and key):
        raise ValueError(f"{name} is not a file: use a path, a pattern or s3://bucket/key")
    return name


def _check_model_path(path: str) -> str:
    scheme, separator, rest = path.partition("://")
    bucket, _, folder = rest.partition("/")
    if separator and not (scheme == "s3" and bucket and folder.strip("/")):
        raise ValueError(
            f"{path} is not a model: use a name on the model hub, a folder or s3://bucket/folder"
        )
    return path


ModelPath = Annotated[str, AfterValidator(_check_model_path)]


def _check_revision(path: str, revision: str | None) -> None:
    if revision is not None and path.startswith("s3://"):
        raise ValueError(f"revision: {revision}: a folder in a store has no revision; remove it")


class S3Config(Section):
    """Connection to S3 or an S3-compatible store. Credentials come from the usual AWS chain."""

    endpoint_url: Annotated[str, AfterValidator(_check_endpoint)] | None = None
    """URL of the endpoint if the store is not AWS, for example http://127.0.0.1:8333."""
    region: str | None = None
    """Region. null: the AWS chain's, or else us-east-1."""
    path_style: bool = True
    """Address buckets as endpoint/bucket. Most S3-compatible servers need this."""
    ca_bundle: str | None = None
    """File with the certificates to trust. null: the AWS chain's."""
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """Server-side encryption of new objects. null: the bucket's setting."""
    kms_key_id: str | None = None
    """Key for the aws:kms encryptions. null: the bucket's key."""
    deadline_seconds: PositiveFloat = 300.0
    """Seconds for which a request is retried while the endpoint is unavailable."""


class StoreConfig(Section):
    """Locations of the activation set and of runs."""

    activations: StoreUrl
    """Location of the activation set. Any number of training runs may read it."""
    runs: StoreUrl
    """Location of all runs. This run's folder is <runs>/<name>."""
    s3: S3Config = S3Config()
    max_ahead_units: PositiveInt | None = None
    """Number of units by which producers may be ahead of the slowest run. null: no limit."""
    retention: Literal["keep", "delete_consumed"] = "keep"
    """keep: keep all shards. delete_consumed: delete a training shard once no run's last checkpoint
    needs it."""
    consumer_expiry_hours: PositiveFloat = 72.0
    """Hours without a sign of life after which a run counts as abandoned. Producers no longer wait
    for it, and shards that only it needs may be deleted."""


class OtherModel(Section):
    """A second language model to compare with the first."""

    path: ModelPath
    """Name on the model hub, a local folder, or a folder in a store (s3://bucket/folder)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> Self:
        _check_revision(self.path, self.revision)
        return self


class HuggingFaceModel(Section):
    """A `transformers` model of any decoder architecture, or an encoder."""

    kind: Literal["huggingface"] = "huggingface"
    path: ModelPath
    """Name on the model hub, a local folder, or a folder in a store (s3://bucket/folder). A folder
    needs config.json, a tokenizer and safetensors. A folder in a store is downloaded once into
    HF_HOME (see `cluster.cache`)."""
    revision: str | None = None
    """Commit, tag or branch on the hub. Use a commit to make the plan reproducible."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the forward pass."""
    batch_tokens: PositiveInt = 4096
    """Tokens in one forward pass, including padding."""
    tensor_parallel: PositiveInt = 1
    """Number of ranks that share one copy of the model. Each producer consists of this many
    processes, and so does `evaluate` in a local run."""
    other: OtherModel | None = Field(None, exclude_if=lambda of: of is None)
    """A second model that is run on the same text. It must have the same tokens. Its sites are
    named NAME.LAYER@other."""
    _s3: S3Config = PrivateAttr(default_factory=S3Config)

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> Self:
        _check_revision(self.path, self.revision)
        return self

    @property
    def s3(self) -> S3Config:
        """S3 settings for a `path` in a store: the run's own (`store.s3`)."""
        return self._s3

    def bind(self, s3: S3Config) -> None:
        """Use the run's S3 settings to read the model. Called by `Run`."""
        self._s3 = s3

    @property
    def is_stored(self) -> bool:
        """True if the model is a folder in a store."""
        return self.path.startswith("s3://")

    def of_site(self, site: str) -> tuple[Self, str]:
        """Return the model that has a site, and the site's name in that model."""
        name, at, _ = site.partition("@")
        model: dict[str, object] = {"other": None}
        if at and self.other:
            model |= {"path": self.other.path, "revision": self.other.revision}
        return self.model_copy(update=model), name

    @property
    def parts(self) -> tuple[Self, ...]:
        """The model, followed by `other` if it is set, each as a single model."""
        return tuple(self.of_site(end)[0] for end in ("", "@")[: 2 if self.other else 1])

    def by_model(self, sites: Iterable[str]) -> list[tuple[Self, dict[str, str]]]:
        """Group sites by model, with a mapping from each site's name in the model to the site."""
        found: dict[bool, tuple[Self, dict[str, str]]] = {}
        for site in sites:
            model, name = self.of_site(site)
            found.setdefault("@" in site, (model, {}))[1][name] = site
        return list(found.values())

    @property
    def place(self) -> str:
        """`path` with ~ expanded. For a model in a store see `storage.model_files`."""
        return os.path.expanduser(self.path)


class SyntheticModel(Section):
    """Activations of a known dictionary: x = sum_i a_i D_i + b, with Zipf-distributed firing.

    Feature i is active with probability proportional to rank^-zipf, scaled so that `l0` features
    are active on average. Its intensity a_i is 1 + 0.25 N(0, 1), but at least 0.1. The rows of D
    are random unit vectors.
    """

    kind: Literal["synthetic"] = "synthetic"
    d_in: PositiveInt = 64
    """Width of the activations."""
    n_features: PositiveInt = 256
    """Number of features, the rows of D."""
    l0: PositiveFloat = 4.0
    """Mean number of active features in a row."""
    zipf: float = 1.0
    """Zipf exponent of the features' frequencies. 0 makes all frequencies equal."""
    p_max: float = Field(0.5, gt=0, le=1)
    """Highest probability that a feature is active."""
    seed: NonNegativeInt = 0
    """Seed of the features and of the rows on which they are active."""

    @model_validator(mode="after")
    def _l0_is_reachable(self) -> Self:
        if self.l0 > self.p_max * self.n_features:
            raise ValueError(
                f"l0 ({self.l0}) must not exceed "
                f"p_max * n_features ({self.p_max * self.n_features})"
            )
        return self


ModelConfig = Annotated[HuggingFaceModel | SyntheticModel, Field(discriminator="kind")]


class FilesCorpus(Section):
    """Text in files: .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet."""

    kind: Literal["files"] = "files"
    files: Annotated[
        tuple[Annotated[str, AfterValidator(_check_corpus_file)], ...], Field(min_length=1)
    ]
    """Paths, glob patterns, or URLs of single objects (s3://bucket/key)."""
    text_field: str = "text"
    """Key (jsonl) or column (parquet) with the text."""
    txt_documents: Literal["paragraph", "line", "file"] = "paragraph"
    """Unit of a .txt file that becomes one document."""
    max_documents: PositiveInt | None = None
    """Approximate number of documents to use, sampled with activations.seed. null: all."""

    @property
    def label(self) -> str:
        """Name of the corpus in reports and exports."""
        return ", ".join(self.files)


class DatasetCorpus(Section):
    """A data set on the Hugging Face hub (needs the extra `text`)."""

    kind: Literal["dataset"] = "dataset"
    name: str
    """Name on the hub."""
    subset: str | None = None
    """Configuration of the data set. Needed only if it has several."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Commit, tag or branch on the hub. Use a commit to make the plan reproducible."""
    text_field: str = "text"
    """Column with the text."""
    max_documents: PositiveInt | None = None
    """Approximate number of documents to use, sampled with activations.seed. null: all."""

    @property
    def label(self) -> str:
        return self.name


class SyntheticCorpus(Section):
    """Documents of the synthetic model. They have no text, and `document_rows` rows each."""

    kind: Literal["synthetic"] = "synthetic"
    documents: PositiveInt = 1024
    """Number of documents in the corpus."""
    document_rows: PositiveInt = 128
    """Rows per document."""

    @property
    def label(self) -> str:
        return self.kind


CorpusConfig = Annotated[FilesCorpus | DatasetCorpus | SyntheticCorpus, Field(discriminator="kind")]


class ExcludeConfig(Section):
    """Rows that are left out of the activation set. They are counted by reason."""

    special_tokens: bool = True
    """Leave out the tokenizer's special tokens, such as BOS, EOS and padding."""
    first_positions: NonNegativeInt = 1
    """Leave out this many positions at the start of every context, where attention sinks are."""
    over_norm: PositiveFloat | None = 10.0
    """Leave out rows whose norm at any site is above this multiple of the unit's median norm. null:
    leave out none."""


class ActivationsConfig(Section):
    """Content and layout of the activation set. The plan records all of these settings."""

    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    """Sites in the model whose activations are recorded, for example [resid_post.7]."""
    context_tokens: Annotated[int, Field(ge=2)] = 256
    """Maximum number of tokens in a context. Longer documents are cut into several contexts."""
    prepend_bos: bool = True
    """Start every context with the tokenizer's BOS token, if it has one."""
    dtype: Literal["bf16", "fp16", "fp32", "int8"] = "bf16"
    """Data type in storage. int8 takes about half the bytes of bf16, with one scale per row."""
    unit_rows: PositiveInt | None = None
    """Approximate number of rows in a unit, which is the work item of producers. null: chosen from
    the size of the corpus, at most 65,536. The first units are then smaller, so that training can
    start early."""
    block_rows: PositiveInt = 4096
    """Maximum number of rows in a block, which is the smallest piece that a reader fetches. Small
    units are cut into four blocks of at least 256 rows, so that training can start early."""
    streams: PositiveInt | None = None
    """Number of streams. Any number of ranks can read them, but ranks that share a stream each read
    all of it. null: the largest multiple of processes.trainers up to 8 that divides
    train.batch_rows and suits the longest document, but at least processes.trainers."""
    window_units: PositiveInt = 4
    """Number of units of one stream whose rows are shuffled together."""
    heldout_share: float = Field(0.05, ge=0, lt=1)
    """Share of the rows that is held out for evaluation. Whole documents are held out."""
    exclude: ExcludeConfig = ExcludeConfig()
    seed: NonNegativeInt = 0
    """Seed of the assignment of documents to units and of the order of rows."""

    @model_validator(mode="after")
    def _sites_are_distinct(self) -> Self:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites has duplicates: {', '.join(self.sites)}")
        return self
