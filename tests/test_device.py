"""The CPU device: order of operations on streams, events with generations, failures kept until somebody waits."""

from __future__ import annotations

import ctypes
import os
import time

import pytest
from native_memory import NativeDevice
from usaf_ext.errors import DeviceError

BIG = 32 << 20  # bytes: a copy that takes milliseconds


@pytest.fixture
def device():
    device = NativeDevice("cpu")
    yield device
    device.close()


def buffer(size: int, fill: int = 0) -> ctypes.Array:
    memory = ctypes.create_string_buffer(size)
    ctypes.memset(memory, fill, size)
    return memory


def test_names_itself_and_its_memory(device):
    assert device.name() == b"cpu"
    assert device.total_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert 0 < device.free_bytes() < device.total_bytes()


def test_a_stream_works_in_order(device):
    stream, event = device.create_stream(), device.create_event()
    big, small = [buffer(BIG, 7), buffer(BIG), buffer(BIG)], buffer(16, 9)
    device.copy(big[1], big[0], BIG, stream)
    device.copy(big[2], big[1], BIG, stream)
    device.copy(big[1], small, 16, stream)
    device.record(event, stream)
    device.synchronize(event)
    assert device.query(event) == 1
    assert big[2].raw == b"\x07" * BIG
    assert big[1].raw[:32] == b"\x09" * 16 + b"\x07" * 16


def test_copies_are_asynchronous(device):
    """The host goes on while a copy runs: some query in a few tries comes before the copy's end."""
    stream, event = device.create_stream(), device.create_event()
    source, target = buffer(BIG, 1), buffer(BIG)
    unfinished = 0
    for _ in range(20):
        for _ in range(4):
            device.copy(target, source, BIG, stream)
        device.record(event, stream)
        unfinished += device.query(event) == 0
        device.synchronize(event)
        if unfinished:
            break
    assert unfinished


def test_a_stream_waits_for_another(device):
    first, second = device.create_stream(), device.create_stream()
    copied, done = device.create_event(), device.create_event()
    for round_ in range(1, 5):
        source, middle, target = buffer(BIG, round_), buffer(BIG), buffer(16)
        last = ctypes.byref(middle, BIG - 16)
        device.copy(middle, source, BIG, first)
        device.record(copied, first)
        device.stream_wait(second, copied)
        device.copy(target, last, 16, second)
        device.record(done, second)
        device.synchronize(done)
        assert target.raw == bytes([round_]) * 16


def test_the_null_stream_is_the_caller(device):
    stream, event = device.create_stream(), device.create_event()
    source, target = buffer(BIG, 3), buffer(BIG)
    device.record(event, None)
    assert device.query(event) == 1
    device.copy(target, source, BIG, stream)
    device.record(event, stream)
    device.stream_wait(None, event)
    assert target.raw[-1] == 3


def test_an_event_never_recorded_is_done(device):
    stream, event, after = device.create_stream(), device.create_event(), device.create_event()
    assert device.query(event) == 1
    device.synchronize(event)
    device.stream_wait(None, event)
    device.stream_wait(stream, event)
    device.record(after, stream)
    device.synchronize(after)


def test_a_wait_is_for_the_latest_record(device):
    stream, event = device.create_stream(), device.create_event()
    source, target = buffer(BIG, 5), buffer(BIG)
    device.record(event, stream)
    device.synchronize(event)
    for _ in range(4):
        device.copy(target, source, BIG, stream)
    device.record(event, stream)
    device.synchronize(event)
    assert target.raw[-1] == 5


def test_a_stream_waits_for_the_record_of_its_time(device):
    """A record that comes after stream_wait does not hold it up, or two streams could wait for each other."""
    first, second = device.create_stream(), device.create_stream()
    event, other = device.create_event(), device.create_event()
    device.record(event, first)
    device.stream_wait(second, event)
    device.record(other, second)
    device.stream_wait(first, other)
    device.record(event, first)
    device.synchronize(event)


def test_a_later_record_elsewhere_does_not_end_an_earlier_wait(device):
    slow, quick, waiting = (device.create_stream() for _ in range(3))
    event, done = device.create_event(), device.create_event()
    source, middle, target = buffer(BIG, 8), buffer(BIG), buffer(16)
    device.copy(middle, source, BIG, slow)
    device.record(event, slow)
    device.stream_wait(waiting, event)
    device.record(event, quick)
    device.record(event, None)
    device.copy(target, ctypes.byref(middle, BIG - 16), 16, waiting)
    device.record(done, waiting)
    device.synchronize(done)
    assert target.raw == b"\x08" * 16


def test_a_failure_is_kept_for_whoever_waits(device):
    stream, other = device.create_stream(), device.create_stream()
    event, later, clean = (device.create_event() for _ in range(3))
    source, target = buffer(16, 1), buffer(16)
    device.copy(target, None, 16, stream)
    device.copy(target, source, 16, stream)
    device.record(event, stream)
    for wait in (lambda: device.synchronize(event), lambda: device.stream_wait(None, event)):
        with pytest.raises(DeviceError, match="cpu copy of 16 bytes: null pointer"):
            wait()
    assert target.raw == b"\x01" * 16  # the stream went on
    device.stream_wait(other, event)
    device.record(later, other)
    with pytest.raises(DeviceError, match="null pointer"):
        device.synchronize(later)
    device.record(clean, stream)
    device.synchronize(clean)


def test_a_destroyed_stream_ends_its_work_first(device):
    stream, event = device.create_stream(), device.create_event()
    source, target = buffer(BIG, 6), buffer(BIG)
    device.copy(target, source, BIG, stream)
    device.record(event, stream)
    device.destroy_event(event)  # still to be recorded
    device.destroy_stream(stream)
    assert target.raw[-1] == 6


def test_a_destroyed_device_joins_its_workers():
    device = NativeDevice("cpu")
    first, second, event = device.create_stream(), device.create_stream(), device.create_event()
    source, middle, target = buffer(BIG, 4), buffer(BIG), buffer(BIG)
    device.copy(middle, source, BIG, first)
    device.record(event, first)
    device.stream_wait(second, event)
    device.copy(target, middle, BIG, second)
    device.close()
    assert target.raw[-1] == 4


def test_idle_workers_sleep(device):
    device.create_stream()
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.05


def test_refuses_bad_arguments(device):
    stream, event = device.create_stream(), device.create_event()
    target = buffer(16)
    with pytest.raises(DeviceError, match="must not be negative, got -1"):
        device.copy(target, target, -1, stream)
    with pytest.raises(DeviceError, match="not a stream of this device"):
        device.copy(target, target, 16, None)
    with pytest.raises(DeviceError, match="not a stream of this device"):
        device.record(event, event)
    with pytest.raises(DeviceError, match="not an event of this device"):
        device.synchronize(stream)
    for pointer, size in ((None, 16), (target, 0)):
        with pytest.raises(DeviceError, match="register_host: expected a pointer and a size above 0"):
            device.register_host(pointer, size)
    assert device.register_host(target, 16) == 0
    device.destroy_stream(stream)
    with pytest.raises(DeviceError, match="not a stream"):
        device.record(event, stream)
