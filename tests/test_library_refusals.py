"""The library in files, and what it and the language refuse, from Python and from TOML."""

import numpy as np
import pytest
from commands import TOML
from commands import refused as refused_by_cli
from library import EXAMPLES, MASKS, SCORES
from refusals import refused

import attngen
from attngen import AttentionSpec, masks, scores, spec_files
from attngen.errors import ExpressionError, OperandError, SpecError

# Files.


@pytest.mark.parametrize(("name", "example"), EXAMPLES.items())
def test_it_is_known_by_its_name_in_files(name, example):
    spec = example.spec()
    text = spec.to_json()
    assert '"expr"' not in text  # the library's names, not their trees
    assert spec_files.from_json(text) == spec
    toml = spec_files.to_toml(spec)
    assert spec_files.from_toml(toml) == spec
    assert spec_files.to_toml(spec_files.from_toml(toml)) == toml


def test_every_name_of_the_library_has_an_example():
    said = {name.split()[0] for name in MASKS}
    assert said == set(masks.LIBRARY) == set(masks.__all__) - {"LIBRARY"}
    assert {name.split()[0] for name in SCORES} == set(scores.LIBRARY)


def test_a_traced_search_goes_through_files():
    mask = attngen.mask(lambda b, h, q, k: attngen.searchsorted(OFFSETS, q + 1) > k)
    spec = AttentionSpec(q_heads=1, q_len=8, qk_dim=8, mask=mask)
    assert spec_files.from_json(spec.to_json()) == spec
    assert spec_files.from_toml(spec_files.to_toml(spec)) == spec
    form = mask.form | {"expr": ["gt", ["searchsorted", "offsets", "q", "k"], 1]}
    with refused(ExpressionError, "can't be read"):
        spec_files.read_mask(form)


