"""The native CPU backend: one call of compiled C++ per bucket and pass."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch

from optfactory.backends.base import Findings
from optfactory.backends.cpu.tables import Tables
from optfactory.build import prebuilt
from optfactory.build.compiler import load_library
from optfactory.rules.codegen import KernelVariant, cpp_source, dtype_name
from optfactory.step.buckets import Bucket, BucketKey


class CpuBackend:
    """Compiles a kernel per rule, dtypes and width at first use, and calls it on whole buckets."""

    name = "cpu"
    supports_capture = False
    divides_gradients = False

    def capturing(self, device: torch.device) -> bool:
        return False

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        fresh = [
            bucket
            for bucket in buckets
            if bucket.tables is None or not bucket.tables.states.are_those_of(bucket)
        ]
        if fresh:
            variants = [_variant(bucket.key) for bucket in fresh]
            libraries = _libraries(list(dict.fromkeys(variants)))
            for bucket, variant in zip(fresh, variants, strict=True):
                bucket.tables = Tables(bucket, libraries[variant])
        for bucket in buckets:
            bucket.tables.check_steps(bucket)

    def update(self, bucket: Bucket) -> Iterator[Findings]:
        found: Iterator[Findings] = bucket.tables.run(bucket)
        return found


def _variant(key: BucketKey) -> KernelVariant:
    return KernelVariant(
        key.rule,
        dtype_name(key.parameter),
        dtype_name(key.gradient),
        key.formats,
        key.block_size,
        key.options,
    )


def _libraries(variants: Sequence[KernelVariant]) -> dict[KernelVariant, ctypes.CDLL]:
    """The kernels of all variants. Compilers are processes of their own: they run side by side."""
    futures: dict[KernelVariant, Future[ctypes.CDLL]] = {}
    if len(variants) > 1:
        with ThreadPoolExecutor() as pool:
            try:
                for variant in variants:
                    futures[variant] = pool.submit(_library, variant)
            except RuntimeError:
                pass  # no threads can be had, as when the interpreter exits: one after the other
    return {
        variant: futures[variant].result() if variant in futures else _library(variant)
        for variant in variants
    }


@cache
def _library(variant: KernelVariant) -> ctypes.CDLL:
    source = cpp_source(variant)
    return prebuilt.load(source, variant.label) or load_library(source, variant.label)
