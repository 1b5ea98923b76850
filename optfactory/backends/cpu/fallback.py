"""The CPU backend that does without what cannot be had: kernels where possible, torch elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields

from optfactory.backends.base import Findings
from optfactory.backends.cpu.backend import CpuBackend
from optfactory.backends.reference.backend import ReferenceBackend
from optfactory.errors import BrokenCompilerError, NoCompilerError
from optfactory.rules.options import DEFAULT_OPTIONS, KernelOptions, has_scales
from optfactory.step.buckets import Bucket, BucketKey

_SLOWER = "Steps of these parameters run as plain torch operations: correct, but slower."
_SHOWN = 500  # characters of what a compiler says


class FallbackBackend(CpuBackend):
    """Buckets whose kernel cannot be had run on the portable backend, after a warning.

    Without a compiler that works these are the ones that no prebuilt kernel serves: custom rules,
    other block sizes and options around the rule.

    Attributes:
        problem: why there is a bucket without a kernel; empty if there is none.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._portable = ReferenceBackend()
        self._without_kernel: set[BucketKey] = set()

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        native = [bucket for bucket in buckets if bucket.key not in self._without_kernel]
        try:
            super().prepare(native)
        except (BrokenCompilerError, NoCompilerError):
            for bucket in native:
                self._prepare_alone(bucket)
        self._portable.prepare([b for b in buckets if b.key in self._without_kernel])

    def _prepare_alone(self, bucket: Bucket) -> None:
        try:
            super().prepare([bucket])
            return
        except NoCompilerError:
            problem, message = "there is no compiler", _without_compiler(bucket.key)
        except BrokenCompilerError as error:
            problem = "what the compiler builds cannot be used"
            said = str(error)[:_SHOWN].rstrip()
            message = "" if self.problem else f"{said}\n{_SLOWER} `optfactory doctor` shows it all."
        self.problem = problem
        self._without_kernel.add(bucket.key)
        if message:
            warnings.warn(message, stacklevel=2)

    def update(self, bucket: Bucket) -> Iterator[Findings]:
        if bucket.key in self._without_kernel:
            return self._portable.update(bucket)
        return super().update(bucket)


def _without_compiler(key: BucketKey) -> str:
    state = f"{' and '.join(dict.fromkeys(key.formats))} state"
    state += f" in blocks of {key.block_size}" if has_scales(key.formats) else ""
    return (
        f"there is no prebuilt kernel of the rule '{key.rule.name}' for {key.parameter} "
        f"parameters, {key.gradient} gradients, {state}{_uncommon(key.options)}, and no C++ "
        "compiler was found; install one (e.g. g++) or name it in the variable CXX. "
        f"{_SLOWER}"
    )


def _uncommon(options: KernelOptions) -> str:
    """The options that are not what they are by default."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return "".join(
        f", {name}: {value}"
        for name, value in values.items()
        if value != getattr(DEFAULT_OPTIONS, name)
    )
