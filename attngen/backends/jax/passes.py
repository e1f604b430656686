"""The backward pass as choices of their own: which there are, which are legal, what they cost.

Under the names that a forward plan's choices have; in a plan they begin with "backward".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from attngen import joint
from attngen.backends.jax import passes_model, passes_tpu, shards
from attngen.backends.jax.candidates import exponentials, products, scalable
from attngen.backends.jax.packed import lowered
from attngen.cost import Cost
from attngen.dtypes import DIGITS
from attngen.lists import skips, unlistable
from attngen.plans import Choice, Option
from attngen.slopes import trained
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

ALGORITHMS = ("by_queries", "by_keys", "two_passes")
CHUNKS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048)
# of accelerators: whole lanes; as many queries as there are where a tile fits the chip
LANES = (8, 32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STORES = {"v2": "narrow", "v3": "narrow", "v5p": "narrow", "v6e": "both"}  # the fastest
WORDS: dict[str, tuple[Option, ...]] = {
    "delta": ("kept", "again", "summed"),
    "scale": ("queries", "scores"),
    "guard": (False, True),
    "store": ("free", "p", "narrow", "both"),
    "slices": ("nd", "dn"),
    "ds": ("once", "twice"),
    "skip": ("bounds", "list"),
    "mass": ("kept", "none"),
}


STORED = ("p", "narrow")


class Passes:
    """See `backends.Backward`."""

    spills = False

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        """For each way of passing over the tiles, the choices worth considering."""
        spec = lowered(spec)
        wide = target.kind == "cpu"
        product = products(spec) if wide else products(spec)[::-1]
        # scores as the forward pass rounds them, where there are none of a user's
        exps: tuple[str, ...] = ("exp", "exp2") if spec.score else ("exp2", "exp")
        exps += tuple(e for e in exponentials(spec) if e not in exps)
        narrow = product[0] != spec.stats_dtype
        plain = exps[0] == "exp" or bool(spec.score)
        exact = not narrow or (plain and math.frexp(spec.scale_value)[0] == 0.5)
        scale = ("queries", "scores") if exact else ("scores", "queries")
        guard = (wide and product[0] != spec.dtype,)
        heads = _few(_divisors(spec.kv_heads // spec.head_shards))
        chunks = CHUNKS if wide else LANES
        axes: dict[str, Sequence[Option]] = {
            "q_chunk": _chunks(spec.q_len, chunks),
            "k_chunk": _chunks(spec.kv_len, chunks),
            "head_chunk": tuple(n * spec.head_shards for n in heads),
            "batch_chunk": tuple(dict.fromkeys((spec.batch_shards, spec.batch))),
            "exp": exps if whole else exps[:1],
            "product_dtype": product if whole else product[:1],
            "guard": (*guard, not guard[0]) if whole and wide else guard,
            "scale": scale if whole else scale[:1],
            "mass": WORDS["mass"] if whole else _mass(spec),
            **skips(spec),
        }
        return {
            kind: axes
            | {"delta": _deltas(spec, kind, whole)}
            | self._forms(spec, target, kind, whole)
            for kind in ALGORITHMS
        }

    def _forms(
        self, spec: AttentionSpec, target: Target, kind: str, whole: bool
    ) -> dict[str, Sequence[Option]]:
        """What of a tile is stored, and how slices lie."""
        if whole:
            return {n: WORDS[n] for n in ("store", "ds", "slices")}
        if target.tpu is None:
            return {"store": ("p",), "ds": ("once",), "slices": ("nd",)}
        store = STORES.get(target.tpu.generation, "p")
        twice = store in STORED and kind != "two_passes" and _twice(spec) is None
        return {
            "store": (store,) if store == "narrow" else (store, "narrow"),
            "ds": ("twice",) if twice else ("once",),
            "slices": ("nd",) if spec.devices > 1 else ("dn",),
        }

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        """The reason why a candidate can't be emitted, or None."""
        spec = lowered(spec)
        limits = {
            "q_chunk": ("q_len", spec.q_len),
            "k_chunk": ("kv_len", spec.kv_len),
            "head_chunk": ("kv_heads", spec.kv_heads),
            "batch_chunk": ("batch", spec.batch),
        }
        for name, (field, limit) in limits.items():
            value = choice[name]
            integer = isinstance(value, int) and not isinstance(value, bool)
            if not integer or not 1 <= int(value) <= limit:
                return f"{name} must be an integer from 1 to {field} = {limit}"
            if name in ("head_chunk", "batch_chunk") and limit % int(value):
                return f"{name} must divide {field} = {limit}"
            each = {"head_chunk": spec.head_shards, "batch_chunk": spec.batch_shards}
            if int(value) % each.get(name, 1):
                return f"{name} must be as much of each of {each[name]} shards"
        words = WORDS | {"exp": exponentials(spec), "product_dtype": products(spec)}
        for name, values in words.items():
            value = choice.get(name, values[0])
            if not any(
                value is v or (value == v and value is not True) for v in values
            ):
                return f"{name} must be " + " or ".join(str(v) for v in values)
        if choice.get("skip") == "list":
            chunks = (spec.q_len, choice["q_chunk"]), (spec.kv_len, choice["k_chunk"])
            if any(int(chunk) == length for length, chunk in chunks):
                return "skip = list is for more than one chunk of queries, and of keys"
            if (reason := unlistable(spec)) is not None:
                return reason
        if _coarse(spec) and choice["delta"] != "summed":
            return f"out in {spec.out_dtype_name} needs delta = summed"
        if choice["ds"] == "twice":
            if choice["algorithm"] == "two_passes" or choice["store"] not in STORED:
                return "ds = twice is for one pass that stores p: store = p or narrow"
            if choice["delta"] == "summed":
                return "ds = twice isn't for delta = summed"
            if (reason := _twice(spec)) is not None:
                return reason
        if choice["slices"] == "dn" and spec.devices > 1:
            return "slices = dn is for arrays on one device"
        if choice["scale"] == "queries" and not scalable(spec, choice):
            return (
                f"only products in {spec.stats_dtype} take queries that are scaled, or a "
                "scale that is a power of two"
            )
        return None

    def kept_bytes(self, spec: AttentionSpec, target: Target) -> int:
        """What the forward pass keeps for this one, as it lies."""
        spec = lowered(spec)
        if target.tpu is not None:
            return passes_tpu.kept_bytes(spec, target.tpu)
        return joint.kept_bytes(spec)

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        """Modelled bytes and time; tiles: of one head, of one pass."""
        spec = lowered(spec)
        mine = shards.local_choice(spec, choice)
        return passes_model.cost(shards.local(spec), target, mine, tiles)

    def flop(self, spec: AttentionSpec, choice: Choice, tiles: Tiles) -> int:
        """Of the products: five for a tile; two more, q·k and dout·v, of a second pass, and of
        the one that sums up delta."""
        spec = lowered(spec)
        again = (choice["algorithm"] == "two_passes") + (choice["delta"] == "summed")
        dims = (3 + again) * spec.qk_dim + (2 + again) * spec.v_dim
        tile = 2 * int(choice["q_chunk"]) * int(choice["k_chunk"]) * dims
        return spec.batch * spec.q_heads * tiles.visited * tile

    def describe(self, choice: Choice) -> str:
        """A candidate in a few words."""
        heads = int(choice["head_chunk"])
        text = (
            f"{choice['algorithm']} · {choice['q_chunk']} queries × "
            f"{choice['k_chunk']} keys · {heads} kv head{'s' if heads != 1 else ''} a step"
        )
        rare = {"again": " · delta again", "summed": " · delta summed"}
        return text + rare.get(str(choice.get("delta")), "")


