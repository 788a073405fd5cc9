"""Section of transcoders; the mathematics is in `dictionaries/recipes/transcoder.py`."""

from collections.abc import Sequence
from typing import Literal

from dist_sae.config.dictionary import KeepsThresholdConfig


class TranscoderConfig(KeepsThresholdConfig):
    """Transcoder: reconstructs sites from others (Dunefsky et al. 2024, arXiv:2406.11944)."""

    kind: Literal["transcoder"] = "transcoder"
    selection: Literal["row", "batch"] = "row"
    """row: the `k` largest codes of each row are kept (TopK). batch: the largest codes of the
    global batch, `k` per row on average (BatchTopK); only this uses `threshold_decay`."""
    skip: bool = False
    """Add a linear map from the sites that are read to those that are written, which latents then
    need not explain (Paulo et al. 2025, arXiv:2501.18823)."""

    def sites_problem(self, reads: Sequence[str], writes: Sequence[str]) -> None:
        """None: any sites can be read and written."""

    @property
    def skips(self) -> bool:
        return self.skip

    @property
    def over_batch(self) -> bool:
        return self.selection == "batch"
