"""What is measured of a device; of a GPU with a torch.cuda that only notes what is asked of it."""

from __future__ import annotations

import pytest
import torch

from optfactory.bench import machine
from optfactory.bench.device import CpuDevice, CudaDevice
from optfactory.errors import BackendError


def test_the_cpu_has_a_name_a_bandwidth_and_a_clock():
    device = CpuDevice()
    facts = device.describe()
    assert str(facts["device"]).strip()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert device.bandwidth(quick=True, repeats=2) > 0
    assert device.time(lambda: None) >= 0
    assert device.room() > 0


# Seconds of each stream in three rounds, the first of which does not count -> bytes an element
# and second of the fastest: 4, 8, 8 and 12 bytes.
ROUNDS = [
    ([1, 1, 1, 1, 4, 8, 8, 12, 2, 8, 8, 12], 4 / 2),
    ([1, 1, 1, 1, 4, 8, 8, 12, 4, 2, 8, 12], 8 / 2),
    ([1, 1, 1, 1, 4, 8, 2, 12, 4, 8, 8, 12], 8 / 2),
    ([1, 1, 1, 1, 4, 8, 8, 4, 4, 8, 8, 12], 12 / 4),
]


@pytest.mark.parametrize(("times", "expected"), ROUNDS)
def test_the_bandwidth_is_that_of_the_fastest_run_of_the_fastest_stream(
    times, expected, monkeypatch
):
    device, left = CpuDevice(), iter(times)
    monkeypatch.setattr(device, "time", lambda call: next(left))
    assert device.bandwidth(quick=True, repeats=2) == expected * 2**20


def test_streams_read_and_write_what_is_counted(monkeypatch):
    device, calls = CpuDevice(), []
    monkeypatch.setattr(device, "time", lambda call: calls.append(call) or 1.0)
    device.bandwidth(quick=True, repeats=1)
    read, copy, scale, update = calls[:4]
    a = scale()
    assert read().shape == ()
    b = copy()
    assert b.data_ptr() != a.data_ptr()
    assert torch.equal(a, b)
    assert update().data_ptr() == a.data_ptr()
    assert float(a[0]) == 0.5 * float(b[0]) + float(b[0])


def test_arrays_are_far_larger_than_the_cache(monkeypatch):
    sizes: list[int] = []

    def ones(elements: int, **kind: object) -> torch.Tensor:
        sizes.append(elements)
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", ones)
    for cache in (0, 2**20, 2**30):
        monkeypatch.setattr(machine, "largest_cache", lambda cache=cache: cache)
        CpuDevice().bandwidth(repeats=1)
    assert all(4 * size >= 2**28 for size in sizes)
    assert all(4 * size >= 4 * 2**30 for size in sizes[-2:])  # one stream reads one array alone


def test_only_installed_packages_have_a_version():
    assert list(machine.versions("torch", "no-such-package")) == ["torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_says_what_to_check():
    with pytest.raises(BackendError, match="no CUDA device; check `nvidia-smi`"):
        CudaDevice()


# ---- a GPU that only takes notes --------------------------------------------------------------

MILLISECONDS = 1e-3


class Notes:
    """Stands for torch.cuda: a call of the host takes the seconds that are set."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0

    def work(self) -> None:
        self.log.append("work")
        self.now += 2 * MILLISECONDS

    def event(self, **options: bool) -> Notes.Event:
        assert options == {"enable_timing": True}
        return self.Event(self)

    class Event:
        def __init__(self, notes: Notes) -> None:
            self.notes, self.at = notes, 0.0

        def record(self) -> None:
            self.notes.log.append("record")
            self.at = self.notes.now

        def synchronize(self) -> None:
            self.notes.log.append("wait")

        def elapsed_time(self, end: Notes.Event) -> float:
            return 1e3 * (end.at - self.at)


class Gpu(CudaDevice):
    name = "cpu"  # where its tensors are


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    made = Notes()
    fakes = {
        "is_available": lambda: True,
        "Event": made.event,
        "_sleep": lambda cycles: made.log.append(f"busy {cycles / CudaDevice.CYCLES:.3f}"),
        "synchronize": lambda: made.log.append("idle"),
        "reset_peak_memory_stats": lambda: made.log.append("reset"),
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 4 * 2**20,
        "mem_get_info": lambda: (10**9, 8 * 10**10),
        "empty_cache": lambda: made.log.append("empty"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("optfactory.bench.device.time.perf_counter", lambda: made.now)
    monkeypatch.setattr("optfactory.bench.device.MIB", 2**10)  # small data to fill caches with
    return made


def test_a_gpus_time_is_that_between_two_events_on_a_busy_device_with_other_data(notes):
    device = Gpu()
    device._other_data = type("Data", (), {"sum": lambda: notes.log.append("read")})
    assert device.time(notes.work) == pytest.approx(2 * MILLISECONDS)
    assert notes.log == ["read", "busy 0.000", "record", "work", "record", "wait"]


def test_the_device_is_busy_while_the_host_queues(notes):
    device = Gpu()
    device.get_ready(notes.work, lambda: None)
    notes.log.clear()
    device.time(notes.work)
    assert notes.log[0] == "busy 0.003"  # one and a half times the host's 2 ms


def test_the_hosts_time_starts_on_an_idle_device_and_does_not_wait(notes):
    slow, none = Gpu().get_ready(notes.work, lambda: None)
    assert (slow.host_ms, none.host_ms) == (pytest.approx(2.0), 0.0)
    assert notes.log[:4] == ["idle", "work", "idle", "work"]


def test_allocations_of_a_step_are_counted_from_what_was_there(notes):
    (figures,) = Gpu().get_ready(notes.work)
    assert figures.extra_mib == (4 * 2**20 - 2**20) / 2**10
    assert notes.log[-3:] == ["reset", "work", "idle"]


def test_a_gpus_bandwidth_counts_bytes_read_and_written(notes, monkeypatch):
    device, times = Gpu(), iter([1.0] * 4 + [4.0, 2.0, 4.0, 4.0])
    monkeypatch.setattr(device, "time", lambda call: next(times))
    assert device.bandwidth(quick=True, repeats=1) == 2 * 64 * 2**10 / 2.0


def test_some_of_a_gpus_memory_is_left_for_steps(notes):
    assert 0.8e9 < Gpu().room() < 1e9
    assert notes.log == ["empty"]


def test_the_caches_of_devices_have_a_size(notes, monkeypatch):
    monkeypatch.setattr(machine, "largest_cache", lambda: 0)
    assert CpuDevice().caches() == 32 * 2**10  # of the small unit of these tests
    card = type("Card", (), {"L2_cache_size": 50 * 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert Gpu().caches() == 50 * 2**20


def test_a_gpu_is_described_by_card_and_driver(notes, monkeypatch):
    card = type("Card", (), {"name": "NVIDIA H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(machine, "driver_version", lambda: "580.1")
    facts = Gpu().describe()
    assert facts["device"] == "NVIDIA H100, 80 GiB"
    assert facts["driver"] == "580.1"
