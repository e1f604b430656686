"""A plan for people: what was chosen and why, in text that fits 100 columns."""

from __future__ import annotations

import re
import textwrap

from attngen import backends, storage
from attngen.cost import sharding
from attngen.lists import SPAN
from attngen.plans import Alternative, Plan
from attngen.skipping import (
    a_head,
    counted,
    decided_by,
    of_mean,
    percent,
    say_which,
    share,
)
from attngen.spec import AttentionSpec
from attngen.units import show_bytes, show_count, show_time


def explain(plan: Plan) -> str:
    """The plan, what it skips, and what else was considered."""
    spec, describe = plan.spec, backends.get(plan.backend).describe
    budget = spec.budget_bytes
    size = f"{spec.q_len} queries × {spec.kv_len} keys, {_count(spec.q_heads, 'head')}"
    size += f" over {_count(spec.kv_heads, 'kv head')}" if spec.repeats > 1 else ""
    size += "".join(f", {part}" for part in _stored(spec))
    size += f", {sharding(spec)}" if spec.devices > 1 else ""
    if spec.derivatives is not None:
        how = {"vjp": "with gradients", "any": "with derivatives of any order"}
        size += f", {how[spec.derivatives]}"
    limit = "no budget given" if budget is None else f"budget {show_bytes(budget)}"
    head = f"{size}, {spec.dtype}, on {plan.target} by {plan.backend}, {limit}"
    lines = [*textwrap.wrap(head, 100), ""]
    for warning in plan.warnings:
        lines += textwrap.wrap(f"warning: {warning}", 100, subsequent_indent=" " * 10)
    chosen = textwrap.wrap(describe(plan.choice), 88)
    lines.append(f"chosen    {chosen[0]}")
    lines += [f"{'':10}{line}" for line in chosen[1:]]
    each = "on each device " if spec.devices > 1 else ""
    figures = (
        f"{show_bytes(plan.temp_bytes)} temporary {each}(modelled) · "
        f"{show_count(plan.flop)}FLOP · "
        f"{show_bytes(plan.moved_bytes)} moved · about {show_time(plan.time_s)} (modelled)"
    )
    lines += [f"{'':10}{line}" for line in textwrap.wrap(figures, 90)]
    if plan.fixed:
        text = f"fixed: {', '.join(plan.fixed)}"
        lines += [f"{'':10}{line}" for line in textwrap.wrap(text, 88)]
    if dict(plan.options).get("guard"):
        lines.append(
            "          slices are converted one by one: XLA would convert all of q, k, v before"
        )
    if spec.batch_shards > 1 and spec.kv_lengths:
        lines.append(
            "          devices exchange two numbers a chunk of queries: how far all go in keys"
        )
    if spec.dropout:
        lines.append(
            "          dropout's bits are made of seed, b, h and positions in each tile: none are "
            "stored"
        )
    if _rounds(plan):
        lines.append(
            '          TPUs multiply float32 in bfloat16 unless precision is "highest"'
        )
    lines += _skipped(plan, backends.seen(plan))
    lines += _alternatives(plan, describe)
    return "\n".join(lines)


def _stored(spec: AttentionSpec) -> list[str]:
    """The batch, and how K/V are stored, in words."""
    batch = f"batch {spec.batch}" if spec.batch > 1 else ""
    if spec.storage == "packed":
        batch = f"of {_count(spec.batch, 'packed sequence')}"
    parts = [batch] if batch else []
    if spec.storage == "paged":
        parts.append(f"in {storage.pages(spec)} pages of {spec.page_size}")
    if spec.is_narrow:
        scale = f" by {storage.of_scale(spec)}" if spec.is_quantised else ""
        parts.append(f"K/V in {spec.kv_dtype}{scale}")
    return parts


def _rounds(plan: Plan) -> bool:
    """Whether the target makes products of less than the dtype's bits."""
    wide = dict(plan.options).get("product_dtype") == "float32"
    tpu = plan.target.startswith("tpu-")
    return wide and tpu and plan.spec.precision == "default"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _skipped(own: Plan, plan: Plan) -> list[str]:
    """Of a plan, and of the dense one whose tiles are counted."""
    tiles, spec = plan.tiles, plan.spec
    if spec.mask is None and not tiles.empty:
        return ["skipped   nothing: every query sees every key"]
    saved, names = share(plan), decided_by(plan)
    part = f"{percent(saved)} of the square" if saved else "nothing of the square"
    whose = f" ({', '.join(counted(plan))})" if counted(plan) else a_head(plan)[3:]
    if names:
        least = f"{part} or more" if saved else f"what {' and '.join(names)} rule out"
        text = (
            f"{least}: of {tiles.total} tiles{whose} {tiles.empty} are always empty, "
            f"at most {tiles.visited} are visited, {tiles.full} of them known to be full: "
            f"{say_which(names)} at run time; the time above is for {SPAN} keys a query"
        )
    else:
        text = (
            f"{part}: of {tiles.total} tiles{whose}{of_mean(own, plan)} {tiles.empty} are "
            f"empty and never visited, {tiles.full} are full and evaluate no mask, "
            f"{tiles.edge} are on an edge"
        )
    first, *more = textwrap.wrap(text, 88)
    return [f"skipped   {first}", *(f"{'':10}{line}" for line in more)]


def _alternatives(plan: Plan, describe: object) -> list[str]:
    legal = [a for a in plan.alternatives if a.temp_bytes is not None]
    refused = [a for a in plan.alternatives if a.temp_bytes is None]
    lines: list[str] = []
    if legal:
        lines += ["", f"{'also legal':<48}{'temporary':>11}{'estimate':>11}"]
        for a in legal:
            given = {n: v for n, v in a.choice.items() if _told(n, plan)}
            name = _short(describe(given))  # type: ignore[operator]
            figures = (
                f"{show_bytes(a.temp_bytes or 0):>11}{show_time(a.time_s or 0):>11}"
            )
            if len(name) > NAME:
                lines.append(f"  {name}")
                name = ""
            lines.append(f"  {name:<{NAME}}{figures}   {a.reason}")
    if refused:
        lines += ["", "not legal"]
        lines += [
            f"  {a.choice['algorithm']!s:<9} {a.reason}" for a in _one_each(refused)
        ]
    return lines


NAME = 46  # columns of a plan's name
FORWARD = ("algorithm", "q_chunk", "k_chunk", "head_chunk", "batch_chunk", "loop")
ALWAYS = (*FORWARD, "backward", *(f"backward_{name}" for name in FORWARD))


def _told(name: str, plan: Plan) -> bool:
    """Whether a choice is said of each alternative: not where all have the one fixed."""
    return name in ALWAYS or name not in plan.fixed


def _short(name: str) -> str:
    short = name.removeprefix("running · ").removesuffix(" · fori")
    short = short.replace("diagonal", "diag")
    for long in (" a step", " queries", " keys"):
        short = re.sub(rf"(?<=\d){long}\b", "", short)
    return short


def _one_each(refused: list[Alternative]) -> list[Alternative]:
    return list({a.reason: a for a in refused}.values())
