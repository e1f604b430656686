"""Certificates of Triton kernels, compiled for GPUs that aren't here; nothing runs."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from commands import run
from library import slowly
from refusals import refused

import attngen
from attngen import AttentionSpec, api, certifier, gpus, masks, scores, targets
from attngen.errors import CompileError
from attngen.reports import Certificate

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton isn't installed"
)
COMPILER = "attngen.backends.triton.compiler"
KERNEL = (Path(__file__).parent / "data" / "running.py").read_text()

# target → how its matrix instruction begins
DEFAULT = {"a100": "HMMA.16816.F32", "h100": "HGMMA.64x64x16", "mi300x": "v_mfma_f32_"}
OTHERS = {
    "rtx3090": "HMMA.16816.F32", "rtx4090": "HMMA.16816.F32", "l4": "HMMA.16816.F32",
    "h200": "HGMMA.64x64x16", "b200": "UTCHMMA", "rtx5090": "HMMA.16816.F32",
    "mi355x": "v_mfma_f32_",
}  # fmt: skip
TARGETS = slowly([*(DEFAULT | OTHERS).items()], DEFAULT.items())


def certified(target, dtype="float16", source=KERNEL, **edits):
    for name, value in edits.items():
        old = next(x for x in source.splitlines() if x.startswith(name))
        source = source.replace(old, f"{name} = {value}", 1)
    shapes = [(name, (1, 4096, 1, 64), dtype) for name in "qkv"]
    return certifier.certify(COMPILER, target, shapes=shapes, source=source)


@pytest.mark.parametrize(("target", "instruction"), TARGETS)
def test_a_kernel_is_certified_for_a_gpu_that_is_not_here(target, instruction):
    certificate, gpu = certified(target), targets.get(target).gpu
    assert certificate.target == target
    assert certificate.temp_bytes == certificate.spill_bytes == 0
    assert certificate.argument_bytes == 3 * 4096 * 64 * 2
    assert 32 < certificate.registers <= gpu.max_registers
    assert 0 < certificate.shared_bytes <= gpu.shared_bytes
    assert certificate.blocks_per_multiprocessor >= 1
    warps = certificate.blocks_per_multiprocessor * certificate.warps
    assert certificate.occupancy == pytest.approx(warps / gpu.max_warps, abs=1e-4)
    assert certificate.matrix_instruction.startswith(instruction)
    assert certificate.mix[certificate.matrix_instruction] >= 4
    assert certificate.estimated_cycles is None

    # the interior has no mask: neither selections nor compares of each score
    scores = 64 * 64 // (4 * gpu.warp_size)
    masking = ("FSEL", "SEL", "ISETP", "v_cndmask", "v_cmp")
    assert sum(n for x, n in certificate.mix.items() if x.startswith(masking)) < scores

    assert certificate.tiles_per_turn == 1
    cycles = certificate.pipe_cycles
    products = 64 * 64 * (64 + 64) / gpu.matrix_fma_per_cycle
    assert cycles["matrix"] >= products * (1 - 1e-9)
    if gpu.backend == "cuda":
        assert cycles["matrix"] == pytest.approx(products)
    exponentials = 64 * (64 + 1) / gpu.exp_per_cycle
    assert exponentials <= cycles["exp"] <= 2.2 * exponentials
    assert certificate.bound_cycles == max(cycles.values())
    assert certificate.bound_cycles == cycles[certificate.bound_pipe]
    flops = 4 * 64 * 64 * 64 / certificate.bound_cycles
    assert certificate.flops_per_cycle == pytest.approx(flops, rel=1e-3)

    assert Certificate.from_json(certificate.to_json()) == certificate
    lines = str(certificate).splitlines()
    assert len(lines) == 3
    assert all(len(line) <= 100 for line in lines)


def test_float32_products_are_the_fma_pipes_on_nvidia():
    certificate = certified("a100", "float32", Q_BLOCK="tl.constexpr(32)")
    gpu = gpus.GPUS["a100"]
    assert certificate.matrix_instruction is None
    assert "matrix" not in certificate.pipe_cycles
    assert certificate.tiles_per_turn == 1
    products = 32 * 64 * (64 + 64) / gpu.fma_per_cycle
    assert products <= certificate.pipe_cycles["fma"] <= 1.3 * products
    assert "no matrix instruction" in str(certificate)


def test_more_shared_memory_than_there_is_is_told():
    certificate = certified("a100", K_BLOCK="tl.constexpr(128)", NUM_STAGES=8)
    assert certificate.shared_bytes > gpus.GPUS["a100"].shared_bytes
    assert certificate.blocks_per_multiprocessor == 0
    assert certificate.occupancy == 0


def test_what_the_launcher_allocates_is_told():
    more = "\nTEMP_BYTES = lambda shapes: 4 * shapes['q'][1]\n"
    assert certified("a100", source=KERNEL + more).temp_bytes == 4 * 4096


@pytest.mark.parametrize(
    ("target", "source", "said"),
    [
        ("cpu", KERNEL, "is no GPU"),
        ("a100", KERNEL.replace("lse_ptr", "bias_ptr"), "bias"),
        ("a100", KERNEL.replace("tl.dot(q", "tl.dot(cols"), "CompilationError"),
        ("a100", "NUM_WARPS = 4", "attention"),
    ],
)
def test_what_does_not_compile_is_an_error(target, source, said):
    with refused(CompileError) as caught:
        certified(target, source=source)
    assert said in caught.value.got


@pytest.mark.parametrize("target", ["h100", "b200", "rtx5090"])
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.sampled(2)
def test_tensor_descriptors_are_copied_as_blocks(target, layout):
    spec = AttentionSpec(
        q_heads=4, kv_heads=2, q_len=500, qk_dim=64, dtype="float16", layout=layout
    )
    fix = {"q_chunk": 64, "k_chunk": 64, "num_warps": 4}
    found = {}
    for loads in ("pointers", "descriptors"):
        plan = attngen.plan(
            spec, target=target, backend="triton", fix=fix | {"loads": loads}
        )
        source = attngen.emit(plan)
        shapes = [(n, spec.shape_of(n), "float16") for n in "qkv"]
        found[loads] = certifier.certify(
            COMPILER, target, shapes=shapes, source=source.text
        )
    assert not any(x.startswith("UTMALDG") for x in found["pointers"].mix)
    assert any(x.startswith("UTMALDG") for x in found["descriptors"].mix)
    assert found["descriptors"].registers <= found["pointers"].registers
    assert found["descriptors"].spill_bytes == 0
    moved = [c.pipe_cycles["global"] for c in found.values()]
    assert moved[0] == pytest.approx(moved[1], rel=0.02)


@pytest.mark.parametrize(
    ("out_dtype", "pointer"), [(None, "*fp16"), ("float32", "*fp32")]
)
def test_a_certificate_is_of_the_outputs_own_dtype(monkeypatch, out_dtype, pointer):
    from attngen.backends.triton import compiler

    class Compiled(Exception):
        pass

    def compile_kernel(kernel, gpu, signature, *_, **__):
        raise Compiled(signature["out_ptr"])

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    spec = AttentionSpec(
        q_heads=2, q_len=500, qk_dim=64, dtype="float16", out_dtype=out_dtype
    )
    plan = attngen.plan(spec, target="a100", backend="triton")
    path = api.stored(attngen.emit(plan))
    shapes = [(n, spec.shape_of(n), "float16") for n in "qkv"]
    with pytest.raises(Compiled) as raised:
        compiler.certify({"target": "a100", "source": str(path), "shapes": shapes})
    assert raised.value.args == (pointer,)


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize("outputs", [("out",), ("out", "lse")])
def test_a_launcher_allocates_its_outputs_and_nothing_else(outputs, loads, monkeypatch):
    """As the certificate of a file that says nothing of TEMP_BYTES has it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from attngen.backends.triton import loader

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.made[made.untyped_storage().data_ptr()] = made
            return made

    class Unlaunched:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    spec = dataclasses.replace(
        BASE, outputs=outputs, mask=masks.causal(), kv_lengths=True, sink=True
    )
    plan = attngen.plan(spec, "h100", "triton", {"loads": loads, "k_chunk": 32})
    module = loader.import_file(api.stored(attngen.emit(plan)))
    monkeypatch.setattr(module, "forward", Unlaunched())
    names = ("q", "k", "v", *(o.name for o in spec.operands))
    given = [
        torch.zeros(spec.shape_of(n), dtype=getattr(torch, spec.dtype_of(n)))
        for n in names
    ]
    with Counting() as counting:
        made = module._attention._init_fn(*given)
    made = made if isinstance(made, tuple) else (made,)
    for tensor in (*given, *made):
        counting.made.pop(tensor.untyped_storage().data_ptr(), None)
    assert not counting.made
    assert not hasattr(module, "TEMP_BYTES")
    assert [x.nbytes for x in made] == [spec.bytes_of(name) for name in outputs]


