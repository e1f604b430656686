"""derivatives="any": against JAX's own derivatives of whole squares, in float64."""

import dataclasses
import functools

import dense
import jax
import jax.numpy as jnp
import library
import numpy as np
import pytest
from jax.test_util import check_grads
from library import slowly

import attngen
from attngen import AttentionSpec, inputs, masks, scores, slopes
from attngen.backends.jax.loader import load_function

SMALL = {"q_chunk": 16, "k_chunk": 16, "head_chunk": 1, "batch_chunk": 1}
TILES = (SMALL, {"q_chunk": 24, "k_chunk": 16, "head_chunk": 2, "batch_chunk": 2})


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def function_of(spec, folder, fix=SMALL):
    """The plain function of a spec's file."""
    source = attngen.emit(attngen.plan(spec, fix=fix))
    return load_function(source.write(folder / f"{source.digest}.py"))


class Case:
    """A kernel and whole squares, as losses of the arrays that have gradients."""

    def __init__(self, spec, folder, held=None, fix=SMALL, function=None):
        self.spec = spec
        given = (library.held(held) if held else inputs.arrays)(spec)
        arrays = {name: jnp.asarray(x) for name, x in given.items()}
        self.names = list(slopes.gradients(spec).values())
        self.at = {name: arrays[name] for name in self.names}
        self.known = {n: x for n, x in arrays.items() if n not in self.names}
        generator = np.random.default_rng(1)
        self.weights = [generator.normal(size=spec.shape_of(o)) for o in spec.outputs]
        self.moved = {
            n: jnp.asarray(generator.normal(size=x.shape), x.dtype)
            for n, x in self.at.items()
        }
        own = function or function_of(spec, folder, fix)

        def kernel(q, k, v, operands):
            return own(q, k, v, **operands)

        def square(q, k, v, operands):
            return dense.attention(spec, q, k, v, operands)

        self.losses = self._loss(kernel), self._loss(square)

    def _loss(self, function):
        def loss(at):
            given = at | self.known
            outputs = function(*(given.pop(name) for name in "qkv"), given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            total = 0
            for output, weights in zip(outputs, self.weights, strict=True):
                finite = jnp.where(jnp.isfinite(output), output, 0)
                total += (jnp.sin(finite.astype("float64")) * weights).sum()
            return total

        return loss

    def agree(self, of, tolerance=1e-7):
        """What `of` makes of both losses is the same; sums in float32 round a few times."""
        mine, theirs = (jax.jit(of(loss))(self.at) for loss in self.losses)
        flat, tree = jax.tree.flatten(mine)
        assert tree == jax.tree.structure(theirs)
        for x, y in zip(flat, jax.tree.leaves(theirs), strict=True):
            most = max(tolerance, 8 * float(jnp.finfo(x.dtype).eps))
            x, y = np.asarray(x, float), np.asarray(y, float)
            assert np.isfinite(x).all()
            scale = max(np.abs(np.where(np.isfinite(y), y, 0)).max(), 1e-3)
            assert np.abs(x - y).max() <= most * scale

    def first(self, loss):
        return jax.value_and_grad(loss)

    def forward(self, loss):
        return lambda at: jax.jvp(loss, (at,), (self.moved,))[1]

    def forward_over_reverse(self, loss):
        return lambda at: jax.jvp(jax.grad(loss), (at,), (self.moved,))[1]

    def reverse_over_reverse(self, loss):
        def along(at):
            found = jax.grad(loss)(at)
            return sum((found[n] * self.moved[n]).sum() for n in self.names)

        return jax.grad(along)

    def reverse_over_forward(self, loss):
        return jax.grad(self.forward(loss))


def spec_of(name, **changes):
    """An example of the library, in float64."""
    offset = library.OFFSETS[library.rotating()[name]]
    found = library.EXAMPLES[name].spec(q_offset=offset, derivatives="any")
    return dataclasses.replace(found, dtype="float64", **changes)


FEW = list(library.EXAMPLES)[::16]


@pytest.mark.parametrize("name", FEW)
def test_gradients_are_those_of_whole_squares(name, tmp_path):
    case = Case(spec_of(name), tmp_path, library.EXAMPLES[name].operands)
    case.agree(case.first)


@pytest.mark.slow
@pytest.mark.parametrize("fix", TILES, ids=("small", "several heads"))
@pytest.mark.parametrize("name", library.EXAMPLES)
def test_derivatives_of_the_library(name, fix, tmp_path):
    case = Case(
        spec_of(name, sink=True), tmp_path, library.EXAMPLES[name].operands, fix
    )
    for of in (case.first, case.forward_over_reverse, case.reverse_over_reverse):
        case.agree(of)


@pytest.mark.slow
@pytest.mark.parametrize("name", library.FEW)
def test_derivatives_of_masks_joined(name, tmp_path):
    spec, held = library.PAIRS[name]
    spec = dataclasses.replace(spec, dtype="float64", derivatives="any")
    case = Case(spec, tmp_path, held)
    case.agree(case.first)


EVERYTHING = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=21,
    kv_len=27,
    qk_dim=4,
    v_dim=6,
    dtype="float64",
    q_offset=-5,  # the first queries see no key
    mask=masks.causal() & masks.sliding_window(9),
    score=(scores.softcap(3.0), scores.alibi()),
    sink=True,
    kv_lengths=True,
    q_lengths=True,
    outputs=("lse", "out"),
    derivatives="any",
)
FIX = {"q_chunk": 8, "k_chunk": 4, "head_chunk": 1, "batch_chunk": 1}
MODES = (
    "first",
    "forward",
    "forward_over_reverse",
    "reverse_over_reverse",
    "reverse_over_forward",
)


