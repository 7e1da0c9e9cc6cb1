"""The verbs of nnsight_fx, the rows of the specification that each comes from, and the tests that prove it.

`proofs` are patterns of test ids below `tests/`. A pattern that no test has, and a verb without a test on an engine, are
errors of `test_semantics.py`; `docs/semantics.md` is this table with the tests counted.
"""

from dataclasses import dataclass

PROGRAM = "equivalence/test_programs.py::*-"
KILLER = "equivalence/test_killer_*::*case"


@dataclass(frozen=True)
class Verb:
    name: str
    rows: str  # of the specification
    proofs: tuple[str, ...]
    free: bool = False  # no engine is in it: what is proved is what is recorded, or done before anything runs


def programs(*names: str) -> tuple[str, ...]:
    return tuple(f"{PROGRAM}{name}]" for name in names)


def killers(*names: str) -> tuple[str, ...]:
    return tuple(f"{KILLER}{name}-*" for name in names)


VERBS = (
    Verb(
        "read `.output`, `.input`, `.inputs`",
        "envoy, R1, R2",
        (*programs("read", "read_after_own_write", "out_of_order"), *killers("09-inputs_by_keyword")),
    ),
    Verb(
        "write them",
        "P4, R3, R4",
        (*programs("replace", "chained_writes", "write_input"), *killers("09-scale_by_keyword", "01-alias_replaced")),
    ),
    Verb(
        "change them in place",
        "R5, R6",
        (*programs("steer", "input_in_place", "positions", "select_and_scatter"), *killers("01-*", "02-*", "03-*")),
    ),
    Verb("tuples, lists, dicts, dataclasses, `ModelOutput`", "R7", killers("07-*", "08-*")),
    Verb("values that are no tensors", "D18, R7", killers("18-*")),
    Verb(
        "`.save()`, `nnsight_fx.save`",
        "P2, D5, D6",
        (*programs("save_twice", "keep_a_list"), "tracing/test_saving.py::*"),
    ),
    Verb("`tracer.result`", "result", programs("write_the_result", "hidden_states", "write_a_field_of_the_result")),
    Verb(
        "`.skip`",
        "skip, R13",
        (
            *programs("skip"),
            *killers("23-*", "15-skip_*"),
            "equivalence/test_skips.py::*skip*",
            "engine/test_removal.py::*skip*",
            "equivalence/test_contract.py::test_skip_*",
        ),
    ),
    Verb(
        "`tracer.stop`",
        "P6, I6, R13",
        (
            *programs("stop"),
            *killers("22-*"),
            "equivalence/test_skips.py::test_stop_*",
            "equivalence/test_contract.py::test_stop_*",
        ),
    ),
    Verb("`tracer.invoke`, rows", "T2, T4, R8, R9", programs("invokes_of_their_own", "patch_across_invokes")),
    Verb("an invoke over the whole batch", "T4, R8", (*programs("promptless"), *killers("24-*"))),
    Verb(
        "values between invokes, `tracer.barrier`",
        "D7, I5, R10",
        (*programs("patch_across_invokes"), *killers("24-between_*"), "equivalence/test_skips.py::*barrier*"),
    ),
    Verb("`tracer.batch`, several forwards", "D12", ("engine/test_waves.py::*",)),
    Verb(
        "Python that looks at values",
        "D1, D12",
        (*programs("look"), *killers("14-*"), "engine/test_sync.py::*", "equivalence/test_contract.py::*sync_point*"),
    ),
    Verb("`tracer.cond`", "P9", ("equivalence/test_cond.py::*",)),
    Verb(
        "`tracer.apply`, `tracer.log`",
        "T11",
        ("tracing/test_small_verbs.py::test_log_*", "tracing/test_small_verbs.py::test_apply_*"),
    ),
    Verb("`value.update`", "P10", ("tracing/test_small_verbs.py::test_update_*",)),
    Verb(
        "constants of a body, `tracer.constant`",
        "P8, D4",
        ("tracing/test_small_verbs.py::test_constants_*", "equivalence/test_killer_bonus.py::test_b1_*"),
    ),
    Verb("random draws in a body", "D3, R14", (*programs("random_draws"), *killers("10-*"))),
    Verb(
        "`.grad`, `loss.backward()`, `with loss.backward():`",
        "P3, R15, backward",
        (*killers("12-*"), "equivalence/test_gradients.py::*"),
    ),
    Verb(
        "`model.vjp`, `model.jvp`, `model.jacobian`, `freeze=`",
        "torch.func, attribution graphs",
        ("derivatives/*::*",),
    ),
    Verb("training through a trace", "R15", (*programs("train_a_vector", "no_grad_inside"), *killers("11-*"))),
    Verb(
        "modules called on values",
        "P1",
        (*programs("lens"), *killers("25-calls_beside"), "tracing/test_small_verbs.py::*call*"),
    ),
    Verb(
        "attached and assigned modules",
        "auxiliary modules",
        (
            *killers("25-calls_beside"),
            "tracing/test_small_verbs.py::*attached*",
            "tracing/test_small_verbs.py::*assigned*",
        ),
    ),
    Verb("a module that runs several times", "I1, R12", (*killers("04-*", "05-*"), "generation/test_iteration.py::*")),
    Verb("`model.generate`", "generate", (*killers("21-*"), "generation/test_generate.py::*")),
    Verb(
        "`tracer.iter`, `tracer.all`, `.next`",
        "I1 to I4, T13, D2",
        (*killers("04-second_call"), "generation/test_iteration.py::*", "generation/test_generate.py::*chosen_steps*"),
    ),
    Verb("`model.session`, values of earlier traces", "T14, P5, P7, P12", ("tracing/test_sessions.py::*",)),
    Verb("`model.edit`, `clear_edits`", "E1, T9", (*killers("24-edit_*"), "tracing/test_edits.py::*")),
    Verb("`tracer.cache`", "C1 to C6", (*killers("04-both_calls_cached"), "tracing/test_cache.py::*")),
    Verb("`.source`", "D16", ("engine/test_source.py::*", "equivalence/test_source_models.py::*")),
    Verb("`model.scan`", "S2, T7", (*killers("17-statistics"),)),
    Verb(
        "what the model does beside: statistics, caches, its own hooks",
        "R13, P4",
        (*killers("17-*", "21-into_the_cache"),),
    ),
    Verb("what the model's Python decides", "R17", (*killers("06-*", "13-*", "16-*"),)),
    Verb("code that no graph holds", "D17", killers("19-*")),
    Verb("dtypes, devices, autocast", "device/dtype", killers("20-*")),
    Verb("the cache of compiled programs", "E1", ("equivalence/test_killer_bonus.py::*",)),
    Verb(
        "another method: `fn=`, `with model.encode(x):`",
        "T5, T6",
        ("test_surface.py::*method*", "test_surface.py::*part_alone*"),
    ),
    Verb(
        "`TraceDict`, `steer`", "baukit, nnterp", ("test_surface.py::test_trace_dict*", "test_surface.py::test_steer*")
    ),
    Verb("ready-made interventions", "pyvene", ("interventions/test_interventions.py::*",)),
    Verb(
        "lazily loaded weights", "lazy load", ("test_surface.py::*weights*", "test_surface.py::*dispatch*"), free=True
    ),
    Verb(
        "`rename=`, `envoys=`, navigation",
        "rename, D21, D24",
        (
            "test_surface.py::test_rename*",
            "test_surface.py::test_envoys*",
            "tracing/test_small_verbs.py::test_navigation*",
        ),
    ),
    Verb(
        "prompts of several lengths",
        "D9, D13",
        (
            *killers("24-between_*"),
            "equivalence/test_contract.py::*different_lengths*",
            "generation/*::*different_lengths*",
        ),
    ),
    Verb("prompts, padding, position ids", "T3, LM batching, D9, D13", ("test_language_inputs.py::*",), free=True),
    Verb(
        "the plan as data: print, draw, save, load",
        "P0, P11, S1, T10",
        ("tracing/test_graph.py::*", "viz/test_drawing.py::*", "test_plans.py::*"),
    ),
    Verb("torch's functions, tensor methods, libraries", "T15, T11", ("tracing/test_entry_points.py::*",), free=True),
    Verb(
        "errors at the user's line",
        "T8, R11, D22",
        (*killers("06-not_called", "18-a_tuple_*", "23-skips_of_invokes"), "tracing/test_errors.py::*"),
    ),
)
