"""The generator of dropout's bits: known answers, and the emitted function beside NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SPEC

import attngen
from attngen import philox

# Random123's kat_vectors: philox 4x32, 10 rounds: counter, key, words
KNOWN = {
    "zeros": (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "digits of pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
DROPOUT = 0.4


@pytest.mark.parametrize("name", KNOWN)
def test_words_are_those_of_random123(name):
    counter, key, want = KNOWN[name]
    assert tuple(int(w) for w in philox.words(key, counter)) == want


def emitted():
    """The namespace of an emitted file with dropout."""
    spec = attngen.AttentionSpec(q_heads=1, q_len=64, qk_dim=8, dropout=DROPOUT)
    space = {}
    exec(attngen.emit(attngen.plan(spec)).text, space)
    return space


def both(seed, b, h, q, k, *, compiled=True):
    """What is kept, by the emitted function and by NumPy's."""
    function = emitted()["_dropout"]
    function = jax.jit(function) if compiled else function
    got = function(jnp.asarray(seed), jnp.int32(b), jnp.int32(h), q[:, None], k)
    return np.asarray(got), philox.kept(DROPOUT, seed, b, h, np.array(q), np.array(k))


SEEDS = [(0, 0), (1, 2), (0xFFFFFFFF, 0x80000000), (123456789, 987654321)]


@pytest.mark.parametrize("start", [0, 1, 2, 3, -7, -1000, 2**30 - 3, 2**31 - 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_emitted_function_is_numpys_bit_for_bit(seed, start):
    q, k = start + jnp.arange(11), 5 - start + jnp.arange(37)
    got, want = both(np.array(seed, np.uint32), 3, 5, q, k)
    assert (got == want).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_so_it_is_where_jax_has_no_mulhi(monkeypatch, compiled):
    monkeypatch.delattr(jax.lax, "mulhi")
    seed = np.array([0xDEADBEEF, 0xCAFEF00D], np.uint32)
    q, k = jnp.arange(64), jnp.arange(64) - 9
    got, want = both(seed, 0xFFFF, 77, q, k, compiled=compiled)
    assert (got == want).all()


def test_a_weight_has_the_word_of_where_it_stands():
    seed, at = np.array([3, 4], np.uint32), np.arange(-20, 30)
    whole = philox.kept(DROPOUT, seed, 1, 2, at, at)
    for q in (0, 17, 49):
        for k in (0, 1, 2, 3, 33):
            word = philox.words(seed, (at[k] // 4, at[q], 2, 1))[at[k] % 4]
            assert whole[q, k] == (word >= round(DROPOUT * 2**32))
    part = philox.kept(DROPOUT, seed, 1, 2, at[5:9], at[13:])
    assert (part == whole[5:9, 13:]).all()


def test_another_seed_batch_or_head_has_other_bits():
    at, given = np.arange(256), (np.array([3, 4], np.uint32), 1, 2)
    seeds = [np.array(x, np.uint32) for x in ((3, 5), (4, 4))]
    others = [(s, 1, 2) for s in seeds] + [(given[0], 2, 2), (given[0], 1, 3)]
    first = philox.kept(0.5, *given, at, at)
    for other in others:
        agree = (philox.kept(0.5, *other, at, at) == first).mean()
        assert abs(agree - 0.5) < 0.01


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked(dropout):
    at = np.arange(1024)
    kept = philox.kept(dropout, np.array([7, 8], np.uint32), 0, 0, at, at)
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert abs(kept.mean() - (1 - dropout)) < 5 * deviation / 1024
    for axis in (0, 1):  # nor are rows or columns alike
        means = kept.mean(axis)
        assert abs(means - (1 - dropout)).max() < 6 * deviation / 32


def test_thresholds_are_words():
    assert philox.threshold(0.5) == 2**31
    assert philox.threshold(1e-12) == 0
    assert philox.threshold(1 - 1e-15) == 2**32 - 1


@pytest.mark.parametrize("n", [0, 7, 2**32 - 1])
def test_a_number_as_a_seed_is_that_of_jax(n):
    key = jax.random.key_data(jax.random.key(n))
    assert (np.asarray(key) == philox.seed_words(n)).all()
    assert philox.seed_words(n).dtype == np.uint32


def test_a_file_without_dropout_has_no_trace_of_it():
    text = attngen.emit(attngen.plan(SPEC)).text
    assert "ropout" not in text.lower()
    assert "seed" not in text
