"""`make demo`: three real workloads under a budget, on this machine.

For each: the plan and why, the bytes and the time of standard attention and of this plan,
the error against float64, and the emitted file. Standard attention is
`jax.nn.dot_product_attention`; each contender runs in a process of its own, with the
same inputs, and the bytes are the compiler's.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import attngen
from attngen import AttentionSpec, certifier, machine, presets
from attngen.units import show_bytes, show_time

FOLDER = Path("demo")
COMPILER = "attngen.backends.jax.compiler"
WORKLOADS = {
    "paper-16k": ({}, "4MiB", "the paper's own: one head of 64, 16384 tokens"),
    "llama3-8b": (
        {"dtype": "float32", "q_len": 4096, "kv_len": 4096},
        "16MiB",
        "prefill of 4096 tokens, 32 query heads over 8 kv heads, causal, float32",
    ),
    "sd15-cross": (
        {"dtype": "float32"},
        "16MiB",
        "image to text: 4096 queries, 77 keys, 8 heads of 40, float32",
    ),
}


def standard(spec: AttentionSpec) -> Callable[..., Any]:
    """What users of JAX call today."""
    import jax
    import jax.numpy as jnp

    causal = spec.mask is not None

    def attention(q: Any, k: Any, v: Any) -> Any:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        return out.astype(jnp.dtype(spec.out_dtype_name))

    return attention


def measure(spec: AttentionSpec, rounds: int, **program: Any) -> dict[str, Any]:
    """Compile and time a program in a process of its own."""
    shapes = [(n, spec.shape_of(n), spec.dtype_of(n)) for n in "qkv"]
    job = {"target": "cpu", "shapes": shapes, "rounds": rounds, **program}
    found: dict[str, Any] = certifier.run(COMPILER, "measure", job)
    return found


def export(spec: AttentionSpec, folder: Path) -> Path:
    """Standard attention as StableHLO, for the other process."""
    import jax
    import jax.export

    structs = [jax.ShapeDtypeStruct(spec.shape_of(n), spec.dtype_of(n)) for n in "qkv"]
    exported = jax.export.export(jax.jit(standard(spec)), platforms=["cpu"])(*structs)
    path = folder / "standard.stablehlo"
    path.write_bytes(exported.serialize())
    return path.resolve()


def show(console: Console, name: str) -> None:
    changes, budget, what = WORKLOADS[name]
    spec = dataclasses.replace(presets.get(name), **changes, memory_budget=budget)
    console.rule(f"[bold]{name}[/]: {what}", align="left")
    with console.status("planning, emitting, certifying, validating …"):
        start = time.perf_counter()
        kernel = attngen.build(spec, target="cpu", backend="jax")
        seconds = time.perf_counter() - start
    path = kernel.source.write(FOLDER / f"{name.replace('-', '_')}.py")
    console.print(kernel.plan.explain(), highlight=False, markup=False)
    with console.status("timing standard attention in its own process …"):
        other = measure(spec, 1, exported=str(export(spec, FOLDER)))
    with console.status("timing the emitted file in its own process …"):
        own = measure(spec, 5, source=str(path.resolve()))
    (FOLDER / "standard.stablehlo").unlink()
    theirs, ours = (statistics.median(x["times_s"]) for x in (other, own))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "temporary bytes", "time", "process's peak"):
        table.add_column(column, justify="left" if not column else "right")
    # the compiler's own figure for standard attention; for ours also what it leaves out
    bytes_theirs = other["temp_bytes"] - other["scratch_bytes"]
    bytes_ours = own["temp_bytes"]
    for label, size, t, peak in (
        ("standard attention", bytes_theirs, theirs, other["peak_rss_bytes"]),
        ("this plan", bytes_ours, ours, own["peak_rss_bytes"]),
    ):
        table.add_row(label, show_bytes(size), show_time(t), show_bytes(peak))
    ratio = f"{bytes_theirs / bytes_ours:.0f}× fewer" if bytes_ours else ""
    table.add_row("", ratio, f"{theirs / ours:.1f}× as fast", "", style="bold")
    console.print(table)
    report = kernel.report
    assert report is not None
    worst = max(report.checks, key=lambda c: (c.error or 0) / c.tolerance)
    console.print(
        f"error     {worst.error:.1e} against float64, {worst.tolerance:.1e} allowed\n"
        f"          {'; '.join(report.cases)}\n"
        f"file      {path} (built in {show_time(seconds)})\n",
        highlight=False,
    )


def main() -> None:
    machine.quiet_jax()  # of devices that aren't here
    machine.start_jax()
    console = Console(width=None if sys.stdout.isatty() else 100)
    FOLDER.mkdir(exist_ok=True)
    start = time.perf_counter()
    for name in WORKLOADS:
        show(console, name)
    console.print(f"done in {show_time(time.perf_counter() - start)}", highlight=False)


if __name__ == "__main__":
    main()
