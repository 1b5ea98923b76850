"""Paged state lies in private files that the system can evict, and goes with the optimizer."""

from __future__ import annotations

import copy
import errno
import gc
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, list_optimizers
from optfactory.errors import ConfigError
from optfactory.memory import placement
from tests.conftest import on_cpus
from tests.devices import randn
from tests.families import states_of
from tests.torch_api.harness import (
    assert_same_training,
    held,
    is_file_mapped,
    mapping_of,
    snapshot,
    train,
)

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").is_file(), reason="mappings are read from /proc"
)

PAGED = list_optimizers("paged_*")
LARGE, SMALL = (400, 250), (333, 300)  # 100,000 elements, and 100 fewer


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [randn(shape, generator).requires_grad_() for shape in (LARGE, SMALL)]


_earlier: set[str] = set()  # mappings that tests of other files still hold in this process


def mapped_files() -> list[str]:
    """The mappings of optfactory's files that this test made."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ours = [line for line in lines if "optfactory-" in line and "optfactory-kernels" not in line]
    return [line for line in ours if line not in _earlier]


@pytest.fixture(autouse=True)
def nothing_mapped_before() -> None:
    gc.collect()
    _earlier.clear()
    _earlier.update(mapped_files())


# ---- where state lies ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGED)
def test_state_of_large_tensors_is_mapped_from_a_deleted_private_file(
    name: str, tmp_path: Path
) -> None:
    optimizer = build_optimizer(name, parameters(), page_dir=str(tmp_path))
    optimizer.init_states()
    large, small = (optimizer.state[p] for p in held(optimizer))
    keys = [key for key in large if not key.endswith("_absmax") and key != "step"]
    assert keys == [
        f"{state.name}_q8" if "8bit" in name else state.name for state in states_of(name)
    ]
    for key in keys:
        line = mapping_of(large[key])
        assert str(tmp_path / "optfactory-") in line
        assert line.endswith("(deleted)")
        assert line.split()[1] == "rw-s"
        assert not is_file_mapped(small[key])
    assert not is_file_mapped(large["step"])
    assert list(tmp_path.iterdir()) == []
    rows = optimizer.memory_report().rows
    assert [row.where for row in rows] == ["file-mapped", "resident"]
    train(optimizer, range(1))
    assert all(is_file_mapped(large[key]) for key in keys)
    assert all(optimizer.state[held(optimizer)[0]][key] is large[key] for key in keys)


@pytest.mark.parametrize("name", ["adam8bit", "lamb"])
def test_names_without_paging_map_nothing(name: str) -> None:
    optimizer = build_optimizer(name, parameters())
    optimizer.init_states()
    assert not mapped_files()
    optimizer = build_optimizer(name, parameters(), is_paged=True)
    optimizer.init_states()
    assert len(mapped_files()) == 2


@pytest.mark.parametrize("name", PAGED)
def test_paging_changes_no_bit(name: str, backend: str) -> None:
    paged = build_optimizer(name, parameters())
    resident = build_optimizer(name.removeprefix("paged_"), parameters())
    train(paged, range(2))
    train(resident, range(2))
    assert_same_training(paged, resident)


def test_amsgrads_third_state_is_paged_too() -> None:
    optimizer = build_optimizer("paged_adam", parameters(), amsgrad=True)
    optimizer.init_states()
    state = optimizer.state[held(optimizer)[0]]
    assert is_file_mapped(state["max_exp_avg_sq"])
    assert len(mapped_files()) == 3


def test_state_starts_at_zero_in_files_too() -> None:
    optimizer = build_optimizer("paged_adam", parameters())
    optimizer.init_states()
    for state in optimizer.state.values():
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_a_file_takes_disk_space_for_its_whole_size_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    reserve = os.posix_fallocate

    def watched(file: int, offset: int, size: int) -> None:
        reserve(file, offset, size)
        facts = os.fstat(file)
        sizes.append((size, facts.st_size, facts.st_blocks * 512, stat.S_IMODE(facts.st_mode)))
        (folder,) = tmp_path.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()

    monkeypatch.setattr(os, "posix_fallocate", watched)
    optimizer = build_optimizer("paged_adam8bit", parameters(), page_dir=str(tmp_path))
    optimizer.init_states()
    assert len(sizes) == 2
    for asked, size, on_disk, _ in sizes:
        assert asked == size == 100_000
        assert on_disk >= size


# ---- and when it goes ----------------------------------------------------------------------


@on_cpus
@pytest.mark.parametrize("name", ["paged_adam", "paged_lamb8bit"])
def test_files_go_with_the_optimizer(name: str, tmp_path: Path, backend: str) -> None:
    optimizer: Optimizer2State | None = build_optimizer(name, parameters(), page_dir=str(tmp_path))
    assert optimizer is not None
    train(optimizer, range(2))
    assert len(mapped_files()) == 2
    optimizer = None
    gc.collect()
    assert not mapped_files()
    assert list(tmp_path.iterdir()) == []


def test_files_of_replaced_state_go_too() -> None:
    optimizer = build_optimizer("paged_adam8bit", parameters())
    train(optimizer, range(1))
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert len(mapped_files()) == 2


def test_files_of_copies_are_their_own(tmp_path: Path) -> None:
    optimizer = build_optimizer("paged_adam", parameters(), page_dir=str(tmp_path))
    train(optimizer, range(1))
    other = copy.deepcopy(optimizer)
    assert len(mapped_files()) == 4
    before = snapshot(optimizer)
    train(other, range(1, 2))
    assert snapshot(optimizer) == before
    del other
    gc.collect()
    assert len(mapped_files()) == 2


# ---- the folder ----------------------------------------------------------------------------


def test_a_folder_that_is_none_is_refused_at_build_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    for folder in (tmp_path / "missing", file, "\0", ""):
        with pytest.raises(ConfigError, match="page_dir") as caught:
            build_optimizer("paged_adam", parameters(), page_dir=str(folder))
        assert repr(str(folder)) in str(caught.value)


def test_a_groups_folder_is_checked_too(tmp_path: Path) -> None:
    p, q = parameters()
    groups = [{"params": [p]}, {"params": [q], "page_dir": str(tmp_path / "missing")}]
    with pytest.raises(ConfigError, match=r"param_groups\[1\]\.page_dir"):
        build_optimizer("paged_adam", groups)


def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The superuser may write everywhere, so the system's answer is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="page_dir"):
        build_optimizer("paged_adam", parameters(), page_dir=str(tmp_path))


def test_state_goes_to_the_folder_of_its_group(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    params = [parameters()[0], parameters()[0]]
    groups = []
    for folder, p in zip(folders, params, strict=True):
        folder.mkdir()
        groups.append({"params": [p], "page_dir": str(folder)})
    optimizer = build_optimizer("paged_adam8bit", groups)
    optimizer.init_states()
    for folder, p in zip(folders, params, strict=True):
        assert str(folder) in mapping_of(optimizer.state[p]["exp_avg_q8"])


def test_the_default_folder_is_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/dev/shm")
    monkeypatch.setattr(placement, "_in_memory", lambda folder: folder == "/dev/shm")
    assert placement.default_page_dir() == "/var/tmp"
    monkeypatch.setattr(placement, "_in_memory", lambda folder: False)
    assert placement.default_page_dir() == "/dev/shm"


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no file system in memory")
def test_file_systems_in_memory_are_recognised(tmp_path: Path) -> None:
    assert placement._in_memory("/dev/shm")
    link = tmp_path / "link"
    link.symlink_to("/dev/shm")
    assert placement._in_memory(str(link))
    assert not placement._in_memory("/proc")


# ---- no room -------------------------------------------------------------------------------


def full(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["init_states", "step"])
def test_a_full_disk_is_an_error_that_says_where_and_what_to_do(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = build_optimizer("paged_adam8bit", parameters(), page_dir=str(tmp_path))
    for p in held(optimizer):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in held(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            getattr(optimizer, call)()
    assert caught.value.errno == errno.ENOSPC
    for word in (str(tmp_path), "100000 bytes", "page_dir"):
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    for p, old in zip(held(optimizer), before, strict=True):
        assert torch.equal(p, old)
    train(optimizer, range(1))  # as soon as there is room
    assert all(optimizer.state[p]["step"] == 1 for p in held(optimizer))


def test_a_copy_without_room_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build_optimizer("paged_adam", parameters())
    train(optimizer, range(1))
    before = snapshot(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            copy.deepcopy(optimizer)
    assert snapshot(optimizer) == before


# ---- a memory limit ------------------------------------------------------------------------

# RLIMIT_DATA bounds private memory: what a program allocates, and not shared mappings of files.
# The parameter and its gradient are such mappings here, so that the limit is all the state's.
LIMITED = """
import resource, sys
import torch
from optfactory import build_optimizer

