"""Section for transcoders. The equations are in `dictionaries/recipes/transcoder.py`."""

from collections.abc import Sequence
from typing import Literal

from dist_sae.config.dictionary import BatchSelectionConfig


class TranscoderConfig(BatchSelectionConfig):
    """Transcoder: reconstructs sites from other sites (Dunefsky et al. 2024, arXiv:2406.11944)."""

    kind: Literal["transcoder"] = "transcoder"
    selection: Literal["row", "batch"] = "row"
    """row: keep the `k` largest codes of each row (TopK). batch: keep the largest codes of the
    global batch, `k` per row on average (BatchTopK). Only batch uses `threshold_decay`."""
    skip: bool = False
    """Add a learned linear map from the read sites to the written sites, so that latents do not
    have to explain the linear part (Paulo et al. 2025, arXiv:2501.18823)."""

    def sites_problem(self, reads: Sequence[str], writes: Sequence[str]) -> None:
        """Return None, since any sites can be read and written."""

    @property
    def has_skip(self) -> bool:
        return self.skip

    @property
    def selects_over_batch(self) -> bool:
        return self.selection == "batch"
