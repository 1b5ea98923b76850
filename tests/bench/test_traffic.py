"""The bytes behind every limit, against sums by hand."""

import re

import pytest
import torch

from optfactory import list_optimizers
from optfactory.bench import traffic
from optfactory.bench.candidates import BASELINE, chosen, peers, state_bytes
from optfactory.bench.measure import CaseRun
from tests.bench.harness import LINE, ScriptedDevice, momentum, no_tick

# (bytes of p and g, states, passes) -> read p, g, states (in both passes); write p, states
EIGHT_BITS = 2 * 1 + 2 * 4 / 256
BY_HAND = {
    "adamw float32": (4, 8, 1, (4 + 4 + 8) + (4 + 8)),
    "adamw8bit float32": (4, EIGHT_BITS, 1, 16.0625),
    "adamw 16 bits": (2, 8, 1, (2 + 2 + 8) + (2 + 8)),
    "adamw8bit 16 bits": (2, EIGHT_BITS, 1, 10.0625),
    "torch 16 bits": (2, 4, 1, (2 + 2 + 4) + (2 + 4)),
    "lamb float32": (4, 8, 2, (4 + 4 + 8) + (4 + 4 + 8) + (4 + 8)),
    "lamb8bit float32": (4, EIGHT_BITS, 2, 26.09375),
    "lamb 16 bits": (2, 8, 2, (2 + 2 + 8) + (2 + 2 + 8) + (2 + 8)),
    "lamb8bit 16 bits": (2, EIGHT_BITS, 2, 16.09375),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_bytes_that_a_step_must_move(what):
    size, states, passes, expected = BY_HAND[what]
    n = 256_000
    moved = traffic.step_bytes(size * n, size * n, int(states * n), passes)
    assert moved / n == expected


def test_the_modules_table_states_the_same_numbers():
    table = re.findall(r"^ {4}(\w+(?: \w+)?) +(\d+ bits) +(\S+) +(\S+)", traffic.__doc__, re.M)
    stated = {(size, bits): (float(adamw), float(lamb)) for size, bits, adamw, lamb in table}
    assert stated == {
        (p, bits): (BY_HAND[f"adamw{eight} {p}"][3], BY_HAND[f"lamb{eight} {p}"][3])
        for p in ("float32", "16 bits")
        for bits, eight in (("32 bits", ""), ("8 bits", "8bit"))
    } | {("16 bits", "16 bits"): (14, 22)}


def test_lars_reads_states_once():
    """Norms of float32 parameters and gradients, and a step with codes and scales of momentum."""
    moved = traffic.step_bytes(1024, 1024, 260, 2, of_gradients=True)
    assert moved == (1024 + 1024) + (1024 + 1024 + 260) + (1024 + 260)


def test_bytes_of_the_streams_are_those_read_and_written():
    assert traffic.STREAMS == {"sum(a)": 4, "b = a": 4 + 4, "a = a*s": 4 + 4, "a = a*s + b": 8 + 4}
    assert traffic.seconds_at(4e9, 8e9) == 2.0


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_row_counts_parameters_gradients_and_the_states_that_are_there(dtype, size):
    run = CaseRun(LINE, dtype, ScriptedDevice(), 1e9, 0.0, 1)
    ((_, one, two), _) = run.run([momentum("one"), momentum("two", passes=2)], no_tick)
    assert one.state_bytes_per_param == size
    assert one.moved_bytes_per_param == (size + size + size) + (size + size)
    assert two.moved_bytes_per_param == 2 * (size + size + size) + (size + size)


@pytest.mark.parametrize("name", list_optimizers())
def test_optimizers_with_a_trust_ratio_read_everything_twice(name):
    (candidate,) = chosen([name])
    is_lars = "lars" in name
    assert candidate.passes == (2 if "lamb" in name or is_lars else 1)
    assert candidate.of_gradients == is_lars


def test_peers_with_a_trust_ratio_read_everything_twice(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    there, _ = peers("cpu")
    assert {peer.label for peer in there if peer.passes == 2} == {"bitsandbytes LAMB", "timm Lamb"}
    assert BASELINE.passes == 1


def test_state_widths_of_real_optimizers():
    parameter = torch.zeros(64, 256, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    for name, expected in (("adamw", 8.0), ("lamb8bit", EIGHT_BITS)):
        optimizer = chosen([name])[0].build([parameter])
        optimizer.step()
        counters = 8  # the step, float64
        assert state_bytes(optimizer) == expected * parameter.numel() + counters
