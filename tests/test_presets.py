"""Presets: that each is a spec with a source, and what their sources say of them."""

import runpy

import pytest
from brute import evaluate
from refusals import refused

from attngen import presets, tracing
from attngen.errors import PresetError
from attngen.spec import AttentionSpec

NAMES = (
    "paper-16k", "llama3-8b", "gemma2-9b", "mistral-7b", "gpt-oss-20b",
    "deepseek-v3-mla", "bert-base", "t5-large", "alphafold-pair", "sd15-self",
    "sd15-cross", "decode-llama3",
)  # fmt: skip


def sees(spec, q, k):
    """Whether the query at index q sees the key at index k."""
    at = {"b": 0, "h": 0, "q": q + spec.static_q_offset, "k": k + spec.kv_offset}
    return evaluate(spec.mask.expr, at)


def test_names_are_known_and_in_order():
    assert presets.names() == NAMES


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_spec_with_a_source(name):
    spec, preset = presets.get(name), presets.find(name)
    assert isinstance(spec, AttentionSpec)
    assert spec == presets.get(name)
    assert preset.name == name
    assert presets.source(name) == preset.source
    assert any(place in preset.source for place in ("arXiv", "doi", "config.json"))
    assert 10 < len(preset.summary) < 110
    assert "\n" not in preset.summary


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_read_as_it_was_written(name):
    spec = presets.get(name)
    assert AttentionSpec.from_json(spec.to_json()) == spec
    assert AttentionSpec.from_toml(spec.to_toml()) == spec


@pytest.mark.parametrize("name", presets.names())
def test_no_preset_has_a_budget(name):
    assert presets.get(name).memory_budget is None


@pytest.mark.parametrize(
    ("name", "close"),
    [("llama3_8b", "llama3-8b"), ("Gemma2-9b", "gemma2-9b"), ("bert", "bert-base")],
)
def test_an_unknown_name_is_refused_and_the_closest_proposed(name, close):
    for ask in (presets.get, presets.source, presets.find):
        with refused(PresetError) as caught:
            ask(name)
        assert close in caught.value.hint
        assert all(known in caught.value.needed for known in NAMES)


@pytest.mark.parametrize("name", ["", "zzzzzz", None, 3])
def test_a_name_like_no_other_has_no_proposal(name):
    with refused(PresetError) as caught:
        presets.get(name)
    assert caught.value.hint is None


def test_importing_traces_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("a mask or score was traced")

    monkeypatch.setattr(tracing, "_trace", refuse)
    module = runpy.run_path(presets.__file__)
    assert module["names"]() == NAMES
    with pytest.raises(AssertionError, match="traced"):
        tracing.mask(lambda b, h, q, k: k <= q)


# What the sources say, beyond the figures that presets.py spells.


def test_the_papers_inputs_and_outputs_are_its_10_mb():
    assert presets.get("paper-16k").bytes_of("q", "k", "v", "out") == 10 * 2**20


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("llama3-8b", 32 * 128),
        ("mistral-7b", 32 * 128),
        ("bert-base", 768),
        ("t5-large", 1024),
        ("sd15-self", 320),
        ("sd15-cross", 320),
        ("alphafold-pair", 128),
    ],
)
def test_the_heads_together_are_as_wide_as_the_model(name, width):
    spec = presets.get(name)
    assert spec.q_heads * spec.qk_dim == width


@pytest.mark.parametrize(
    ("name", "window"),
    [("gemma2-9b", 4096), ("mistral-7b", 4096), ("gpt-oss-20b", 128)],
)
def test_a_window_bites_and_holds_its_own_key(name, window):
    spec = presets.get(name)
    last = spec.q_len - 1
    assert sees(spec, last, last)
    assert sees(spec, last, last - window + 1)
    assert not sees(spec, last, last - window)
    assert not sees(spec, last - 1, last)


def test_a_decoding_query_sees_every_key():
    spec = presets.get("decode-llama3")
    assert all(sees(spec, 0, k) for k in (0, 1, spec.kv_len // 2, spec.kv_len - 1))
    assert not sees(spec, 0, spec.kv_len)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("gemma2-9b", 1 / 16),
        ("t5-large", 1.0),
        ("deepseek-v3-mla", 0.1352337788608801),
        ("sd15-self", 0.15811388300841897),
    ],
)
def test_the_scale_is_the_models(name, scale):
    assert presets.get(name).scale_value == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "operand", "shape"),
    [
        ("gpt-oss-20b", "sink", (64,)),
        ("bert-base", "kv_lengths", (8,)),
        ("t5-large", "relative_bias", (16, 32)),
        ("alphafold-pair", "pair_bias", (4, 256, 256)),
    ],
)
def test_an_operand_has_the_models_shape(name, operand, shape):
    spec = presets.get(name)
    assert [o.name for o in spec.operands] == [operand]
    assert spec.shape_of(operand) == shape


def test_alphafolds_bias_has_a_gradient():
    assert presets.get("alphafold-pair").derivatives == "vjp"


def test_mla_has_wider_keys_than_values():
    spec = presets.get("deepseek-v3-mla")
    assert (spec.qk_dim, spec.v_dim) == (192, 128)
