"""Arguments as text: what is read, and that everything else is refused, never run."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from attngen import shapes
from attngen.errors import ShapeError
from attngen.shapes import Shape


def one(text):
    (found,), named = shapes.read([text])
    assert named == {}
    return found


@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("sizes", [(), (3,), (1, 0, 4096)])
def test_what_a_shape_prints_is_read(dtype, sizes):
    shape = Shape(dtype, sizes)
    assert one(str(shape)) == shape
    assert one(f" {dtype} [ {', '.join(map(str, sizes))} ] ") == shape


@pytest.mark.parametrize(
    ("short", "dtype"),
    {"bf16": "bfloat16", "f32": "float32", "s8": "int8", "i32": "int32", "u64": "uint64",
     "pred": "bool", "c64": "complex64", "f8e5m2": "float8_e5m2"}.items(),
)  # fmt: skip
def test_short_names(short, dtype):
    assert one(f"{short}[2]") == Shape(dtype, (2,))


def test_every_dtype_is_numpys():
    import ml_dtypes
    import numpy as np

    for name in shapes.DTYPES:
        assert np.dtype(getattr(ml_dtypes, name, name)).name == name


def test_arguments_in_order_and_by_name():
    f32 = Shape("float32", (2, 3))
    count = Shape("int32", ())
    given, named = shapes.read(
        ["f32[2,3], n=s32[]", 'tree = {"w": ["f32[2,3]", null]}']
    )
    assert given == [f32]
    assert named == {"n": count, "tree": {"w": [f32, None]}}
    assert shapes.read([]) == ([], {})
    assert shapes.read(['"f32[2,3]", []']) == ([f32, []], {})


BAD = {
    "nothing": "",
    "a comma too many": "f32[2],",
    "no comma": "f32[2] f32[2]",
    "no sizes": "f32",
    "an open bracket": "f32[2",
    "a negative size": "f32[-1]",
    "a missing size": "f32[1,,2]",
    "a fraction": "f32[1.5]",
    "no dtype": "f33[2]",
    "Python": "__import__('os')",
    "an expression": "f32[2*3]",
    "open JSON": '{"w": "f32[2]"',
    "a number in JSON": "[3]",
    "another text in JSON": '["f32"]',
    "a dtype in JSON": '["f33[2]"]',
    "a key twice": '{"w": "f32[2]", "w": "f32[3]"}',
    "a name without a value": "n=",
    "a name twice": "n=f32[2],n=f32[2]",
    "too many elements": f"f32[{2**40},{2**40}]",
    "too large a size": f"f32[{'1' * 5000}]",
    "deep JSON": "[" * 100_000,
    "a superscript": "f32[²]",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_no_shape_is_refused(text):
    with refused(ShapeError):
        shapes.read([text])


@given(st.text(alphabet=string.printable, max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        given, named = shapes.read([text])
    except ShapeError:
        return
    assert given or named
