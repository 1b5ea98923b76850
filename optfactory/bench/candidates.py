"""Which optimizers are timed: optfactory's names, torch's AdamW, and other libraries'."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory.bench.bare_import import import_module
from optfactory.bench.results import Absent
from optfactory.errors import ConfigError
from optfactory.factory import build_optimizer, resolve
from optfactory.registry import canonical_name, get_optimizer_info, list_optimizers

# All candidates have these; what else a step costs does not depend on them.
_SETTINGS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
OURS = "optfactory"
FOR_SLOW = ("large", "100m", "tiny")  # one tensor of a usual size, and what tries the command
FOR_MATRICES = ("gpt2", "small", "tiny")  # products of one large matrix take minutes


@dataclass(frozen=True)
class Candidate:
    """An optimizer that can be timed.

    Attributes:
        label: what tables call it.
        library: whose it is.
        build: makes it for parameters.
        passes, of_gradients: how often a step reads its input; see `traffic`.
        cases: it is measured in these only; all if empty.
    """

    label: str
    library: str
    build: Callable[[list[Tensor]], Optimizer]
    passes: int = 1
    cases: tuple[str, ...] = ()
    of_gradients: bool = False

    def is_for(self, case: str) -> bool:
        """Whether the case is worth the time that it takes."""
        return not self.cases or case in self.cases


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library, and the settings with which it does comparable work."""

    package: str
    module: str
    kind: str
    passes: int = 1
    slow: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.package} {self.kind}"


