"""The examples on several processes: saved by some, killed, and gone on with by others."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed as dist

ROOT = Path(__file__).parents[2]
TINY = ["warmup=2", "eval_every=10", "eval_batches=2", "batch=12", "context=16"]
TINY += ["model.width=32", "model.depth=1", "model.heads=2", "optimizer=adamw8bit"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="torch was built without gloo",
    ),
]


def torchrun(processes: int, script: str, *arguments: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, f"--nproc-per-node={processes}", str(ROOT / "examples" / script), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str, saves: str = "") -> str:
    def once() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
        )

    done = once()
    # torch 2.13 seldom aborts so while gloo's threads end, and torchrun ends the others.
    if saves and "terminate called without an active exception" in done.stderr:
        shutil.rmtree(saves, ignore_errors=True)
        done = once()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def started(count: int, folder: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Processes as torchrun starts them, but ours to kill: its own outlive it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "train_lm.py"), *arguments],
            cwd=folder,
            env=environment() | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(count)
    ]


def test_the_short_example_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    first = run(tmp_path, *torchrun(2, "fsdp2.py", folder, "lamb8bit"), saves=folder)
    assert "step 20: loss" in first
    assert "2 processes" in first
    second = run(tmp_path, *torchrun(1, "fsdp2.py", folder, "lamb8bit"))
    assert "step 40: loss" in second


def test_the_language_model_goes_on_after_a_kill(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400, encoding="utf-8")
    saved = tmp_path / "saved"
    common = [*TINY, f"data={text}", f"hydra.run.dir={tmp_path / 'out'}"]
    both = started(2, tmp_path, *common, "steps=100000", f"checkpoint={saved}")
    try:
        deadline = time.monotonic() + 120
        while len(list(saved.glob("step-*/.metadata"))) < 2 and time.monotonic() < deadline:
            assert [process.poll() for process in both] == [None, None]
            time.sleep(0.1)
    finally:
        for process in both:
            process.kill()
            process.wait()
    last = max(int(path.parent.name[5:]) for path in saved.glob("step-*/.metadata"))
    assert last >= 20
    # One process without torchrun reads what two have written.
    alone = [sys.executable, str(ROOT / "examples" / "train_lm.py"), *common]
    printed = run(tmp_path, *alone, f"steps={last + 10}", f"resume={saved}")
    assert "validation loss" in printed
