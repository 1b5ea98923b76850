"""What engines do to a model between its uses."""

from __future__ import annotations

import sys

from torch import nn


def put_pieces_back(model: nn.Module) -> None:
    """Undo what a forward without a backward leaves of FSDP2: whole parameters in the model.

    They are freed at the next backward, and an optimizer of them would train nothing. The next
    forward gathers them anew.
    """
    # Not imported: without it there can be none of its models.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return
    for module in model.modules():
        if isinstance(module, kind):
            module.reshard()
