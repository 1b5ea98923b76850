"""Four processes of one machine that run functions of the tests together, over gloo.

They start once for all tests: importing torch four times takes longer than most of what they do.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing as mp
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PROCESSES = 4
_GRIDS = ((2, 2), (1, 2), (2, 1))


@dataclass(frozen=True)
class Team:
    """The processes that take part in a function, as one of them sees it.

    Attributes:
        rank, world: its number among them, and how many there are.
        meshes: device meshes by their sizes: (world,), and (2, 2) of four.
        folder: one that all of them see, empty at first.
    """

    rank: int
    world: int
    meshes: dict[tuple[int, ...], Any]
    folder: Path

    @property
    def mesh(self) -> Any:
        """All of them in one dimension."""
        return self.meshes[self.world,]

    @property
    def group(self) -> Any:
        """Their process group."""
        return self.mesh.get_group()


class Processes:
    """Runs functions on teams of processes, and starts new ones after a failure."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._runs = 0
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(
        self, function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 120
    ) -> list[Any]:
        """What `function(team, *arguments)` returns on each of `world` processes.

        The function is one of a test module's, found there again by its name.

        Raises:
            AssertionError: it raised in one of them, whose traceback this shows, or took too long.
        """
        if not self._workers:
            self._start()
        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        folder.mkdir(parents=True)
        module = f"tests.distributed.{Path(inspect.getfile(function)).stem}"
        place = (module, function.__qualname__)
        for _, connection in self._workers:
            connection.send((place, world, arguments, str(folder)))
        results, waiting = {}, {c: rank for rank, (_, c) in enumerate(self._workers)}
        while waiting:
            ready = wait(list(waiting), timeout=seconds)
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    results[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = (False, "the process ended")
            if any(not good for good, _ in results.values()):
                seconds = 10  # the others may wait for one that failed
        failed = {rank: text for rank, (good, text) in results.items() if not good}
        failed |= dict.fromkeys(sorted(waiting.values()), "did not come back")
        if failed:
            self.stop()
            raise AssertionError("\n".join(f"process {r}: {text}" for r, text in failed.items()))
        return [results[rank][1] for rank in range(world)]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = self._folder / f"store{self._runs}"
        self._folder.mkdir(parents=True, exist_ok=True)
        for rank in range(PROCESSES):
            ours, theirs = context.Pipe()
            target, arguments = _serve, (rank, str(store), theirs, self._environment)
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(rank: int, store: str, connection: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch
    from torch import distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    meshes: dict[tuple[int, ...], Any] = {
        (world,): DeviceMesh("cpu", list(range(world))) for world in range(1, PROCESSES + 1)
    }
    meshes[2, 2] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    while True:
        try:
            (module, name), world, arguments, folder = connection.recv()
        except EOFError:
            return
        try:
            function = getattr(importlib.import_module(module), name)
            torch.manual_seed(0)
            team = Team(rank, world, meshes, Path(folder))
            connection.send((True, function(team, *arguments) if rank < world else None))
        except BaseException:  # whatever it is, the test shows it
            connection.send((False, traceback.format_exc()))
