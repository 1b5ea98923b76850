"""8-bit state under FSDP2: train, save by Distributed Checkpoint, go on with other processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py /tmp/fsdp2            # adamw8bit, saves there
    torchrun --nproc-per-node 4 examples/fsdp2.py /tmp/fsdp2 lamb8bit   # another folder, please

Run it again on any number of processes, and it goes on where it was. It runs on CPUs (gloo) where
there is no GPU. `examples/train_lm.py` is a whole training run under torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optfactory import build_optimizer


def main(folder: str, name: str = "adamw8bit", steps: int = 20) -> None:
    """Train a small model for some steps more, and save it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    layers = [nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 64)]
    model = nn.Sequential(*layers).to(device)
    fully_shard(layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(name, model, lr=1e-3)  # after sharding: it trains these tensors

    done = 0
    weights, state = get_state_dict(model, optimizer)
    if (Path(folder) / ".metadata").exists():
        saved = {"model": weights, "optimizer": state, "steps": done}
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )
        done = saved["steps"]

    for step in range(done, done + steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(device)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "steps": done + steps}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        print(f"step {done + steps}: loss {loss.item():.4f}, {mesh.size()} processes")
        print(optimizer.memory_report())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
