"""What the classes share: an optimizer whose class states the name of its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from optfactory.config.validation import config_error
from optfactory.errors import ConfigError
from optfactory.factory import resolve
from optfactory.groups.parameters import Params
from optfactory.optimizer import Optimizer2State

Betas = tuple[float, float]

# Arguments whose default is None: it leaves them to the name and the config.
_LEFT_OPEN = ("weight_decay", "optim_bits", "is_paged", "block_wise")


class Named(Optimizer2State):
    """An optimizer whose class states the name of its config."""

    _name: ClassVar[str]
    # Whether 8-bit state has one scale per tensor if nothing is said, as bitsandbytes' class has.
    _whole_tensors: ClassVar[bool] = False
    # Whether torch's class of this name and bitsandbytes' decay weights differently.
    _two_decays: ClassVar[bool] = False

    def _build(self, params: Params, values: dict[str, Any], options: Mapping[str, Any]) -> None:
        values |= _read_args(values.pop("args", None), values)
        values |= options
        values = {k: v for k, v in values.items() if v is not None or k not in _LEFT_OPEN}
        bits = values.get("optim_bits", resolve(self._name).optim_bits)
        if self._whole_tensors and "block_wise" not in values and str(bits) != "32":
            values["block_wise"] = False
        problems = self._decay_problems(values, "optimizer")
        try:
            config = resolve(self._name, **values)
        except ConfigError as error:
            if not problems:
                raise
            raise self._refusal([*error.problems, *problems]) from None
        if problems:
            raise self._refusal(problems)
        lr = values.get("lr")
        super().__init__(params, config, lr=lr if isinstance(lr, Tensor) else None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of `Optimizer2State`; how weights decay must be clear in each group.

        Raises:
            ConfigError: a hyperparameter or parameter is refused; the optimizer is unchanged.
        """
        if "adam_w_mode" not in self.config.model_fields_set:
            number = param_group.get("name", len(self.param_groups))
            problems = self._decay_problems(param_group, f"param_groups[{number}]")
            if problems:
                raise self._refusal(problems)
        super().add_param_group(param_group)

    def _decay_problems(self, values: Mapping[str, Any], place: str) -> list[str]:
        """Refuse decay that would not be what those who come from elsewhere mean by it."""
        decay = values.get("weight_decay", 0.0)
        if not self._two_decays or "adam_w_mode" in values or not _is_positive(decay):
            return []
        return [
            f"{place}.weight_decay: {decay} means decoupled decay in bitsandbytes' Adam classes, "
            "and L2, added to the gradient, in torch.optim.Adam; say adam_w_mode=True for the "
            "former (or take the AdamW class), adam_w_mode=False for the latter"
        ]

    def _refusal(self, problems: list[str]) -> ConfigError:
        return config_error(f"optimizer '{self._name}'", problems)


def _is_positive(decay: Any) -> bool:
    try:
        return float(decay) > 0
    except (TypeError, ValueError):
        return False  # refused as what it is


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