torch.set_num_threads(1)
name, folder, numel = sys.argv[1], sys.argv[2], int(sys.argv[3])
warm = torch.ones(1000, 300).requires_grad_()
optimizer = build_optimizer(name, [warm], page_dir=folder if name.startswith("paged") else None)
warm.grad = torch.ones_like(warm)
optimizer.step()
del optimizer, warm

def in_file(label):
    with open(f"{folder}/{label}", "wb") as file:
        file.truncate(4 * numel)
    return torch.from_file(f"{folder}/{label}", shared=True, size=numel).view(-1, 1000)

p, g = in_file("p"), in_file("g").fill_(1.0)
p.requires_grad_()
p.grad = g
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "VmData" in line)
limit = used + 8 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
state_folder = folder if name.startswith("paged") else None
optimizer = build_optimizer(name, [p], lr=0.25, page_dir=state_folder)
assert optimizer.memory_report().state_bytes > 16 * 2**20
for _ in range(2):
    optimizer.step()
assert abs(p[0, 0].item() + 0.5) < 0.05 > abs(p[-1, -1].item() + 0.5), p[-1, -1]
print("finished with", optimizer.memory_report().state_bytes, "bytes of state")
"""


def limited(name: str, folder: Path, numel: int) -> subprocess.Popen[str]:
    folder.mkdir()
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", LIMITED, name, str(folder), str(numel)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root), "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
@pytest.mark.parametrize(("name", "numel"), [("adam", 4_000_000), ("adam8bit", 10_000_000)])
def test_state_larger_than_the_memory_limit_trains_paged_and_only_paged(
    name: str, numel: int, tmp_path: Path
) -> None:
    runs = [limited(f"paged_{name}", tmp_path / "a", numel), limited(name, tmp_path / "b", numel)]
    (output, errors), (other_output, other_errors) = (run.communicate() for run in runs)
    paged, resident = runs
    assert paged.returncode == 0, errors
    assert "finished with" in output
    assert resident.returncode != 0
    assert "memory" in other_errors
    assert "finished" not in other_output
