"""What docs/pages/explanation/names.md says of other libraries and of our names is what they do.

The page's tables are read, so that its numbers are written once. Rows of libraries that are not
installed are left out; run with them to check the rest.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info
from tests.conformance.harness import eager, peer
from tests.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "explanation" / "names.md"
START, GRADIENT = torch.tensor([[1.0, -2.0, 2.0, 4.0]]), torch.tensor([[0.2, 0.4, -0.4, 0.8]])
DECAY = 0.01
# Arguments that change no step.
QUIET = {"adabelief_pytorch": {"print_change_log": False}, "heavyball": {"compile_step": False}}
STEPS, LATE = 2000, 1000  # and steps without a gradient for the elements whose gradients are late


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rules as torch operations, which nothing is compiled for, and one thread for tiny tensors."""
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def table(*columns: str) -> list[dict[str, str]]:
    """The rows of the page's table with these first columns; an empty name is the one above."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith(f"| {' | '.join(columns)} |"))
    keys = [key.strip() for key in lines[head].strip("|").split("|")]
    rows: list[dict[str, str]] = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            return rows
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        assert len(cells) == len(keys), line
        row = dict(zip(keys, cells, strict=True))
        if not cells[0]:
            row[keys[0]] = rows[-1][keys[0]]
        rows.append(row)
    return rows


def names_of(row: dict[str, str]) -> str:
    return row["name"].strip("`")


def arguments(text: str) -> dict[str, Any]:
    """`lr=1e-3, betas=(0.9, 0.999)` as a mapping."""
    return call(f"f({text.strip('`')})")[1]


def call(text: str) -> tuple[str, dict[str, Any]]:
    """A call's function, and its arguments."""
    node = ast.parse(text.strip("`"), mode="eval").body
    assert isinstance(node, ast.Call)
    assert not node.args
    return ast.unparse(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}


def found(path: str) -> Any:
    """Another library's optimizer, or None where the library is not installed."""
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            return None


def known(row: dict[str, str]) -> bool:
    """Whether what a row is about can be run here."""
    path = call(row["optimizer"])[0]
    if path.startswith("optfactory."):
        return get_family(path) in FAMILIES
    return found(path) is not None


def get_family(path: str) -> str:
    return re.sub(r"(8|32)bit$", "", path.removeprefix("optfactory."))


def run(text: str, steps: int = 6, copies: int = 1, **more: Any) -> list[Tensor]:
    """The first steps, in learning rates."""
    path, asked = call(text)
    library = path.partition(".")[0]
    asked = {"lr": 0.01} | asked | QUIET.get(library, {}) | more
    scale = copies**-0.5
    p = (START.repeat(1, copies) * scale).requires_grad_()
    if library == "optfactory":
        optimizer: Any = build_optimizer(path.removeprefix("optfactory."), [p], **asked)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = found(path)([p], **asked)
    moved = []
    for number in range(steps):
        before = p.detach().double().clone()
        p.grad = GRADIENT.repeat(1, copies) * scale * (10.0 if number else 1.0)
        with warnings.catch_warnings(), eager():
            warnings.simplefilter("ignore")
            optimizer.step()
        moved.append((before - p.detach().double()) / asked["lr"])
    return moved


def near(got: float, said: str, relative: float = 2e-3) -> bool:
    """Whether a number is the page's, which has four digits."""
    return abs(got - float(said)) <= relative * abs(float(said)) + 1e-9


def test_steps() -> None:
    wrong, seen = [], set()
    for row in filter(known, table("name", "optimizer", "1st", "2nd")):
        seen.add(call(row["optimizer"])[0].partition(".")[0])
        moved = run(row["optimizer"])
        for column, number in (("1st", 0), ("2nd", 1), ("6th", 5)):
            length = float(moved[number].norm())
            if not near(length, row[column]):
                wrong.append(f"{row['optimizer']} {column}: {length:.4g}, not {row[column]}")
        if row["decay"]:
            share = decay_of(row["optimizer"])
            if abs(share - float(row["decay"])) > 0.07:
                wrong.append(f"{row['optimizer']} decay: {share:.2f}, not {row['decay']}")
    assert not wrong, "\n".join(wrong)
    assert {"optfactory", "torch"} <= seen


def decay_of(text: str) -> float:
    """What the sixth step takes more of lr * weight_decay * p with weight decay than without."""
    with_decay, without = (run(text, weight_decay=value)[-1] for value in (DECAY, 0.0))
    return float(((with_decay - without) * START).sum() / (START.double() ** 2).sum() / DECAY)


def test_ours_are_those_of_torch() -> None:
    """Where the page says "as torch's"."""
    seen = []
    for row in table("name", "optimizer", "1st", "2nd"):
        if row["optimizer"].startswith("`optfactory.") and "as torch's" in row["what differs"]:
            peers = get_optimizer_info(names_of(row)).base.torch_peer
            assert peers is not None
            momentum = "momentum=0.9" if names_of(row) == "sgd" else ""
            moved = run(f"torch.optim.{peers.name}({momentum})")
            for column, number in (("1st", 0), ("2nd", 1), ("6th", 5)):
                assert near(float(moved[number].norm()), row[column]), row["name"]
            seen.append(names_of(row))
    assert seen == ["adagrad", "adam", "adamw", "nadam", "radam", "rmsprop", "sgd"]