@pytest.mark.parametrize("mode", slowly(MODES, ["forward_over_reverse"]))
def test_each_mode_of_everything_at_once(mode, tmp_path):
    case = Case(EVERYTHING, tmp_path, fix=FIX)
    case.agree(getattr(case, mode))


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [("out",), ("lse",)])
def test_other_layouts_and_outputs(outputs, tmp_path):
    spec = dataclasses.replace(EVERYTHING, layout="bhtd", outputs=outputs)
    case = Case(spec, tmp_path, fix=FIX | {"head_chunk": 2})
    case.agree(case.forward_over_reverse)


@pytest.mark.slow
def test_jax_checks_two_orders_in_both_modes(tmp_path):
    spec = AttentionSpec(
        q_heads=2, kv_heads=1, q_len=6, qk_dim=3, dtype="float64",
        mask=masks.causal(), outputs=("out", "lse"), derivatives="any",
    )  # fmt: skip
    function = function_of(spec, tmp_path, {"q_chunk": 3, "k_chunk": 2})
    given = [jnp.asarray(x) for x in inputs.arrays(spec).values()]
    check_grads(jax.jit(function), given, order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("order", slowly([1, 2], [1]))
def test_what_no_query_sees_has_no_derivative(order, tmp_path):
    """Gradients are 0 of rows without keys, and of keys that hold NaN."""
    case = Case(EVERYTHING, tmp_path, fix=FIX)
    q_len, kv_len = (np.asarray(case.known[n]) for n in ("q_lengths", "kv_lengths"))
    of = jax.grad if order == 1 else case.reverse_over_reverse
    found = jax.jit(of(case.losses[0]))(case.at)
    for b in range(2):
        assert not np.asarray(found["k"][b, kv_len[b] :]).any()
        assert not np.asarray(found["v"][b, kv_len[b] :]).any()
        assert not np.asarray(found["q"][b, q_len[b] :]).any()
        assert not np.asarray(found["q"][b, :5]).any()
    assert all(np.isfinite(x).all() for x in found.values())


def test_an_infinite_slope_of_a_key_that_is_not_seen(tmp_path):
    """0 times infinity isn't 0: what a mask hides is hidden before the score, too."""
    inverse = attngen.score(lambda s, b, h, q, k: s / (q - k))
    spec = AttentionSpec(
        q_heads=1, q_len=12, qk_dim=4, dtype="float64",
        mask=attngen.mask(lambda b, h, q, k: k < q), score=(inverse,), derivatives="any",
    )  # fmt: skip
    function = function_of(spec, tmp_path, {"q_chunk": 4, "k_chunk": 4})
    given = [jnp.asarray(x) for x in inputs.arrays(spec).values()]

    def loss(*given):
        return jnp.sin(function(*given)).sum()

    assert all(np.isfinite(x).all() for x in jax.grad(loss, (0, 1, 2))(*given))


@pytest.mark.slow
def test_a_vmap_is_a_loop_over_examples(tmp_path):
    spec = dataclasses.replace(EVERYTHING, batch=1, sink=False, score=())
    function = function_of(spec, tmp_path, FIX)
    many = [
        {n: jnp.asarray(x) for n, x in inputs.arrays(spec, seed=seed).items()}
        for seed in (1, 2, 3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)

    def gradient(given):
        def loss(qkv):
            _, out = function(**given | qkv)
            return jnp.sin(out).sum()

        return jax.grad(loss)({name: given[name] for name in "qkv"})

    together = jax.jit(jax.vmap(gradient))(stacked)
    for i, given in enumerate(many):
        for name, found in gradient(given).items():
            np.testing.assert_allclose(together[name][i], found, atol=1e-12)


@pytest.mark.slow
def test_a_shard_map_over_the_batch(tmp_path):
    spec = AttentionSpec(
        q_heads=2, q_len=12, qk_dim=4, dtype="float64",
        mask=masks.causal(), score=(scores.alibi(),), derivatives="any",
    )  # fmt: skip
    function = function_of(
        spec, tmp_path, {"q_chunk": 4, "k_chunk": 4, "head_chunk": 1}
    )
    *qkv, slopes_of_heads = (jnp.asarray(x) for x in inputs.arrays(spec).values())
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.PartitionSpec

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(where("b"),) * 3 + (where(),),
        out_specs=where("b"),
    )
    def sharded(q, k, v, slopes):
        return function(q, k, v, slopes=slopes)

    def plain(q, k, v, slopes):
        return function(q, k, v, slopes=slopes)

    def along(of):
        def gradient(*given):
            return jax.grad(lambda *x: jnp.sin(of(*x)).sum(), (0, 1, 2, 3))(*given)

        given = (*qkv, slopes_of_heads)
        return jax.jit(lambda *x: jax.jvp(gradient, x, x)[1])(*given)

    for x, y in zip(along(sharded), along(plain), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("exp", ["exp", "exp2", "polynomial"])
def test_each_exponential_in_float32(exp, tmp_path):
    spec = dataclasses.replace(EVERYTHING, dtype="float32", score=())
    case = Case(spec, tmp_path, fix=FIX | {"exp": exp})
    case.agree(case.forward_over_reverse, 1e-4)


# Plans.


def test_operands_do_not_decide_what_is_skipped():
    spec = AttentionSpec(
        q_heads=1, q_len=4096, qk_dim=64, mask=masks.documents(), derivatives="any"
    )
    plan = attngen.plan(spec)
    assert plan.tiles.empty == 0
    assert "document" in plan.explain()
    assert "isn't skipped" in plan.explain()
    bounded = attngen.plan(dataclasses.replace(spec, mask=masks.causal()))
    assert not bounded.warnings
