"""Loops, instructions and the work of pipes, from short pieces of assembly."""

import pytest

from attngen import gpus
from attngen.backends.triton import assembly
from attngen.backends.triton.assembly import Instruction, main_loops, mix
from attngen.backends.triton.pipes import Tile, matrix_fma, pipes

# the poll of .L_x_9 has been moved behind the end: its branch back makes no loop
SASS = """
.text.forward:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R20+0x100] ;
        /*0030*/                   HMMA.16816.F32 R36, R144.reuse, R184, RZ ;
        /*0040*/              @!P3 BRA `(.L_x_9) ;
.L_x_2:
        /*0050*/                   HMMA.16816.F32 R28, R144, R180, RZ ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/                   BRA.U UP0, `(.L_x_1) ;
        /*0080*/                   FADD R1, R2, R3 ;
.L_x_4:
        /*0090*/                   HMMA.16816.F32 R36, R144, R184, RZ ;
        /*00a0*/                   FSEL R4, R4, -INF , P2 ;
        /*00b0*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*00c0*/                   EXIT ;
.L_x_9:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [R2], R5 ;
        /*00e0*/              @!P3 BRA `(.L_x_9) ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_10:
        /*0100*/                   BRA `(.L_x_10);
"""
AMD = """
forward:                                ; @forward
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[2:5], v[8:9], off
	s_waitcnt vmcnt(0)
	v_mfma_f32_32x32x8_f16 a[0:15], v[2:3], v[4:5], a[0:15]
	v_exp_f32_e32 v1, v1
	s_cmp_lg_u32 s4, 0
	s_cbranch_scc1 .LBB0_2
.LBB0_4:
	s_endpgm
"""


def test_loops_of_nvidias_assembly():
    program = assembly.parse_sass(SASS)
    assert len(program.instructions) == 17
    interior, edge = main_loops(program)
    assert [x.opcode for x in interior] == [
        "LDSM.16.M88.4",
        "HMMA.16816.F32",
        "BRA",
        "HMMA.16816.F32",
        "MUFU.EX2",
        "BRA.U",
        "BRA",  # what polls is a loop of its own
    ]
    assert mix(edge) == {"HMMA.16816.F32": 1, "FSEL": 1, "BRA": 1}
    assert list(mix(interior))[:2] == ["HMMA.16816.F32", "BRA"]


def test_loops_of_amds_assembly():
    program = assembly.parse_amdgcn(AMD)
    (loop,) = main_loops(program)
    assert len(program.instructions) == 9
    assert mix(loop)["v_mfma_f32_32x32x8_f16"] == 1
    assert len(loop) == 6


def test_the_innermost_loop_with_products_is_the_main_one():
    text = SASS.replace("FADD R1, R2, R3", "BRA.U UP1, `(.L_x_1)")
    assert len(main_loops(assembly.parse_sass(text))) == 2  # one head, one loop
    text = AMD.replace("s_endpgm", "s_cbranch_scc0 .LBB0_1\n\ts_endpgm").replace(
        "; %bb.0:", "; %bb.0:\n.LBB0_1:"
    )
    program = assembly.parse_amdgcn(text)
    assert len(assembly.loops(program)) == 2
    (loop,) = main_loops(program)
    assert len(loop) == 6


def test_a_program_without_loops_or_products():
    assert main_loops(assembly.parse_sass("")) == []
    program = assembly.parse_sass("        /*0000*/      EXIT ;")
    assert assembly.loops(program) == main_loops(program) == []
    no_products = SASS.replace("HMMA.16816.F32", "FADD")
    assert main_loops(assembly.parse_sass(no_products)) == []


@pytest.mark.parametrize(
    ("opcode", "fma"),
    [
        ("HMMA.16816.F32", 16 * 8 * 16),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HGMMA.64x128x16.F32", 64 * 128 * 16 / 4),
        ("HGMMA.64x64x8.F32.TF32", 64 * 64 * 8 / 4),
        ("v_mfma_f32_32x32x8_f16", 32 * 32 * 8),
        ("v_mfma_f32_16x16x32_bf16", 16 * 16 * 32),
        ("v_mfma_f32_16x16x4_f32", 16 * 16 * 4),
        ("v_mfma_f32_4x4x4_16b_f16", 4 * 4 * 4 * 16),
        ("v_mfma_f32_32x32x4_xf32", 32 * 32 * 4),
        ("UTCHMMA", 0),
        ("FFMA", 0),
        ("v_fma_f32", 0),
    ],
)
def test_the_size_of_a_matrix_product_is_in_its_name(opcode, fma):
    assert matrix_fma(Instruction(opcode, "")) == fma


def one_tile(count, q=16, k=8, d=8):
    """A loop of `count` tiles of 16 × 8 scores, head dim 8: 32 lanes, 4 scores each."""
    products = [Instruction("HMMA.1688.F32.TF32", "R0, R1, R2, R0")] * 2
    powers = [Instruction("MUFU.EX2", "R0, R0")] * 5
    return (products + powers) * count, Tile(q, k, d, d)


