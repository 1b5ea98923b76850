"""The part of a gradient that belongs to the part of a parameter which this process holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.sharding.dtensors import is_dtensor, local_values


def local_gradient(parameter: Tensor, name: str) -> Tensor | None:
    """A parameter's gradient as this process needs it, summed and cut as the parameter is.

    Engines leave gradients in other placements than their parameters': a sum that is still to be
    made (SequenceParallel gives `Partial`), or whole ones for a sharded parameter. Whoever computed
    with their local parts as they are would be wrong, silently.

    Raises:
        ConfigError: one of both is sharded and the other is not.
    """
    gradient: Any = parameter.grad
    if gradient is None or not (is_dtensor(parameter) or is_dtensor(gradient)):
        return gradient  # type: ignore[no-any-return]
    if not (is_dtensor(parameter) and is_dtensor(gradient)):
        sharded = "parameter" if is_dtensor(parameter) else "gradient"
        raise ConfigError(
            f"cannot update {name}: its {sharded} is a DTensor and the other is not; shard the "
            "model before its optimizer is built, and let backward() make the gradients"
        )
    spec, own = gradient._spec, parameter._spec  # type: ignore[attr-defined]
    if spec is not own and not (
        spec.placements == own.placements and spec.mesh == own.mesh and _order(spec) == _order(own)
    ):
        if spec.mesh != own.mesh:
            raise ConfigError(
                f"cannot update {name}: its gradient is on another mesh ({spec.mesh}) than itself "
                f"({own.mesh})"
            )
        gradient = gradient.redistribute(placements=own.placements)
    return local_values(gradient)


def _order(spec: Any) -> Any:
    """In which order a tensor dimension was cut by several dimensions of the mesh."""
    return getattr(spec, "shard_order", None)
