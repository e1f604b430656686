"""The gallery: what each file of generated/ is emitted from.

`python tests/gallery.py` (or `make golden`) emits them anew; test_gallery.py holds them
byte for byte and runs them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import attngen
from attngen import AttentionSpec, masks, presets, scores

FOLDER = Path(__file__).parent.parent / "generated"


def causal_alibi() -> AttentionSpec:
    """A score of the user's own beside the library's mask, heads first."""
    return AttentionSpec(
        q_heads=8,
        q_len=1000,
        qk_dim=72,
        layout="bhtd",
        mask=masks.causal(),
        score=(scores.alibi(),),
        outputs=("out", "lse"),
    )


def packed_documents() -> AttentionSpec:
    """Several documents in one row, each causal."""
    return AttentionSpec(
        batch=2,
        q_heads=4,
        q_len=2048,
        qk_dim=64,
        mask=masks.causal() & masks.documents(),
        dtype="bfloat16",
    )


def prefix_lm() -> AttentionSpec:
    """The first 300 tokens see each other, the rest is causal."""
    return AttentionSpec(
        q_heads=8, q_len=2048, qk_dim=64, mask=masks.causal() | masks.prefix(300)
    )


def decode_step() -> AttentionSpec:
    """One function for every step of a decode loop: the position comes at run time."""
    return AttentionSpec(
        batch=4,
        q_heads=16,
        kv_heads=2,
        q_len=1,
        kv_len=4096,
        qk_dim=128,
        mask=masks.causal(),
        q_offset="operand",
        kv_lengths=True,
        outputs=("out", "lse"),
    )


def decode_gqa() -> AttentionSpec:
    """Drafted tokens after a long context, of which the last keys and the first are seen."""
    return dataclasses.replace(
        presets.get("decode-llama3"),
        q_len=3,
        mask=masks.streaming_llm(4, 8192),
        sink=True,
        kv_lengths=True,
        outputs=("out", "lse"),
    )


def checkerboard() -> AttentionSpec:
    """A mask that no library has, written by hand."""
    board = attngen.mask(
        lambda b, h, q, k: ((q // 64 + k // 64 + h) % 2 == 0) | (q == k)
    )
    return AttentionSpec(q_heads=2, q_len=512, qk_dim=96, v_dim=40, mask=board)


def sharded() -> AttentionSpec:
    """Batch and heads over eight devices, under automatic partitioning."""
    return AttentionSpec(
        batch=4,
        q_heads=16,
        kv_heads=8,
        q_len=512,
        qk_dim=64,
        mask=masks.causal(),
        dtype="bfloat16",
        batch_shards=2,
        head_shards=4,
    )


def any_order() -> AttentionSpec:
    """Differentiable to any order, forward and in reverse: grouped heads, a window."""
    return AttentionSpec(
        q_heads=4,
        kv_heads=2,
        q_len=1000,
        qk_dim=64,
        dtype="bfloat16",
        mask=masks.causal() & masks.sliding_window(200),
        score=(scores.softcap(30.0),),
        outputs=("out", "lse"),
        derivatives="any",
    )


def training() -> AttentionSpec:
    """With its gradients: grouped heads, causal, a sink, and lse that has a gradient, too."""
    return AttentionSpec(
        q_heads=8,
        kv_heads=2,
        q_len=2048,
        qk_dim=64,
        mask=masks.causal(),
        sink=True,
        outputs=("out", "lse"),
        derivatives="vjp",
    )


def training_documents() -> AttentionSpec:
    """Gradients of packed documents, with dropout: tiles by list, bits made again."""
    return dataclasses.replace(
        packed_documents(), dropout=0.1, derivatives="vjp", dtype="float32"
    )


def training_alibi() -> AttentionSpec:
    """Gradients of what scores read: a softcap, then slopes that are trained."""
    return dataclasses.replace(
        causal_alibi(),
        outputs=("out",),
        score=(scores.softcap(30.0), scores.alibi()),
        derivatives="vjp",
    )


def packed_training() -> AttentionSpec:
    """Packed sequences, causal in each, their last query at their last key; gradients."""
    return AttentionSpec(
        batch=8,
        q_heads=8,
        kv_heads=2,
        q_len=4096,
        qk_dim=64,
        storage="packed",
        mask=masks.causal(),
        q_offset="bottom_right",
        derivatives="vjp",
    )


def paged_decode() -> AttentionSpec:
    """A step of decode from pages of int8, a scale for each token; four tokens guessed."""
    return AttentionSpec(
        batch=8,
        q_heads=16,
        kv_heads=4,
        q_len=4,
        kv_len=8192,
        qk_dim=128,
        storage="paged",
        kv_dtype="int8",
        kv_scale="token",
        kv_lengths=True,
        mask=masks.causal(),
        q_offset="bottom_right",
    )


def of_preset(name: str, **changes: object):
    return lambda: dataclasses.replace(presets.get(name), **changes)


# file → (spec, budget, fixed choices)
ENTRIES = {
    "paper_16k": (of_preset("paper-16k"), "4MiB", {}),
    "llama3_8b": (
        of_preset("llama3-8b", dtype="float32", q_len=4096, kv_len=4096),
        "16MiB",
        {},
    ),
    "gemma2_9b": (of_preset("gemma2-9b"), "64MiB", {}),
    "mistral_7b": (of_preset("mistral-7b"), "32MiB", {}),
    "gpt_oss_20b": (of_preset("gpt-oss-20b"), "64MiB", {}),
    "bert_base": (of_preset("bert-base"), "32MiB", {}),
    "t5_large": (of_preset("t5-large"), "64MiB", {}),
    "sd15_cross": (of_preset("sd15-cross"), "16MiB", {}),
    "decode_llama3": (of_preset("decode-llama3"), "16MiB", {}),
    "causal_alibi": (causal_alibi, "8MiB", {"q_chunk": 256, "k_chunk": 128}),
    "packed_documents": (packed_documents, "16MiB", {}),
    "prefix_lm": (prefix_lm, "8MiB", {}),
    "decode_step": (decode_step, "8MiB", {}),
    "checkerboard": (checkerboard, None, {"algorithm": "dense"}),
    "any_order": (any_order, "16MiB", {"q_chunk": 128, "k_chunk": 128}),
    "training": (training, "16MiB", {}),
    "training_alibi": (training_alibi, "8MiB", {"backward": "by_keys"}),
    "training_documents": (
        training_documents,
        "16MiB",
        {"skip": "list", "backward_skip": "list", "backward_q_chunk": 256},
    ),
    "training_paper": (of_preset("paper-16k", derivatives="vjp"), "1MiB", {}),
    "alphafold_pair": (of_preset("alphafold-pair", batch=8), "64MiB", {}),
    "packed_training": (
        packed_training,
        "16MiB",
        {"skip": "list", "backward_skip": "list", "q_chunk": 256, "k_chunk": 256},
    ),
    "paged_decode": (paged_decode, "8MiB", {"k_chunk": 512}),
    "sharded": (sharded, "4MiB", {"q_chunk": 256, "head_chunk": 4}),
}


def source(name: str):
    """What is emitted for an entry now."""
    spec, budget, fix = ENTRIES[name]
    made = dataclasses.replace(spec(), memory_budget=budget)
    return attngen.emit(attngen.plan(made, target="cpu", backend="jax", fix=fix))


def packed_training() -> AttentionSpec:
    """Sequences of any lengths behind each other, as they are trained on."""
    return AttentionSpec(
        batch=16, q_heads=32, kv_heads=8, q_len=65536, qk_dim=128, dtype="bfloat16",
        mask=masks.causal(), q_offset=0, storage="packed", derivatives="vjp",
    )  # fmt: skip


def paged_decode() -> AttentionSpec:
    """A step of decoding from a cache in pages, a quarter of whose bytes float32 would take."""
    return AttentionSpec(
        batch=32, q_heads=32, kv_heads=8, q_len=1, kv_len=32768, qk_dim=128, dtype="bfloat16",
        mask=masks.causal(), q_offset="bottom_right", kv_lengths=True, storage="paged",
        page_size=64, kv_dtype="float8_e4m3",
    )  # fmt: skip


def paged_int8() -> AttentionSpec:
    """Four tokens that are to be verified, a window of keys in small pages, a scale for each."""
    return AttentionSpec(
        batch=8, q_heads=32, kv_heads=8, q_len=4, kv_len=16384, qk_dim=128, dtype="float16",
        mask=masks.causal() & masks.sliding_window(4096), q_offset="bottom_right", kv_lengths=True,
        storage="paged", kv_dtype="int8", kv_scale="token", outputs=("out", "lse"),
    )  # fmt: skip


def mla_decode() -> AttentionSpec:
    """DeepSeek's latent attention as it decodes: one kv head, whose keys hold the values."""
    return AttentionSpec(
        batch=16, q_heads=128, kv_heads=1, q_len=1, kv_len=16384, qk_dim=576, v_dim=512,
        scale=192**-0.5, dtype="bfloat16", mask=masks.causal(), q_offset="bottom_right",
        kv_lengths=True, storage="paged", page_size=64,
    )  # fmt: skip


