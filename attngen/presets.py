"""Named real workloads, each an AttentionSpec with the source of its figures.

    spec = attngen.presets.get("llama3-8b")

A preset is one layer's attention of a released model or a paper's experiment, at a
length that its source states. None has a memory budget: that is the user's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from attngen import masks, scores
from attngen.errors import PresetError
from attngen.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Preset:
    """A workload: its spec's maker, what it is in a line, the source of its figures."""

    name: str
    make: Callable[[], AttentionSpec]
    summary: str
    source: str


def names() -> tuple[str, ...]:
    """The presets' names."""
    return tuple(PRESETS)


def get(name: str) -> AttentionSpec:
    """The spec of a preset.

    Raises:
        PresetError: there is none of that name.
    """
    return find(name).make()


def source(name: str) -> str:
    """Where the figures of a preset are from; raises as `get`."""
    return find(name).source


def find(name: str) -> Preset:
    """A preset with all that is known of it; raises as `get`."""
    if name in PRESETS:
        return PRESETS[name]
    import difflib

    close = difflib.get_close_matches(str(name), PRESETS, n=1)
    raise PresetError(
        "There is no preset of that name.",
        got=repr(name),
        needed="one of " + ", ".join(PRESETS),
        hint=f"did you mean {close[0]!r}?" if close else None,
    )


