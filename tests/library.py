"""Every mask and score of the library: an example of each, and what its operands hold."""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field

import numpy as np
import pytest

from attngen import AttentionSpec, inputs, masks, reference, scores
from attngen.tracing import Mask

# no chunk of 16 or 24 divides these lengths, nor is it the period of a mask
SPEC = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=50,
    kv_len=70,
    qk_dim=16,
    q_offset="bottom_right",
    outputs=("out", "lse"),
)
OFFSETS = {
    "top left": 0,
    "bottom right": "bottom_right",
    "behind": 7,
    "before": -9,
    "run time": "operand",
}
PLAIN = inputs.arrays


@dataclass(frozen=True)
class Example:
    """A mask or a score, and what its operands hold where random values mean little.

    inside: whether positions must be known, to lie within an operand's blocks, say.
    """

    of: object
    operands: dict = field(default_factory=dict)
    inside: bool = False

    def spec(self, **changes):
        how = {"mask": self.of} if isinstance(self.of, Mask) else {"score": (self.of,)}
        return dataclasses.replace(SPEC, **(how | changes))


def preorder(parents):
    """enter and exit of each node of a tree, whose nodes come after their parents."""
    children = [
        [c for c, p in enumerate(parents) if p == n] for n in range(len(parents))
    ]
    enter, leave = [0] * len(parents), [0] * len(parents)
    count = 0

    def visit(node):
        nonlocal count
        enter[node] = count
        count += 1
        for child in children[node]:
            visit(child)
        leave[node] = count

    for root in (n for n, p in enumerate(parents) if p < 0):
        visit(root)
    return np.array(enter, np.int32), np.array(leave, np.int32)


def random_tree(nodes, seed):
    generator = np.random.default_rng(seed)
    return [-1, *(int(generator.integers(0, n)) for n in range(1, nodes))]


def _tree(q_len, kv_len):
    """Cached keys that all see, then a tree of the queries; two batches."""
    cached = kv_len - q_len
    made = {"tree_enter": [], "tree_exit": [], "q_enter": []}
    for seed in (0, 1):
        enter, leave = preorder(random_tree(q_len, seed))
        made["q_enter"].append(enter)
        made["tree_enter"].append(np.concatenate([np.zeros(cached, np.int32), enter]))
        past = np.full(cached, 2**30, np.int32)
        made["tree_exit"].append(np.concatenate([past, leave]))
    return {name: np.stack(x) for name, x in made.items()}


def _ints(*values):
    return np.array(values, np.int32)


_SEGMENTS = {
    "q_segments": np.sort(np.random.default_rng(0).integers(0, 4, (2, 50))).astype(
        "i4"
    ),
    "kv_segments": np.sort(np.random.default_rng(1).integers(0, 5, (2, 70))).astype(
        "i4"
    ),
}
_RESTART = np.concatenate([np.arange(n) for n in (13, 1, 30, 26)]).astype(np.int32)
_PLACES = {"places": np.stack([_RESTART, _RESTART[::-1]])}
_Q_PLACES = {"q_places": np.stack([_RESTART[:50], _RESTART[10:60]])}
_GLOBAL = {"is_global": np.random.default_rng(0).random((2, 70)) < 0.1}
_POSITIVE = np.array([0.7, 1.0, 1.9, 3.0], np.float32)
_TAU = {"tau": np.linspace(0.5, 3, 100, dtype=np.float32).reshape(2, 50)}
_SLOPES = {"slopes": np.array([0.5, 0.25, 0.1, 0.02], np.float32)}
_RATES = {"decay": np.log1p(-(2.0 ** (-1.0 - np.arange(4)))).astype(np.float32)}

