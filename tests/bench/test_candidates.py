"""Which optimizers are timed: names, globs, peers; and the bytes of their states."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from torch import Tensor

from optfactory import list_optimizers
from optfactory.bench import candidates
from optfactory.bench.arguments import DEFAULTS
from optfactory.bench.cases import CASES
from optfactory.errors import ConfigError, UnknownOptimizerError


def labels(*words: str) -> list[str]:
    return [candidate.label for candidate in candidates.chosen(words)]


def test_names_aliases_and_globs_choose():
    assert labels("lamb", "adam8bit") == ["lamb", "adam8bit"]
    assert labels("PagedAdamW8bit") == ["paged_adamw8bit"]
    assert labels("*") == list_optimizers()
    assert labels("adam?8bit", "[a]dam") == ["adamw8bit", "adam"]
    assert labels("adam", "adam*", "Adam") == ["adam", *list_optimizers("adam?*")]


def test_the_memory_of_paged_state_can_be_chosen():
    assert labels("paged_adam:pinned", "paged_adam8bit:managed", "paged_adam") == [
        *("paged_adam:pinned", "paged_adam8bit:managed", "paged_adam")
    ]
    assert labels("paged_lamb*:pinned") == [f"{x}:pinned" for x in list_optimizers("paged_lamb*")]


@pytest.mark.parametrize("words", [["adm8bit"], ["adam", "adm8bit"]])
def test_an_unknown_name_is_the_registrys_error(words):
    with pytest.raises(UnknownOptimizerError, match=r"^unknown optimizer.*Did you mean 'adam8bit'"):
        candidates.chosen(words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nosuch*", r"no optimizer matches 'nosuch\*'"),
        ("adam:pinned", "page_memory needs is_paged"),
        ("paged_adam:floppy", "page_memory"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        candidates.chosen([word])


@pytest.mark.parametrize("device", DEFAULTS)
def test_the_defaults_exist(device):
    defaults = DEFAULTS[device]
    assert labels(*defaults.names) == list(defaults.names)
    assert labels(*defaults.startup) == list(defaults.startup)
    assert set(defaults.cases) <= set(CASES)


def test_what_is_slow_is_measured_in_few_cases():
    slow, quick = candidates.chosen(["paged_adamw8bit", "adamw8bit"])
    assert [case for case in CASES if slow.is_for(case)] == ["large", "100m", "tiny"]
    assert all(quick.is_for(case) for case in CASES)


def test_products_of_large_matrices_are_left_out():
    (muon,) = candidates.chosen(["muon8bit"])
    assert [case for case in CASES if muon.is_for(case)] == ["gpt2", "small", "tiny"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no parameter is without a name
        muon.build([torch.zeros(8, 4, requires_grad=True), torch.zeros(3, requires_grad=True)])


# ---- peers ------------------------------------------------------------------------------------


def test_peers_of_a_device(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    on_cpu, absent = candidates.peers("cpu")
    assert [peer.label for peer in on_cpu] == [
        *("bitsandbytes AdamW", "bitsandbytes AdamW8bit", "bitsandbytes LAMB"),
        *("torchao AdamW8bit", "torchao AdamW4bit", "torchao AdamWFp8", "timm Lamb"),
    ]
    assert absent == []
    on_gpu, _ = candidates.peers("cuda")
    assert {peer.label for peer in on_gpu} - {peer.label for peer in on_cpu} == {
        "bitsandbytes PagedAdamW8bit"
    }


def test_missing_packages_are_reported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    there, absent = candidates.peers("cpu")
    assert there == []
    assert {(peer.optimizer, peer.reason) for peer in absent} >= {
        ("timm Lamb", "not installed"),
        ("torchao AdamW8bit", "not installed"),
        ("bitsandbytes LAMB", "not installed"),
    }


def test_installed_peers_take_a_step_with_the_common_settings():
    there, _ = candidates.peers("cpu")
    for peer in there:
        if peer.library == "torchao":
            continue  # compiles for seconds
        parameter = torch.ones(64, 256, requires_grad=True)
        parameter.grad = torch.ones_like(parameter)
        optimizer = peer.build([parameter])
        optimizer.step()
        assert (parameter != 1).all(), peer.label
        assert candidates.state_bytes(optimizer) >= 2 * parameter.numel()
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (1e-4, 0.01)


def test_namesakes_in_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    names = ["sgd8bit", "lars", "paged_lion8bit", "adamw8bit", "adan8bit", "ademamix8bit"]
    before = {peer.label for peer in candidates.peers("cuda")[0]}
    there = candidates.peers("cuda", names)[0]
    added = [x for x in there if x.label not in before and x.library == "bitsandbytes"]
    kinds = ["SGD8bit", "LARS", "PagedLion8bit", "AdEMAMix8bit"]
    assert [peer.label for peer in added] == [f"bitsandbytes {kind}" for kind in kinds]
    assert all(peer.cases == candidates.FOR_SLOW for peer in added)
    assert [peer.passes for peer in added] == [1, 2, 1, 1]
    labels = {peer.label for peer in added}
    for peer in candidates.peers("cpu", names)[0]:
        if peer.label in labels:
            parameter = torch.ones(64, 256, requires_grad=True)
            parameter.grad = torch.ones_like(parameter)
            peer.build([parameter]).step()
            assert (parameter != 1).all(), peer.label


def test_fused_optimizers_of_torch():
    names = ["sgd8bit", "sgd", "adam8bit", "adamw8bit", "lion", "adagrad"]
    added = [peer for peer in candidates.peers("cpu", names)[0] if peer.library == "torch"]
    assert [peer.label for peer in added] == ["torch SGD", "torch Adam", "torch Adagrad"]
    (group,) = added[0].build([torch.zeros(3, requires_grad=True)]).param_groups
    assert (group["fused"], group["momentum"], group["lr"]) == (True, 0.9, 1e-4)


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_torch_is_measured_in_both_forms(how):
    candidate = {"fused": candidates.BASELINE, "foreach": candidates.FOREACH}[how]
    optimizer = candidate.build([torch.zeros(3, requires_grad=True)])
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert group[how]
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.01)
    assert how in candidate.label


# ---- bytes of states --------------------------------------------------------------------------


class Wrapper(Tensor):
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "codebook"], None


def test_states_that_wrap_others_and_shared_ones_are_counted_once():
    parameters = [torch.zeros(100, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters)
    codebook = torch.zeros(256)
    for p in parameters:
        wrapper = torch.zeros(100).as_subclass(Wrapper)
        wrapper.codes, wrapper.codebook = torch.zeros(100, dtype=torch.uint8), codebook[:]
        optimizer.state[p] = {"state": wrapper, "plain": torch.zeros(3), "step": 1}
    assert candidates.state_bytes(optimizer) == 2 * (100 + 12) + 1024
