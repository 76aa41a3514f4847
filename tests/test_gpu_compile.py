"""cuda/ and hip/ compile for every chip, and what comes out is what was meant: no spills, no local memory, no fused
multiply-add that would change a bit, 16-byte accesses. Nothing runs here.

hipcc compiles hip/ for the chips that every version of it knows, clang 19 for all; of those the ordinary run takes one
a generation. A missing compiler is a skip, or with USAF_REQUIRE_COMPILERS=1 a failure.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

REPO = pathlib.Path(__file__).parents[1]
CUDA_DEVICE, HIP_DEVICE = REPO / "cuda/device.cu", REPO / "hip/device.hip"  # streams and copies: no kernels in them
CUDA_SOURCES = sorted(set((REPO / "cuda").glob("*.cu")) - {CUDA_DEVICE})
HIP_SOURCES = sorted(set((REPO / "hip").glob("*.hip")) - {HIP_DEVICE})
CUDA_ARCHS = (75, 80, 86, 89, 90, 120)
HIPCC_ARCHS = ("gfx1030", "gfx1031")
CLANG = "clang++-19"
CLANG_ARCHS = ("gfx1030", "gfx1100", "gfx1200")  # RDNA 2, 3 and 4
SLOW_CLANG_ARCHS = ("gfx1031", "gfx1101", "gfx1102", "gfx1151", "gfx1201")
# Kernels over maps of 4 and 8 bytes an item: nothing in them is 16 bytes wide.
MAP_KERNELS = re.compile(r"sort_\w+_kernel|source_kernel")
WITHOUT_FLOATS = {"sort"}
# A kernel's fewest, where it is more than one: all four rows' accesses.
HIP_WIDE_ACCESSES = {"codec": 4, "residual": 4, "moments8": 4}


def compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not on PATH"
        if os.environ.get("USAF_REQUIRE_COMPILERS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


def run(command: list[str], folder: pathlib.Path) -> str:
    environment = {**os.environ, "HIP_PLATFORM": "amd"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    return result.stdout + result.stderr


def compile_cuda(nvcc: str, source: pathlib.Path, arch: int, folder: pathlib.Path) -> tuple[str, str]:
    """The report of ptxas, and the PTX."""
    folder = folder / f"{source.stem}_{arch}"
    folder.mkdir()
    command = [nvcc, "-std=c++20", "-O3", "-fmad=false", f"-I{REPO / 'cpp'}", f"-I{source.parent}"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra"]
    # The host's part is the same for all chips.
    command += ["-Werror=all-warnings", "--keep", "-c" if arch == CUDA_ARCHS[-1] else "-cubin"]
    command += [str(source), "-o", "out.o"]
    report = run(command, folder)
    (ptx,) = folder.glob("*.ptx")
    return report, ptx.read_text()


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    nvcc, folder = compiler("nvcc"), tmp_path_factory.mktemp("cuda")
    jobs = [(source, arch) for source in CUDA_SOURCES for arch in CUDA_ARCHS]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_cuda(nvcc, *job, folder), jobs)
        return dict(zip(jobs, results))


def compile_hip(hipcc: str, source: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
    """The assembly of each chip, kept from the compilation of the very object that a build links."""
    command = [hipcc, "-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{REPO / 'cpp'}", f"-I{source.parent}", *(f"--offload-arch={arch}" for arch in HIPCC_ARCHS)]
    run([*command, "-save-temps", "-c", str(source), "-o", f"{source.stem}.o"], folder)
    return {arch: next(folder.glob(f"{source.stem}*{arch}*.s")).read_text() for arch in HIPCC_ARCHS}


def device_libs(clang: str, archs: tuple[str, ...], folder: pathlib.Path) -> pathlib.Path:
    libs = folder / "device_libs"
    run([sys.executable, str(REPO / "cpp/cmake/hip_device_libs.py"), clang, str(libs), *archs], folder)
    return libs


def compile_hip_by_clang(clang: str, libs: pathlib.Path, source: pathlib.Path, arch: str, folder: pathlib.Path) -> str:
    """The assembly, made as cpp/cmake/hip_compiler.cmake has it made; the host's part is hipcc's to test."""
    command = [clang, "-x", "hip", f"--rocm-device-lib-path={libs}", "-mcode-object-version=4", "-std=c++20", "-O3"]
    command += ["-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{REPO / 'cpp'}", f"-I{REPO / 'hip'}"]
    out = folder / f"{source.stem}_{arch}.s"
    run([*command, f"--offload-arch={arch}", "--cuda-device-only", "-S", str(source), "-o", str(out)], folder)
    return out.read_text()


def hip_by_clang(archs: tuple[str, ...], folder: pathlib.Path) -> dict[pathlib.Path, dict[str, str]]:
    clang = compiler(CLANG)
    libs = device_libs(clang, archs, folder)
    # The longest first.
    jobs = [(source, arch) for source in sorted(HIP_SOURCES, key=lambda s: -s.stat().st_size) for arch in archs]
    found: dict[pathlib.Path, dict[str, str]] = {source: {} for source in HIP_SOURCES}
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda job: compile_hip_by_clang(clang, libs, *job, folder), jobs)
        for (source, arch), text in zip(jobs, texts):
            found[source][arch] = text
    return found


@pytest.fixture(scope="module", params=["hipcc", "clang", pytest.param("clang, other chips", marks=pytest.mark.slow)])
def hip(request, tmp_path_factory):
    """Of each source the assembly of each chip."""
    folder = tmp_path_factory.mktemp("hip")
    if request.param != "hipcc":
        return hip_by_clang(CLANG_ARCHS if request.param == "clang" else SLOW_CLANG_ARCHS, folder)
    hipcc = compiler("hipcc")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(HIP_SOURCES, pool.map(lambda source: compile_hip(hipcc, source, folder), HIP_SOURCES)))


def hip_kernels(assembly: str) -> dict[str, list[str]]:
    """Mnemonics of each kernel, in order; both of a dual-issue pair."""
    names = re.findall(r"^\s*\.amdhsa_kernel\s+(\S+)", assembly, re.MULTILINE)
    bodies = {name: assembly.split(f"\n{name}:", 1)[1].split("\n\t.section", 1)[0] for name in names}
    return {name: re.findall(r"(?:^\t|:: )([a-z]\w+)", body, re.MULTILINE) for name, body in bodies.items()}


def fused_by_clang(instructions: list[str]) -> tuple[list[str], list[str]]:
    """What rounds once where two operations may be written: plain fused multiply-adds, and all else (conversions mixed
    in, packed, dot products, those that take 0 * anything as 0)."""
    names = [i for i in instructions if re.search(r"fma(?!x)|mad|mac|dot\d|mix", i)]
    names = [i for i in names if not re.fullmatch(r"v_div_fmas_f\d\d|v_mad_(co_)?[iu]\d\d_[iu]\d\d(_\w+)?", i)]
    plain = [i for i in names if re.fullmatch(r"(v|v_dual)_(fma|fmac|fmaak|fmamk)_f(32|64)(_e32|_e64)?", i)]
    return plain, [i for i in names if i not in plain]


def test_cuda_uses_registers_only(cuda):
    kernels: dict[pathlib.Path, set[frozenset[str]]] = {}
    for (source, arch), (report, _) in cuda.items():
        entries = re.findall(rf"Compiling entry function '(\S+)' for 'sm_{arch}'", report)
        usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert entries
        assert len(usage) == len(entries)
        assert set(usage) == {("0", "0", "0")}, f"{source.name} sm_{arch}\n{report}"
        kernels.setdefault(source, set()).add(frozenset(entries))
    assert all(len(per_arch) == 1 for per_arch in kernels.values())  # the same kernels for every chip


def test_cuda_rounds_as_written(cuda):
    for (source, arch), (_, ptx) in cuda.items():
        floating = re.findall(
            r"\b(?:mul|add|sub|div|rcp|sqrt|fma|mad|min|max|ex2|lg2|rsqrt)\.[\w.]*f(?:16|32|64)\b", ptx
        )
        wrong = [name for name in floating if re.search(r"^(fma|mad)|approx|ftz|rsqrt|ex2|lg2", name)]
        assert any(name == "mul.rn.f32" for name in floating) or source.stem in WITHOUT_FLOATS
        assert not wrong, f"{source.name} sm_{arch}: {sorted(set(wrong))}"


def test_cuda_moves_16_bytes(cuda):
    for (source, _), (_, ptx) in cuda.items():
        bodies = re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.MULTILINE | re.DOTALL)
        assert bodies
        for name, body in bodies:
            if MAP_KERNELS.search(name):
                continue
            assert re.search(r"(ld|st)\.global(\.nc)?\.v4\.", body), f"{source.name}: {name}"


def test_cuda_rounds_two_bf16_at_once(cuda):
    """Where the chip can (cpp/numerics/bfloat16.h)."""
    for (source, arch), (_, ptx) in cuda.items():
        if source.stem in ("codec", "gather", "glu", "masked_adam"):
            assert ("cvt.rn.bf16x2.f32" in ptx) == (arch >= 80), f"{source.name} sm_{arch}"


def test_hip_uses_registers_only(hip):
    keys = ("private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count")
    for source, assemblies in hip.items():
        for arch, assembly in assemblies.items():
            count = len(hip_kernels(assembly))
            assert count > 0
            for key in keys:
                values = re.findall(rf"^\s*\.{key}:\s*(\d+)", assembly, re.MULTILINE)
                assert values == ["0"] * count, f"{source.name} {arch}: {key} {values}"


def test_hip_rounds_as_written(hip):
    for source, assemblies in hip.items():
        for arch, assembly in assemblies.items():
            modes = set(re.findall(r"\.amdhsa_float_denorm_mode_32 (\d)", assembly))
            assert modes == {"3"}, f"{source.name} {arch}: subnormals are flushed"
            for name, instructions in hip_kernels(assembly).items():
                fused, others = fused_by_clang(instructions)
                assert not others, f"{arch} {name}: {others}"
                # A correctly rounded division is five of them and v_div_fmas, a root two (fp32) or seven (fp64);
                # nothing else may be fused.
                for bits, root, fused_a_root in (("f32", r"v_(s_)?sqrt_f32", 2), ("f64", "v_rsq_f64", 7)):
                    divisions = sum(i.startswith(f"v_div_fmas_{bits}") for i in instructions)
                    roots = sum(re.match(root, i) is not None for i in instructions)
                    of_type = sum(bits in i for i in fused)
                    assert of_type == 5 * divisions + fused_a_root * roots, f"{arch} {name}: {fused}"
                    assert sum(i.startswith(f"v_div_fixup_{bits}") for i in instructions) == divisions


HALF_OF_A_PRODUCT = """
#include "numerics/float16.h"
__global__ void written_plainly(const float* x, _Float16* out) {
  *out = static_cast<_Float16>(x[threadIdx.x] * x[0]);
}
__global__ void by_to_f16(const float* x, usaf::F16* out) { *out = usaf::to_f16(x[threadIdx.x] * x[0]); }
"""


@pytest.mark.parametrize("arch", CLANG_ARCHS)
def test_hip_product_and_conversion_stay_two(arch, tmp_path):
    """What to_f16 prevents is there without it, and is seen."""
    source = tmp_path / "half_of_a_product.hip"
    source.write_text(HALF_OF_A_PRODUCT)
    clang = compiler(CLANG)
    kernels = hip_kernels(compile_hip_by_clang(clang, device_libs(clang, (arch,), tmp_path), source, arch, tmp_path))
    fused = {name: fused_by_clang(instructions)[1] for name, instructions in kernels.items()}
    plainly, guarded = (next(name for name in fused if part in name) for part in ("written_plainly", "by_to_f16"))
    assert fused[plainly] == ["v_fma_mixlo_f16"]
    assert fused[guarded] == []
    assert any(i.startswith("v_mul_f32") for i in kernels[guarded])
    assert any(i.startswith("v_cvt_f16_f32") for i in kernels[guarded])


def test_hip_moves_16_bytes(hip):
    for source, assemblies in hip.items():
        for arch, assembly in assemblies.items():
            for name, instructions in hip_kernels(assembly).items():
                if MAP_KERNELS.search(name):
                    continue
                wide = sum(bool(re.match(r"global_(load|store)_(dwordx4|b128)", i)) for i in instructions)
                assert wide >= HIP_WIDE_ACCESSES.get(source.stem, 1), f"{arch} {name}: {wide}"


@pytest.mark.parametrize("source", [*HIP_SOURCES, HIP_DEVICE], ids=lambda path: path.name)
def test_hip_compiles_under_nvcc(source, tmp_path):
    command = [compiler("nvcc"), "-x", "cu", "-std=c++20", "-fmad=false", "-arch=sm_90", "-Werror=all-warnings"]
    command += [f"-I{REPO / 'tests/hip_on_cuda'}", f"-I{REPO / 'cpp'}", f"-I{source.parent}"]
    run([*command, "-c", str(source), "-o", "out.o"], tmp_path)
    assert (tmp_path / "out.o").stat().st_size > 0


def test_the_devices_compile(tmp_path):
    includes = ["-std=c++20", f"-I{REPO / 'cpp'}", "-c"]
    run([compiler("nvcc"), "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", *includes, str(CUDA_DEVICE)], tmp_path)
    run([compiler("hipcc"), "-Wall", "-Wextra", "-Werror", *includes, str(HIP_DEVICE)], tmp_path)
