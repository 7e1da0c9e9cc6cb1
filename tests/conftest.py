"""Every test starts from one seed, with its share of the cores, no network and a Dynamo without a past."""

import os
import sys

import pytest
import torch

import semantics

# Read when huggingface_hub and Inductor are imported, which conftest.py comes before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile processes under each worker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-semantics", action="store_true", help="write docs/semantics.md from this run's tests")


def pytest_configure(config: pytest.Config) -> None:
    semantics.install(config)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# Their `aot_eager` rows take seconds each: `make test-slow`. `make test` has that backend in all other files.
AOT_LATER = {
    "test_cond",
    "test_gradients",
    "test_edit_files",
    "test_harvest",
    "test_interventions",
    "test_removal",
    "test_source_models",
    "test_state",
    "test_symbolic",
    "test_tensor_classes",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in AOT_LATER and "aot_eager" in item.name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    torch.manual_seed(0)
    yield
    if dynamo := sys.modules.get("torch._dynamo"):  # importing it takes a second, so only where it was used
        dynamo.reset()
