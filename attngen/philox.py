"""Dropout's bits: Philox 4x32-10, a counter-based generator, and what attngen makes of it.

A weight p[b, h, q, k] has a word of 32 bits that depends on nothing but where it stands, and
on the seed: so the same weights are dropped in every backend, whatever the chunks, in the
forward and in the backward pass, and nothing is stored.

    key      the seed's two words: uint32 [2], as `jax.random.key_data(jax.random.key(n))`
    counter  (k // 4, q, h, b): q and k are positions (index + offset), h is the query head
    word     number k % 4 of the four that the counter gives

Positions are taken modulo 2**32, and // and % floor, as everywhere. A weight is dropped where
its word is less than `threshold(dropout)`, and divided by 1 - dropout elsewhere.

From J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011; tests/test_philox.py has the known answers of their library, Random123.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key
ROUNDS = 10
WORD = 2**32


def threshold(dropout: float) -> int:
    """Words below it are of weights that are dropped."""
    return min(round(dropout * WORD), WORD - 1)


def seed_words(seed: int) -> Array:
    """A number below 2**64 as a seed: its high and its low word, as JAX's own keys lie."""
    import numpy as np

    return np.array([seed >> 32, seed % WORD], np.uint32)


def words(key: Any, counter: tuple[Any, Any, Any, Any]) -> tuple[Array, ...]:
    """The four words of Philox 4x32-10 for each counter.

    Args:
        key: two words.
        counter: four integers or integer arrays that broadcast; taken modulo 2**32.

    Returns:
        Four arrays of uint32, of the counters' common shape.
    """
    import numpy as np

    low = np.uint64(WORD - 1)
    half = np.uint64(32)
    given = [np.asarray(c, np.int64).astype(np.uint64) & low for c in counter]
    c0, c1, c2, c3 = np.broadcast_arrays(*given)
    keys = [int(k) for k in key]
    for _ in range(ROUNDS):
        x, y = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c2 = (
            (y >> half) ^ c1 ^ np.uint64(keys[0]),
            (x >> half) ^ c3 ^ np.uint64(keys[1]),
        )
        c1, c3 = y & low, x & low
        keys = [(k + w) % WORD for k, w in zip(keys, WEYL, strict=True)]
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def kept(dropout: float, seed: Any, b: int, h: int, q: Array, k: Array) -> Array:
    """Whether a weight is kept, for some queries and keys of one head.

    Args:
        q, k: positions, [queries] and [keys].

    Returns:
        bool [queries, keys].
    """
    import numpy as np

    groups, group = np.unique(k // 4, return_inverse=True)
    made = words(seed, (groups, q[:, None], h, b))
    word = np.stack(made, -1)[:, group, k % 4]
    return np.asarray(word >= threshold(dropout))
