"""On-disk format of a unit: a manifest, and one shard (a webdataset tar) per site.

Each sample of a shard is a block of rows:

    <block>.safetensors   acts [rows, d_in], tokens [rows], positions [rows], documents [rows]
    <block>.json          rows and unit

int8 blocks have one of two forms:

    acts, scales [rows]                       row = acts * scale
    levels, scales [rows], columns [2, d_in]  row = levels * scale * columns[1] + columns[0]

The manifest is written last, so a unit exists when its manifest exists. The manifest contains the
byte range of every block, so a reader can fetch and check single blocks.
"""

import hashlib
import io
import json
import logging
import tarfile
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import safetensors.torch
import torch
import webdataset
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import KeyPattern, NumberedKeys
from dist_sae.storage.records import READS, Record, read_record

logger = logging.getLogger(__name__)

_DIGITS = 8  # digits of the unit in a shard's key
MANIFESTS = NumberedKeys("units/")
CLAIMS = NumberedKeys("claims/")
"""Producers' claims, by unit; see `data.work_queue`."""
SHARDS = KeyPattern("shards/", r"(?P<site>[a-z_]+(\.\d+(@other)?)?)/(?P<unit>\d{8})-[0-9a-f]+\.tar")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_INT8_LARGEST = 127
_LEAST_BLOCK_ROWS = 256  # a smaller block is not worth the round trip of a request
ORIGIN_BYTES = 4 + 4 + 8
"""Bytes of a row's token, position and document."""
_INT8_GAIN = 0.5  # columns are standardized if that reduces the noise to less than this share
_STATISTICS_VALUES = 2**15  # 5x faster: torch uses one thread for so few, and they fit the cache
with warnings.catch_warnings():  # torch warns once about read-only memory; we never write to it
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)


class SiteRows(NamedTuple):
    """Activations of one site, with the origin of each row. All sites have the same rows."""

    acts: Float[Tensor, "rows d_in"]
    tokens: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    """Position within the document."""
    documents: Int[Tensor, " rows"]

    def take(self, index: Int[Tensor, " taken"]) -> "SiteRows":
        """Select the rows at `index`, in that order."""
        return SiteRows(*(column.index_select(0, index) for column in self))


class Block(Record):
    """Location of a block's safetensors within the tar."""

    offset: int
    bytes: int
    rows: int
    xxh3: str
    """XXH3-128 checksum. Every read is checked, and a sha256 would take as long as the GET."""


class SiteShard(Record):
    """Shard of one site, with the sums that the normaliser needs."""

    key: str
    bytes: int
    sha256: str
    d_in: int
    blocks: tuple[Block, ...]
    sum: tuple[float, ...]
    """Sum of the rows, of shape [d_in]."""
    sum_squares: float
    """Sum of the squared norms of the rows."""


class UnitManifest(Record):
    """Description of a unit and its shards: content of `units/<unit>.json`."""

    schema_version: Literal[1] = 1
    plan: str
    """Hash of the plan."""
    unit: int
    producer: str
    documents: int
    refused: int = 0
    """Number of `documents` that the tokenizer refused."""
    rows: int
    excluded: dict[str, int]
    """Number of excluded rows, by reason."""
    seconds: dict[str, float]
    """Time that the producer took, by stage."""
    sites: dict[str, SiteShard]


def manifest_key(unit: int) -> str:
    """Return the key of a unit's manifest."""
    return MANIFESTS.key(unit)


def existing_units(store: ObjectStore) -> Iterator[int]:
    """Yield the units that exist."""
    return MANIFESTS.numbers(store)


