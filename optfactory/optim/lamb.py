"""LAMB as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import LambOptions
from optfactory.optim.named import Betas, Named


class LAMB(Named):
    """LAMB (You et al. 2020) as bitsandbytes has it: the norm of a tensor's update is clipped.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.LAMB([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'lamb'

    Args:
        params: as for `build_optimizer`.
        lr, betas, eps, weight_decay: hyperparameters.
        bias_correction: correct the moments' bias towards zero in early steps.
        amsgrad: use the maximum of past second moments; 32-bit state only.
        adam_w_mode: decoupled decay (True), or L2, added to the gradient.
        optim_bits: 8 or 32; if None, what the class's name says, or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False; if None too).
        max_unorm: an update's norm is at most this times the tensor's; None: 1.0; 0: no limit.
        options: any other field of the config, e.g. ``trust_ratio="lamb"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "lamb"
    _whole_tensors = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool | None = None,
        max_unorm: float | None = None,
        **options: Unpack[LambOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LAMB_ARGUMENTS}
        self._build(params, values, {"trust_ratio": "clip", **options})


_LAMB_ARGUMENTS = (
    *("lr", "bias_correction", "betas", "eps", "weight_decay", "amsgrad", "adam_w_mode"),
    *("optim_bits", "args", "min_8bit_size", "percentile_clipping", "block_wise", "max_unorm"),
)


class _FixedLAMB(LAMB):
    """The classes whose name states the width have no argument for it."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool | None = None,
        max_unorm: float | None = None,
        **options: Unpack[LambOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _LAMB_ARGUMENTS}
        self._build(params, values, {"trust_ratio": "clip", **options})


class LAMB8bit(_FixedLAMB):
    """`LAMB` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.LAMB8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'lamb8bit'
    """

    _name = "lamb8bit"


class LAMB32bit(_FixedLAMB):
    """`LAMB` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.LAMB32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'lamb32bit'
    """

    _name = "lamb32bit"
