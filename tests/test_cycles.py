"""Cycles of a compiled module: each estimate as often as it is gone through."""

import pytest

from attngen.backends.jax.cycles import estimated_cycles
from attngen.backends.jax.hlo import instruction, parse

HBM = 100.0  # bytes a cycle


def estimate(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}},"flags":[]}}'


FRAMES = """
FileNames
1 "a.py"

FunctionNames
1 "attention"
2 "attention.<locals>.queries"
3 "attention.<locals>.queries.<locals>.interior"
4 "attention.<locals>.queries.<locals>.edge"
5 "_add"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=7 end_line=7 column=1 end_column=2}
3 {file_name_id=1 function_name_id=3 line=3 end_line=3 column=1 end_column=2}
4 {file_name_id=1 function_name_id=4 line=4 end_line=4 column=1 end_column=2}
5 {file_name_id=1 function_name_id=5 line=20 end_line=20 column=1 end_column=2}
6 {file_name_id=1 function_name_id=2 line=8 end_line=8 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=5 parent_frame_id=4}
5 {file_location_id=4 parent_frame_id=3}
6 {file_location_id=5 parent_frame_id=6}
7 {file_location_id=6 parent_frame_id=2}
"""


def loop(name, *, end, cycles, frame, start=0, step=1):
    """A counted loop's body and condition; `end` a number, or "" for one passed in."""
    passed = "get-tuple-element(%arg), index=2" if end == "" else f"constant({end})"
    return f"""
%{name}_body (arg: (s32[], f32[512], s32[])) -> (s32[], f32[512], s32[]) {{
  %arg = (s32[]{{:T(128)}}, f32[512]{{0:T(512)}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %x = f32[512]{{0:T(512)}} get-tuple-element(%arg), index=1
  %n = s32[] get-tuple-element(%arg), index=2
  %y = f32[512]{{0:T(512)}} fusion(%x), kind=kLoop, calls=%f, metadata={{op_name="x" stack_frame_id={frame}}}, {estimate(cycles)}
  ROOT %t = (s32[], f32[512], s32[]) tuple(%next, %y, %n)
}}

%{name}_test (arg: (s32[], f32[512], s32[])) -> pred[] {{
  %arg = (s32[]{{:T(128)}}, f32[512]{{0:T(512)}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %end = s32[] {passed}
  ROOT %less = pred[] compare(%i, %end), direction=LT
}}
"""


