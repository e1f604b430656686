"""What masks save on a CPU: against the unmasked function, and against flex_attention.

float32, 1 × 8 × 16384 × 64: causal, a window of 1024, documents of 1024 tokens. Plans are the best
that build(effort="measure") finds, with random operands. Each is judged
by the reference, then all take turns in one process. A mask's time is compared with its share
of tiles times the unmasked function's, in its own best plan and in the mask's chunks. The peer
is torch's flex_attention, compiled, with a block mask that a compiled create_block_mask makes;
that is timed apart, and counted in the total. Writes results/masks_cpu.json.

    python benchmarks/masks_cpu.py [--rounds 7] [--only causal] [--no-flex] [--effort estimate]
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from side_by_side import Contest, Goal, circumstances, merge, say

import attngen
from attngen import AttentionSpec, inputs, masks, tilemap
from attngen.timing import Spread, spread

WINDOW = DOCUMENT = 1024  # tokens
MASKS = {
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(WINDOW),
    "documents": masks.documents(),
    "causal documents": masks.causal() & masks.documents(),
}
PROPORTIONAL, FASTER = 1.2, 1.2
# what one fixes who knows how long documents, or windows, are
FITTING = {
    "documents": {"q_chunk": DOCUMENT, "k_chunk": DOCUMENT // 2, "skip": "list"},
    "window": {"q_chunk": WINDOW // 2, "k_chunk": WINDOW // 4, "head_chunk": 8},
}


def arrays_of(spec: AttentionSpec) -> dict[str, Any]:
    """Inputs, with ids that give each document DOCUMENT tokens."""
    arrays = inputs.arrays(spec, nan=False)
    if "document_ids" in arrays:
        ids = np.arange(spec.kv_len, dtype=np.int32) // DOCUMENT
        arrays["document_ids"] = np.broadcast_to(ids, (spec.batch, spec.kv_len)).copy()
    return arrays


def share(plan: attngen.Plan, arrays: dict[str, Any]) -> float:
    """The part of all tiles that is visited, as the operands decide."""
    if "document_ids" not in arrays:
        return plan.tiles.visited / plan.tiles.total
    ids = arrays["document_ids"][0]
    q, k = plan.q_chunk, plan.k_chunk
    rows = tilemap.kinds(plan) != tilemap.EMPTY
    first = [ids[i : i + q] for i in range(0, len(ids), q)]
    second = [ids[j : j + k] for j in range(0, len(ids), k)]
    meets = [[x[0] <= y[-1] and y[0] <= x[-1] for y in second] for x in first]
    return float((rows & np.array(meets)).mean())


def flex(
    spec: AttentionSpec, arrays: dict[str, Any], rounds: int
) -> tuple[Any, list[float]]:
    """flex_attention, ready to be called, and seconds of its compiled block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from attngen.peers.torch_peers import flex_block_mask, flex_options, tensors

    spec = dataclasses.replace(spec, layout="bhtd", memory_budget=None)
    given = tensors(spec, arrays)
    moved = {n: given[n].transpose(1, 2).contiguous() for n in "qkv"}
    given |= moved
    torch.compiler.reset()
    create, attend = torch.compile(create_block_mask), torch.compile(flex_attention)
    options = flex_options(spec, given)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        made = flex_block_mask(spec, given, create)
        seconds.append(time.perf_counter() - start)
    if made is not None:
        options["block_mask"] = made

    def call() -> Any:
        with torch.no_grad():
            return attend(given["q"], given["k"], given["v"], **options)

    call()
    return call, seconds[1:]  # the first compiles


def close(spec: AttentionSpec, out: Any, arrays: dict[str, Any]) -> float:
    """The largest error of flex's output in a few rows, against the reference."""
    from attngen import reference

    rows = np.linspace(0, spec.q_len - 1, 16).astype(int)
    own = {n: x for n, x in arrays.items() if n not in "qkv"}
    wanted = reference.attention(spec, *(arrays[n] for n in "qkv"), own, rows=rows)
    return float(np.abs(out.numpy()[:, :, rows] - wanted["out"]).max())


def times(ratio: Spread, factor: float) -> Spread:
    return Spread(*(x * factor for x in dataclasses.astuple(ratio)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=2**14)
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--only", help="masks, with commas between them")
    parser.add_argument("--effort", default="measure")
    given = parser.parse_args()
    full = AttentionSpec(q_heads=8, q_len=given.length, qk_dim=64)
    chosen = given.only.split(",") if given.only else list(MASKS)
    contest, shares, block_masks, errors = Contest(), {}, {}, {}
    own = attngen.build(full, effort=given.effort)
    contest.own("full", own)
    for name in chosen:
        spec = dataclasses.replace(full, mask=MASKS[name])
        arrays = arrays_of(spec)
        kernel = attngen.build(spec, effort=given.effort)
        contest.own(name, kernel, arrays)
        shares[name] = share(kernel.plan, arrays)
        say(f"{name}: {shares[name]:.1%} of the tiles")
        fix = {
            n: kernel.plan.choice[n]
            for n in ("algorithm", "q_chunk", "k_chunk", "head_chunk")
        }
        contest.own(f"full in the chunks of {name}", attngen.build(full, fix=fix))
        if name in FITTING:
            fix = {"algorithm": "running", **FITTING[name]}
            contest.own(f"{name}, fixed", attngen.build(spec, fix=fix), arrays)
        if not given.no_flex:
            call, seconds = flex(spec, arrays, given.rounds)
            errors[name] = close(spec, call(), arrays)
            block_masks[name] = seconds
            contest.call(f"flex {name}", call)
            say(
                f"flex {name}: block mask {spread(seconds).median:.2f} s, error {errors[name]:.1e}"
            )
    contest.run(given.rounds)
    goals, totals = [], {}
    for name in chosen:
        for what, against in (
            ("", "full"),
            (" in its chunks", f"full in the chunks of {name}"),
        ):
            ratio = contest.ratio(against, name)
            assert ratio is not None
            scaled = times(ratio, shares[name] * PROPORTIONAL)
            goals.append(Goal(f"{name}: share × 1.2 × full{what}, by it", 1.0, scaled))
        ratio = contest.ratio(f"flex {name}", name)
        if ratio is not None:
            goals.append(Goal(f"{name}: flex by attngen", None, ratio))
            mine = spread(contest.rounds.samples_s[name]).median
            block = spread(block_masks[name]).median
            total = Spread(*(x + block / mine for x in dataclasses.astuple(ratio)))
            totals[name] = {"block_mask_s": block_masks[name], "error": errors[name]}
            goals.append(
                Goal(f"{name}: flex and its block mask by attngen", FASTER, total)
            )
            fixed = contest.ratio(f"flex {name}", f"{name}, fixed")
            if fixed is not None:
                mine = spread(contest.rounds.samples_s[f"{name}, fixed"]).median
                fixed = Spread(*(x + block / mine for x in dataclasses.astuple(fixed)))
                goals.append(Goal(f"{name}: the same, chunks fixed", FASTER, fixed))
    print("\n".join([*contest.times(), "", *map(str, goals)]))
    for name, seconds in block_masks.items():
        print(f"    block mask of {name:<21}{spread(seconds).median * 1e3:>7.0f} ms")
    part = {
        "circumstances": circumstances(),
        "length": given.length,
        "shares": shares,
        "flex": totals,
        "goals": [g.to_dict() for g in goals],
        **contest.to_dict(),
    }
    key = f"{given.length}, {', '.join(chosen)}" if given.only else str(given.length)
    say(f"wrote {merge('masks_cpu.json', {key: part})}")


if __name__ == "__main__":
    main()
