"""LARS as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import LarsOptions, PytorchLarsOptions
from optfactory.optim.named import Named


class LARS(Named):
    """LARS (You et al. 2017) as bitsandbytes has it: the norm of a tensor's update is clipped.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.LARS([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9).config.name
    'lars'

    Args:
        params: as for `build_optimizer`.
        lr, momentum, dampening, weight_decay: hyperparameters; decay is L2. Without momentum there
            is no state, so that 8-bit classes want one.
        nesterov: step by Nesterov's momentum.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        max_unorm: an update's norm is at most this times the tensor's; None: 0.02; 0: no limit.
        options: any other field of the config, e.g. ``trust_ratio="lars"``, the paper's; 8-bit
            state has one scale per tensor unless they say ``block_wise=True``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "lars"
    _whole_tensors = True

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        max_unorm: float | None = None,
        **options: Unpack[LarsOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LARS_ARGUMENTS}
        self._build(params, values, {"trust_ratio": "clip", **options})


_LARS_ARGUMENTS = (
    *("lr", "momentum", "dampening", "weight_decay", "nesterov", "optim_bits", "args"),
    *("min_8bit_size", "percentile_clipping", "max_unorm"),
)


class _FixedLARS(LARS):
    """The classes whose name states the width have no argument for it."""

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        max_unorm: float | None = None,
        **options: Unpack[LarsOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LARS_ARGUMENTS}
        self._build(params, values, {"trust_ratio": "clip", **options})


class LARS8bit(_FixedLARS):
    """`LARS` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.LARS8bit([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9).config.name
    'lars8bit'
    """

    _name = "lars8bit"


class LARS32bit(_FixedLARS):
    """`LARS` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.LARS32bit([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9).config.name
    'lars32bit'
    """

    _name = "lars32bit"


class PytorchLARS(LARS):
    """`LARS` with 32-bit state, by the arguments of bitsandbytes' class in plain torch.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PytorchLARS([torch.zeros(3, requires_grad=True)], momentum=0.9).config.name
    'lars32bit'
    """

    _name = "lars32bit"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_unorm: float | None = None,
        **options: Unpack[PytorchLarsOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LARS_ARGUMENTS}
        self._build(params, values, {"trust_ratio": "clip", **options})
