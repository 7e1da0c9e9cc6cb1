"""Generation captures a model two or three times, seconds each: tests that leave a module as it is share it."""

from __future__ import annotations

import pytest
import torch

from .test_generate import shared, wrap


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """In place of the suite's own, which makes Dynamo forget the shared modules after every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="package", autouse=True)
def _captures_are_of_this_package():
    yield
    shared.cache_clear()
    wrap.cache_clear()
    torch._dynamo.reset()
