"""The derivatives of scores: against JAX's own, at random points and where branches meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attngen
from attngen import AttentionSpec, masks, scores, slopes
from attngen.printer import ArrayPrinter
from attngen.symbols import exp, log, maximum, minimum, tanh, where

x = attngen.operand("x", axes="h", dtype="float32")
table = attngen.operand("table", axes=("h", 4), dtype="float32")

FUNCTIONS = {
    "softcap": lambda s, b, h, q, k: 20 * tanh(s / 20),
    "alibi": lambda s, b, h, q, k: s + x[h] * (k - q),
    "temperature": lambda s, b, h, q, k: s / x[h],
    "softcap of an operand": lambda s, b, h, q, k: x[h] * tanh(s / x[h]),
    "exp and log": lambda s, b, h, q, k: log(exp(s) + exp(x[h]) * 2) - s * s,
    "abs": lambda s, b, h, q, k: abs(s * x[h]) + abs(x[h]),
    "minimum": lambda s, b, h, q, k: minimum(s, x[h] * s) - maximum(s, 0),
    "where": lambda s, b, h, q, k: where(s > x[h], s * x[h], -s) + where(k > q, x[h], s),
    "integers": lambda s, b, h, q, k: s * (q // 3 - k % 2) - -(x[h] - s),
}  # fmt: skip


def as_function(node, load):
    """An expression as a function of s and of what its reads hold."""
    names = {"s": "s", "h": "h", "q": "q", "k": "k"}
    printer = ArrayPrinter("jnp", names, lambda n: "x", float_dtype="float32")
    text = printer.text(node)
    return lambda s, x: jnp.float32(
        eval(text, {"jnp": jnp}, {"s": s, "x": x, "h": 0, "q": 5, "k": 7})
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "point", [(0.3, 1.7), (-2.0, 0.5), (1.5, 1.5), (0.0, 1.0), (1.0, 0.0)]
)
def test_slopes_are_those_of_jax(name, point):
    score = attngen.score(FUNCTIONS[name])
    f = as_function(score.expr, x)
    own = jax.grad(f, argnums=(0, 1))(*map(jnp.float32, point))
    read = slopes.reads(score)
    for of, want in zip((slopes.SCORE, *read), own, strict=False):
        got = as_function(slopes.slope(score.expr, of), x)(*map(jnp.float32, point))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert len(read) <= 1


def test_two_reads_of_an_operand_are_apart():
    score = attngen.score(lambda s, b, h, q, k: s + table[h, q % 4] * table[h, k % 4])
    first, second = slopes.reads(score)
    assert slopes.slope(score.expr, first) == second


def test_what_has_a_gradient():
    given = {"q_heads": 2, "q_len": 8, "qk_dim": 4}
    limit = attngen.operand("limit", axes="h", dtype="float32")
    ids = attngen.operand("ids", axes="bk", dtype="int32")
    spec = AttentionSpec(
        **given,
        score=(scores.alibi(), attngen.score(lambda s, b, h, q, k: where(s > limit[h], s, 0))),
        mask=attngen.mask(lambda b, h, q, k: ids[b, k] > 0),
        sink=True,
        outputs=("out", "lse"),
        derivatives="vjp",
    )  # fmt: skip
    assert [o.name for o in slopes.trained(spec)] == ["sink", "slopes"]
    assert [o.name for o in slopes.compared(spec)] == ["limit"]
    assert list(slopes.gradients(spec)) == ["dq", "dk", "dv", "d_sink", "d_slopes"]
    assert slopes.cotangents(spec) == {"dout": "out", "dlse": "lse"}
    plain = AttentionSpec(**given, mask=masks.causal())
    assert slopes.gradients(plain) == slopes.cotangents(plain) == {}
