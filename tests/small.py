"""One small causal attention, its arrays, and whether an output is the reference's."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from attngen import AttentionSpec, masks, reference

CAUSAL = masks.causal()
SPEC = AttentionSpec(q_heads=2, q_len=48, qk_dim=8, mask=CAUSAL)
FIX = {"q_chunk": 16, "k_chunk": 16}


def spec_of(**changes):
    return dataclasses.replace(SPEC, **changes)


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(spec=SPEC, dtype=np.float32):
    return tuple(
        normal(*spec.shape_of(n), seed=i, dtype=dtype) for i, n in enumerate("qkv")
    )


def close(spec, out, arrays, **operands):
    """Whether an output is the reference's, to float32's accuracy."""
    want = reference.attention(spec, *map(np.asarray, arrays), operands)["out"]
    got = reference.pick(spec, "out", out, np.arange(spec.q_len))
    return np.allclose(got, want, rtol=0, atol=1e-5)
