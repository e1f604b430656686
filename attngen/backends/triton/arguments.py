"""What attention(), its kernels and their launches take, as text."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from attngen import storage, targets
from attngen.backends.triton import stored
from attngen.backends.triton.combining import combining
from attngen.backends.triton.limits import is_exact
from attngen.backends.triton.slope_code import SIZES
from attngen.plans import Plan
from attngen.spec import AttentionSpec


def kept(spec: AttentionSpec) -> list[str]:
    """What the forward pass keeps of each row, beside its outputs.

    norm: log2 of the sum of its weights, a sink's with them; mass: what weights then add up
    to, which is 1 but for the rounding of norm: float32 shows it. lse_mass: the same of lse,
    where a sink parts the two.
    """
    if spec.derivatives != "vjp":
        return []
    if spec.dtype != "float32":
        return ["norm"]
    return ["norm", "mass", *(["lse_mass"] if is_beside(spec) else [])]


def is_beside(spec: AttentionSpec) -> bool:
    """Whether lse and out have other weights: a sink's are out's alone."""
    return spec.sink and {"out", "lse"} <= set(spec.outputs)


def unpacked(spec: AttentionSpec) -> dict[str, str]:
    """How attention()'s arguments lie, and what the launcher makes of their shapes."""
    tokens_first = spec.layout == "bthd"
    packed = spec.storage == "packed"
    layout = "t, h, d" if tokens_first else "h, t, d"
    given = "T, H, _" if tokens_first else "H, T, _"
    keys = "S, G, _" if tokens_first else "G, S, _"
    if spec.storage == "paged":
        keys = "_, G, _" if tokens_first else "G, _, _"
    return {
        "layout": f"[{layout}]" if packed else f"[b, {layout}]",
        "given_q": given if packed else f"B, {given}",
        "given_k": keys
        if packed
        else f"{'P' if spec.storage == 'paged' else '_'}, {keys}",
        "keys_of_table": "KV_LEN.value"
        if is_exact(spec)
        else "block_table.shape[1] * PAGE_SIZE.value",
        "unpack_q": f"B, {given}",
        "unpack_tokens": f"_, {given}" if packed else f"B, {given}",
        "unpack_k": f"_, {keys}",
    }


def axes_of(spec: AttentionSpec) -> tuple[str, ...]:
    """Of q, k and v, as their strides are named."""
    return ("b", "t", "h", "d") if spec.layout == "bthd" else ("b", "h", "t", "d")


def arguments(
    plan: Plan, out: bool, lse: bool, runtime: list[str], *, listed: bool
) -> dict[str, Any]:
    """Of attention(), of the kernel, and of its launch."""
    spec, gpu = plan.spec, targets.get(plan.target).gpu
    operands = [o.name for o in spec.operands]
    axes = axes_of(spec)
    parts = combining(plan, axes)
    read = [o for o in operands if not (parts and o in parts["operands"])]
    tensors = ["q", "k", *(["v"] if out else [])] + ["out"] * (out and not parts)
    described = plan.option("loads") == "descriptors"
    blocks = [x for x in tensors if described and x in ("k", "v")]
    pointed = [x for x in tensors if x not in blocks]
    dims = {"q": spec.qk_dim, "k": spec.qk_dim, "v": spec.v_dim, "out": spec.v_dim}
    strides = [f"{x}_stride_{a}" for x in pointed for a in axes]
    more = {
        o.name: [f"{o.name}_stride_{i}" for i in range(len(o.axes))]
        for o in spec.operands
        if o.name in read
    }
    strides += [name for names in more.values() for name in names]
    rows = ["tiles"] if listed else []
    strides += [f"{x}_stride_{i}" for x in rows for i in range(3)]
    made = [n for n, _ in parts["scratch"]] if parts else ["lse"] * lse
    pointers = [*tensors, *made, *kept(spec), *read, *rows]
    sizes = sizes_of(spec)
    every = dict.fromkeys([*sizes, *strides, *runtime])
    runtime = [s for s in every if not s.endswith("_stride_d")]
    shape, kv_shape = _given(spec)
    kv_dtype = torch_dtype(spec.dtype_of("k"))
    checks = [
        ("q", shape.format(spec.qk_dim), torch_dtype(spec.dtype)),
        ("k", kv_shape.format(spec.qk_dim), kv_dtype),
        ("v", kv_shape.format(spec.v_dim), kv_dtype),
    ]
    shapes = _own_shapes(spec)
    checks += [
        (
            o.name,
            (o in spec.own_operands and shapes.get(o.name)) or shape_text(o.axes),
            torch_dtype(o.dtype),
        )
        for o in spec.operands
    ]
    shown = [(n, _shown(spec, n, s), t.removeprefix("torch.")) for n, s, t in checks]
    if out:
        shown.append(("out", shape.format(spec.v_dim), spec.out_dtype_name))
    if lse:
        of_lse = "(H, T)" if spec.storage == "packed" else "(B, H, T)"
        shown.append(("lse", of_lse, "float32: log of the sum of exp(s)"))
    bits = gpu is not None and stored.reads_bits(spec.dtype_of("k"), gpu)
    passed = [f'_describe("{x}", {x})' if x in blocks else x for x in pointers]
    passed = [
        f"{x}.view(torch.uint8)" if bits and x in ("k", "v") else x for x in passed
    ]
    names = [f"{x}_desc" if x in blocks else f"{x}_ptr" for x in pointers]
    launched = [
        *(f"{x}," for x in passed),
        "T,",
        "S," if spec.storage == "paged" else f"k.shape[{axes.index('t')}],",
        "H,",
        *(["sequences,"] if spec.storage == "packed" else []),
        *(f"*{x}.stride()," for x in (*pointed, *read)),
        *(f"*{x}.stride()[:3]," for x in rows),
    ]
    return {
        "tensors": tensors,
        "operands": operands,
        "named": [f"{n}={n}" for n in operands],
        "arguments": ["q", "k", "v", *operands],
        "checked": _checked(spec),
        "pointed": pointed,
        # dense strides are multiples of a head dim, and the least of them is one
        "large_differ": gpu is not None and gpu.backend == "hip",
        "align": math.gcd(16, *(dims[x] for x in pointed)),
        "block_sizes": ", ".join(
            f'"{x}": {_tokens(spec, plan.k_chunk, x)}' for x in pointed if x != "out"
        ),
        "token_axis": axes.index("t"),
        "given_axis_d": 3 - (spec.storage == "packed"),
        "given_axis": axes.index("t") - (spec.storage == "packed"),
        "parameters": names + sizes + strides,
        "runtime_lines": textwrap.wrap(", ".join(f'"{n}"' for n in runtime) + ",", 84),
        "launch_arguments": launched,
        "checks": checks,
        "shapes": shown,
        "out_shape": _whole(spec).format(spec.v_dim),
        "out_dtype": torch_dtype(spec.out_dtype_name),
    }