def test_pipes_of_a_loop():
    loop, tile = one_tile(1)
    more = [
        Instruction("FFMA", ""),
        Instruction("FMNMX", ""),
        Instruction("IMAD.WIDE", ""),
        Instruction("LDS.128", "R0, [R1]"),
        Instruction("LDSM.16.MT88.4", "R0, [R1]"),
        Instruction("LDGSTS.E.BYPASS.128", "[R1], [R2]"),
        Instruction("SHFL.BFLY", ""),
        Instruction("BAR.SYNC.DEFER_BLOCKING", ""),
    ]
    found = pipes([*loop, *more], gpus.GPUS["a100"], tile, warps=1)
    assert found.tiles_per_turn == 1
    assert found.cycles == {
        "matrix": 2 * 16 * 8 * 8 / 512,
        "exp": 5 * 32 / 16,
        "fma": 2 * 32 / 64,
        "alu": 32 / 64,
        "shared": (512 + 512 + 512 + 128) / 128,
        "global": round(512 / 47, 2),
        "issue": 15 / 4,
    }
    assert (found.bound_pipe, found.bound_cycles) == ("shared", 13)
    assert found.flops_per_cycle == round(4 * 16 * 8 * 8 / 13, 2)


def test_an_unrolled_loop_does_several_tiles():
    once = pipes(*one_tile(1)[:1], gpus.GPUS["a100"], one_tile(1)[1], warps=1)
    loop, tile = one_tile(3)
    found = pipes(loop, gpus.GPUS["a100"], tile, warps=1)
    assert found.tiles_per_turn == 3
    assert found.cycles == once.cycles
    # padding isn't another tile, nor are exponentials of a score
    padded = pipes(loop, gpus.GPUS["a100"], Tile(16, 8, 8, 5), warps=1)
    assert padded.tiles_per_turn == 3
    curved = [*loop, *[Instruction("MUFU.EX2", "")] * 15]
    assert pipes(curved, gpus.GPUS["a100"], tile, warps=1).tiles_per_turn == 3


def test_a_warpgroups_product_reads_shared_memory():
    tile = Tile(64, 64, 64, 64)
    powers = [Instruction("MUFU.EX2", "")] * 32
    both = [Instruction("HGMMA.64x64x16.F32", "R56, gdesc[UR32], RZ, !UPT")] * 4
    second = [Instruction("HGMMA.64x64x16.F32", "R24, R88, gdesc[UR12], R24")] * 4
    found = pipes([*powers, *both, *second], gpus.GPUS["h100"], tile, warps=4)
    assert found.cycles["matrix"] == 8 * 64 * 64 * 16 / 2048
    assert found.cycles["shared"] == (8 + 4) * 64 * 16 * 2 / 128


def test_tensor_memorys_products_are_counted_by_the_tile():
    tile = Tile(128, 64, 64, 64)
    powers = [Instruction("MUFU.EX2", "")] * 64
    tensor = [Instruction("UTCHMMA", "gdesc[UR4], gdesc[UR6], tmem[UR17]")] * 8
    found = pipes([*powers, *tensor], gpus.GPUS["b200"], tile, warps=4)
    assert found.tiles_per_turn == 1
    assert found.cycles["matrix"] == 128 * 64 * 128 / 4096


def test_amds_exponentials_hold_the_vector_pipe():
    tile = Tile(32, 32, 8, 8)
    products = [Instruction("v_mfma_f32_32x32x8_f16", "")] * 2
    rest = [Instruction("v_exp_f32_e32", "")] * 17 + [
        Instruction("v_pk_mul_f32", ""),
        Instruction("ds_read2st64_b64", ""),
        Instruction("ds_write_b128", ""),
        Instruction("ds_bpermute_b32", ""),
        Instruction("buffer_load_dwordx4", "v1, s[0:3], 0 offen lds"),
        Instruction("global_load_dwordx2", ""),
        Instruction("s_waitcnt", "vmcnt(0)"),
    ]
    found = pipes([*products, *rest], gpus.GPUS["mi300x"], tile, warps=1)
    assert found.cycles["matrix"] == 2 * 32 * 32 * 8 / 1024
    assert found.cycles["exp"] == 17 * 64 / 16
    assert found.cycles["fma"] == 17 * 64 / 16 + 1
    assert found.cycles["shared"] == 64 * (16 + 16 + 4 + 16) / 128
    assert found.cycles["global"] == round(64 * (16 + 8) / 53, 2)


def test_blocks_that_run_at_once():
    a100, h100, mi300x = (gpus.GPUS[n] for n in ("a100", "h100", "mi300x"))
    few = {"registers": 32, "shared_bytes": 0}
    assert a100.resident(**few, warps=4) == 16  # as many warps as there can be
    assert a100.resident(**few, warps=1) == 32  # as many blocks
    assert a100.resident(registers=255, warps=4, shared_bytes=0) == 2
    assert a100.resident(registers=168, warps=4, shared_bytes=0) == 3
    assert a100.resident(registers=255, warps=16, shared_bytes=0) == 0
    assert h100.resident(registers=32, warps=4, shared_bytes=100 * 1024) == 2
    assert h100.resident(registers=32, warps=4, shared_bytes=227 * 1024) == 1
    assert h100.resident(registers=32, warps=4, shared_bytes=228 * 1024) == 0
    assert mi300x.resident(registers=256, warps=4, shared_bytes=0) == 2
    assert mi300x.resident(registers=257, warps=4, shared_bytes=0) == 1
    few = {"registers": 32, "warps": 4}
    assert mi300x.resident(**few, shared_bytes=13_000) == 4  # in steps of 512
    mi355x = gpus.GPUS["mi355x"]
    assert mi355x.resident(**few, shared_bytes=2**15) == 4  # in steps of 1280
    assert mi355x.resident(registers=32, shared_bytes=0, warps=1) == 32  # no barrier
    assert mi355x.resident(registers=32, shared_bytes=0, warps=2) == 16
    b200, few = gpus.GPUS["b200"], {"registers": 32, "shared_bytes": 0}
    assert b200.resident(**few, warps=4, tensor_columns=256) == 2
