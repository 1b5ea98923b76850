"""The families that other libraries have, from what their classes say."""

from __future__ import annotations

from typing import TypeVar

from optfactory.config.peers import BitsandbytesPeer, TorchaoPeer, TorchPeer
from optfactory.config.schema import OptimizerConfig
from optfactory.registry import get_optimizer_info, list_optimizers

Peer = TypeVar("Peer", TorchPeer, BitsandbytesPeer, TorchaoPeer)


def model_of(family: str) -> type[OptimizerConfig]:
    """The class of a family."""
    return get_optimizer_info(family).base


def peers_of(kind: type[Peer]) -> dict[str, Peer]:
    """Each family's optimizer in a library; what a family inherits is another family's."""
    found = {}
    for family in dict.fromkeys(get_optimizer_info(name).family for name in list_optimizers()):
        for value in vars(model_of(family)).values():
            if isinstance(value, kind):
                found[family] = value
    return found