def test_rules_are_of_every_family_and_have_its_defaults() -> None:
    rows = table("name", "rule", "decay", "eps")
    names = [names_of(row) for row in rows]
    assert names == sorted(set(names))
    assert set(FAMILIES) <= set(names)
    for row in rows:
        if names_of(row) in FAMILIES:
            defaults = get_optimizer_info(names_of(row)).defaults
            for key, value in arguments(row["defaults"]).items():
                assert defaults[key] == value, f"{row['name']} {key}"


def test_defaults_that_differ() -> None:
    for row in table("name", "elsewhere", "there"):
        here, there = arguments(row["here"]), arguments(row["there"])
        assert here.keys() == there.keys()
        ours = get_optimizer_info(names_of(row)).defaults
        assert {key: ours[key] for key in here} == here
        other = found(row["elsewhere"].strip("`"))
        if other is not None:
            theirs = inspect.signature(other).parameters
            assert {key: theirs[key].default for key in there} == there, row["elsewhere"]


def test_lion_of_transformers_has_adams_betas(tmp_path: Path) -> None:
    peer("bitsandbytes")
    transformers = peer("transformers")
    args = transformers.TrainingArguments(output_dir=str(tmp_path), optim="lion_8bit")
    _, asked = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert asked["betas"] == (0.9, 0.999)
    assert get_optimizer_info("lion").defaults["betas"] == (0.9, 0.99)
    assert "by default (0.9, 0.999), where Lion's are (0.9, 0.99)" in PAGE.read_text("utf-8")


def test_ratios_at_8_bits() -> None:
    peer("bitsandbytes")
    for row in filter(known, table("optimizer", "1st")):
        length = float(run(row["optimizer"], steps=1, copies=1024)[0].norm())
        assert near(length, row["1st"]), f"{row['optimizer']}: {length}"


def averages(optimizer: Any, p: Tensor) -> Tensor:
    """The last average that bitsandbytes keeps in its first state."""
    state = optimizer.state[p]
    values = state["state1"]
    if "absmax1" in state:
        scales = state["absmax1"].repeat_interleave(256, dim=-1)
        values = state["qmap1"][values.long()] * scales.reshape(values.shape)
    return values[-1] if values.ndim > 1 else values


@pytest.mark.slow
def test_averages_at_8_bits_stand_still() -> None:
    bnb = peer("bitsandbytes").optim
    for row in table("average", "gradients"):
        kind = re.match(r"`(\w+)8bit`", row["average"])
        assert kind
        value = float(row["gradients"].split(" ")[0])
        for column, bits in (("8 bits", 8), ("32 bits", 32)):
            p = torch.zeros(256, requires_grad=True)
            asked = {"lr": 1e-3, "optim_bits": bits, "min_8bit_size": 1}
            optimizer = getattr(bnb, kind[1])([p], **asked)
            for step in range(STEPS):
                p.grad = torch.full_like(p, value)
                if "from step" in row["gradients"]:
                    p.grad[::2] = 1.0
                    p.grad[1::2] *= step >= LATE
                optimizer.step()
            got = float(averages(optimizer, p)[1])
            assert near(got, row[column]), f"{row['average']} {column}: {got}"


def test_maps_and_refusals_of_bitsandbytes() -> None:
    bnb = peer("bitsandbytes").optim
    for name in ("RMSprop8bit", "Adagrad8bit"):
        p = torch.zeros(4096, requires_grad=True)
        optimizer = getattr(bnb, name)([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert int((optimizer.state[p]["qmap1"] < 0).sum()) == 127
    p = torch.zeros(3, requires_grad=True)
    for name in ("SGD", "LARS"):
        with pytest.raises(NotImplementedError):
            getattr(bnb, name)([p], lr=0.1)
    for key in ("lr_decay", "initial_accumulator_value"):
        with pytest.raises(ValueError, match="not supported"):
            bnb.Adagrad([p], **{key: 0.1})
    optimizer = bnb.AdEMAMix32bit([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_one_cycle_overwrites_alpha_of_bitsandbytes() -> None:
    def first(make: Any, p: Tensor) -> tuple[Any, float]:
        optimizer = make([p])
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
        p.grad = torch.ones_like(p)
        optimizer.step()
        group = optimizer.param_groups[0]
        return group, float(-p.detach()[0] / group["lr"])

    numbers = re.search(
        r"([\d.]+) becomes\s+([\d.]+), and the first step ([\d.]+) instead of ([\d.]+) learning",
        PAGE.read_text("utf-8"),
    )
    assert numbers
    alpha, written, step, wanted = numbers.groups()
    bnb = peer("bitsandbytes").optim
    assert bnb.RMSprop([torch.zeros(1)]).defaults["betas"][0] == float(alpha)
    group, length = first(bnb.RMSprop, torch.zeros(4, requires_grad=True))
    assert group["betas"][0] == float(written)
    assert near(length, step)
    ours = partial(build_optimizer, "rmsprop")
    group, length = first(ours, torch.zeros(4, requires_grad=True))
    assert group["alpha"] == float(alpha)
    assert near(length, wanted)
