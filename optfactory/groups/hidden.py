"""Which parameters are hidden matrices, and why others are not.

Muon is for the matrices inside a network: not for vectors, embeddings and the output head, whose
rows stand for themselves (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from optfactory.groups.origins import Origin, Origins, Place

# What output heads are called, where models do not say which one it is.
_HEADS = frozenset(
    {
        *("lm_head", "head", "heads", "classifier", "score", "output", "output_projection"),
        *("fc_out", "embed_out", "unembed", "unembedding", "logits", "decoder_head", "fc"),
    }
)
_EMBEDDED = re.compile(r"embed|(^|[._])(tokens?|wte|wpe)($|\.)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

_HEAD, _EMBEDDING = "the output head", "an embedding"


class HiddenMatrices:
    """Tells hidden matrices from what else a model is made of.

    Args:
        origins: names and modules of the parameters, as far as they are known.
        flattens: whether a convolution's kernels are taken for one matrix.
    """

    def __init__(self, origins: Origins, flattens: bool) -> None:
        self._origins, self._flattens = origins, flattens
        self._heads = _heads_by_models(origins.places) or _heads_by_names(origins)
        # Of parameters that were chosen by the caller the last is no head.
        self._heads = self._heads or (_last_layer(origins) if origins.places else set())

    def reason(self, tensor: Tensor) -> str:
        """Why a parameter is no hidden matrix; empty if it is one."""
        origin = self._origins.of(tensor) or Origin()
        found = _by_shape(tensor) or _by_owner(origin) or _by_name(origin)
        if not found and id(tensor) in self._heads:
            found = _HEAD
        if found or self._flattens or tensor.ndim == 2:
            return found
        if any(issubclass(owner, nn.modules.conv._ConvNd) for owner in origin.owners):
            return "a convolution, which flatten: true takes for a matrix"
        return "" if tensor.ndim == 3 else f"{tensor.ndim} dimensions, as long as flatten is false"


def _by_shape(tensor: Tensor) -> str:
    if tensor.ndim < 2 or tensor.numel() in (0, *tensor.shape):
        return "a vector"
    return ""


def _by_owner(origin: Origin) -> str:
    classes = [base.__name__ for owner in origin.owners for base in owner.mro()]
    if not any("Embedding" in name for name in classes):
        return ""
    return _EMBEDDING if len(origin.names) == 1 else "tied to an embedding"


def _by_name(origin: Origin) -> str:
    found = any(_EMBEDDED.search(name) for name in origin.names)
    return f"{_EMBEDDING}, by its name" if found else ""


def _heads_by_models(places: Iterable[Place]) -> set[int]:
    """The weights of what models say is their output (Hugging Face)."""
    found = set()
    for place in places:
        ask = getattr(place.module, "get_output_embeddings", None)
        if not callable(ask):
            continue
        try:
            weight = getattr(ask(), "weight", None)
        except (NotImplementedError, AttributeError):
            continue
        found |= {id(weight)} if isinstance(weight, Tensor) else set()
    return found


def _heads_by_names(origins: Origins) -> set[int]:
    return {
        id(tensor)
        for tensor, origin in origins.all()
        for name in origin.names
        if not _NUMBER.search(name) and _HEADS & set(name.split(".")[-2:-1])
    }


def _last_layer(origins: Origins) -> set[int]:
    """The last matrix of a model, unless blocks before it have the same one."""
    named = [(t, o.names[0]) for t, o in origins.all() if t.ndim == 2]
    if not named:
        return set()
    kinds = Counter((_NUMBER.sub("#", name), tuple(t.shape)) for t, name in named)
    last, name = named[-1]
    pattern = _NUMBER.sub("#", name)
    in_block = "#" in pattern.split(".")[:-2]
    repeats = in_block and kinds[pattern, tuple(last.shape)] > 1
    return set() if repeats else {id(last)}
