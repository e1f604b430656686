"""A third backend costs one package and one template folder: this one emits NumPy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import attngen
from attngen import AttentionSpec, backends, inputs, masks, scores

ROOT = Path(__file__).parent.parent
SPEC = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=40,
    qk_dim=8,
    mask=masks.causal() & masks.documents(),
    score=(scores.softcap(5.0),),
    outputs=("out", "lse"),
    memory_budget="1MiB",
)


@pytest.fixture(scope="module", autouse=True)
def toy():
    backends.register("numpy", "toy_backend")


def test_it_builds_a_certified_and_validated_kernel():
    kernel = attngen.build(SPEC, backend="numpy")
    assert kernel.report.passed
    assert 0 < kernel.certificate.temp_bytes <= 2**20
    assert "import numpy as np" in kernel.source.text
    arrays = inputs.arrays(SPEC)
    out, lse = kernel(**arrays)
    other = attngen.build(SPEC, backend="jax")(**arrays)
    np.testing.assert_allclose(out, other[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, other[1], rtol=2e-5, atol=2e-6)


def test_its_file_needs_numpy_alone(tmp_path):
    path = attngen.emit(attngen.plan(SPEC, backend="numpy")).write(tmp_path / "toy.py")
    code = (
        "import sys; sys.path.insert(0, '.'); import toy; print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, cwd=path.parent, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
    assert attngen.validate(path).passed


def test_a_formatter_has_nothing_to_do(tmp_path):
    path = attngen.emit(attngen.plan(SPEC, backend="numpy")).write(tmp_path / "toy.py")
    for command in (["format", "--isolated", "--check"],):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(path)], check=False
        )
        assert done.returncode == 0


def test_nothing_in_attngen_knows_it():
    for path in (ROOT / "attngen").rglob("*.py"):
        assert "toy_backend" not in path.read_text(), path
    assert not (ROOT / "templates" / "numpy").exists()
