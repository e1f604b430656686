"""benchmarks/paper_tables.py: what it takes from certificates, and what it compiles again."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

import attngen
from attngen.errors import CompileError
from attngen.peers.references import Reference
from attngen.reports import Certificate

FOLDER = Path(__file__).parent.parent / "benchmarks"
MIB = 2**20


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The benchmark, with results and wisdom of a test's own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "wisdom"))
    made = importlib.import_module("paper_tables")
    monkeypatch.setattr(made, "RESULTS", tmp_path / "paper_tables.json")
    yield made
    for name in ("paper_tables", "paper_shown"):
        sys.modules.pop(name, None)


class Compilers:
    """Stands for the targets' compilers: bytes and cycles of a tile; counts programs."""

    def __init__(self, monkeypatch, tables):
        self.sources, self.peers = [], []
        monkeypatch.setattr("attngen.building.certify_many", self.certify_many)
        monkeypatch.setattr(tables.references, "compiled", self.compiled)

    def certify_many(self, made, by, target):
        self.sources.extend(source.digest for _, source in made)
        return [self.certificate(target, p) for p, _ in made]

    def certificate(self, target, plan):
        tile = plan.q_chunk * plan.k_chunk
        cycles = plan.spec.q_len * plan.spec.kv_len * (10**3 + 10**9 // tile)
        return Certificate(target, "XLA:TPU", 4 * tile, estimated_cycles=cycles)

    def compiled(self, peer, spec, target, timed):
        self.peers.append((peer, spec.q_len, target.name, timed))
        if peer == "plain" and spec.q_len > 2**14:
            said = "JaxRuntimeError: RESOURCE_EXHAUSTED: (16.04G) exceeds (15.48G)"
            return Reference(name=peer, failed=said)
        n = spec.q_len
        need = 4 * (n**2 if peer == "plain" else min(n, 1024) * min(n, 4096))
        whole = Certificate(target.name, "XLA", need, estimated_cycles=1)
        return Reference(name=peer, certificate=whole, time_s=0.25)


@pytest.fixture
def compilers(monkeypatch, tables):
    return Compilers(monkeypatch, tables)


def table(capsys):
    """Rows of what was printed, by their label and the label of those before."""
    rows, section = {}, ""
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 100
        label = line[:33].strip()
        values = [line[i : i + 9] for i in range(33, len(line), 9)]
        section = line if line and not line.startswith(" ") else section
        rows[section.split(" (")[0], label] = [v.strip() for v in values if v.strip()]
    return rows


def command(monkeypatch, tables, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *arguments])
    tables.main()


def test_the_papers_figures_are_those_of_the_paper(tables):
    assert tables.paper_bytes(2**14) == 17 * MIB
    assert tables.paper_bytes(2**14, "overhead_standard") == 2**30
    assert tables.paper_bytes(2**10) == 4 * MIB == 4 * (2**10) ** 2
    assert tables.paper_bytes(2**16, "overhead_standard") is None
    assert tables.paper_bytes(2**13) is None
    said = tables.paper()
    at = said["n"].index(2**14)
    assert said["differentiation"]["overhead_paper"][at] == "64MB"
    assert said["inference"]["speed_relative_to_standard_percent"][at] == -13
    assert said["inference"]["time_paper_s"][at] == 0.0113
    assert said["headline"]["inference_reduction"] == 59
    assert "2112.05682" in said["source"]
    for part in ("inference", "differentiation"):
        assert all(len(row) == len(said["n"]) for row in said[part].values())


def test_the_setup_is_the_papers(tables):
    spec = tables.Cell("tpu-v3", 2**14, "attngen").spec
    assert spec == attngen.presets.get("paper-16k")
    assert tables.paper()["setup"]["head_dim"] == spec.qk_dim
    inputs = spec.bytes_of("q", "k", "v", "out")
    assert inputs == 10 * MIB  # "10MB"


def test_the_table_is_of_certificates(tables, compilers, monkeypatch, capsys):
    command(monkeypatch, tables, "--targets", "tpu-v3", "--sizes", "12,16")
    cells = json.loads(tables.RESULTS.read_text())["cells"]
    rows = table(capsys)
    over = {k[1]: v for k, v in rows.items() if k[0] == "overhead"}
    assert over["standard attention"] == ["64.0 MiB", "OOM"]
    assert over["the paper's algorithm"] == ["16.0 MiB", "16.0 MiB"]
    whole = cells["tpu-v3 4096 attngen"]["budgets"]
    for name, budget in tables.Cell("tpu-v3", 4096, "attngen").budgets.items():
        entry = whole[name]
        tile = entry["choice"]["q_chunk"] * entry["choice"]["k_chunk"]
        assert entry["temp_bytes"] == 4 * tile
        assert budget is None or 4 * tile <= budget
        assert entry["digest"] in compilers.sources
    assert whole["none"]["temp_bytes"] > whole["1MiB"]["temp_bytes"]
    speed = {k[1]: v for k, v in rows.items() if k[0].startswith("speed")}
    ratio = 0.25 / whole["none"]["time_s"]
    assert speed["attngen"][0] == f"{ratio - 1:+.0%}"
    assert speed["the paper's algorithm"] == ["+0%", "–"]
    assert tables.RESULTS.with_suffix(".png").exists() == bool(
        importlib.util.find_spec("matplotlib")
    )