class Entry(NamedTuple):
    """What a Triton file is emitted from; fix: choices that are made for it.

    Where the model's first plan spills on the target, those that `attngen build` comes to.
    """

    spec: Callable[[], AttentionSpec]
    target: str
    fix: Mapping[str, str | int] = MappingProxyType({})


# Triton: file → entry
TRITON = {
    "llama3_8b": Entry(of_preset("llama3-8b"), "h100"),
    "llama3_8b_descriptors": Entry(
        of_preset("llama3-8b"), "h100", {"loads": "descriptors"}
    ),
    "gemma2_9b": Entry(of_preset("gemma2-9b"), "h100"),
    "mistral_7b": Entry(of_preset("mistral-7b"), "b200"),
    "gpt_oss_20b": Entry(of_preset("gpt-oss-20b"), "rtx5090"),
    "t5_large": Entry(of_preset("t5-large", dtype="bfloat16"), "a100"),
    "sd15_cross": Entry(of_preset("sd15-cross", dtype="float16"), "rtx3090"),
    "causal_alibi": Entry(
        causal_alibi,
        "a100",
        {"q_chunk": 16, "k_chunk": 16, "num_warps": 1, "num_stages": 1},
    ),
    "packed_documents": Entry(packed_documents, "mi300x"),
    "prefix_lm": Entry(prefix_lm, "rtx4090"),
    "decode_step": Entry(
        lambda: dataclasses.replace(decode_step(), dtype="float16"), "l4"
    ),
    "decode_gqa": Entry(decode_gqa, "h100"),
    "checkerboard": Entry(
        checkerboard, "mi355x", {"q_chunk": 16, "k_chunk": 32, "num_warps": 1}
    ),
    "training_llama3_8b": Entry(
        of_preset("llama3-8b", derivatives="vjp"),
        "h100",
        {"num_stages": 2, "backward_k_chunk": 16},
    ),
    "training": Entry(
        training,
        "rtx4090",
        {
            "backward_q_chunk": 32,
            "backward_k_chunk": 16,
            "backward_num_warps": 4,
            "backward_num_stages": 2,
        },
    ),
    "training_alibi": Entry(
        lambda: dataclasses.replace(training_alibi(), dtype="bfloat16"),
        "a100",
        {
            "q_chunk": 64,
            "k_chunk": 64,
            "num_warps": 4,
            "num_stages": 2,
            "backward_q_chunk": 64,
            "backward_k_chunk": 16,
            "backward_num_warps": 4,
        },
    ),
    "training_documents": Entry(
        lambda: dataclasses.replace(training_documents(), dtype="bfloat16"),
        "b200",
        {"q_chunk": 64, "k_chunk": 64, "num_warps": 8, "backward_k_chunk": 32},
    ),
    "training_t5": Entry(
        of_preset("t5-large", derivatives="vjp"),
        "mi300x",
        {"backward_q_chunk": 32, "backward_k_chunk": 64, "backward_num_warps": 2},
    ),
    "packed_training": Entry(
        packed_training,
        "h100",
        {
            "num_stages": 1,
            "backward_q_chunk": 128,
            "backward_k_chunk": 16,
            "backward_num_warps": 8,
        },
    ),
    "paged_decode": Entry(paged_decode, "h100"),
    "paged_int8": Entry(paged_int8, "a100"),
    "mla_decode": Entry(mla_decode, "mi300x"),
    "alphafold_pair": Entry(
        of_preset("alphafold-pair", batch=8, dtype="bfloat16"),
        "h200",
        {
            "q_chunk": 64,
            "num_warps": 4,
            "num_stages": 2,
            "backward_q_chunk": 64,
            "backward_num_warps": 8,
        },
    ),
}


def triton_source(name: str):
    """What is emitted for an entry now."""
    spec, target, fix = TRITON[name]
    return attngen.emit(attngen.plan(spec(), target, "triton", fix))


def main() -> None:
    for name in ENTRIES:
        print("wrote", source(name).write(FOLDER / f"{name}.py").name)
    for name in TRITON:
        path = triton_source(name).write(FOLDER / "triton" / f"{name}.py")
        print("wrote", path.relative_to(FOLDER))


if __name__ == "__main__":
    main()
