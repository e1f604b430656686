"""The demo's own pieces: what `make demo` measures, of a small workload."""

import importlib.util
from pathlib import Path

import attngen
from attngen import AttentionSpec

PATH = Path(__file__).parent.parent / "benchmarks" / "demo.py"


def test_both_contenders_are_measured(tmp_path):
    found = importlib.util.spec_from_file_location("demo", PATH)
    demo = importlib.util.module_from_spec(found)
    found.loader.exec_module(demo)
    spec = AttentionSpec(q_heads=2, q_len=64, qk_dim=8, mask=attngen.masks.causal())
    attngen.emit(attngen.plan(spec)).write(tmp_path / "small.py")
    own = demo.measure(spec, 2, source=str(tmp_path / "small.py"))
    other = demo.measure(spec, 1, exported=str(demo.export(spec, tmp_path)))
    for measured, rounds in ((own, 2), (other, 1)):
        assert len(measured["times_s"]) == rounds
        assert measured["temp_bytes"] > 0
        assert measured["peak_rss_bytes"] > 2**20