# The makers are called by `get`: importing this module traces no mask.

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper-16k",
            lambda: AttentionSpec(
                q_heads=1,
                q_len=16384,
                qk_dim=64,
                dtype="bfloat16",
                out_dtype="float32",
            ),
            summary="the paper's headline experiment: one head, 16384 tokens",
            source="Rabe & Staats, Self-attention Does Not Need O(n²) Memory, "
            "arXiv 2112.05682, table 2 (inference), n = 2^14: one head, d = 64, "
            "q, k, v bfloat16, output float32: its 10MB of inputs and outputs",
        ),
        Preset(
            "llama3-8b",
            lambda: AttentionSpec(
                q_heads=32,
                kv_heads=8,
                q_len=8192,
                qk_dim=128,
                dtype="bfloat16",
                mask=masks.causal(),
            ),
            summary="Llama 3 8B, prefill of its whole context: grouped heads, causal",
            source="meta-llama/Meta-Llama-3-8B config.json: num_attention_heads 32, "
            "num_key_value_heads 8, hidden_size 4096 (head dim 4096 / 32 = 128), "
            "max_position_embeddings 8192, torch_dtype bfloat16",
        ),
        Preset(
            "gemma2-9b",
            lambda: AttentionSpec(
                q_heads=16,
                kv_heads=8,
                q_len=8192,
                qk_dim=256,
                dtype="bfloat16",
                scale=256**-0.5,
                mask=masks.causal() & masks.sliding_window(4096),
                score=(scores.softcap(50.0),),
            ),
            summary="Gemma 2 9B, its local layers: sliding window and soft cap",
            source="google/gemma-2-9b config.json: num_attention_heads 16, "
            "num_key_value_heads 8, head_dim 256, query_pre_attn_scalar 256, "
            "attn_logit_softcapping 50.0, sliding_window 4096, "
            "max_position_embeddings 8192; every other layer is local "
            "(arXiv 2408.00118, section 2)",
        ),
        Preset(
            "mistral-7b",
            lambda: AttentionSpec(
                q_heads=32,
                kv_heads=8,
                q_len=16384,
                qk_dim=128,
                dtype="bfloat16",
                mask=masks.causal() & masks.sliding_window(4096),
            ),
            summary="Mistral 7B v0.1, prefill of four windows: sliding window",
            source="mistralai/Mistral-7B-v0.1 config.json: num_attention_heads 32, "
            "num_key_value_heads 8, hidden_size 4096 (head dim 128), sliding_window "
            "4096, torch_dtype bfloat16; 16K tokens is the length at which "
            "arXiv 2310.06825, section 2, states the window's gain",
        ),
        Preset(
            "gpt-oss-20b",
            lambda: AttentionSpec(
                q_heads=64,
                kv_heads=8,
                q_len=8192,
                qk_dim=64,
                dtype="bfloat16",
                mask=masks.causal() & masks.sliding_window(128),
                sink=True,
            ),
            summary="gpt-oss 20B, its local layers: a narrow window, a sink per head",
            source="openai/gpt-oss-20b config.json: num_attention_heads 64, "
            "num_key_value_heads 8, head_dim 64, sliding_window 128 in every other "
            "layer; the sinks are sdpa's S in openai/gpt-oss, gpt_oss/torch/model.py. "
            "Of its 131072 positions a prompt of 8192",
        ),
        Preset(
            "deepseek-v3-mla",
            lambda: AttentionSpec(
                q_heads=128,
                q_len=4096,
                qk_dim=128 + 64,
                v_dim=128,
                dtype="bfloat16",
                scale=192**-0.5 * (0.1 * math.log(40) + 1) ** 2,
                mask=masks.causal(),
            ),
            summary="DeepSeek-V3, prefill, MLA expanded to heads: qk_dim isn't v_dim",
            source="deepseek-ai/DeepSeek-V3 config.json: num_attention_heads 128, "
            "qk_nope_head_dim 128 + qk_rope_head_dim 64, v_head_dim 128, rope_scaling "
            "(YaRN) factor 40, mscale_all_dim 1.0, original_max_position_embeddings "
            "4096; the scale is modeling_deepseek.py's softmax_scale, "
            "192^-½ · (0.1 ln 40 + 1)²",
        ),
        Preset(
            "bert-base",
            lambda: AttentionSpec(
                batch=8,
                q_heads=12,
                q_len=512,
                qk_dim=64,
                kv_lengths=True,
            ),
            summary="BERT base, a padded batch: every query sees its sentence's keys",
            source="google-bert/bert-base-uncased config.json: num_attention_heads 12, "
            "hidden_size 768 (head dim 64), max_position_embeddings 512; a batch of 8 "
            "in float32, its attention_mask as lengths",
        ),
        Preset(
            "t5-large",
            lambda: AttentionSpec(
                q_heads=16,
                q_len=512,
                qk_dim=64,
                scale=1.0,
                score=(scores.relative_buckets(),),
            ),
            summary="T5 large, its encoder: bucketed relative bias, no scale",
            source="google-t5/t5-large config.json: num_heads 16, d_kv 64, "
            "relative_attention_num_buckets 32, n_positions 512; max_distance 128: "
            "arXiv 1910.10683, section 2.1; unscaled products: transformers "
            "modeling_t5.py, T5Attention",
        ),
        Preset(
            "alphafold-pair",
            lambda: AttentionSpec(
                batch=256,
                q_heads=4,
                q_len=256,
                qk_dim=32,
                score=(scores.bias("pair_bias", axes="hqk"),),
                derivatives="vjp",
            ),
            summary="AlphaFold 2 training, triangle attention (starting node): a bias "
            "that all rows share, with its gradient",
            source="Jumper et al., doi 10.1038/s41586-021-03819-2, supplementary "
            "algorithm 13 (N_head = 4, c = 32) and methods (crops of 256 residues); "
            "google-deepmind/alphafold alphafold/model/config.py: "
            "triangle_attention_starting_node num_head 4, pair_channel 128, and "
            "modules.py TriangleAttention (nonbatched_bias [h, q, k]). The batch is "
            "the pair matrix's rows; of a full crop, whose pair mask hides nothing",
        ),
        Preset(
            "sd15-self",
            lambda: AttentionSpec(q_heads=8, q_len=64 * 64, qk_dim=40, dtype="float16"),
            summary="Stable Diffusion 1.5 at 512×512, first level: self-attention",
            source="stable-diffusion-v1-5/stable-diffusion-v1-5 unet/config.json: "
            "attention_head_dim 8 (the number of heads), block_out_channels 320 "
            "(head dim 320 / 8 = 40), sample_size 64; the fp16 revision, one image "
            "without guidance",
        ),
        Preset(
            "sd15-cross",
            lambda: AttentionSpec(
                q_heads=8, q_len=64 * 64, kv_len=77, qk_dim=40, dtype="float16"
            ),
            summary="Stable Diffusion 1.5 at 512×512, first level: cross-attention",
            source="stable-diffusion-v1-5/stable-diffusion-v1-5 unet/config.json as "
            "for sd15-self, and text_encoder/config.json: max_position_embeddings 77",
        ),
        Preset(
            "decode-llama3",
            lambda: AttentionSpec(
                q_heads=32,
                kv_heads=8,
                q_len=1,
                kv_len=32768,
                qk_dim=128,
                dtype="bfloat16",
                q_offset="bottom_right",
                mask=masks.causal(),
            ),
            summary="Llama 3.1 8B, one step of decoding after 32768 tokens",
            source="meta-llama/Llama-3.1-8B config.json: num_attention_heads 32, "
            "num_key_value_heads 8, hidden_size 4096 (head dim 128), torch_dtype "
            "bfloat16; of its max_position_embeddings 131072 a quarter (Llama 3 itself "
            "ends at 8192)",
        ),
    )
}
