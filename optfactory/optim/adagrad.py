"""Adagrad as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import PagingOptions
from optfactory.optim.named import Named


class Adagrad(Named):
    """Adagrad (Duchi, Hazan & Singer 2011), as torch.optim.Adagrad.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adagrad([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adagrad'

    Args:
        params: as for `build_optimizer`.
        lr, lr_decay, weight_decay, eps: hyperparameters; decay is L2.
        initial_accumulator_value: what the sums begin with.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False).
        options: any other field of the config, e.g. ``param_rounding="stochastic"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "adagrad"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADAGRAD_ARGUMENTS}
        self._build(params, values, options)


_ADAGRAD_ARGUMENTS = (
    *("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "optim_bits", "args"),
    *("min_8bit_size", "percentile_clipping", "block_wise"),
)


class Adagrad8bit(Adagrad):
    """`Adagrad` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adagrad8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adagrad8bit'
    """

    _name = "adagrad8bit"


class Adagrad32bit(Adagrad):
    """`Adagrad` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adagrad32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adagrad32bit'
    """

    _name = "adagrad32bit"
