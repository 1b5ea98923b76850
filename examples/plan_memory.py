"""Will it fit? Groups, bytes and alternatives, before anything is allocated.

    python examples/plan_memory.py 24GiB

The same from the command line, for any function of yours that returns a model:

    optfactory plan paged_adamw8bit --model examples.plan_memory:llama --plot plan.png
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from optfactory import plan, ready_rules


class Block(nn.Module):
    """The tensors of one block of a Llama; a plan needs no forward pass."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({k: nn.Linear(width, width, bias=False) for k in "qkvo"})
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))


def llama(width: int = 4096, hidden: int = 11008, depth: int = 32) -> nn.Module:
    """A model of the size of Llama 7B."""
    model = nn.Module()
    model.embed = nn.Embedding(32000, width)
    model.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
    model.norm = nn.RMSNorm(width)
    model.lm_head = nn.Linear(width, 32000, bias=False)
    return model.to(torch.bfloat16)


def main(memory: str) -> None:
    with torch.device("meta"):  # tensors with a shape and without data
        model = llama()
    rules = ready_rules("llama")
    planned = plan("paged_adamw8bit", model, device="cuda", memory=memory, param_groups=rules)
    print(planned)
    best = [other.name for other in planned.alternatives if planned.verdict(other) == "fits"]
    print(f"\nwithout paging anything out, {memory} are enough for: {', '.join(best) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["24GiB"])
