"""How often the loops of an emitted file call their function, by the plan."""

from __future__ import annotations

from attngen.backends.jax.bounds import bounds
from attngen.backends.jax.candidates import bounded
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.loops import main_loop, unrolls
from attngen.backends.jax.tile import Starts, chosen, tile
from attngen.plans import Plan
from attngen.tiles import chunk_limits, key_chunks

Turns = dict[str, list[float]]


def turns(plan: Plan) -> Turns:
    """For each function that key loops call, the turns of each of these loops.

    In the order of the emitted file, averaged over the chunks of queries. Empty where no
    loop goes over chunks, and where lengths or offsets that come at run time decide.
    """
    spec = plan.spec
    run_time = spec.kv_lengths or spec.q_lengths or spec.static_q_offset is None
    listed = chosen(plan, "skip") == "list"
    if plan.algorithm in ("dense", "scanned") or (run_time and bounded(spec)) or listed:
        return {}
    at = tile(plan)
    ragged = spec.kv_len % plan.k_chunk != 0 and not chosen(plan, "diagonal")
    starts = Starts("b", "g", "q_start", "k_start")
    loops = bounds(plan, at, starts, ragged, Lengths(plan, at, starts))["loops"]
    chunks = _chunks(plan)
    found: Turns = {}
    for index, (kind, first, last) in enumerate(loops):
        counts = [max(0, at[last] - at[first]) for at in _named(chunks, first, last)]
        for name, own in _grouped(plan, kind, index, loops, counts):
            found.setdefault(name, []).append(sum(own) / max(1, len(own)))
    return found


def _named(chunks: list[dict[str, int]], first: str, last: str) -> list[dict[str, int]]:
    """The bounds of each chunk of queries, by the text that the emitted file has."""
    digits = {text: int(text) for text in (first, last) if text.isdigit()}
    return [at | digits for at in chunks]


def _chunks(plan: Plan) -> list[dict[str, int]]:
    """The key chunks that each chunk of queries visits, by the names in the file."""
    names = ("first", "full_first", "full_last", "last")
    limits = chunk_limits(plan.spec, plan.q_chunk, exact=False)
    return [
        {
            name + (f"_{i + 1}" if i else ""): at
            for i, visit in enumerate(key_chunks(own, plan.k_chunk))
            for name, at in zip(names, visit, strict=True)
        }
        for own in limits
    ]


def _grouped(
    plan: Plan,
    kind: str,
    index: int,
    loops: list[tuple[str, str, str]],
    counts: list[int],
) -> list[tuple[str, list[int]]]:
    """A loop's turns, where it goes several chunks at a time: of these, and the rest."""
    several, name = 1, kind
    main = index == main_loop([k for k, _, _ in loops])
    if main and kind == "interior" and unrolls(plan):
        several, name = int(chosen(plan, "unroll")), "interiors"
    elif main and chosen(plan, "parts") != 1:
        several, name = int(chosen(plan, "parts")), "together"
    if several == 1:
        return [(kind, counts)]
    whole = (name, [n // several for n in counts])
    return [whole, (kind, [n % several for n in counts])]
