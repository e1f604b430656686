"""The paper's gradient table without a TPU: standard attention, its algorithm, attngen.

Rabe & Staats, arXiv 2112.05682, table 3: one head, d = 64, bfloat16 in, float32 out, from
2^8 to 2^20 tokens, (q, k, v, dout) → (out, dq, dk, dv) in one program; that of the first two
is jax.vjp of their inference, standard attention's with jax.nn.softmax, whose gradient is
cheaper than one spelled out. Overhead is what the target's own compiler certifies of
temporaries, a time its estimate of cycles at the target's clock on a TPU; unknown elsewhere.

What is wanted is a share of standard attention's cycles in jax.value_and_grad of its sum
(`LOSS`): the least, as its dout is a constant.

attngen's plans aren't tuned: for each budget the planner's first that is certified within
it. Of these a row has the one of the fewest cycles that fits; "planned_for" says for which
budget it was planned. The paper's figures are in data/paper_tables.json.

    python benchmarks/paper_gradients.py [--targets tpu-v3,cpu] [--sizes 10,14] [--show]

Writes benchmarks/results/paper_gradients.json, a cell when it is done; what is there and
made of the same isn't compiled again.
"""

import argparse
import dataclasses
import hashlib
import inspect
import sys
from typing import Any

import paper_tables
from paper_shown import BUDGETS, Column, show
from paper_tables import HERE, JAX, PEERS, SIZES, WHO, Cell, paper, paper_bytes

import attngen
from attngen import descent, peers, planner, targets
from attngen.errors import AttngenError, BudgetError, CompileError
from attngen.keys import canonical
from attngen.plans import Plan
from attngen.spec import AttentionSpec
from attngen.units import show_bytes

RESULTS = HERE / "results" / "paper_gradients.json"
HALF = "differentiation"
TARGETS = ("tpu-v3", "tpu-v5e", "tpu-v6e", "h100", "cpu")
SMALL = {f"{m}MiB": m * 2**20 for m in (64, 16, 10, 4)}
ROWS = {n: BUDGETS[n] for n in ("none", "paper's")} | {
    n: f"attngen within {show_bytes(b)}" for n, b in SMALL.items()
}
LOSS = "value_and_grad"
WANTED = (  # target, tokens, budget, at most of standard attention's cycles in LOSS
    ("tpu-v3", 2**14, "16MiB", 0.78),
    ("tpu-v3", 2**14, "64MiB", 0.68),
    ("tpu-v5e", 2**14, "none", 0.18),
    ("tpu-v6e", 2**14, "none", 0.25),
    ("tpu-v3", 2**20, "10MiB", None),
)


@dataclasses.dataclass(frozen=True)
class Gradient(Cell):
    """As a cell of the inference table; no processor is timed."""

    @property
    def digest(self) -> str:
        more = inspect.getsource(inference) if self.who == "standard" else ""
        parts = [super().digest, list(self.budgets), more]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()

    @property
    def spec(self) -> AttentionSpec:
        return dataclasses.replace(super().spec, derivatives="vjp")

    @property
    def timed(self) -> bool:
        return self.device.kind == "tpu"

    @property
    def budgets(self) -> dict[str, int | None]:
        own = paper_bytes(self.n, half=HALF)
        return {"none": None} | ({"paper's": own} if own else {}) | SMALL


def of(cell: Cell) -> dict[str, Any]:
    return of_peer(cell) if cell.who in PEERS else of_attngen(cell)


def of_peer(cell: Cell) -> dict[str, Any]:
    """What the compiler says of jax.vjp of standard attention, or of the paper's."""
    spec, device = cell.spec, cell.device
    matrix, has = 4 * spec.q_len * spec.kv_len, device.memory_bytes
    if cell.who == "standard" and has is not None and matrix >= has:
        said = f"not compiled: the scores alone are {show_bytes(matrix)}"
        return {"temp_bytes": None, "time_s": None, "oom": True, "said": said}
    names = ("q", "k", "v", "out")
    shapes = [struct(spec, n) for n in names]
    function = inference(cell.who, spec)
    try:
        found = attngen.certify(vjp(function), *shapes, target=cell.target)
        more: dict[str, Any] = {}
        if cell.who == "standard" and cell.timed:
            loss = attngen.certify(summed(function), *shapes[:3], target=cell.target)
            more[LOSS] = {
                "temp_bytes": loss.temp_bytes,
                "estimated_cycles": loss.estimated_cycles,
            }
    except CompileError as error:
        failed = " ".join(f"{error.what} {error.got}".split())[:400]
        none = {"temp_bytes": None, "time_s": None}
        return none | paper_tables.room(device, 0, None, failed)
    kept = spec.bytes_of(*names) + spec.bytes_of("q", "k", "v", "out")
    return (
        more
        | {
            "temp_bytes": found.temp_bytes,
            "time_s": seconds(cell, found.estimated_cycles),
            "estimated_cycles": found.estimated_cycles,
            "on_chip_bytes": found.on_chip_bytes,
        }
        | paper_tables.room(device, kept, found.temp_bytes, None)
    )