def test_what_does_not_fit_is_said_in_the_compilers_words(
    tables, compilers, monkeypatch, capsys
):
    command(monkeypatch, tables, "--targets", "tpu-v3", "--sizes", "16")
    said = capsys.readouterr().out
    assert "OOM, standard attention at 2^16: (16.04G) exceeds (15.48G)" in said


def test_a_finished_cell_is_not_compiled_again(tables, compilers, monkeypatch):
    arguments = ("--targets", "tpu-v3", "--sizes", "8,12")
    command(monkeypatch, tables, *arguments)
    first = json.loads(tables.RESULTS.read_text())["cells"]
    assert len(compilers.peers) == 4
    assert len(set(compilers.sources)) == len(compilers.sources) > 0
    compilers.sources.clear()
    compilers.peers.clear()
    command(monkeypatch, tables, *arguments)
    assert not compilers.sources
    assert not compilers.peers
    command(monkeypatch, tables, "--targets", "tpu-v3", "--sizes", "8,10")
    assert {n for _, n, *_ in compilers.peers} == {2**10}
    again = json.loads(tables.RESULTS.read_text())["cells"]
    assert {k: again[k] for k in first} == first


def test_a_cell_of_another_source_is_stale(tables, compilers, monkeypatch):
    cell = tables.Cell("tpu-v3", 2**10, "standard")
    known = {}
    for found in tables.run([cell], {}, 9.0, False):
        known = found
    assert list(tables.run([cell], known, 9.0, False)) == []
    known[cell.name]["digest"] = "of another"
    assert len(list(tables.run([cell], known, 9.0, False))) == 1
    digests = {tables.Cell("tpu-v3", 2**10, w).digest for w in tables.WHO}
    assert len(digests) == len(tables.WHO)


def test_cells_that_were_stopped_go_on_where_asked(tables, compilers):
    cell = tables.Cell("tpu-v3", 2**14, "attngen")
    (known,) = tables.run([cell], {}, 1e-6, False)
    assert known[cell.name]["stopped"]
    before = len(compilers.sources)
    assert list(tables.run([cell], known, 99.0, False)) == []
    (known,) = tables.run([cell], known, 99.0, True)
    assert not known[cell.name]["stopped"]
    assert len(compilers.sources) > before
    assert len(set(compilers.sources)) == len(compilers.sources)


def test_where_nothing_says_a_time_the_models_best_that_fits_is_taken(
    tables, compilers, monkeypatch
):
    for target, n in (("h100", 2**12), ("cpu", 2 * tables.MEASURED)):
        cell = tables.Cell(target, n, "attngen")
        assert not cell.timed
        (known,) = tables.run([cell], {}, 9.0, False)
        for name, budget in cell.budgets.items():
            entry = known[cell.name]["budgets"][name]
            assert entry["time_s"] is None
            assert budget is None or entry["temp_bytes"] <= budget


def test_what_the_compiler_refuses_is_a_cell_too(tables, monkeypatch):
    def refuse(*_, **__):
        raise CompileError("It crashed.", got="exit code 3", needed="a compiler")

    monkeypatch.setattr(tables.references, "compiled", refuse)
    cell = tables.Cell("tpu-v3", 2**10, "paper")
    (known,) = tables.run([cell], {}, 9.0, False)
    assert known[cell.name]["failed"] == "It crashed. exit code 3"


def test_a_certificate_of_more_than_the_device_has_is_out_of_memory(
    tables, monkeypatch
):
    def compiled(peer, spec, target, timed):
        whole = Certificate(target.name, "XLA:GPU", 2**40)
        return dataclasses.replace(Reference(name=peer), certificate=whole)

    monkeypatch.setattr(tables.references, "compiled", compiled)
    found = tables.of_peer(tables.Cell("h100", 2**10, "standard"))
    assert found["oom"]
    assert "1024.0 GiB of 74.5 GiB" in found["said"]
