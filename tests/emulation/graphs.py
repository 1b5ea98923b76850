"""CUDA graphs without CUDA: what a step launches and what it asks torch for, to be repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optfactory.backends.cuda.driver import CudaModule
from tests.emulation.driver import EmulatedDriver

aten = torch.ops.aten


class Graph:
    """All that a captured step did; it keeps the memory that torch gave the step."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Do it again with the same memory."""
        with torch.no_grad():
            for do in self.work:
                do()


class GraphDriver(EmulatedDriver):
    """A driver that captures steps; captured ones run too, so that their results can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()

    def module(self, source: str, name: str, threads: int, device: torch.device) -> Any:
        return _CapturedModule(self, super().module(source, name, threads, device))

    def capture(self, step: Callable[[], Any]) -> Graph:
        """Run a step.

        Raises:
            AssertionError: the host asked for a value of the device, which no graph can know.
        """
        self.graph, self.is_capturing = Graph(), True
        try:
            with _CapturedOperations(self.graph):
                step()
        finally:
            self.is_capturing = False
        return self.graph


class _CapturedModule:
    def __init__(self, driver: GraphDriver, module: CudaModule) -> None:
        self._driver, self._module = driver, module

    def launch(self, kernel: str, blocks: int, arguments: Sequence[np.ndarray]) -> None:
        launch = partial(self._module.launch, kernel, blocks, [np.copy(a) for a in arguments])
        if self._driver.is_capturing:
            self._driver.graph.work.append(launch)
        launch()


class _CapturedOperations(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func is not aten._local_scalar_dense.default, "the host waits for the device"
        result = func(*args, **kwargs)
        if func.namespace == "aten" and isinstance(result, Tensor):
            self._graph.work.append(partial(_repeat, func, args, kwargs, result))
        return result


def _repeat(func: Any, args: Any, kwargs: dict[str, Any], target: Tensor) -> None:
    """An operation whose result goes to where the first one went."""
    result = func(*args, **kwargs)
    if result.data_ptr() != target.data_ptr():  # neither in place nor a view
        target.copy_(result)
