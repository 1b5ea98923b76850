"""The CPU backend of machines without a compiler: prebuilt kernels, and torch for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields

from optfactory.backends.cpu.backend import CpuBackend
from optfactory.backends.reference.backend import ReferenceBackend
from optfactory.errors import NoCompilerError
from optfactory.rules.options import DEFAULT_OPTIONS, KernelOptions
from optfactory.step.plan import Bucket, BucketKey


class PrebuiltBackend(CpuBackend):
    """Buckets that no prebuilt kernel serves run on the portable backend, after one warning each.

    These are custom rules, other block sizes and options around the rule, which are compiled where
    there is a compiler.
    """

    def __init__(self) -> None:
        self._portable = ReferenceBackend()
        self._without_kernel: set[BucketKey] = set()

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            if bucket.key not in self._without_kernel:
                try:
                    super().prepare([bucket])
                    continue
                except NoCompilerError:
                    self._without_kernel.add(bucket.key)
                    _warn(bucket.key)
            self._portable.prepare([bucket])

    def update(self, bucket: Bucket) -> None:
        if bucket.key in self._without_kernel:
            self._portable.update(bucket)
        else:
            super().update(bucket)


def _warn(key: BucketKey) -> None:
    state = f"8-bit state in blocks of {key.block_size}" if key.quantized else "32-bit state"
    warnings.warn(
        f"there is no prebuilt kernel of the rule '{key.rule.name}' for {key.parameter} "
        f"parameters, {key.gradient} gradients, {state}{_uncommon(key.options)}, and no C++ "
        "compiler was found; install one (e.g. g++) or name it in the variable CXX. Steps of "
        "these parameters run as plain torch operations: correct, but slower.",
        stacklevel=2,
    )


def _uncommon(options: KernelOptions) -> str:
    """The options that are not what they are by default."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return "".join(
        f", {name}: {value}"
        for name, value in values.items()
        if value != getattr(DEFAULT_OPTIONS, name)
    )
