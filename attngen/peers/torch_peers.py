"""torch's scaled_dot_product_attention, and flex_attention through torch.compile.

Both take [b, h, t, d], the layout "bhtd".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from attngen import targets
from attngen.peers import Ready
from attngen.peers.expressions import Frame, scored, seen, summed, whole
from attngen.peers.forms import Band, added, band
from attngen.peers.matrices import Matrix, score_bytes
from attngen.reference import Array, numpy_dtype
from attngen.spec import AttentionSpec

MASK_BYTES = 5  # of an element of attn_mask: itself, and what it is made from
BLOCK_BYTES = 20  # of an element while a block mask is made: int64 positions, and more


class TorchLanguage:
    """See `expressions.Language`. Positions are int64, torch's own integers."""

    integer = "int64"

    def cast(self, x: Any, dtype: str) -> Any:
        return x.to(_dtype(dtype))

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        import torch

        return torch.clamp(x, low, high)

    def permuted(self, x: Any, axes: tuple[int, ...]) -> Any:
        return x.permute(axes)

    def call(self, name: str, *args: Any) -> Any:
        import torch

        return getattr(torch, name)(*args)


TORCH = TorchLanguage()


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def tensors(spec: AttentionSpec, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The arrays as torch's, sharing their memory; and torch on this process's cores."""
    import torch

    torch.set_num_threads(targets.get().cores)
    made = {}
    for name, x in arrays.items():
        if spec.dtype_of(name) == "bfloat16":  # which torch doesn't take from NumPy
            made[name] = torch.from_numpy(x.view("int16")).view(torch.bfloat16)
        else:
            made[name] = torch.from_numpy(x)
    return made


def _outputs(spec: AttentionSpec) -> Callable[[Any], tuple[Array, ...]]:
    def outputs(out: Any) -> tuple[Array, ...]:
        if spec.out_dtype_name == "bfloat16":
            out = out.contiguous().view(_dtype("int16"))
            return (out.numpy().view(numpy_dtype("bfloat16")),)
        return (out.numpy(),)

    return outputs


def _refuse(spec: AttentionSpec) -> str | None:
    if "lse" in spec.outputs:
        return "returns no lse on a CPU"
    return "has no sinks" if spec.sink else None


class SDPA:
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "torch SDPA"
    package = "torch"
    layout = "bhtd"

    def refuse(self, spec: AttentionSpec) -> str | None:
        if (reason := _refuse(spec)) is not None:
            return reason
        if added(spec) is None:
            return "its scores can only have a bias added to them"
        return None

    def matrix_bytes(self, spec: AttentionSpec) -> int:
        mask = MASK_BYTES * _attn_mask(spec).elements if _needs_attn_mask(spec) else 0
        # its CPU kernel takes one head dimension; other specs compute all scores
        return mask + (score_bytes(spec) if spec.v_dim != spec.qk_dim else 0)

    def make(self, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        given = tensors(spec, arrays)
        q, k, v = (given[n] for n in "qkv")
        out_dtype = _dtype(spec.out_dtype_name)
        options: dict[str, Any] = {"scale": spec.scale_value}
        said, times = [], {}
        if _is_causal(spec):
            options["is_causal"] = True
            said.append("is_causal")
        elif _needs_attn_mask(spec):
            start = time.perf_counter()
            with torch.no_grad():
                options["attn_mask"] = mask = _make_attn_mask(spec, given)
            times["attn_mask"] = time.perf_counter() - start
            kind = str(mask.dtype).removeprefix("torch.")
            said.append(f"a {kind} attn_mask made outside the call")
        if spec.repeats > 1:
            options["enable_gqa"] = True
            said.append("enable_gqa")

        def call() -> Any:
            with torch.no_grad():
                out = scaled_dot_product_attention(q, k, v, **options)
                return out.to(out_dtype)

        return Ready(
            call, _outputs(spec), ", ".join(said) or "as it is", prepared_s=times
        )


def _is_causal(spec: AttentionSpec) -> bool:
    """Whether the mask is top-left causal on a square, and nothing else is asked for."""
    plain = not (spec.score or spec.kv_lengths or spec.q_lengths)
    return plain and spec.q_len == spec.kv_len and band(spec) == Band(high=0)


def _needs_attn_mask(spec: AttentionSpec) -> bool:
    other = spec.score or spec.kv_lengths or spec.q_lengths or band(spec) != Band()
    return bool(other) and not _is_causal(spec)


def _attn_mask(spec: AttentionSpec) -> Matrix:
    return Matrix.of(spec, *spec.expressions, lengths=True)


def _make_attn_mask(spec: AttentionSpec, operands: Mapping[str, Any]) -> Any:
    """Booleans, or what is added to the scores with −inf for what isn't seen."""
    import torch

    frame = whole(spec, TORCH, operands)
    there = seen(frame)
    bias = summed(frame, added(spec) or ())
    if bias is not None:
        dtype = _dtype(spec.stats_dtype)
        made = torch.as_tensor(bias, dtype=dtype)
        made = made if there is None else torch.where(there, made, -torch.inf)
    else:
        made = torch.as_tensor(there)
    shape = (1,) * (4 - made.dim()) + tuple(made.shape)
    return made.expand(*shape[:2], spec.q_len, spec.kv_len)


class Flex:
    """torch.nn.attention.flex_attention, compiled; its block mask made outside the call."""

    name = "torch flex"
    package = "torch"
    layout = "bhtd"

    def refuse(self, spec: AttentionSpec) -> str | None:
        return _refuse(spec)

    def matrix_bytes(self, spec: AttentionSpec) -> int:
        if not _needs_block_mask(spec):
            return 0
        return BLOCK_BYTES * _block_mask(spec).elements

    def make(self, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        given = tensors(spec, arrays)
        q, k, v = (given[n] for n in "qkv")
        out_dtype = _dtype(spec.out_dtype_name)
        times = {}
        options = flex_options(spec, given)
        if _needs_block_mask(spec):
            start = time.perf_counter()
            options["block_mask"] = flex_block_mask(spec, given, create_block_mask)
            times["block mask"] = time.perf_counter() - start
        torch.compiler.reset()  # what was compiled for another spec counts as a variant
        compiled = torch.compile(flex_attention, dynamic=False)

        def call() -> Any:
            with torch.no_grad():
                return compiled(q, k, v, **options).to(out_dtype)

        start = time.perf_counter()
        call()
        times["compile"] = time.perf_counter() - start
        said = [n for n in options if n != "scale" and options[n] is not False]
        return Ready(
            call, _outputs(spec), ", ".join(["compiled", *said]), prepared_s=times
        )


def flex_options(spec: AttentionSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """flex_attention's keywords for a spec, but for the block mask."""
    options: dict[str, Any] = {"scale": spec.scale_value}
    options["enable_gqa"] = spec.repeats > 1
    if spec.score:
        options["score_mod"] = _score_mod(spec, given)
    return options


def flex_block_mask(
    spec: AttentionSpec, given: Mapping[str, Any], create: Callable[..., Any]
) -> Any:
    """Its block mask of a spec, where q, k, v and the operands are; None without a mask.

    Args:
        create: create_block_mask, compiled or not.
    """
    if not _needs_block_mask(spec):
        return None
    shape = _block_mask(spec)
    return create(
        _mask_mod(spec, given),
        shape.batch if shape.batch > 1 else None,
        shape.heads if shape.heads > 1 else None,
        spec.q_len,
        spec.kv_len,
        device=given["q"].device,
    )


def _needs_block_mask(spec: AttentionSpec) -> bool:
    return bool(spec.kv_lengths or spec.q_lengths) or band(spec) != Band()


def _block_mask(spec: AttentionSpec) -> Matrix:
    mask = () if spec.mask is None else (spec.mask.expr,)
    return Matrix.of(spec, *mask, lengths=True)


def _mask_mod(spec: AttentionSpec, operands: Mapping[str, Any]) -> Callable[..., Any]:
    """The mask as flex asks for it: of single indices, as tensors."""

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        index = {"b": b, "h": h, "q": q, "k": k}
        there = seen(Frame(spec, TORCH, index, operands))
        return (q >= 0) & there  # a tensor, also where the mask is a constant

    return mask_mod


def _score_mod(spec: AttentionSpec, operands: Mapping[str, Any]) -> Callable[..., Any]:
    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        index = {"b": b, "h": h, "q": q, "k": k}
        return scored(Frame(spec, TORCH, index, operands), s)

    return score_mod


SDPA_PEER, FLEX = SDPA(), Flex()