def _twice(spec: AttentionSpec) -> str | None:
    """The reason why ds can't be formed twice, or None."""
    if _coarse(spec):
        return "ds = twice isn't for delta = summed"
    if any(o.name != "sink" for o in trained(spec)):
        return "ds = twice isn't for gradients of operands, which take it once"
    if "out" not in spec.outputs:
        return "ds = twice needs out among the outputs"
    return None


def _deltas(spec: AttentionSpec, kind: str, whole: bool) -> tuple[Option, ...]:
    """Where delta comes from, for a way of passing over the tiles.

    Where operands' gradients are sums over rows, ds must add up to 0 in each of them: then
    delta is summed of the same p and dp, for which tiles are made once more. By queries each
    row's is made once in any case. So it is where out is rounded by more than q, k and v are.
    """
    if "out" not in spec.outputs:
        return ("again",)
    if _coarse(spec):
        return ("summed",)
    ours = any(o.name != "sink" for o in trained(spec))
    if whole:
        return ("summed", "kept", "again") if ours else ("kept", "again", "summed")
    if ours:
        return ("summed",)
    return ("again",) if kind == "by_queries" else ("kept", "again")


def _coarse(spec: AttentionSpec) -> bool:
    """Whether out, as it is rounded, is too coarse to make delta of."""
    return DIGITS[spec.out_dtype_name] < DIGITS[spec.dtype] and "out" in spec.outputs


def _mass(spec: AttentionSpec) -> tuple[Option, ...]:
    """Whether the sum of exp(s - lse) is kept, which is 1 but for how lse is rounded.

    float32 rounds lse by more than a plain softmax errs; half as wide numbers don't show it.
    """
    return ("kept",) if spec.dtype == spec.stats_dtype else ("none",)


def _chunks(length: int, known: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(n for n in known if n < length)
    return (*found, length) if length <= known[-1] else found


def _few(heads: tuple[int, ...]) -> tuple[int, ...]:
    """One, a few, all."""
    return tuple(dict.fromkeys((*heads[:3], heads[-1])))


def _divisors(heads: int) -> tuple[int, ...]:
    """1, the powers of two that divide, all."""
    return tuple(
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n & (n - 1) == 0 or n == heads)
    )
