"""No operand can take a name that an emitted file uses itself."""

import ast

import pytest
from test_emitter import texts

import attngen
from attngen import AttentionSpec, masks, scores
from attngen.emitter import read_header
from attngen.names import is_free, is_free_of_backward

# functions that operands are arguments of
TAKE_OPERANDS = (
    "attention", "_attention", "_forward", "_attention_fwd", "_attention_bwd", "_backward", "_scanned",
    "_gradients", "_fake_gradients", "_save", "_pull",
)  # fmt: skip


def names_beside_operands(tree):
    """Every name that functions which take operands bind or read, and constants."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            if statement.name not in TAKE_OPERANDS:
                continue
        elif not isinstance(statement, ast.Assign):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg
            elif isinstance(node, ast.FunctionDef):
                yield node.name


def trained():
    """Files of the backward passes that the gallery has not."""
    masked = {"mask": masks.causal() & masks.documents(), "batch": 2}
    scored = {"score": (scores.softcap(3.0), scores.alibi(), scores.relative_buckets())}
    other = {"layout": "bhtd", "kv_lengths": True, "q_lengths": True, "dropout": 0.1}
    for i, fields in enumerate(
        (masked, scored | {"sink": True}, other, scored | masked)
    ):
        for derivatives in ("vjp", "any"):
            if derivatives == "any" and "dropout" in fields:
                continue
            spec = AttentionSpec(
                q_heads=4,
                kv_heads=2,
                q_len=200,
                qk_dim=16,
                outputs=("out", "lse"),
                derivatives=derivatives,
                **fields,
            )
            fix = {"q_chunk": 64, "k_chunk": 32, "head_chunk": 1}
            for way in ("by_queries", "by_keys", "two_passes"):
                if derivatives == "any" and way != "by_keys":
                    continue
                sizes = {"backward_q_chunk": 48, "backward_k_chunk": 64}
                more = {"backward": way} | sizes if derivatives == "vjp" else {}
                yield (
                    f"{i} {derivatives} {way}",
                    attngen.emit(attngen.plan(spec, fix=fix | more)).text,
                )


def test_every_name_that_is_used_is_taken(tmp_path):
    for name, text in (*texts().items(), *trained()):
        path = tmp_path / "emitted.py"
        path.write_text(text)
        spec = read_header(path).spec
        operands = {o.name for o in spec.operands}
        operands |= {f"d_{n}" for n in operands} | {f"_{n}" for n in operands}
        used = set(names_beside_operands(ast.parse(text))) - operands
        free = {n for n in used if is_free(n)}
        if spec.derivatives is not None:
            free = {n for n in free if is_free_of_backward(n)}
        assert not free, name


@pytest.mark.parametrize(
    "name",
    ["if", "lambda", "match", "len", "jnp", "q", "sink", "_x", "x_at_b", "part_1"],
)
def test_what_python_or_the_file_uses_is_taken(name):
    assert not is_free(name)


@pytest.mark.parametrize("name", ["ids", "slopes", "bias", "table", "x", "mask"])
def test_ordinary_names_are_free(name):
    assert is_free(name)
