"""Options of the whole suite: `--run-slow` adds what `make test` leaves out.

A file named by USAF_FAILURES is given each failure as it comes: a run that is stopped (bench/gpu.sh) has them there.
"""

from __future__ import annotations

import os

import devices
import pytest
import torch

NEED_A_GPU = {
    "test_cuda_graphs.py",
    "test_gpu_layer.py",
    "test_gpu_package.py",
    "test_gpu_training.py",
    "test_ops_devices.py",
}


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow (make test-full)")


def _note_failure(what, text):
    if "USAF_FAILURES" in os.environ:
        with open(os.environ["USAF_FAILURES"], "a") as file:
            file.write(f"{what}\n{text}\n\n")


class _NotesFailures:
    def pytest_runtest_logreport(self, report):
        if report.failed:
            _note_failure(f"{report.nodeid} ({report.when})", report.longreprtext)

    def pytest_collectreport(self, report):
        if report.failed:
            _note_failure(f"{report.nodeid} (collection)", report.longreprtext)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # xdist's workers send theirs to the process that started them
        config.pluginmanager.register(_NotesFailures())
    config.addinivalue_line("markers", "slow: takes long; runs with --run-slow only")
    config.addinivalue_line("markers", "gpu: runs on a GPU, the emulated one included (bench/gpu.sh)")
    config.addinivalue_line("markers", "gpu_code: compiles or emulates the GPU sources (make test-gpu-code)")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name.startswith(("test_gpu_", "test_emulated_")):
            item.add_marker("gpu_code")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("device") in devices.names()[1:] or item.path.name in NEED_A_GPU:
            item.add_marker("gpu")
    items[:] = devices.chosen(items, config.getoption("--run-slow"))
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs with --run-slow (make test-full)")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leave_a_broken_gpu(request):
    """What a GPU cannot do (an illegal access) stays with the process: an xdist worker would fail all that it is given
    from then on. It ends instead, which fails this test, and xdist starts another."""
    yield
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        _note_failure(f"{request.node.nodeid} (the GPU answers no more)", error)
        os._exit(3)


@pytest.fixture(params=devices.names())
def device(request):
    """The device that the ops of tests/devices.py run on, each in turn."""
    chosen = torch.device(request.param)
    with devices.running_on(chosen if chosen.type == "cpu" else devices.gpu()):
        yield chosen


@pytest.fixture
def on_gpu():
    """`device`, for what is tested on a GPU alone."""
    with devices.running_on(devices.gpu()):
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random Qwen3-MoE checkpoint in bf16; read it, never write to it."""
    from tiny_models import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def one_thread():
    """For tests of tiny models: with more threads than idle cores they would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_pager(request):
    """make_pager(num_layers, num_experts, num_slots, kind="cpu", busy_bytes=0, **ring) -> NativePager, closed at the
    end."""
    from native_memory import NativeDevice, NativePager

    def make(num_layers, num_experts, num_slots, kind="cpu", busy_bytes=0, **ring):
        device = NativeDevice(kind, busy_bytes)
        request.addfinalizer(device.close)
        pager = NativePager(device, num_layers, num_experts, num_slots, **ring)
        request.addfinalizer(pager.close)
        return pager

    return make


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request):
    """The CPU kernels on each instruction set in turn, of those that this CPU has."""
    from usaf_ext import _C

    levels = ["plain", "avx2", "avx512"]
    if levels.index(request.param) > levels.index(_C.detected_isa()):
        pytest.skip(f"this CPU has no {request.param}")
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa(_C.detected_isa())
