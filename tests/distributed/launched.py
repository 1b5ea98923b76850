"""A script for torchrun: frameworks that shard by FSDP2, beside one process.

Writes what differed, for each framework, into the folder that it is given. Modules that are not
installed are left out.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optfactory import build_optimizer
from tests.distributed.beside import Beside
from tests.distributed.harness import whole
from tests.distributed.nets import Net, fsdp, inputs, net

NAME = "adamw8bit"


def untied() -> Net:
    """accelerate maps parameters by name, and has none for the second use of a tensor."""
    model = net()
    model.head = nn.Linear(96, 101, bias=False)
    return model


def beside_one(rank: int, world: int, folder: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (world,))
    both: Beside = Beside.of(fsdp(mesh), "lamb8bit")
    return both.train(range(3), rank, world).wrong


def by_accelerate(rank: int, world: int, folder: Path) -> list[str]:
    """Its FSDP2 plugin, which puts placeholders into the groups, then the pieces."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="no_wrap",
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True)
    # It shards on GPUs only; what it does there works on CPUs too.
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model, single = untied(), untied()
    optimizers = [build_optimizer(NAME, m, lr=1e-2) for m in (model, single)]
    sharded, optimizer = accelerator.prepare(model, optimizers[0])
    both = Beside(sharded, single, optimizer, optimizers[1]).train(range(2), rank, world)
    accelerator.save_state(str(folder / "accelerate"))
    after = [w.detach().clone() for w in single.state_dict().values()]
    saved = copy.deepcopy(optimizers[1].state_dict())
    both.train(range(2, 4), rank, world)
    expected = [whole(p).detach().clone() for p in sharded.parameters()]
    accelerator.load_state(str(folder / "accelerate"))
    single.load_state_dict(dict(zip(single.state_dict(), after, strict=True)))
    optimizers[1].load_state_dict(saved)
    both.train(range(2, 4), rank, world)
    again = [whole(p) for p in sharded.parameters()]
    pairs = zip(again, expected, strict=True)
    return [*both.wrong, *(f"loaded {n}" for n, (a, b) in enumerate(pairs) if not a.equal(b))]


def by_lightning(rank: int, world: int, folder: Path) -> list[str]:
    """ModelParallelStrategy: an epoch, a checkpoint, and another one from there."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = fully_shard(net(), mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.net(batch)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(NAME, self, lr=1e-2)

    def fitted(epochs: int, resume: Path | None = None) -> tuple[Any, Any]:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=world,
            strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
            max_epochs=epochs,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        module = Module()
        data = torch.utils.data.DataLoader([inputs(seed) for seed in range(2)], batch_size=None)
        trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
        return trainer, module

    fitted(1)[0].save_checkpoint(folder / "lightning")
    _, module = fitted(2, folder / "lightning")
    single = net()
    alone = build_optimizer(NAME, single, lr=1e-2)
    for seed in (0, 1, 0, 1):
        single.zero_grad()
        single(inputs(seed)).backward()
        alone.step()
    pairs = zip(module.net.named_parameters(), single.parameters(), strict=True)
    return [name for (name, p), q in pairs if not whole(p).equal(q)]


USES: dict[str, Callable[[int, int, Path], list[str]]] = {
    "torch": beside_one,
    "accelerate": by_accelerate,
    "lightning": by_lightning,
}


def main(folder: Path) -> None:
    """Try all of them in one process group."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {
        module: use(rank, world, folder)
        for module, use in USES.items()
        if importlib.util.find_spec(module)
    }
    (folder / f"process {rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
