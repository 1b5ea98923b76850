"""All tests of this folder are about the native CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import has_compiler


@pytest.fixture(scope="module", autouse=True)
def native_backend(kernel_cache: object) -> Iterator[None]:
    if not has_compiler():
        pytest.skip("no C++ compiler for the native backend")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFACTORY_BACKEND", "cpu")
        yield