PEERS = (
    Peer("bitsandbytes", "bitsandbytes.optim", "AdamW"),
    Peer("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    Peer("bitsandbytes", "bitsandbytes.optim", "LAMB", passes=2),
    # Paged state moves over the bus.
    Peer("bitsandbytes", "bitsandbytes.optim", "PagedAdamW8bit", slow=True, devices=("cuda",)),
    # torchao compiles anew for every shape.
    Peer("torchao", "torchao.optim", "AdamW8bit", slow=True),
    Peer("torchao", "torchao.optim", "AdamW4bit", slow=True),
    Peer("torchao", "torchao.optim", "AdamWFp8", slow=True),
    # None of the others clips gradients.
    Peer("timm", "timm.optim.lamb", "Lamb", passes=2, settings={"max_grad_norm": None}),
)


def build_torch(parameters: list[Tensor], **how: Any) -> Optimizer:
    """torch.optim.AdamW, with `fused` or `foreach`."""
    return torch.optim.AdamW(parameters, **_SETTINGS, **how)


BASELINE = Candidate("torch AdamW fused", "torch", partial(build_torch, fused=True))
FOREACH = Candidate("torch AdamW foreach", "torch", partial(build_torch, foreach=True))


def build_ours(parameters: list[Tensor], name: str, **more: Any) -> Optimizer:
    """An optimizer of optfactory."""
    named = [(f"{number}.weight", p) for number, p in enumerate(parameters)]
    return build_optimizer(name, named, **_SETTINGS, **{"master_weights": "none", **more})


def build_peer(parameters: list[Tensor], peer: Peer) -> Optimizer:
    """An optimizer of another library."""
    kind = getattr(import_module(peer.module), peer.kind)
    made: Optimizer = kind(parameters, **_SETTINGS, **peer.settings)
    return made


def ours(name: str, memory: str = "") -> Candidate:
    """The candidate of a name or alias.

    Args:
        memory: where a paged optimizer's state lies on GPUs; empty: its own choice.

    Raises:
        UnknownOptimizerError: nothing of that name.
        ConfigError: memory for an optimizer that is not paged, or of an unknown kind.
    """
    more: dict[str, Any] = {"page_memory": memory} if memory else {}
    config = resolve(canonical_name(name), **more)
    rule = config.rule(config.model_dump())
    return Candidate(
        f"{config.name}:{memory}" if memory else config.name,
        OURS,
        partial(build_ours, name=config.name, **more),
        passes=2 if rule.trust_ratio else 1,
        cases=FOR_MATRICES if config.of_matrices else FOR_SLOW if config.is_paged else (),
        of_gradients=rule.ratio_of == "g",
    )


def is_glob(word: str) -> bool:
    """Whether a word stands for all names that it matches."""
    return any(sign in word for sign in "*?[")


def chosen(words: Sequence[str]) -> list[Candidate]:
    """The candidates behind names and globs, each once, in the order given.

    Args:
        words: each may end in where paged state lies on GPUs, as in paged_adam8bit:pinned.

    Raises:
        UnknownOptimizerError: nothing of such a name.
        ConfigError: a glob that matches nothing, or memory that does not fit.
    """
    found: dict[str, Candidate] = {}
    for word in words:
        name, _, memory = word.partition(":")
        matches = list_optimizers(name) if is_glob(name) else [name]
        if not matches:
            raise ConfigError(f"no optimizer matches '{name}'; `optfactory list` shows them all")
        for match in matches:
            candidate = ours(match, memory)
            found.setdefault(candidate.label, candidate)
    return list(found.values())


def peers(device: str, names: Sequence[str] = ()) -> tuple[list[Candidate], list[Absent]]:
    """What there is of other libraries for a device, and what is not installed.

    Args:
        names: optimizers whose namesakes in bitsandbytes, and torch's fused ones, are among them.
    """
    here, absent = [], []
    for peer in (*PEERS, *_namesakes(names), *_fused(names)):
        if device not in peer.devices:
            continue
        if importlib.util.find_spec(peer.package) is None:
            absent.append(Absent(peer.label, "not installed"))
            continue
        build = partial(build_peer, peer=peer)
        cases = FOR_SLOW if peer.slow else ()
        of_gradients = "LARS" in peer.kind
        here.append(Candidate(peer.label, peer.package, build, peer.passes, cases, of_gradients))
    return here, absent


def _namesakes(names: Sequence[str]) -> list[Peer]:
    """Classes of bitsandbytes that are called as these optimizers, and not among `PEERS`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    there = vars(import_module("bitsandbytes.optim"))
    kinds = {kind.lower(): kind for kind, value in there.items() if isinstance(value, type)}
    known = {peer.kind for peer in PEERS}
    found = [kinds.get(name.replace("_", "")) for name in names]
    return [_namesake(kind) for kind in found if kind is not None and kind not in known]


def _fused(names: Sequence[str]) -> list[Peer]:
    """Fused optimizers of torch for the families of these names; all are next to its AdamW."""
    kinds = {kind.lower(): kind for kind, value in vars(torch.optim).items() if _can_fuse(value)}
    families = dict.fromkeys(get_optimizer_info(name).family for name in names)
    found = [kinds.get(family) for family in families if family != "adamw"]
    return [
        Peer("torch", "torch.optim", kind, settings={"fused": True, **_momentum(kind)})
        for kind in found
        if kind is not None
    ]


def _can_fuse(value: object) -> bool:
    return isinstance(value, type) and "fused" in inspect.signature(value).parameters


def _momentum(kind: str) -> dict[str, float]:
    """As ours have it by default."""
    return {"momentum": 0.9} if kind.startswith(("SGD", "LARS")) else {}


def _namesake(kind: str) -> Peer:
    plain = kind.removeprefix("Paged")
    return Peer(
        *("bitsandbytes", "bitsandbytes.optim", kind),
        passes=2 if plain.startswith(("LAMB", "LARS")) else 1,
        slow=True,
        devices=("cuda",) if kind != plain else ("cpu", "cuda"),
        settings=_momentum(plain),
    )


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of; torchao's 8-bit states have several."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _stored(getattr(tensor, name))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors; one that parameters share (a codebook) counts once."""
    tensors = {
        part.data_ptr(): part.numel() * part.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
        for part in _stored(value)
    }
    return sum(tensors.values())
