"""The real kernels of cuda/ and hip/, compiled as host C++ and run on the CPU: bit for bit against an oracle and the
CPU backend, under sanitizers too; and proof that the emulator catches what it should."""

from __future__ import annotations

import ctypes
import importlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import usaf_ext.ops as ops

HERE = pathlib.Path(__file__).parent / "gpu_emulation"
sys.path.insert(0, str(HERE))
build = importlib.import_module("build_emulation")
codec = importlib.import_module("codec_cases")

# HIP runs with both wave sizes: the sources are for wave32, and must be right on any.
TARGETS = {"cuda": ("cuda", 32), "hip_wave32": ("hip", 32), "hip_wave64": ("hip", 64)}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module", params=TARGETS)
def library(request, tmp_path_factory):
    name, wave_size = TARGETS[request.param]
    out = tmp_path_factory.mktemp("emulated")
    return codec.Library(str(build.build_library(out, name, wave_size=wave_size)))


@pytest.fixture(scope="module", params=["cuda", "hip"])
def broken(request, tmp_path_factory):
    native = ctypes.CDLL(str(build.build_library(tmp_path_factory.mktemp("broken"), f"broken_{request.param}")))
    native.last_message.restype = ctypes.c_char_p
    native.backend = request.param
    return native


@pytest.mark.parametrize("case", codec.cases(), ids=str)
def test_codec_equals_oracle(library, case):
    codec.check_case(library, case)


@pytest.mark.parametrize("format", codec.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 97, 1030])
def test_codec_equals_cpu_backend(library, format, dtype, cols):
    case = codec.Case(format, dtype, 6, cols)
    weight = codec.sample_weights(case)
    codes, absmax = codec.run_encode(library, case, weight)
    cpu_codes, cpu_absmax = ops.quantize_blocks(torch.from_numpy(weight).to(DTYPES[dtype]), format)
    np.testing.assert_array_equal(codes, cpu_codes.numpy())
    np.testing.assert_array_equal(absmax.view(np.uint8), cpu_absmax.numpy().view(np.uint8))
    decoded = codec.run_decode(library, case, codes, absmax)
    expected = ops.dequantize_blocks(cpu_codes, cpu_absmax, cols, format, DTYPES[dtype])
    as_bytes = expected.contiguous().view(torch.uint8).numpy().reshape(-1)
    np.testing.assert_array_equal(decoded.view(np.uint8), as_bytes)
    library.free()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_within_one_rounding_of_float64(library, dtype):
    case = codec.Case("nf4", dtype, 5, 333)
    codes, absmax = codec.encode_oracle(codec.sample_weights(case), "nf4")
    got = codec.run_decode(library, case, codes, absmax)
    value = codec.from_dtype(got, dtype).astype(np.float64).reshape(5, 333)
    exact = codec.decode_oracle(codes, absmax, 333, "nf4")
    relative = {"f32": 2.0**-24, "bf16": 1.01 * 2.0**-8, "f16": 1.01 * 2.0**-11}[dtype]
    np.testing.assert_allclose(value, exact, rtol=relative, atol=2.0**-25 if dtype == "f16" else 2.0**-149)
    library.free()


def test_launch_goes_to_the_passed_stream(library):
    library.native.last_stream.restype = ctypes.c_void_p
    case = codec.Case("nf4", "f32", 1, 64)
    codec.run_encode(library, case, codec.sample_weights(case))
    assert library.native.last_stream() == codec.STREAM
    library.free()


def test_empty_work_launches_nothing(library):
    before = library.native.launches()
    for rows, cols in ((0, 64), (3, 0)):
        case = codec.Case("nf4", "f32", rows, cols)
        codes, absmax = codec.run_encode(library, case, codec.sample_weights(case))
        codec.run_decode(library, case, codes, absmax)
    assert library.native.launches() == before
    library.free()


@pytest.mark.parametrize("library", ["hip_wave32"], indirect=True)
def test_an_earlier_error_is_not_the_launchs(library):
    case = codec.Case("nf4", "f32", 1, 64)
    library.native.leave_an_error()
    codec.run_encode(library, case, codec.sample_weights(case))
    library.free()


def test_failed_launch_is_an_error(library):
    case = codec.Case("nf4", "f32", 1, 64)
    library.native.fail_next_launch(98)
    with pytest.raises(RuntimeError, match=r"encode_rows: (CUDA|HIP) launch failed"):
        codec.run_encode(library, case, codec.sample_weights(case))
    library.native.fail_next_launch(98)
    with pytest.raises(RuntimeError, match=r"decode_rows: (CUDA|HIP) launch failed"):
        codec.run_decode(library, case, *codec.encode_oracle(codec.sample_weights(case), "nf4"))
    library.free()


