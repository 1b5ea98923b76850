"""What the classes share: an optimizer whose class states the name of its config."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.factory import resolve
from optfactory.groups.parameters import Params
from optfactory.optimizer import Optimizer2State

Betas = tuple[float, float]

# Arguments with a default that bitsandbytes has where it has no effect: there, it states nothing.
_HISTORIC = {"optim_bits": 32, "is_paged": False}


_WIDTHS = {"8bit": 8, "32bit": 32}


class Named(Optimizer2State):
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
        lr = values.get("lr")
        super().__init__(params, config, lr=lr if isinstance(lr, Tensor) else None)

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
