"""AdEMAMix as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import AdEMAMixOptions, PagedAdEMAMixOptions
from optfactory.optim.named import Named

ThreeBetas = tuple[float, float, float]


class AdEMAMix(Named):
    """AdEMAMix (Pagliardini et al. 2024); state of `optim_bits` bits, paged if `is_paged`.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.AdEMAMix([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'ademamix'

    Args:
        params: as for `build_optimizer`.
        lr, betas, eps, weight_decay: hyperparameters; weight decay is decoupled.
        alpha: weight of the slow average.
        t_alpha: steps in which alpha grows from 0; None: none.
        t_beta3: steps in which the slow average becomes slow; None: none.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        is_paged: keep state where it makes room for other data; if None, as the name says.
        options: any other field of the config, e.g. ``param_rounding="stochastic"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "ademamix"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: ThreeBetas = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        optim_bits: int | None = None,
        min_8bit_size: int = 4096,
        is_paged: bool | None = None,
        **options: Unpack[AdEMAMixOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADEMAMIX_ARGUMENTS}
        self._build(params, values, options)


_ADEMAMIX_ARGUMENTS = (
    *("lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay", "optim_bits"),
    *("min_8bit_size", "is_paged"),
)


class _FixedAdEMAMix(AdEMAMix):
    """The classes whose name states the width have no argument for it."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: ThreeBetas = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        min_8bit_size: int = 4096,
        is_paged: bool | None = None,
        **options: Unpack[AdEMAMixOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADEMAMIX_ARGUMENTS}
        self._build(params, values, options)


class AdEMAMix8bit(_FixedAdEMAMix):
    """`AdEMAMix` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.AdEMAMix8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'ademamix8bit'
    """

    _name = "ademamix8bit"


class AdEMAMix32bit(_FixedAdEMAMix):
    """`AdEMAMix` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.AdEMAMix32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'ademamix32bit'
    """

    _name = "ademamix32bit"


class PagedAdEMAMix(AdEMAMix):
    """`AdEMAMix` with paged state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdEMAMix([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_ademamix'
    """

    _name = "paged_ademamix"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: ThreeBetas = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        optim_bits: int | None = None,
        min_8bit_size: int = 4096,
        **options: Unpack[PagedAdEMAMixOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADEMAMIX_ARGUMENTS}
        self._build(params, values, options)


class _FixedPagedAdEMAMix(AdEMAMix):
    """The paged classes whose name states the width have an argument for neither."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: ThreeBetas = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        min_8bit_size: int = 4096,
        **options: Unpack[PagedAdEMAMixOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADEMAMIX_ARGUMENTS}
        self._build(params, values, options)


class PagedAdEMAMix8bit(_FixedPagedAdEMAMix):
    """`AdEMAMix` with paged 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdEMAMix8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_ademamix8bit'
    """

    _name = "paged_ademamix8bit"


class PagedAdEMAMix32bit(_FixedPagedAdEMAMix):
    """`AdEMAMix` with paged 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdEMAMix32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_ademamix32bit'
    """

    _name = "paged_ademamix32bit"