def struct(spec: AttentionSpec, name: str) -> Any:
    import jax

    return jax.ShapeDtypeStruct(spec.shape_of(name), spec.dtype_of(name))


def inference(who: str, spec: AttentionSpec) -> Any:
    """The function (q, k, v) → out of a peer, or of standard attention."""
    if who == "paper":
        made: Any = peers.get("paper")
        return made.function(dataclasses.replace(spec, derivatives=None))
    import jax
    import jax.numpy as jnp

    def standard(q: Any, k: Any, v: Any) -> Any:
        wide: dict[str, Any] = {"preferred_element_type": jnp.float32}
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k, **wide) * spec.scale_value
        return jnp.einsum(
            "bhqk,bkhd->bqhd", jax.nn.softmax(s).astype(v.dtype), v, **wide
        )

    return standard


def vjp(function: Any) -> Any:
    """(q, k, v, dout) → (out, dq, dk, dv)."""
    import jax

    def gradient(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(function, q, k, v)
        return (out, *pull(dout))

    return gradient


def summed(function: Any) -> Any:
    """(q, k, v) → the sum of out, and its gradient."""
    import jax

    return jax.value_and_grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2))


def seconds(cell: Cell, cycles: int | None) -> float | None:
    tpu = cell.device.tpu
    return None if tpu is None or cycles is None else cycles / tpu.clock_hz


def of_attngen(cell: Cell) -> dict[str, Any]:
    """For each budget the planner's first that is certified; a row the fastest that fits."""
    entries: list[dict[str, Any]] = []
    for name, budget in cell.budgets.items():
        spec = dataclasses.replace(cell.spec, memory_budget=budget)
        try:
            ranked = planner.rank(spec, cell.device, JAX, None, smallest=descent.TRIES)
            first = ranked[0].choice
            if any(e["choice"] == first and fits(e, budget) for e in entries):
                continue
            plan, source, found = descent.first_certified(ranked, JAX)
        except BudgetError:
            break  # nor within a smaller one
        entries.append(entry(cell, name, plan, source.digest, found))
    rows = {n: fastest(entries, b) for n, b in cell.budgets.items()}
    return {"budgets": rows, "stopped": False}


def entry(cell: Cell, name: str, plan: Plan, digest: str, found: Any) -> dict[str, Any]:
    return {
        "planned_for": name,
        "choice": plan.choice,
        "digest": digest,
        "modelled_bytes": plan.temp_bytes,
        "temp_bytes": found.temp_bytes,
        "estimated_cycles": found.estimated_cycles,
        "time_s": seconds(cell, found.estimated_cycles),
        "modelled_s": plan.time_s,
        "on_chip_bytes": found.on_chip_bytes,
    }


def fits(made: dict[str, Any], budget: int | None) -> bool:
    return budget is None or made["temp_bytes"] <= budget


def fastest(entries: list[dict[str, Any]], budget: int | None) -> dict[str, Any] | None:
    """By the compiler's cycles; by the model where they aren't known."""
    within = [e for e in entries if fits(e, budget)]
    known = all(e["time_s"] is not None for e in within)
    by = "time_s" if known else "modelled_s"
    return min(within, key=lambda e: float(e[by]), default=None)


def share(column: Column, budget: str) -> float | None:
    """Of standard attention's cycles in LOSS."""
    standard, own = column.entry("standard") or {}, column.entry(budget) or {}
    most = standard.get(LOSS, {}).get("estimated_cycles")
    cycles = own.get("estimated_cycles")
    return cycles / most if cycles and most else None


def goals(cells: dict[str, Any]) -> str:
    """What is wanted, and what there is."""
    lines = []
    for target, n, budget, most in WANTED:
        column = Column(target, n, cells)
        found = column.entry(budget)
        if found is None or found.get("temp_bytes") is None:
            lines.append(f"{target}, {n} tokens, {budget}: nothing")
            continue
        need, ratio = show_bytes(found["temp_bytes"]), share(column, budget)
        said = f"{target}, {n} tokens, budget {budget}: {need}"
        if most is not None and ratio is not None:
            met = "met" if ratio <= most else "not met"
            said += f", {ratio:.3f} of standard attention's cycles"
            said += f" (wanted {most}): {met}"
        lines.append(said)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--show", action="store_true", help="compile nothing")
    given = parser.parse_args()
    names = given.targets.split(",")
    sizes = [2 ** int(x) for x in given.sizes.split(",")]
    cells: list[Cell] = [Gradient(t, n, w) for t in names for n in sizes for w in WHO]
    known = paper_tables.read(RESULTS)
    try:
        for found in [] if given.show else paper_tables.done(cells, known, of):
            known = found
            paper_tables.write(RESULTS, "the paper's gradient table", known)
    except AttngenError as error:
        sys.exit(str(error))
    for name in names:
        print(show(targets.get(name), known, paper(), HALF, ROWS))
    print(goals(known))


if __name__ == "__main__":
    main()
