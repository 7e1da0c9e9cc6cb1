"""Every test starts from one seed, with its share of the cores, no network and a Dynamo without a past."""

import os
import sys

import pytest
import torch

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
    "test_saving",
    "test_sessions",
    "test_small_verbs",
    "test_source",
    "test_source_models",
    "test_state",
    "test_strategies",
    "test_surface",
    "test_symbolic",
    "test_tensor_classes",
}
# Ten seconds each or so, and a lighter sibling stays.
LATER = {
    "test_a_cache_by_name[llama-past_key_values-eager]",
    "test_a_cache_has_every_call[bert2gpt2-eager]",
    "test_a_cache_of_the_users[skips_a_layer]",
    "test_a_language_model_with_a_cache",
    "test_a_language_model_with_prompts_of_other_lengths[runs0]",
    "test_a_module_is_copied_after_a_trace[eager]",
    "test_a_pass_has_one_module[in the checkout]",
    "test_a_room_is_empty[fakes]",
    "test_a_room_is_empty[frames]",
    "test_a_room_is_empty[graphs]",
    "test_a_room_is_empty[guards]",
    "test_a_room_is_empty[modes]",
    "test_a_room_is_empty[symbols]",
    "test_a_room_is_empty[tensors]",
    "test_a_room_is_empty[variables]",
    "test_a_saved_cache_is_the_models_own[gpt2-eager]",
    "test_a_step_flows_into_a_trace_and_into_another_generation[eager-gpt2-static]",
    "test_a_step_flows_into_a_trace_and_into_another_generation[eager-llama-dynamic]",
    "test_a_step_flows_into_a_trace_and_into_another_generation[eager-llama-static]",
    "test_a_thousand_traces_do_not_grow[aot_eager]",
    "test_a_trace_flows_into_a_generation_and_what_it_returns_into_the_next[eager-dynamic]",
    "test_a_trace_flows_into_a_generation_and_what_it_returns_into_the_next[eager-static]",
    "test_an_edit_that_iterates[every other-eager]",
    "test_an_edit_that_iterates[from the third-eager]",
    "test_an_edit_that_iterates[two of them-eager]",
    "test_as_on_hooks[attribution-llama-False-symbolic]",
    "test_as_on_hooks[invokes-llama-False-symbolic]",
    "test_as_on_hooks[look-llama-False-symbolic]",
    "test_captures_do_not_grow_with_chosen_steps_and_batches[llama-dynamic]",
    "test_captures_do_not_grow_with_the_steps[eager-gpt2-dynamic]",
    "test_captures_do_not_grow_with_the_steps[eager-llama-dynamic]",
    "test_captures_do_not_grow_with_the_steps[eager-llama-static]",
    "test_edits_hold_wherever_the_modules_are_called[bart-eager]",
    "test_edits_hold_wherever_the_modules_are_called[bert2gpt2-eager]",
    "test_edits_hold_wherever_the_modules_are_called[compiled-eager]",
    "test_edits_hold_wherever_the_modules_are_called[gpt2-eager]",
    "test_every_engine_reads_and_writes_scores_and_activations[t5]",
    "test_every_family[Llama]",
    "test_every_family[Mamba]",
    "test_every_step_of_the_loop[bart-eager]",
    "test_every_step_of_the_loop[bert2gpt2-eager]",
    "test_every_step_of_the_loop[compiled-eager]",
    "test_every_step_of_the_loop[gpt2-eager]",
    "test_every_step_of_the_loop[whisper-eager]",
    "test_every_token_of_every_prompt[batching1-eager]",
    "test_in_a_generation[eager]",
    "test_in_a_generation_and_a_session[eager]",
    "test_in_every_step_of_a_generation",
    "test_interventions_on_chosen_steps[eager-gpt2-slice(1, 3, None)]",
    "test_interventions_on_chosen_steps[eager-gpt2-slice(3, 99, None)]",
    "test_interventions_on_chosen_steps[eager-gpt2-slice(None, None, None)]",
    "test_interventions_on_chosen_steps[eager-llama-2]",
    "test_interventions_on_chosen_steps[eager-llama-[0, 3]]",
    "test_interventions_on_chosen_steps[eager-llama-slice(1, 3, None)]",
    "test_interventions_on_chosen_steps[eager-llama-slice(3, 99, None)]",
    "test_interventions_on_chosen_steps[eager-llama-slice(None, None, None)]",
    "test_it_applies_and_equals_the_loop[gpt2, written out-eager]",
    "test_it_applies_and_equals_the_loop[llama, written out-eager]",
    "test_it_applies_and_equals_the_loop[neox-eager]",
    "test_it_equals_its_reference[gpt2-eager-hidden_states]",
    "test_it_equals_its_reference[gpt2-eager-invokes_of_their_own]",
    "test_it_equals_its_reference[gpt2-eager-no_grad_inside]",
    "test_it_equals_its_reference[gpt2-eager-patch_across_invokes]",
    "test_it_equals_its_reference[gpt2-eager-train_a_vector]",
    "test_it_equals_its_reference[neox-eager-train_a_vector]",
    "test_it_finds_the_same_captured_and_on_hooks[steering]",
    "test_it_runs_a_trace_outside_the_checkout[checkout]",
    "test_killer[case21-into_the_cache-eager]",
    "test_killer[case21-one_step-eager]",
    "test_one_plan_many_shapes_and_positions[inductor-None]",
    "test_one_plan_many_shapes_and_positions[inductor-True]",
    "test_patching_is_the_loop[gpt2-attention-eager]",
    "test_patching_is_the_loop[gpt2-mlp-eager]",
    "test_patching_is_the_loop[gpt2-residual-eager]",
    "test_patching_is_the_loop[gpt2-residual_pre-eager]",
    "test_patching_is_the_loop[llama-q-eager]",
    "test_patching_is_the_loop[llama-residual-eager]",
    "test_patching_is_the_loop[llama-z-eager]",
    "test_sampling_draws_what_transformers_draws[eager]",
    "test_stop_leaves_the_cache_as_eager_does[inductor]",
    "test_the_compiled_grid_equals_plain_forward_hooks[7]",
    "test_the_encoder_and_the_loop_in_one_body[bart-eager]",
    "test_the_encoder_and_the_loop_in_one_body[bert2gpt2-eager]",
    "test_the_encoder_and_the_loop_in_one_body[whisper-eager]",
    "test_the_engines_pass_the_same_operations_in_the_same_order[gpt2]",
    "test_the_models_own_keywords_reach_every_invoke[batch-eager]",
    "test_two_invokes_of_different_lengths_with_shapes_and_a_sync[eager]",
    "test_values_flow_from_the_encoder_into_the_loop[bart-eager]",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        aot = item.path.stem in AOT_LATER and "aot_eager" in item.name
        model = item.path.stem == "test_programs" and any(f"[{name}-eager" in item.name for name in ("bert", "neox"))
        if item.name in LATER or aot or model:  # GPT-2 and Llama stay
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