def sizes_of(spec: AttentionSpec) -> list[str]:
    """The lengths that kernels take."""
    if spec.storage == "packed":
        return ["q_tokens", "kv_tokens", "heads", "sequences"]
    return ["q_len", "kv_len", "heads"]


def _tokens(spec: AttentionSpec, k_chunk: int, name: str) -> str:
    """Tokens within which a kernel's offsets have 32 bits."""
    if name == "q":
        return "Q_BLOCK.value"
    whole = spec.storage == "paged" and spec.page_size > k_chunk
    return "PAGE_SIZE.value" if whole else "K_BLOCK.value"


def _shown(spec: AttentionSpec, name: str, shape: str) -> str:
    """A shape as people read it: N are the pages of a sequence."""
    if name == "block_table" and spec.storage == "paged":
        return "(B, N)"
    return shape.replace("PAGE_SIZE.value", str(spec.page_size))


def _checked(spec: AttentionSpec) -> list[str]:
    """What the check of values takes."""
    if spec.storage == "packed":
        return ["q", "k", "cu_seqlens_q", "cu_seqlens_k"]
    return ["k", "block_table", *(["kv_lengths"] if spec.kv_lengths else [])]


def _given(spec: AttentionSpec) -> tuple[str, str]:
    """The shapes of q and of k as attention() takes them, without the head dims."""
    bthd = spec.layout == "bthd"
    if spec.storage == "packed":
        return ("(T, H, {})", "(S, G, {})") if bthd else ("(H, T, {})", "(G, S, {})")
    first, keys = ("P", "PAGE_SIZE.value") if spec.storage == "paged" else ("B", "S")
    k = f"{keys}, G" if bthd else f"G, {keys}"
    return _whole(spec), f"({first}, {k}, {{}})"


def _whole(spec: AttentionSpec) -> str:
    """The shape of q as the launcher has it, with a batch, without the head dim."""
    return "(B, T, H, {})" if spec.layout == "bthd" else "(B, H, T, {})"


def _own_shapes(spec: AttentionSpec) -> dict[str, str]:
    """The shapes of operands that say how k and v are stored, in the launcher's names."""
    shapes = {"cu_seqlens_q": "(B + 1,)", "cu_seqlens_k": "(B + 1,)"}
    shapes["block_table"] = "(B, -(-S // PAGE_SIZE.value))"
    if spec.kv_scale == "head":
        return shapes | {"k_scale": "(G,)", "v_scale": "(G,)"}
    block = storage.scale_block(spec)
    if spec.storage == "paged":
        heads = f"(P, G, {spec.page_size // block})"
    else:
        tokens = "S" if block == 1 else f"-(-S // {block})"
        heads = f"(G, {tokens})" if spec.storage == "packed" else f"(B, G, {tokens})"
    return shapes | {"k_scale": heads, "v_scale": heads}


def torch_dtype(dtype: str) -> str:
    return f"torch.{dtype.replace('_e4m3', '_e4m3fn')}"


def shape_text(axes: tuple[Any, ...]) -> str:
    items = [str(SIZES.get(a, a)) for a in axes]
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