def rows_of_block(rows: int, most: int) -> int:
    """Return the rows per block: a quarter of the unit's rows (at least 256), at most `most`.

    Small units get small blocks, because the first batch needs the first block of every unit in the
    first windows.
    """
    return min(most, max(_LEAST_BLOCK_ROWS, -(-rows // 4)))


def write_shard(
    store: ObjectStore, unit: int, site: str, rows: SiteRows, block_rows: int, dtype: str
) -> SiteShard:
    """Encode and store one site's rows of a unit, under a key that no other attempt uses.

    Args:
        store: Object store of the activation set.
        site: Site of the rows.
        block_rows: Maximum rows of a block.
        dtype: Key of `DTYPES`.
    """
    size = rows_of_block(len(rows.acts), block_rows)
    blocks = [
        _encode(SiteRows(*(column[start : start + size] for column in rows)), dtype)
        for start in range(0, len(rows.acts), size)
    ]
    tar = _encode_tar(unit, blocks)
    key = f"{SHARDS.folder}{site}/{unit:08d}-{uuid.uuid4().hex[:8]}.tar"
    with ThreadPoolExecutor(1, "put") as putter:  # computes sums and checksums during the upload
        putting = putter.submit(store.put, key, tar)
        total, squares = _statistics(blocks, rows.acts.shape[1])
        located, digest = _locate_blocks(tar, blocks), hashlib.sha256(tar).hexdigest()
        putting.result()
    return SiteShard(
        key=key,
        bytes=len(tar),
        sha256=digest,
        d_in=rows.acts.shape[1],
        blocks=located,
        sum=tuple(total.tolist()),
        sum_squares=squares,
    )


def _statistics(blocks: list[dict[str, Tensor]], d_in: int) -> tuple[Float[Tensor, " d_in"], float]:
    """Sum the rows, and their squared norms, as readers will decode them."""
    total, squares = torch.zeros(d_in, dtype=torch.float64), 0.0
    for block in blocks:
        for piece in torch.split(_decode(block).acts, max(1, _STATISTICS_VALUES // d_in)):
            acts = piece.double()
            total += acts.sum(0)
            squares += float(acts.square().sum())
    return total, squares


def read_manifest(store: ObjectStore, unit: int) -> UnitManifest:
    """Read a unit's manifest.

    Raises:
        ObjectNotFoundError: The unit does not exist yet.
        CorruptObjectError: The manifest is damaged, or names objects other than this unit's shards.
            Otherwise anyone who can write a manifest could choose what retention deletes.
    """
    key = manifest_key(unit)
    manifest = read_record(UnitManifest, store, key)
    for site, shard in manifest.sites.items():
        own = SHARDS.parse(shard.key)
        if own is None or (own["site"], int(own["unit"])) != (site, unit):
            raise CorruptObjectError(
                f"names {shard.key}, which is not a shard of {site} of unit {unit}; delete the "
                f"manifest and produce the unit again",
                url=store.url,
                key=key,
            )
    return manifest


def read_block(store: ObjectStore, shard: SiteShard, number: int) -> SiteRows:
    """Read one block.

    Raises:
        CorruptObjectError: The stored bytes do not match their checksum.
    """
    return decode_block(_fetch(store, shard, number))


def read_acts(store: ObjectStore, shard: SiteShard, number: int) -> Float[Tensor, "rows d_in"]:
    """Read the activations of one block into read-only memory; raise the errors of `read_block`."""
    data = _fetch(store, shard, number)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "scales" in header:
        return decode_block(data).acts
    acts = header["acts"]
    start, stop = acts["data_offsets"]
    view = memoryview(data)[8 + length + start : 8 + length + stop]
    return torch.frombuffer(view, dtype=_STORED[acts["dtype"]]).view(acts["shape"])


def _fetch(store: ObjectStore, shard: SiteShard, number: int) -> bytes:
    """Fetch a block and check it; retry if the checksum does not match."""
    block = shard.blocks[number]
    fault = ""
    for _ in range(READS):
        try:
            data = store.get(shard.key, block.offset, block.offset + block.bytes)
        except ObjectNotFoundError as exc:
            raise CorruptObjectError(
                "is gone; delete the unit's manifest and produce the unit again",
                url=store.url,
                key=shard.key,
            ) from exc
        if xxhash.xxh3_128_hexdigest(data) == block.xxh3:
            return data
        fault = "is truncated" if len(data) < block.bytes else "does not match its checksum"
        logger.warning("%s/%s: block %d %s; reading it again", store.url, shard.key, number, fault)
    raise CorruptObjectError(
        f"block {number} {fault}; delete the unit's manifest and produce the unit again",
        url=store.url,
        key=shard.key,
    )


def decode_block(data: bytes) -> SiteRows:
    """Decode the rows of a block's safetensors."""
    return _decode(safetensors.torch.load(data))


def _encode(rows: SiteRows, dtype: str) -> dict[str, Tensor]:
    """Encode a block's tensors. int8 rounds each row to 255 levels between -max|x| and max|x|.

    In language models a few columns are far from 0 and would use up all levels. So columns are
    first standardized by their mean and deviation over the block. If that gains little, for example
    because of outlier rows, the block is stored without standardization.
    """
    columns = rows._asdict()
    if dtype == "int8":
        acts = rows.acts.float()
        sizes = acts.square().sum(1).clamp_min(torch.finfo().tiny)

        def noise(found: dict[str, Tensor]) -> Tensor:
            return ((_restored(**found) - acts).square().sum(1) / sizes).sum()

        found, other = _int8(acts), _int8(acts, _mean_and_deviation(acts))
        columns |= found
        if noise(other) < _INT8_GAIN * noise(found):
            # under another name, so that an older reader finds no acts instead of wrong ones
            del columns["acts"]
            columns |= {"levels": other.pop("acts"), **other}
    name = "levels" if "levels" in columns else "acts"
    columns[name] = columns[name].to(DTYPES[dtype])
    return {name: column.contiguous() for name, column in columns.items()}


def _int8(
    acts: Float[Tensor, "rows d_in"], columns: Float[Tensor, "2 d_in"] | None = None
) -> dict[str, Tensor]:
    """Compute the levels (as fp32) and the other tensors that `_restored` needs."""
    if columns is not None:
        acts = (acts - columns[0]) / columns[1]
    scales = (acts.abs().amax(dim=1) / _INT8_LARGEST).clamp_min(torch.finfo().tiny)
    found = {"acts": (acts / scales[:, None]).round(), "scales": scales}
    return found if columns is None else {**found, "columns": columns}


def _restored(
    acts: Tensor, scales: Float[Tensor, " rows"], columns: Float[Tensor, "2 d_in"] | None = None
) -> Float[Tensor, "rows d_in"]:
    acts = acts * scales[:, None]
    return acts if columns is None else acts * columns[1] + columns[0]


def _mean_and_deviation(acts: Float[Tensor, "rows d_in"]) -> Float[Tensor, "2 d_in"]:
    """Return each column's mean and deviation, with 1 for a deviation of 0."""
    deviation = acts.std(0, correction=0)
    return torch.stack([acts.mean(0), torch.where(deviation > 0, deviation, 1.0)])


def _decode(tensors: dict[str, Tensor]) -> SiteRows:
    columns = {name: tensors[name] for name in SiteRows._fields if name != "acts"}
    acts = tensors["levels" if "levels" in tensors else "acts"]
    if "scales" in tensors:
        acts = _restored(acts, tensors["scales"], tensors.get("columns"))
    return SiteRows(acts, **columns)


def _encode_tar(unit: int, blocks: list[dict[str, Tensor]]) -> bytes:
    stream = io.BytesIO()
    # with fixed times and owners, the same rows give the same bytes
    with webdataset.TarWriter(stream, encoder=False, mtime=0.0, user="", group="") as writer:
        for number, block in enumerate(blocks):
            writer.write(
                {
                    "__key__": f"{unit:08d}-{number:06d}",
                    "json": f'{{"unit": {unit}, "rows": {len(block["tokens"])}}}'.encode(),
                    "safetensors": safetensors.torch.save(block),
                }
            )
    return stream.getvalue()


def _locate_blocks(tar: bytes, blocks: list[dict[str, Tensor]]) -> tuple[Block, ...]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = [m for m in archive if m.name.endswith(".safetensors")]
    view = memoryview(tar)
    return tuple(
        Block(
            offset=m.offset_data,
            bytes=m.size,
            rows=len(block["tokens"]),
            xxh3=xxhash.xxh3_128_hexdigest(view[m.offset_data : m.offset_data + m.size]),
        )
        for m, block in zip(members, blocks, strict=True)
    )
