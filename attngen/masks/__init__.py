"""The mask library, each mask written in the mask language itself (see tracing.mask).

Masks relate positions; combine them with `&`, `|` and `~`:

    windows.py     causal, sliding_window, dilated_window, prefix, streaming_llm, longformer,
                   strided, fixed: of the distance and the place of two tokens
    sequences.py   documents, packed, packed_causal, lengths, tree: which tokens belong together
    grids.py       neighborhood, shifted_windows: of tokens on a line, an image, a volume
    arrays.py      dense, block_sparse: an operand says it pair by pair, or block by block

Lengths that differ between batches are better told by the spec's fields `kv_lengths=True`
and `q_lengths=True`.
"""

from __future__ import annotations

from typing import Any

from attngen.masks.arrays import block_sparse, dense
from attngen.masks.grids import neighborhood, shifted_windows
from attngen.masks.sequences import documents, lengths, packed, packed_causal, tree
from attngen.masks.windows import (
    causal,
    dilated_window,
    fixed,
    longformer,
    prefix,
    sliding_window,
    streaming_llm,
    strided,
)

__all__ = [
    "LIBRARY",
    "block_sparse",
    "causal",
    "dense",
    "dilated_window",
    "documents",
    "fixed",
    "lengths",
    "longformer",
    "neighborhood",
    "packed",
    "packed_causal",
    "prefix",
    "shifted_windows",
    "sliding_window",
    "streaming_llm",
    "strided",
    "tree",
]

_ALL = (
    causal, sliding_window, dilated_window, prefix, streaming_llm, longformer, strided,
    fixed, documents, packed, packed_causal, lengths, tree, neighborhood, shifted_windows,
    dense, block_sparse,
)  # fmt: skip
LIBRARY: dict[str, Any] = {f.__name__: f for f in _ALL}