OFFSETS = attngen.operand("offsets", axes=(4,), dtype="int32")
SEARCHES = {
    "of both": lambda b, h, q, k: attngen.searchsorted(OFFSETS, q - k) == 1,
    "of a float": lambda b, h, q, k: attngen.searchsorted(OFFSETS, q / 2) == 1,
    "of no operand": lambda b, h, q, k: attngen.searchsorted([1, 2], q) == 1,
    "of a read": lambda b, h, q, k: attngen.searchsorted(OFFSETS[1], q) == 1,
    "of an array": lambda b, h, q, k: attngen.searchsorted(OFFSETS, np.arange(3)) == 1,
    "of floats": lambda b, h, q, k: (
        attngen.searchsorted(attngen.operand("x", axes=(4,), dtype="float32"), q) == 1
    ),
    "of lettered axes": lambda b, h, q, k: (
        attngen.searchsorted(attngen.operand("x", axes="k", dtype="int32"), q) == 1
    ),
    "of two axes": lambda b, h, q, k: (
        attngen.searchsorted(attngen.operand("x", axes=("b", 3), dtype="int32"), q) == 1
    ),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_searches_that_can_not_be_are_refused(search):
    with refused(ExpressionError):
        attngen.mask(search)


# Refusals.

REFUSED = {
    "dilation of 0": lambda: masks.dilated_window(3, 0),
    "dilated window of 0": lambda: masks.dilated_window(0, 2),
    "dilated right of a float": lambda: masks.dilated_window(3, 2, 1.0),
    "streaming window of 0": lambda: masks.streaming_llm(4, 0),
    "streaming first of -1": lambda: masks.streaming_llm(-1, 4),
    "longformer radius of -1": lambda: masks.longformer(-1, 4),
    "longformer tokens of a float": lambda: masks.longformer(2, 1.5),
    "stride of 0": lambda: masks.strided(0),
    "stride of a string": lambda: masks.strided("8"),
    "summary beyond the stride": lambda: masks.fixed(4, 5),
    "summary of 0": lambda: masks.fixed(4, 0),
    "ids of the queries alone": lambda: masks.documents(q_ids="q_ids"),
    "ids of all and of both": lambda: masks.documents("ids", q_ids="x", k_ids="y"),
    "no sequences": lambda: masks.packed(0),
    "sequences of a name": lambda: masks.packed("cu_seqlens"),
    "no causal sequences": lambda: masks.packed_causal(0),
    "lengths of neither": lambda: masks.lengths(None),
    "tree's prefix of a float": lambda: masks.tree(prefix=1.5),
    "positions of three": lambda: masks.causal(positions=("x", "y", "z")),
    "positions of a number": lambda: masks.causal(positions=3),
    "even window": lambda: masks.neighborhood(9, 4),
    "window longer than the grid": lambda: masks.neighborhood((9, 3), 5),
    "dilated window longer than the grid": lambda: masks.neighborhood(8, 3, 3),
    "grid of a string": lambda: masks.neighborhood("9", 3),
    "grid of 0": lambda: masks.neighborhood((0, 4), 1),
    "grid of four axes": lambda: masks.neighborhood((2, 2, 2, 2), 1),
    "window of another grid": lambda: masks.neighborhood((5, 5), (3, 3, 3)),
    "shift as long as the window": lambda: masks.shifted_windows((8, 8), 4, 4),
    "negative shift": lambda: masks.shifted_windows((8, 8), 4, -1),
    "windows of 0": lambda: masks.shifted_windows((8, 8), 0),
    "blocks of 0": lambda: masks.block_sparse((0, 4)),
    "three blocks": lambda: masks.block_sparse((4, 4, 4)),
    "block of 0": lambda: masks.block_sparse((4, 4), 0),
    "blocks with other axes": lambda: masks.block_sparse((4, 4), axes="q"),
    "heads of 0": lambda: scores.alibi(heads=0),
    "heads and slopes": lambda: scores.alibi("slopes", heads=4),
    "decay of a grid and of positions": lambda: scores.decay(grid=4, positions="x"),
    "decay of grid 0": lambda: scores.decay(grid=0),
    "table of a larger window": lambda: scores.relative_table((4, 4), 5),
    "table of another grid": lambda: scores.relative_table((4, 4), (2,)),
    "temperature of a length": lambda: scores.temperature(axes=("h", 4)),
    "cap of None": lambda: scores.softcap(None),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_arguments_that_can_not_be_are_refused(make):
    with refused(ExpressionError):
        make()


def test_names_that_collide_are_refused():
    with refused(OperandError, "Two different operands"):
        AttentionSpec(
            q_heads=1, q_len=8, qk_dim=8,
            mask=masks.prefix("lengths_of") & masks.documents("lengths_of"),
        )  # fmt: skip
    with refused(OperandError, "of the spec itself|can't be called"):
        AttentionSpec(
            q_heads=1, q_len=8, qk_dim=8, kv_lengths=True, mask=masks.lengths("kv_lengths")
        )  # fmt: skip


def test_masks_of_positions_ask_where_queries_stand():
    for mask in (masks.strided(4), masks.neighborhood(9, 3), masks.packed(2)):
        with refused(SpecError, "where do the queries stand"):
            AttentionSpec(q_heads=1, q_len=8, kv_len=9, qk_dim=8, mask=mask)


# What the language can't express names the part, and what is possible instead.

IDS = attngen.operand("ids", axes="bk", dtype="int32")
TABLE = attngen.operand("table", axes=("h", 8), dtype="float32")
BEYOND = {
    "control flow": (
        lambda s, b, h, q, k: s if q - k < 4 else 0.0,
        ["q - k < 4", "attngen.where(c, x, y) for if"],
    ),
    "a loop": (
        lambda s, b, h, q, k: sum(range(q // 2)),
        ["q // 2", "operators"],
    ),
    "an index of both": (
        lambda s, b, h, q, k: s + IDS[b, q - k],
        ["q - k, in ids[b, q - k]", "q or k alone", "an axis of its own length"],
    ),
    "a search for each pair": (
        lambda s, b, h, q, k: s + attngen.searchsorted(OFFSETS, q - k),
        ["q - k", "of q or of k, not of both", "compare searchsorted"],
    ),
    "a float for an index": (
        lambda s, b, h, q, k: s + TABLE[h, q / 2],
        ["q / 2.0, a float, in table[h, q / 2.0]", "an integer", "//"],
    ),
    "a score for an index": (
        lambda s, b, h, q, k: s + TABLE[h, s],
        ["s, a float, in table[h, s]", "an integer expression"],
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_the_part_and_what_is_possible_are_named(name):
    function, words = BEYOND[name]
    with refused(ExpressionError) as caught:
        attngen.score(function)
    for word in words:
        assert word in str(caught.value)


OPERANDS = """operands = {
ids = {axes = ["b", "k"], dtype = "int32"},
table = {axes = ["h", 8], dtype = "float32"},
offsets = {axes = [4], dtype = "int32"}}""".replace("\n", " ")
IN_FILES = {
    "control flow": (
        "ExpressionError",
        'mask = {expr = ["if", ["lt", "q", "k"], true, false]}',
        ["['if', ['lt', 'q', 'k'], True, False]", "where"],
    ),
    "an index of both": (
        "ExpressionError",
        'score = {expr = ["load", "ids", "b", ["sub", "q", "k"]], OPERANDS}',
        ["q - k, in ids[b, q - k]", "q or k alone"],
    ),
    "a search for each pair": (
        "ExpressionError",
        'mask = {expr = ["eq", ["searchsorted", "offsets", ["sub", "q", "k"]], 1], OPERANDS}',
        ["q - k", "of q or of k"],
    ),
    "a float for an index": (
        "ExpressionError",
        'score = {expr = ["load", "table", "h", ["div", "q", 2]], OPERANDS}',
        ["table[h, q / 2.0]", "an integer"],
    ),
    "an index outside its table": (
        "OperandError",
        'score = {expr = ["load", "table", "h", ["add", ["mod", "q", 8], 8]], OPERANDS}',
        ["table[h, q % 8 + 8]", "indices from 0 to 7"],
    ),
    "too few blocks": (
        "OperandError",
        "mask = {block_sparse = {blocks = [2, 2], block = 4}}",
        ["block_mask[q // 4, k // 4]", "indices from 0 to 1"],
    ),
    "an even window": (
        "ExpressionError",
        "mask = {neighborhood = {grid = [8, 8], window = 4}}",
        ["window=(4, 4)", "odd windows"],
    ),
    "another argument": (
        "ExpressionError",
        "mask = {strided = {step = 4}}",
        ["step", "strided"],
    ),
}


@pytest.mark.parametrize("name", IN_FILES)
def test_the_command_line_names_them_too(name, tmp_path):
    kind, line, words = IN_FILES[name]
    path = tmp_path / "spec.toml"
    path.write_text(TOML + line.replace("OPERANDS", OPERANDS))
    said = str(refused_by_cli(kind, "plan", path))
    for word in words:
        assert word in said
