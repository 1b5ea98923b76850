"""What FullyShardedDataParallel (FSDP1) cuts into flat pieces: elementwise float32 state only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from optfactory import Optimizer2State, build_optimizer, list_optimizers
from optfactory.errors import ConfigError

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch.distributed is not built"),
    # FSDP1 is deprecated, and has something to say of one process and of CPUs.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(whole_names: bool, dtype: torch.dtype = torch.float32) -> FullyShardedDataParallel:
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 50)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model, use_orig_params=whole_names, device_id=torch.device("cpu")
        )


def trained(model: FullyShardedDataParallel, name: str, **options: Any) -> Optimizer2State:
    optimizer = build_optimizer(name, model.parameters(), **options)
    model(torch.ones(2, 100, dtype=next(model.parameters()).dtype)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("whole_names", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        *[(name, {}, "optim_bits: 8-bit state") for name in list_optimizers("*8bit")],
        ("adam", {"optim_bits": 8}, "optim_bits: 8-bit state"),
        ("lamb", {}, "name: 'lamb' needs the norms of whole tensors"),
        ("muon32bit", {}, "needs whole matrices, not"),
        ("adamw", {"percentile_clipping": 5}, "percentile_clipping: needs the norms"),
        ("adamw", {"nonfinite": "skip_step"}, "nonfinite: 'skip_step' must be decided"),
    ],
)
def test_what_needs_whole_tensors_is_refused_with_the_remedy(
    name: str, options: dict[str, Any], words: str, whole_names: bool
) -> None:
    model = sharded(whole_names)
    for params in (model, model.parameters()):
        with pytest.raises(ConfigError, match=rf"(?s){words}.*FSDP1.*fully_shard \(FSDP2\)"):
            build_optimizer(name, params, **options)
    optimizer = build_optimizer(name, [torch.ones(3).requires_grad_()], **options)
    with pytest.raises(ConfigError, match=words):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("whole_names", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("adamw", {}, torch.float32),
        ("paged_adam", {"amsgrad": True}, torch.float32),
        ("adamw", {"nonfinite": "skip_element", "skip_zeros": True}, torch.float32),
        ("adamw", {"param_rounding": "stochastic"}, torch.bfloat16),
        ("adamw", {"param_rounding": "kahan"}, torch.bfloat16),
        ("adamw", {"master_weights": "fp32"}, torch.bfloat16),
    ],
)
def test_what_is_computed_element_by_element_trains_and_is_gathered(
    name: str, options: dict[str, Any], dtype: torch.dtype, whole_names: bool
) -> None:
    model = sharded(whole_names, dtype)
    optimizer = trained(model, name, **options)
    saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    assert set(saved["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert saved["state"]["0.weight"]["exp_avg"].shape == (60, 100)
    before = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved)
    optimizer.load_state_dict(before)
    trained(model, name, **options)


def test_halves_of_masters_are_refused_as_integers_are_not_gathered() -> None:
    model = sharded(True, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"master_weights: .* unlike fp32, .*FSDP1"):
        build_optimizer("adamw", model, master_weights="split")


def test_a_group_beside_the_pieces_may_have_8_bits() -> None:
    model = sharded(whole_names=True)
    groups = [
        {"params": list(model.parameters()), "optim_bits": 32},
        {"params": [torch.ones(64, 64).requires_grad_()], "optim_bits": 8},
    ]
    assert len(build_optimizer("adamw", groups).param_groups) == 2
