"""RMSprop as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import PagingOptions
from optfactory.optim.named import Named


class RMSprop(Named):
    """RMSprop (Tieleman & Hinton 2012), as torch.optim.RMSprop.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.RMSprop([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'rmsprop'

    Args:
        params: as for `build_optimizer`.
        lr, alpha, eps, weight_decay: hyperparameters; decay is L2.
        momentum: decay rate of the momentum of steps; 0: none.
        centered: divide by the standard deviation; 32-bit state only.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False).
        options: any other field of the config, e.g. ``param_rounding="stochastic"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "rmsprop"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _RMSPROP_ARGUMENTS}
        self._build(params, values, options)


_RMSPROP_ARGUMENTS = (
    *("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "optim_bits", "args"),
    *("min_8bit_size", "percentile_clipping", "block_wise"),
)


class _FixedRMSprop(RMSprop):
    """The classes whose name states the width have no argument for it."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _RMSPROP_ARGUMENTS}
        self._build(params, values, options)


class RMSprop8bit(_FixedRMSprop):
    """`RMSprop` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.RMSprop8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'rmsprop8bit'
    """

    _name = "rmsprop8bit"


class RMSprop32bit(_FixedRMSprop):
    """`RMSprop` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.RMSprop32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'rmsprop32bit'
    """

    _name = "rmsprop32bit"