MASKS = {
    "causal": Example(masks.causal()),
    "causal positions": Example(masks.causal(positions="places"), _PLACES),
    "sliding_window": Example(masks.sliding_window(9, 4)),
    "sliding_window causal": Example(masks.causal() & masks.sliding_window(20)),
    "sliding_window positions": Example(
        masks.sliding_window(5, 3, positions=("q_places", "places")), _PLACES | _Q_PLACES
    ),
    "dilated_window": Example(masks.dilated_window(5, 3, 4)),
    "dilated_window past": Example(masks.dilated_window(7, 4) & masks.causal()),
    "prefix": Example(masks.prefix(11) | masks.causal()),
    "prefix operand": Example(
        masks.prefix("prefix_lengths") | masks.causal(), {"prefix_lengths": _ints(7, 33)}
    ),
    "streaming_llm": Example(masks.streaming_llm(4, 13)),
    "longformer": Example(masks.longformer(6, 5)),
    "longformer operand": Example(masks.longformer(6, "is_global"), _GLOBAL),
    "strided": Example(masks.strided(7)),
    "fixed": Example(masks.fixed(9, 2)),
    "documents": Example(masks.documents()),
    "documents of both": Example(
        masks.documents(q_ids="q_segments", k_ids="kv_segments"), _SEGMENTS
    ),
    "packed": Example(
        masks.packed(6), {"cu_seqlens": _ints(2, 9, 9, 30, 41, 61, 66)}
    ),
    "packed both": Example(
        masks.packed(4, "cu_seqlens_q", "cu_seqlens_k"),
        {"cu_seqlens_q": _ints(0, 5, 5, 21, 48), "cu_seqlens_k": _ints(1, 9, 20, 33, 69)},
    ),
    "packed of many": Example(
        masks.packed(40, "cu_of_many"),
        {"cu_of_many": np.sort(np.random.default_rng(0).integers(0, 70, 41)).astype("i4")},
    ),
    "packed_causal": Example(
        masks.packed_causal(4),
        {"cu_seqlens_q": _ints(0, 5, 5, 21, 48), "cu_seqlens_k": _ints(1, 9, 20, 33, 69)},
        inside=True,  # else its differences are taken to leave int32
    ),
    "lengths": Example(
        masks.lengths("key_lengths", "query_lengths"),
        {"key_lengths": _ints(61, 3), "query_lengths": _ints(64, 40)},
    ),
    "tree": Example(masks.tree(q_enter="q_enter"), _tree(50, 70)),
    "tree prefix": Example(
        masks.tree("node_enter", "node_exit", "q_enter", prefix="cached"),
        {
            "node_enter": _tree(50, 70)["tree_enter"],
            "node_exit": _tree(50, 70)["tree_exit"] % 2**30,  # 0 of the cached keys
            "q_enter": _tree(50, 70)["q_enter"],
            "cached": _ints(20, 20),
        },
    ),
    "neighborhood": Example(masks.neighborhood(70, 9)),
    "neighborhood 2d": Example(masks.neighborhood((7, 10), (3, 5))),
    "neighborhood 2d dilated": Example(masks.neighborhood((7, 10), 3, (1, 3))),
    "neighborhood 3d": Example(masks.neighborhood((3, 4, 6), 3)),
    "shifted_windows": Example(masks.shifted_windows((7, 10), (4, 5), (2, 3))),
    "shifted_windows 3d": Example(masks.shifted_windows((3, 4, 6), 2, 1)),
    "dense": Example(masks.dense()),
    "dense of some": Example(masks.dense("visible", axes="kb")),
    "block_sparse": Example(masks.block_sparse((5, 5), 15), inside=True),
    "block_sparse of heads": Example(
        masks.block_sparse((5, 10), (14, 7), "blocks_seen", axes="hb"), inside=True
    ),
}  # fmt: skip

