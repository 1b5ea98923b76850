"""Lion as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import Options, PagingOptions
from optfactory.optim.named import Betas, Named


class Lion(Named):
    """Lion (Chen et al. 2023); state of `optim_bits` bits, paged if `is_paged`.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Lion([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'lion'

    Args:
        params: as for `build_optimizer`.
        lr, betas, weight_decay: hyperparameters; weight decay is decoupled.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False).
        is_paged: keep state where it makes room for other data; if None, as the name says.
        options: any other field of the config, e.g. ``param_rounding="stochastic"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "lion"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LION_ARGUMENTS}
        self._build(params, values, options)


_LION_ARGUMENTS = (
    *("lr", "betas", "weight_decay", "optim_bits", "args", "min_8bit_size"),
    *("percentile_clipping", "block_wise", "is_paged"),
)


class _FixedLion(Lion):
    """The classes whose name states the width have no argument for it."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LION_ARGUMENTS}
        self._build(params, values, options)


class Lion8bit(_FixedLion):
    """`Lion` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Lion8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'lion8bit'
    """

    _name = "lion8bit"


class Lion32bit(_FixedLion):
    """`Lion` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Lion32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'lion32bit'
    """

    _name = "lion32bit"


class PagedLion(Lion):
    """`Lion` with paged state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedLion([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_lion'
    """

    _name = "paged_lion"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LION_ARGUMENTS}
        self._build(params, values, options)


class _FixedPagedLion(Lion):
    """The paged classes whose name states the width have an argument for neither."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        **options: Unpack[PagingOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LION_ARGUMENTS}
        self._build(params, values, options)


class PagedLion8bit(_FixedPagedLion):
    """`Lion` with paged 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedLion8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_lion8bit'
    """

    _name = "paged_lion8bit"


class PagedLion32bit(_FixedPagedLion):
    """`Lion` with paged 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedLion32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_lion32bit'
    """

    _name = "paged_lion32bit"
