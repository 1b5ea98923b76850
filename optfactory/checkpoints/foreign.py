"""What others keep in `optimizer.state`: wrappers such as Lookahead, helpers that average weights.

Their keys are left alone, saved and loaded back. A key that means a state in some optimizer is none
of theirs: if nothing here reads it, the checkpoint is of another optimizer or is damaged.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optfactory.config.plain import plain
from optfactory.registry import get_optimizer_info, list_optimizers

# What optimizers of torch and bitsandbytes call their states, and others after them; with anything
# appended by an underscore these are states as well: exp_avg_sq_row, exp_avg_slow, absmax1_old ...
_STEMS = (
    *("exp_avg", "max_exp_avg", "exp_inf", "square_avg", "momentum_buffer", "compensation"),
    *("state1", "state2", "state3", "qmap", "qmap1", "qmap2", "qmap3"),
    *("absmax", "absmax1", "absmax2", "absmax3"),
)
# ... and these exactly.
_NAMES = (
    *("step", "step_size", "sum", "prev", "eta", "mu", "ax", "mu_product", "grad_avg"),
    *("acc_delta", "max1", "max2", "new_max1", "new_max2", "unorm_vec", "gnorm_vec"),
    *("neuron_second_moment", "master_low", "master"),
    "__bnb_optimizer_quant_state__",
)


class States:
    """Knows which keys mean a state, in this optimizer, in a registered one or elsewhere.

    Args:
        own: the names of this optimizer's states.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        infos = map(get_optimizer_info, list_optimizers())
        rules = (info.config_class.rule({**info.defaults, "name": info.name}) for info in infos)
        registered = [state.name for rule in rules for state in rule.states]
        stems = "|".join(map(re.escape, dict.fromkeys([*_STEMS, *registered, *own])))
        names = "|".join(map(re.escape, _NAMES))
        self._pattern = re.compile(rf"(?:{stems})(?:_.*)?|{names}", re.DOTALL)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._pattern.fullmatch(key) is not None


def copied(
    value: Any,
    device: torch.device | None = None,
    other: Callable[[Any], Any] = copy.deepcopy,
) -> Any:
    """A copy that shares no tensor and no container with what it was made of.

    Tensors keep their dtype, and numbers and texts become plain Python.

    Args:
        device: where tensors go; None leaves them where they are.
        other: copies what is no tensor, number or text, nor a list, tuple or dict of them.
    """
    if isinstance(value, Tensor):
        return value.detach().to(value.device if device is None else device, copy=True)
    if isinstance(value, (list, tuple)):
        items = [copied(item, device, other) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if type(value) is dict:
        return {plain(key): copied(item, device, other) for key, item in value.items()}
    simple = plain(value)
    return other(value) if simple is value else simple
