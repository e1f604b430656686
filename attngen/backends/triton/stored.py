"""Where the keys and values of a tile lie, and what they are multiplied by, as text."""

from __future__ import annotations

from attngen import storage
from attngen.backends.triton.bounds import end_of_keys
from attngen.dtypes import LARGEST
from attngen.gpus import Gpu
from attngen.plans import Plan
from attngen.spec import AttentionSpec

BITS = ("sm80", "sm86")  # Triton has no float8_e4m3 there: its bits are read


class Stored:
    """Of the keys and values of one kernel.

    Args:
        there: whether v is masked in interior tiles, too: see guards.py.
    """

    def __init__(self, plan: Plan, gpu: Gpu, *, there: bool) -> None:
        self.spec, self.there = plan.spec, there
        self.packed = self.spec.storage == "packed"
        self.paged = self.spec.storage == "paged"
        self.whole = self.paged and self.spec.page_size % plan.k_chunk == 0
        self.bits = reads_bits(self.spec.dtype_of("k"), gpu)
        self.converted = self.spec.is_narrow
        self.scaled = self.spec.is_quantised
        self.each = self.scaled and self.spec.kv_scale != "head"  # factors of tokens
        self.zero = "0" if self.spec.kv_dtype == "int8" or self.bits else "0.0"

    @property
    def rows(self) -> bool:
        """Whether each key of a block lies in a page of its own."""
        return self.paged and not self.whole

    @property
    def has_keys(self) -> bool:
        """Whether a tile begins with `key`, the keys of its block."""
        return self.rows or self.each

    def at(self, name: str) -> str:
        """Where a block begins; with `rows` where each token lies, [K_BLOCK]."""
        if not self.paged:
            return f"{name}_head + c * {name}_block"
        if self.whole:
            return f"{name}_head + page * {name}_page + place * {name}_step"
        wide = "[None, :]" if name == "k" else "[:, None]"
        return f"{name}_head + {name}_rows{wide}"

    def tokens_at(self, name: str) -> str:
        """Where the tokens of a block lie, from its first on."""
        if self.rows:
            return ""
        return f"cols{'[None, :]' if name == 'k' else '[:, None]'} * {name}_step + "

    def converted_text(self, name: str) -> str:
        """A tile of k or v in the dtype of q."""
        if self.bits:
            return f"_e4m3({name}, q_ptr.dtype.element_ty)"
        return f"{name}.to(q_ptr.dtype.element_ty)"

    @property
    def before(self) -> list[str]:
        """Statements before the loops."""
        lines = []
        if self.paged:
            lines.append("table = block_table_ptr + b_index * block_table_stride_0")
        if self.scaled and not self.each:
            scale = "tl.load(k_scale_ptr + g_index * k_scale_stride_0)"
            lines.append(f"k_factor = {scale} * SCALE")
        if self.each:
            for name in self._names():
                heads = f"g_index * {name}_stride_{0 if self.packed else 1}"
                batch = f"b_index * {name}_stride_0 + "
                batch = "" if self.packed or self.paged else batch
                lines.append(f"{name}s = {name}_ptr + {batch}{heads}")
        return lines

    def _names(self) -> list[str]:
        return ["k_scale", *(["v_scale"] if "out" in self.spec.outputs else [])]

    def of_tile(self, *, edge: bool) -> list[str]:
        """Statements of a tile: which page it is in, the factors of its keys."""
        lines = []
        mask = f", mask=key < {end_of_keys(self.spec)}, other=0" if edge else ""
        if self.has_keys:
            lines.append("key = c * K_BLOCK + cols")
        if self.whole:
            lines.append("at = table + c * K_BLOCK // PAGE_SIZE * block_table_stride_1")
            lines.append("page = tl.load(at).to(tl.int64)")
            lines.append("place = c * K_BLOCK % PAGE_SIZE")
        if self.rows:
            lines.append("at = table + key // PAGE_SIZE * block_table_stride_1")
            lines.append(f"page = tl.load(at{mask}).to(tl.int64)")
            lines.append("place = key % PAGE_SIZE")
            lines.append("k_rows = page * k_page + place * k_step")
            if "out" in self.spec.outputs:
                lines.append("v_rows = page * v_page + place * v_step")
        if self.each:
            lines.append(f"at = k_scales + {self._of_scale('k')}")
            lines.append(f"k_factor = tl.load(at{mask}) * SCALE")
        return lines

    def _of_scale(self, name: str) -> str:
        """How far into its scales the factor of each key lies."""
        place = "(k_first + key)" if self.packed else "key"
        if self.paged:
            place = "(place + cols)" if self.whole else "place"
        else:
            place += ".to(tl.int64)"
        if self.spec.kv_scale != "token":
            place = f"{place} // {self.spec.kv_scale}"
        last = len(storage.scale_axes(self.spec)) - 1
        text = f"{place} * {name}_scale_stride_{last}"
        return f"page * {name}_scale_stride_0 + {text}" if self.paged else text

    @property
    def k_factor(self) -> str:
        """What scores are multiplied by, in place of SCALE; "" where that is all."""
        if not self.scaled:
            return ""
        return "k_factor[None, :]" if self.each else "k_factor"

    def v_factor(self, *, edge: bool) -> list[str]:
        """Statements that multiply weights by the factors of values."""
        if not self.each:
            return []
        mask = ", mask=there, other=0.0" if edge or self.there else ""
        largest = self.largest
        return [
            f"at = v_scales + {self._of_scale('v')}",
            f"v_factor = tl.load(at{mask})" + (f" * {largest}" if largest else ""),
            "p *= v_factor[None, :]",
        ]

    @property
    def largest(self) -> float | None:
        """What factors of values are multiplied by, and sums divided: float16 has few digits
        of small ones. None: by nothing."""
        return (
            LARGEST[self.spec.dtype_of("k")] if self.spec.dtype == "float16" else None
        )

    def share(self, head: str) -> list[str]:
        """Statements of what sums are multiplied by at the end.

        Args:
            head: the kv head's index.
        """
        if self.each:
            return [f"share *= 1.0 / {self.largest}"] if self.largest else []
        if not self.scaled:
            return []
        return [
            f"v_factor = tl.load(v_scale_ptr + {head} * v_scale_stride_0)",
            "share = tl.where(total == 0, 0.0, share * v_factor)",
        ]


def reads_bits(dtype: str, gpu: Gpu) -> bool:
    """Whether kernels take a tensor as the bits of float8_e4m3."""
    return dtype == "float8_e4m3" and gpu.architecture in BITS


def refusal(spec: AttentionSpec, loads: object) -> str | None:
    """Why keys and values that are stored so can't be loaded by descriptors, or None."""
    if loads != "descriptors":
        return None
    if spec.storage != "dense":
        return (
            f"a tensor descriptor loads dense keys and values, not {spec.storage} ones"
        )
    if spec.is_narrow:
        return "a tensor descriptor loads keys and values in the dtype of q"
    return None