def entry(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"""
ENTRY %main (p: f32[512]) -> f32[512] {{
  %p = f32[512]{{0:T(512)}} parameter(0)
{body}
}}
"""


def run_loop(name, *, start=0, end=0, line=2, size="f32[512]"):
    return [
        f"%{name}_start = s32[] constant({start})",
        f"%{name}_end = s32[] constant({end})",
        f"%{name}_in = (s32[], {size}, s32[]) tuple(%{name}_start, %p, %{name}_end)",
        f"%{name} = (s32[], {size}, s32[]) while(%{name}_in), "
        f"condition=%{name}_test, body=%{name}_body, "
        f'metadata={{op_name="w" stack_frame_id={line}}}',
    ]


def test_a_line_is_taken_apart():
    made = instruction(
        "  ROOT %f.1 = (f32[4,8]{1,0:T(8,128)S(1)}, /*index=1*/s32[]) fusion(%a, %b.2), "
        'kind=kLoop, calls=%c, metadata={op_name="jit(f)/mul" stack_frame_id=7}, '
        + estimate(12)
    )
    assert (made.name, made.opcode, made.root) == ("f.1", "fusion", True)
    assert made.operands == ["a", "b.2"]
    assert made.called("calls") == "c"
    assert made.called("body") is None
    assert (made.cycles, made.frame, made.bytes) == (12, 7, 4 * 8 * 4 + 4)
    assert instruction("}") is None
    assert instruction("") is None


def test_frames_are_those_of_the_program():
    module = parse(FRAMES + entry("ROOT %r = f32[512] add(%p, %p), " + estimate(5)))
    names = [f.function.rsplit(".", 1)[-1] for f in module.calls(4)]
    assert names == ["attention", "queries", "interior", "_add"]
    assert module.calls(None) == module.calls(99) == []
    assert module.root("main").name == "r"


def test_what_is_not_in_a_loop_counts_once():
    text = entry(
        "%a = f32[512] fusion(%p), calls=%f, " + estimate(30),
        "ROOT %b = f32[512] fusion(%a), calls=%f, " + estimate(12),
    )
    assert estimated_cycles(text, HBM) == 42


@pytest.mark.parametrize(
    ("start", "end", "step", "turns"),
    [(0, 8, 1, 8), (3, 8, 1, 5), (0, 8, 3, 3), (5, 5, 1, 0)],
)
def test_a_loop_of_constant_bounds_counts_its_turns(start, end, step, turns):
    for known in (end, ""):  # in the condition, or passed in
        text = loop("l", end=known, cycles=10, frame=4, step=step)
        text += entry(
            *run_loop("l", start=start, end=end),
            "ROOT %z = f32[512] fusion(%p), calls=%f, " + estimate(1),
        )
        assert estimated_cycles(text, HBM) == 10 * turns + 1


def test_a_loop_of_unknown_bounds_is_known_by_its_function():
    unknown = [
        line.replace("constant(0)", "negate(%p)") for line in run_loop("l", line=2)
    ]
    text = FRAMES + loop("l", end="", cycles=10, frame=4) + entry(*unknown)
    assert estimated_cycles(text, HBM) is None
    assert estimated_cycles(text, HBM, {"edge": [2.0]}) is None
    assert estimated_cycles(text, HBM, {"interior": [3.5]}) == 35
    assert estimated_cycles(text, HBM, {"interior": [3.5, 2.0]}) is None


def test_loops_of_one_function_are_told_by_their_order():
    def unknown(name, line):
        made = run_loop(name, line=line)
        return [x.replace("constant(0)", "negate(%p)") for x in made]

    text = FRAMES + loop("late", end="", cycles=100, frame=6)
    text += loop("early", end="", cycles=10, frame=6)
    text += entry(*unknown("late", 7), *unknown("early", 2))
    assert estimated_cycles(text, HBM, {"edge": [1.0, 2.0]}) == 210
    assert estimated_cycles(text, HBM, {"edge": [2.0]}) == 220


def test_a_loop_within_a_loop():
    inner = run_loop("inner", end=3)
    body = """
%outer_body (arg: (s32[], f32[512], s32[])) -> (s32[], f32[512], s32[]) {
  %arg = (s32[], f32[512], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %p = f32[512] get-tuple-element(%arg), index=1
  %n = s32[] get-tuple-element(%arg), index=2
"""
    body += "".join(f"  {line}\n" for line in inner)
    body += "  ROOT %t = (s32[], f32[512], s32[]) tuple(%next, %p, %n)\n}\n"
    test = loop("outer", end="", cycles=0, frame=1).partition("%outer_test")
    text = loop("inner", end="", cycles=7, frame=4) + body + "\n%outer_test" + test[2]
    text += entry(*run_loop("outer", end=4))
    assert estimated_cycles(text, HBM) == 4 * 3 * 7


def test_copies_take_the_memorys_time_beside_the_work():
    copy = [
        "%s = (f32[512], f32[512], u32[]) copy-start(%p)",
        "%d = f32[512] copy-done(%s)",
    ]
    for work, whole in ((1000, 1000), (4, 20)):  # 2048 bytes: 20 cycles
        last = "ROOT %z = f32[512] fusion(%d), calls=%f, " + estimate(work)
        assert estimated_cycles(entry(*copy, last), HBM) == whole


def test_a_slice_that_is_written_in_place_takes_its_own_bytes():
    text = entry(
        "%big = f32[1000000] fusion(%p), calls=%f, " + estimate(7),
        "%at = s32[] constant(0)",
        "ROOT %z = f32[1000000] dynamic-update-slice(%big, %p, %at)",
    )
    assert estimated_cycles(text, HBM) == 7 + 20


def test_a_reshape_that_moves_data_takes_what_it_reads_and_writes():
    text = entry(
        "%big = f32[10000] fusion(%p), calls=%f, " + estimate(7),
        "ROOT %z = f32[100,100] reshape(%big)",
    )
    assert estimated_cycles(text, HBM) == 7 + 2 * 40000 / HBM
    small = "ROOT %z = f32[2,256] reshape(%p)"
    known = "%a = f32[512] fusion(%p), calls=%f, " + estimate(30)
    assert estimated_cycles(entry(known, small), HBM) == 30


@pytest.mark.parametrize(
    "line",
    [
        "ROOT %z = f32[512] conditional(%p, %p), branch_computations={%a, %b}",
        "ROOT %z = f32[100000] exponential(%p)",
        'ROOT %z = f32[100000] custom-call(%p), custom_call_target="tpu_custom_call"',
        "ROOT %z = (f32[512]) while(%p), condition=%missing, body=%missing",
    ],
    ids=["a branch", "a large operation", "a kernel", "a loop"],
)
def test_what_has_no_estimate_makes_the_whole_unknown(line):
    known = "%a = f32[512] fusion(%p), calls=%f, " + estimate(30)
    assert estimated_cycles(entry(known, line), HBM) is None


def test_a_text_without_estimates_is_unknown():
    assert estimated_cycles("", HBM) is None
    assert estimated_cycles(entry("ROOT %z = f32[2] add(%p, %p)"), HBM) is None


def test_index_arithmetic_needs_no_estimate():
    text = entry(
        "%i = s32[] add(%p, %p)",
        '%b = f32[100000] custom-call(), custom_call_target="AllocateBuffer"',
        '%c = f32[100000] custom-call(%b), custom_call_target="ConcatBitcast"',
        "ROOT %z = f32[512] fusion(%p), calls=%f, " + estimate(3),
    )
    assert estimated_cycles(text, HBM) == 3
