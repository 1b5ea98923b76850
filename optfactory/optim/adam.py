"""Adam and AdamW as classes."""

from __future__ import annotations

from typing_extensions import Unpack

from optfactory.groups.parameters import Params
from optfactory.optim.arguments import AdamOptions
from optfactory.optim.named import Betas, Named


class Adam(Named):
    """Adam (Kingma & Ba 2015); state of `optim_bits` bits, paged if `is_paged`.

    >>> import torch
    >>> from optfactory import optim
    >>> optim.Adam([torch.zeros(3, requires_grad=True)], lr=3e-4).config.name
    'adam'

    Args:
        params: as for `build_optimizer`.
        lr, betas, eps: hyperparameters.
        weight_decay: if not given 0, for the AdamW classes 0.01. The others want `adam_w_mode`
            beside it: False as torch.optim.Adam (L2), True as bitsandbytes (decoupled).
        amsgrad: use the maximum of past second moments; 32-bit state only.
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

    _name = "adam"
    _two_decays = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        optim_bits: int | None = None,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        **options: Unpack[AdamOptions],
    ) -> None:
        values = {key: value for key, value in locals().items() if key in _ADAM_ARGUMENTS}
        self._build(params, values, options)


_ADAM_ARGUMENTS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "optim_bits", "args", "min_8bit_size"),
    *("percentile_clipping", "block_wise", "is_paged"),
)


class Adam8bit(Adam):
    """`Adam` with 8-bit state.

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
    _two_decays = False


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