SCORES = {
    "softcap": Example(scores.softcap(3.0)),
    "softcap operand": Example(scores.softcap("caps"), {"caps": _POSITIVE}),
    "temperature": Example(scores.temperature(), {"temperature": _POSITIVE}),
    "temperature of queries": Example(scores.temperature("tau", axes="bq"), _TAU),
    "alibi": Example(scores.alibi(), _SLOPES),
    "alibi heads": Example(scores.alibi(heads=4)),
    "alibi positions": Example(
        scores.alibi(positions=("q_places", "places")), _SLOPES | _PLACES | _Q_PLACES
    ),
    "decay": Example(scores.decay(), _RATES),
    "decay 2d": Example(scores.decay(grid=(7, 10)), _RATES),
    "bias": Example(scores.bias(axes="hqk")),
    "bias of some": Example(scores.bias("some_bias", axes="kh", dtype="bfloat16")),
    "relative_table": Example(scores.relative_table(70)),
    "relative_table 2d": Example(scores.relative_table((7, 10))),
    "relative_buckets": Example(scores.relative_buckets()),
    "relative_buckets past": Example(
        scores.relative_buckets("past_bias", 16, 50, False, positions="places"), _PLACES
    ),
}
EXAMPLES = MASKS | SCORES
# Swin's table is of a window: farther pairs read outside of it, and its mask hides them
SWIN = Example(masks.shifted_windows((7, 10), (4, 5), (2, 3))).spec(
    score=(scores.relative_table((7, 10), (4, 5)),)
)


def held(operands):
    """In place of inputs.arrays: as it is, but for these operands."""

    def arrays(spec, **how):
        made = PLAIN(spec, **how)
        for name in made.keys() & operands.keys():
            assert operands[name].shape == spec.shape_of(name)
            made[name] = operands[name].astype(made[name].dtype)
        return made

    return arrays


def offsets_of(name, *, lengths=False):
    """The kinds of offset that an example takes.

    Args:
        lengths: whether lengths come at run time: the last query then stands anywhere.
    """
    return _offsets(EXAMPLES[name], lengths=lengths)


def _offsets(*examples, lengths=False):
    open_ = {"before", "run time", *(["bottom right"] * lengths)}
    inside = any(e.inside for e in examples)
    return [o for o in OFFSETS if not (inside and o in open_)]


@functools.cache
def rotating():
    """One kind of offset for each example, each kind as often."""
    found = {}
    for i, name in enumerate(EXAMPLES):
        kinds = offsets_of(name)
        found[name] = kinds[i % len(kinds)]
    return found


def matrix(of, q_len, kv_len, operands=None, *, b=0, h=0, q_offset=0, s=None):
    """What a mask, or score, is worth for each pair, as the reference evaluates it."""
    q, k = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    at = {"b": b, "h": h, "q_index": q, "k_index": k, "q": q + q_offset, "k": k, "s": s}
    arrays = {name: np.asarray(x) for name, x in (operands or {}).items()}
    values = reference.evaluate(of.expr, at, arrays, np.float64)
    return np.broadcast_to(values, (q_len, kv_len))


@contextlib.contextmanager
def holding(operands):
    """Operands hold these in whatever is validated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "arrays", held(operands))
        yield


def slowly(cases, usual):
    """The cases, all but the usual ones slow."""

    def marked(case):
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=[] if case in usual else pytest.mark.slow)

    return [marked(case) for case in cases]


def _pairs():
    """Masks joined by each operation, and a score in most."""
    names, others, found = list(MASKS), list(SCORES), {}
    for i, name in enumerate(names):
        for step in (5, 12):
            other = names[(i + step) % len(names)]
            n = len(found)
            one, two = MASKS[name], MASKS[other]
            joined = (
                one.of & two.of,
                one.of | two.of,
                one.of & ~two.of,
                ~one.of | two.of,
                ~(one.of | two.of),
            )[n % 5]
            said = ("{} & {}", "{} | {}", "{} & ~{}", "~{} | {}", "~({} | {})")[n % 5]
            score = SCORES[others[n % len(others)]]
            label = said.format(name, other)
            if n % 4:
                label += f", {others[n % len(others)]}"
            kinds = _offsets(one, two)
            found[label] = (
                dataclasses.replace(
                    SPEC,
                    mask=joined,
                    score=(score.of,) if n % 4 else (),
                    q_offset=OFFSETS[kinds[n % len(kinds)]],
                    sink=n % 7 == 0,
                    kv_lengths=n % 6 == 5,
                ),
                one.operands | two.operands | (score.operands if n % 4 else {}),
            )
    return found


PAIRS = _pairs()
FEW = list(PAIRS)[3::8]  # of the default tests
