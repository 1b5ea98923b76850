"""The optimizers as classes, with the arguments and the order of bitsandbytes' older API.

>>> import torch
>>> from optfactory import optim
>>> optim.Adam8bit([torch.zeros(64, 64, requires_grad=True)], lr=3e-4).config.name
'adam8bit'

Each class is `Optimizer2State` with a name's config: `Adam8bit(params, lr)` is
`build_optimizer("adam8bit", params, lr=lr)`. An argument has the effect that it names, or is
refused with a ValueError; that differs from bitsandbytes, where

* `weight_decay` of the Adam classes is decoupled: here that is `AdamW`, and `Adam` adds it to the
  gradient as torch.optim.Adam does (`adam_w_mode=True` changes that);
* `amsgrad`, `bias_correction`, `adam_w_mode` and more are accepted and ignored;
* the LAMB classes only clip the update's norm. These do so too (`trust_ratio="clip"`), at 8 bits as
  well, and take the paper's ratio with `trust_ratio="lamb"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from optfactory.arguments import AdamOptions, LambOptions
from optfactory.errors import ConfigError
from optfactory.factory import resolve
from optfactory.optimizer import Optimizer2State
from optfactory.param_groups import Params, with_lr

__all__ = [
    *("Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"),
    *("AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
    *("LAMB", "LAMB8bit", "LAMB32bit"),
]

Betas = tuple[float, float]

# Arguments with a default that bitsandbytes has where it has no effect: there, it states nothing.
_HISTORIC = {"optim_bits": 32, "is_paged": False}


_WIDTHS = {"8bit": 8, "32bit": 32}


class _Named(Optimizer2State):
    """An optimizer whose class states the name of its config."""

    _name: ClassVar[str]
    # What bitsandbytes' class has as its default where the config's differs.
    _own_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def _build(self, params: Params, values: dict[str, Any], options: Mapping[str, Any]) -> None:
        values |= _read_args(values.pop("args"), values)
        values |= options
        if values["weight_decay"] is None:
            values.pop("weight_decay")
        for key in ("optim_bits", "is_paged"):
            if _states(self._name, key) and values.get(key) == _HISTORIC[key]:
                values.pop(key)
        if _bits(self._name, values) == 32 and values.get("block_wise") == self._block_wise():
            values.pop("block_wise", None)  # a default that concerns 8-bit state only
        if values.get("max_unorm") == 1.0 and values.get("trust_ratio") == "lamb":
            values.pop("max_unorm")
        config = resolve(self._name, **values)
        if isinstance(values.get("lr"), Tensor):
            params = with_lr(params, values["lr"])
        super().__init__(params, config)

    def _block_wise(self) -> bool:
        return bool(self._own_defaults.get("block_wise", True))


def _states(name: str, key: str) -> bool:
    """Whether a name says by itself what an argument would."""
    return "bit" in name if key == "optim_bits" else name.startswith("paged_")


def _bits(name: str, values: Mapping[str, Any]) -> object:
    stated = next((bits for end, bits in _WIDTHS.items() if name.endswith(end)), None)
    return stated or values.get("optim_bits")


def _read_args(args: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of bitsandbytes' `args` object as keyword arguments.

    Raises:
        ConfigError: an entry is no argument of this optimizer.
    """
    if args is None:
        return {}
    entries = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    unknown = sorted(set(entries) - set(values) - {"skip_zeros", "max_unorm"})
    if unknown:
        raise ConfigError(
            f"args has the entries {unknown}, which this optimizer does not have; allowed are "
            f"{sorted(values)}"
        )
    # bitsandbytes' objects list every entry; what says nothing must not be refused as an argument.
    neutral = {"skip_zeros": False, "max_unorm": 0.0}
    return {key: value for key, value in entries.items() if key in values or value != neutral[key]}


class Adam(_Named):
    """Adam (Kingma & Ba 2015); state of `optim_bits` bits, paged if `is_paged`.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adam([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adam'

    Args:
        params: as for `build_optimizer`.
        lr, betas, eps: hyperparameters.
        weight_decay: if not given 0, for the AdamW classes 0.01; `adam_w_mode` says how it enters.
        amsgrad: use the maximum of past second moments; 32-bit state only.
        optim_bits: 8 or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False).
        is_paged: keep state where it makes room for other data.
        options: any other field of the config, e.g. ``param_rounding="stochastic"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        **options: Unpack[AdamOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADAM_ARGUMENTS}
        self._build(params, values, options)


_ADAM_ARGUMENTS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "optim_bits", "args", "min_8bit_size"),
    *("percentile_clipping", "block_wise", "is_paged"),
)


class Adam8bit(Adam):
    """`Adam` with 8-bit state; `optim_bits` may be left at its historic default.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adam8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adam8bit'
    """

    _name = "adam8bit"


class Adam32bit(Adam):
    """`Adam` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adam32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adam32bit'
    """

    _name = "adam32bit"


class PagedAdam(Adam):
    """`Adam` with paged state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdam([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_adam'
    """

    _name = "paged_adam"


class PagedAdam8bit(Adam):
    """`Adam` with paged 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdam8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_adam8bit'
    """

    _name = "paged_adam8bit"


class PagedAdam32bit(Adam):
    """`Adam` with paged 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdam32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_adam32bit'
    """

    _name = "paged_adam32bit"


class AdamW(Adam):
    """`Adam` with decoupled weight decay (Loshchilov & Hutter 2019), 0.01 if not given.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.AdamW([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adamw'
    """

    _name = "adamw"


class AdamW8bit(AdamW):
    """`AdamW` with 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.AdamW8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adamw8bit'
    """

    _name = "adamw8bit"


class AdamW32bit(AdamW):
    """`AdamW` with 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.AdamW32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adamw32bit'
    """

    _name = "adamw32bit"


class PagedAdamW(AdamW):
    """`AdamW` with paged state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdamW([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_adamw'
    """

    _name = "paged_adamw"


class PagedAdamW8bit(AdamW):
    """`AdamW` with paged 8-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdamW8bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_adamw8bit'
    """

    _name = "paged_adamw8bit"


class PagedAdamW32bit(AdamW):
    """`AdamW` with paged 32-bit state.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.PagedAdamW32bit([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'paged_adamw32bit'
    """

    _name = "paged_adamw32bit"


class LAMB(_Named):
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
        optim_bits: 8 or 32.
        args: an object whose attributes are read as further arguments.
        min_8bit_size: tensors with fewer elements keep 32-bit state.
        percentile_clipping: scale gradients to this percentile of their last 100 norms; 100: off.
        block_wise: 8-bit state has a scale per block (True) or per tensor (False).
        max_unorm: an update's norm is at most this times the tensor's; 0: no limit.
        options: any other field of the config, e.g. ``trust_ratio="lamb"``.

    Raises:
        ConfigError (a ValueError): an argument is refused; lists all problems.
    """

    _name = "lamb"
    _own_defaults = MappingProxyType({"block_wise": False})

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
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = False,
        max_unorm: float | None = 1.0,
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
        block_wise: bool = False,
        max_unorm: float | None = 1.0,
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
