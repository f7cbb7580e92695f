"""Every test here runs once on each instruction set that the machine has."""

from collections.abc import Iterator

import pytest
import torch

from halfbyte.kernels import backends


@pytest.fixture(params=["avx512bf16", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in backends.cpu_isas():
        pytest.skip(f"{request.param} cannot run here: {backends.status()[0].reason}")
    with backends.cpu_isa_forced(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Uninitialized memory holds NaN, or 255 in bytes: a kernel that skips an element is caught.

    Done inside PyTorch's allocation, so that tensors which kernels create are poisoned too.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
