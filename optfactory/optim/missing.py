"""What is said of a class that does not exist here."""

from __future__ import annotations

from collections.abc import Iterable

from optfactory.errors import UnknownOptimizerError
from optfactory.registry import canonical_name

# What bitsandbytes' module has beside optimizers, and where its settings are made here.
_NO_OPTIMIZERS = {
    "GlobalOptimManager": "what it sets for single parameters is a rule of param_groups here, for "
    "example with optim_bits: 32; the ready rule 'embeddings_32bit' is one",
}


def message(name: str, classes: Iterable[str]) -> str:
    """Why there is no such class, and what to take instead if it is the same thing.

    No other optimizer is proposed: names that look alike are other algorithms.

    >>> message("NAdam8bit", [])
    "optfactory.optim has no class 'NAdam8bit'; build_optimizer('nadam8bit', params) makes one"
    """
    refused = f"optfactory.optim has no class '{name}'"
    if name in _NO_OPTIMIZERS:
        return f"{refused}; {_NO_OPTIMIZERS[name]}"
    plain = sorted(item for item in classes if not item.startswith("Paged") and "bit" not in item)
    try:
        return f"{refused}; build_optimizer('{canonical_name(name)}', params) makes one"
    except UnknownOptimizerError:
        return (
            f"{refused}, and there is no optimizer of that name; the classes are "
            f"{', '.join(plain)}, with 8bit, 32bit and Paged; optfactory.list_optimizers() has all "
            "names, and optfactory.extend.register adds one of your own"
        )
