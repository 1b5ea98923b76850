"""Parameters that are put in the places of others after the optimizer was built."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn


class ModelWatch:
    """Remembers the Modules that an optimizer was built from, without keeping them alive."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = [weakref.ref(model) for model in models]
        self._theirs = {id(p) for model in models for p in model.parameters()}

    def replaced(self, parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
        """The names of parameters that were the models', and are no longer."""
        models = [model for model in (ref() for ref in self._models) if model is not None]
        if len(models) < len(self._models):
            return []
        now = {id(p) for model in models for p in model.parameters()}
        gone = self._theirs - now
        return [name for name, p in parameters if id(p) in gone and p.requires_grad]


def replaced_warning(names: Sequence[str]) -> str:
    """What to say of them."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    return (
        f"the model's parameters {shown} were replaced after the optimizer was built: it goes on "
        "with the old tensors, and the new ones are not trained. Resize, wrap or shard the model "
        "before its optimizer is built, or call optimizer.replace_parameter(old, new) for each"
    )