@pytest.mark.parametrize("target", slowly(["h100", "a100", "b200", "mi300x"], ["h100"]))
def test_the_interior_of_a_mask_costs_what_no_mask_costs(target):
    fix = {"q_chunk": 128, "k_chunk": 64, "num_warps": 8, "num_stages": 2}
    counts = []
    for mask in (None, masks.causal(), masks.causal() & masks.sliding_window(1000)):
        spec = AttentionSpec(
            q_heads=2, q_len=4000, qk_dim=64, dtype="float16", mask=mask
        )
        plan = attngen.plan(spec, target=target, backend="triton", fix=fix)
        shapes = [(n, spec.shape_of(n), "float16") for n in "qkv"]
        text = attngen.emit(plan).text
        found = certifier.certify(COMPILER, target, shapes=shapes, source=text)
        instruction = {**DEFAULT, "h100": "HGMMA", "b200": "UTCHMMA"}[target]
        assert found.matrix_instruction.startswith(instruction)
        counts.append(sum(found.mix.values()))
    plain, *masked = counts
    assert all(abs(n - plain) <= 0.05 * plain for n in masked), counts


def test_without_an_interior_the_loop_that_evaluates_the_mask_is_certified():
    board = attngen.mask(lambda b, h, q, k: ((q // 64 + k // 64) % 2 == 0) | (q == k))
    fix = {"q_chunk": 64, "k_chunk": 64, "num_warps": 4, "num_stages": 2}
    counts = []
    for mask in (None, board):
        fix |= {} if mask is None else {"skip": "bounds"}  # a list has an interior
        spec = AttentionSpec(
            q_heads=2, q_len=500, qk_dim=64, dtype="float16", mask=mask
        )
        plan = attngen.plan(spec, target="a100", backend="triton", fix=fix)
        mix = api.certify(plan).mix
        counts.append(sum(mix.values()))
    plain, masked = counts
    scores = 64 * 64 // (4 * 32)
    assert masked > plain + 2 * scores  # a position divided, a selection, at the least


def test_a_plan_that_spills_is_certified_and_called_unfit():
    spec = (
        "--q-heads", 2, "--q-len", 512, "--qk-dim", 128, "--dtype", "float32",
        "--target", "a100", "--fix", "q_chunk=64,k_chunk=32,num_warps=8,num_stages=3",
    )  # fmt: skip
    said, _ = run("certify", *spec, code=1)
    assert "not to be used: 64 × 32 spills" in said
    said, _ = run("certify", *spec, "--json", code=1)
    assert json.loads(said)["fits"] is False


def test_an_edited_file_is_compiled_as_it_is_for_its_own_target(tmp_path):
    """Not planned anew for this machine's processor."""
    spec = AttentionSpec(q_heads=2, q_len=500, qk_dim=64, dtype="float16")
    fix = {"q_chunk": 64, "k_chunk": 32, "num_warps": 4, "num_stages": 2}
    path = attngen.emit(attngen.plan(spec, "a100", fix=fix)).write(tmp_path / "a.py")
    plain = attngen.certify(path)
    assert (plain.target, plain.warps, plain.spill_bytes) == ("a100", 4, 0)
    text = path.read_text()
    path.write_text(text.replace("NUM_STAGES = 4, 2", "NUM_STAGES = 2, 2"))
    edited = json.loads(run("certify", path, "--json")[0])
    assert (edited["target"], edited["warps"], edited["fits"]) == ("a100", 2, True)
    assert edited["digest"] != plain.digest
    assert run("certify", path, "--target", "h100")[0].startswith("h100: ")
    path.write_text(
        text.replace("Q_BLOCK = tl.constexpr(64)", "Q_BLOCK = tl.constexpr(256)")
    )
    assert "not to be used: " in run("certify", path, code=1)[0]


BASE = AttentionSpec(q_heads=4, kv_heads=2, q_len=200, qk_dim=64, dtype="bfloat16")
DENSE = {
    "64": {},
    "36": {"qk_dim": 36, "v_dim": 36},
    "72, heads first": {
        "qk_dim": 72,
        "v_dim": 72,
        "layout": "bhtd",
        "dtype": "float32",
    },
    "64 and 40, lse": {"v_dim": 40, "outputs": ("out", "lse"), "out_dtype": "float32"},
    "40, lse alone": {"qk_dim": 40, "v_dim": 3, "outputs": ("lse",)},
    "odd, one head": {"qk_dim": 5, "v_dim": 7, "q_heads": 1, "kv_heads": 1},
    "operands": {
        "mask": masks.documents() & masks.causal(),
        "score": (scores.bias(axes="kq"),),
        "kv_lengths": True,
    },
    "2 GiB": {"q_len": 2**22, "kv_len": 2**20, "q_offset": 0, "mask": masks.causal()},
}


@pytest.mark.parametrize("target", ["a100", "h100", "mi300x"])
@pytest.mark.parametrize("case", DENSE)
def test_what_is_certified_is_what_dense_tensors_launch(case, target, monkeypatch):
    """The compiler is told what Triton's launcher finds out about the arguments."""
    spec = dataclasses.replace(BASE, **DENSE[case])
    assert_launched_as_certified(spec, target, {}, monkeypatch)


def test_descriptors_are_certified_as_they_are_launched(monkeypatch):
    spec = dataclasses.replace(BASE, qk_dim=72, v_dim=40)
    fix = {"loads": "descriptors", "head_dim": "padded"}
    assert_launched_as_certified(spec, "h100", fix, monkeypatch)


def assert_launched_as_certified(spec, target, fix, monkeypatch):
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    from attngen.backends.triton import compiler, loader

    plan = attngen.plan(spec, target=target, backend="triton", fix=fix)
    module = loader.import_file(api.stored(attngen.emit(plan)))
    kernel, gpu = module.forward, targets.get(target).gpu
    architecture = gpu.architecture.removeprefix("sm")
    architecture = int(architecture) if gpu.backend == "cuda" else architecture
    backend = make_backend(GPUTarget(gpu.backend, architecture, gpu.warp_size))
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    launched = []

    class Launched:
        def __getitem__(self, grid):
            def launch(*given, **options):
                bound, found, _ = bind(*given, **options)
                packed = kernel._pack_args(backend, options, bound, found, None)
                launched.append(packed[1:])

            return launch

    monkeypatch.setattr(module, "forward", Launched())
    names = ("q", "k", "v", *(o.name for o in spec.operands))
    dtypes = {n: getattr(torch, spec.dtype_of(n)) for n in names}
    tensors = [torch.empty(spec.shape_of(n), dtype=dtypes[n]) for n in names]
    module._attention(*tensors)
    signature, constants, attributes = compiler.arguments(
        kernel,
        [(n, spec.shape_of(n), spec.dtype_of(n)) for n in names],
        gpu,
        constants=module.CONSTEXPRS,
        blocks=getattr(module, "BLOCK_SHAPES", {}),
        out_dtype=str(getattr(module, "OUT_DTYPE", "")).removeprefix("torch."),
    )
    order = list(signature)
    placed = {(order.index(name),): value for name, value in constants.items()}
    known = {at: what for at, what in launched[0][2].items() if what}
    assert launched == [(signature, placed, launched[0][2])]
    assert known == attributes


def test_dropout_beside_a_read_of_keys_compiles():
    """Triton moves what a product's weights are made of, of which bits can't be."""
    spec = AttentionSpec(
        q_heads=8, q_len=1024, qk_dim=64, dtype="bfloat16", dropout=0.1,
        score=scores.bias(axes="hk"),
    )  # fmt: skip
    fix = {"q_chunk": 64, "k_chunk": 32, "num_warps": 4, "num_stages": 3}
    plan = attngen.plan(spec, target="h100", backend="triton", fix=fix)
    assert attngen.certify(plan).spill_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [70, 75])
def test_what_is_older_than_the_targets_gets_no_matrix_instructions(capability):
    """Why gpus.py has neither: the same file has them from sm80 on."""
    from attngen.backends.triton import compiler, loader

    spec = AttentionSpec(q_heads=2, q_len=500, qk_dim=64, dtype="float16")
    fix = {"q_chunk": 32, "k_chunk": 32, "num_warps": 4, "num_stages": 2}
    module = loader.import_file(
        api.stored(attngen.emit(attngen.plan(spec, "a100", "triton", fix)))
    )
    shapes = [(n, spec.shape_of(n), "float16") for n in "qkv"]
    counts = []
    for architecture in (f"sm{capability}", f"sm{gpus.FIRST}"):
        gpu = dataclasses.replace(gpus.GPUS["a100"], architecture=architecture)
        given = compiler.arguments(
            module.forward, shapes, gpu, constants=module.CONSTEXPRS
        )
        made = compiler.compile_kernel(
            module.forward, gpu, *given, num_warps=4, num_stages=2
        )
        counts.append(made.asm["ptx"].count("mma.sync"))
    assert counts[0] == 0 < counts[1]