def test_unaligned_codes_are_refused(library):
    codes = library.upload(np.zeros(32, np.uint8), offset=4)
    weight, absmax = library.upload(np.zeros(64, np.float32)), library.upload(np.zeros(1, np.float32))
    kind = (ctypes.c_int(1), ctypes.c_int(0), None)
    with pytest.raises(RuntimeError, match="codes: expected an address that is a multiple of 16"):
        library.call("encode_rows", weight, codes, absmax, None, 1, 64, 64, *kind)
    with pytest.raises(RuntimeError, match="codes: expected an address that is a multiple of 16"):
        library.call("decode_rows", codes, absmax, weight, None, None, 1, 64, 64, *kind)
    library.free()


def run_sanitized(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = build.sanitizer_environment()
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("target", ["cuda", "hip_wave32"])
def test_codec_under_sanitizers(target, tmp_path):
    name, wave_size = TARGETS[target]
    library = build.build_library(tmp_path, name, sanitize=True, wave_size=wave_size)
    result = run_sanitized([codec.__file__, str(library)])
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == f"{len(codec.cases())} cases"


# The emulator itself. Numbers of Mistake in broken_kernels.cpp.
NO_BARRIER, PARTIAL, TWO_BARRIERS, EARLY_EXIT, DIVERGENT, PAST_END, WRONG_MASK, MASK_WITHOUT_CALLER = range(1, 9)


def run_reverse(native, mistake: int) -> tuple[int, np.ndarray, np.ndarray]:
    values = np.arange(192, dtype=np.int32)
    out = np.zeros_like(values)
    status = native.run_reverse(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data), 2, mistake)
    return status, out, values.reshape(2, 96)[:, ::-1].reshape(-1)


@pytest.mark.parametrize("schedule", [0, 1, 2, 3, codec.WHOLE_WARPS])
def test_emulator_runs_correct_kernels(broken, schedule):
    broken.set_schedule(schedule)
    status, out, expected = run_reverse(broken, 0)
    assert status == 0
    np.testing.assert_array_equal(out, expected)
    values, total = np.arange(3, 131, dtype=np.int32), np.zeros(2, np.int32)
    pointers = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(total.ctypes.data)
    assert broken.run_sum(*pointers, 0) == 0
    assert total[0] == values[:96].sum()
    assert broken.run_tree_sum(*pointers, 100) == 0
    assert total[0] == values[:100].sum()
    assert total[1] == 16  # odd ones among the first warp's 32
    broken.set_schedule(0)


def test_deleted_barrier_shows_in_every_order(broken):
    for schedule in (0, 1, 2):
        broken.set_schedule(schedule)
        status, out, expected = run_reverse(broken, NO_BARRIER)
        assert status == 0
        assert (out != expected).any()
        assert (out == -1).any()  # what shared memory is filled with, also in the second block
        assert (out[96:] == -1).any()
    broken.set_schedule(0)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (PARTIAL, "partial barrier: reached by 16 of 96 threads"),
        (TWO_BARRIERS, "met a barrier at"),
        (EARLY_EXIT, "partial barrier: reached by 95 of 96 threads"),
    ],
)
def test_wrong_barriers_are_errors(broken, mistake, message):
    status, _, _ = run_reverse(broken, mistake)
    assert status == 1
    assert message in broken.last_message().decode()
    assert run_reverse(broken, 0)[0] == 0  # and the next launch is not disturbed


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (DIVERGENT, "not reached by all lanes of its mask"),
        (WRONG_MASK, "shuffle reads lane 16, which its mask leaves out"),
        (MASK_WITHOUT_CALLER, "its mask leaves out the calling lane"),
    ],
)
def test_wrong_collectives_are_errors(broken, mistake, message):
    if broken.backend == "hip" and mistake != DIVERGENT:
        pytest.skip("HIP's collectives name no mask")
    values, total = np.ones(96, np.int32), np.zeros(1, np.int32)
    assert broken.run_sum(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(total.ctypes.data), mistake) == 1
    assert message in broken.last_message().decode()


READ_PAST_END = """
import ctypes, sys
native = ctypes.CDLL(sys.argv[1])
native.device_malloc.restype = ctypes.c_void_p
memory = [ctypes.c_void_p(native.device_malloc(ctypes.c_size_t(192 * 4))) for _ in range(2)]
print(native.run_reverse(*memory, 2, int(sys.argv[2])))
"""


def test_read_past_the_end_is_caught_under_sanitizers(tmp_path):
    library = str(build.build_library(tmp_path, "broken_cuda", sanitize=True))
    result = run_sanitized(["-c", READ_PAST_END, library, "0"])
    assert result.stdout.strip() == "0", result.stderr[-4000:]
    result = run_sanitized(["-c", READ_PAST_END, library, str(PAST_END)])
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "broken_kernels.cpp" in result.stderr
