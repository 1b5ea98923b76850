"""A CUDA driver without CUDA: kernels are compiled for this processor and run on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tests.emulation.build import load_kernels

_running = threading.Lock()  # the runtime has one set of fibers, and ctypes lets threads go on


class EmulationError(AssertionError):
    """A kernel did what no kernel may do, or was launched with wrong arguments."""


class _Request(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("seed", ctypes.c_ulonglong),
        ("count", ctypes.c_uint),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_ulonglong)),
    )


class EmulatedModule:
    """The kernels of one source."""

    def __init__(self, driver: EmulatedDriver, source: str, name: str, threads: int) -> None:
        self._driver = driver
        self._name = name
        self._threads = threads
        self._library = load_kernels(source, name)

    def launch(self, kernel: str, blocks: int, arguments: Sequence[np.ndarray]) -> None:
        """Run a kernel to its end.

        Raises:
            EmulationError: the kernel or its arguments were at fault.
        """
        entry = getattr(self._library, f"emulator_entry_{kernel}", None)
        if entry is None:
            raise EmulationError(f"{self._name} has no kernel {kernel}")
        if blocks < 1:
            raise EmulationError(f"{kernel} needs at least one block, got {blocks}")
        several = [array.shape for array in arguments if array.size != 1]
        if several:
            raise EmulationError(f"arguments of {kernel} are single values, got arrays {several}")
        self._driver.launches.append((kernel, blocks))
        values = [np.array(array, copy=True) for array in arguments]  # alive and aligned
        request = _Request(
            blocks,
            self._threads,
            self._driver.next_seed(),
            len(values),
            (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)),
            (ctypes.c_ulonglong * len(values))(*(value.nbytes for value in values)),
        )
        entry.restype = ctypes.c_char_p
        with _running:
            problem = entry(ctypes.byref(request))
        if problem is not None:
            raise EmulationError(problem.decode())


class EmulatedDriver:
    """The driver of the CUDA backend, for CPU tensors.

    Attributes:
        launches: every launch's kernel and number of blocks; for tests to read and clear.
        launch_seed: if set, the seed of all launches, as an error's message tells it. Otherwise
            each launch has its own, drawn from `seed`: it decides who runs before whom.
        is_capturing: what `capturing` answers.
    """

    def __init__(self, seed: int = 0, blocks: int = 3) -> None:
        self.launches: list[tuple[str, int]] = []
        self.launch_seed: int | None = None
        self.is_capturing = False
        self._seeds = random.Random(seed)
        self._blocks = blocks

    def module(self, source: str, name: str, threads: int, device: torch.device) -> EmulatedModule:
        assert device.type == "cpu"
        return EmulatedModule(self, source, name, threads)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        assert device.type == "cpu"
        yield

    def resident_blocks(self, device: torch.device) -> int:
        assert device.type == "cpu"
        return self._blocks

    def capturing(self, device: torch.device) -> bool:
        return self.is_capturing

    def next_seed(self) -> int:
        """The next launch's seed."""
        drawn = self._seeds.getrandbits(64)
        return drawn if self.launch_seed is None else self.launch_seed
