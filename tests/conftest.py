"""Every test starts from one seed, with its share of the cores, no network and a Dynamo without a past."""

import os
import sys

import pytest
import torch

import heavy
import semantics

# Read when huggingface_hub, Dynamo and Inductor are imported, which conftest.py comes before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile processes under each worker
os.environ.setdefault("TORCH_DYNAMO_AUTOMATIC_DYNAMIC_LOCAL_PGO", "0")  # no sizes remembered from earlier runs, on disk


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-semantics", action="store_true", help="write docs/semantics.md from this run's tests")


def pytest_configure(config: pytest.Config) -> None:
    semantics.install(config)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# Their `aot_eager` rows take seconds each: `make test-slow`. `make test` has that backend in all other files.
AOT_LATER = {
    "test_anything",
    "test_attention",
    "test_attention_paths",
    "test_autograd",
    "test_changed_containers",
    "test_cond",
    "test_containers",
    "test_contract",
    "test_decided_by_values",
    "test_draws",
    "test_edit_files",
    "test_generation_by_invoke",
    "test_freeze",
    "test_gradients",
    "test_harvest",
    "test_indexing",
    "test_interventions",
    "test_kept_by_the_user",
    "test_killer_bonus",
    "test_many_captures",
    "test_objects",
    "test_odd_caches",
    "test_odd_modules",
    "test_plans",
    "test_program",
    "test_programs",
    "test_removal",
    "test_repeats",
    "test_saving",
    "test_sessions",
    "test_small_verbs",
    "test_source",
    "test_vjp",
    "test_source_models",
    "test_state",
    "test_strategies",
    "test_surface",
    "test_symbolic",
    "test_tensor_classes",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    later = heavy.names()
    for item in items:
        aot = item.path.stem in AOT_LATER and "aot_eager" in item.name
        model = item.path.stem == "test_programs" and any(f"[{name}-eager" in item.name for name in ("bert", "neox"))
        if f"{item.path.stem}::{item.name}" in later or aot or model:  # GPT-2 and Llama stay
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _same_start_for_every_test(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    yield
    if not request.node.get_closest_marker("xdist_group"):  # whose tests share a model, and what was captured of it
        _forget()


@pytest.fixture(autouse=True, scope="module")
def _captures_are_of_one_file():
    yield
    _forget()


def _forget():
    if dynamo := sys.modules.get("torch._dynamo"):  # importing it takes a second, so only where it was used
        dynamo.reset()
