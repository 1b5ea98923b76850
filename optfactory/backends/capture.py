"""Steps while a CUDA graph is captured."""

from __future__ import annotations

import torch

from optfactory import backends
from optfactory.backends.base import WARM_UP
from optfactory.errors import BackendError
from optfactory.step.slots import Slot


def refuse_capture(slots: list[Slot], devices: set[torch.device]) -> None:
    """Raise before a graph records what must happen once, or scalars that must change.

    Raises:
        BackendError: says what to do before or instead.
    """
    captured = {device for device in devices if backends.backend_for(device).capturing(device)}
    if not captured:
        return
    for slot in slots:
        if slot.parameter.grad is None or slot.local.device not in captured:
            continue
        if not slot.layout.device_step:
            raise BackendError(
                f"a CUDA graph is being captured, and the step of {slot.name} is computed on the "
                "host, so that replays would repeat it; set capturable: true"
            )
        if not slot.state:
            raise BackendError(WARM_UP)
