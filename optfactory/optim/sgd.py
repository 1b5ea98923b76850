"""SGD as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import PagingOptions
from optfactory.optim.named import Named


class SGD(Named):
    """SGD (Sutskever et al. 2013), without momentum unless one is given; as torch.optim.SGD.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9).config.name
    'sgd'

    Args:
        params: as for `build_optimizer`.
        lr, momentum, dampening, weight_decay: hyperparameters; decay is L2. Without momentum there
            is no state, so that 8-bit classes want one.
        nesterov: step by Nesterov's momentum.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False).
        options: any other field of the config, e.g. ``param_rounding="stochastic"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "sgd"

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
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _SGD_ARGUMENTS}
        self._build(params, values, options)


_SGD_ARGUMENTS = (
    *("lr", "momentum", "dampening", "weight_decay", "nesterov", "optim_bits", "args"),
    *("min_8bit_size", "percentile_clipping", "block_wise"),
)


class _FixedSGD(SGD):
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
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _SGD_ARGUMENTS}
        self._build(params, values, options)


class SGD8bit(_FixedSGD):
    """`SGD` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.SGD8bit([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9).config.name
    'sgd8bit'
    """

    _name = "sgd8bit"


class SGD32bit(_FixedSGD):
    """`SGD` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.SGD32bit([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9).config.name
    'sgd32bit'
    """

    _name = "sgd32bit"
