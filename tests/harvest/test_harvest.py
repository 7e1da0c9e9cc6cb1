"""Harvested activations against loops of plain hooks: what is in the rows, which rows there are, and what survives a kill."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import transformers as tf
from torch.utils.data import DataLoader

from nnsight_fx import Activations, LanguageModel, NNsight, StoreError, UnknownModuleError, assert_max_compiles
from nnsight_fx.errors import PromptError
from nnsight_fx.harvest.prompts import Batches, Item, width

ENGINES = ["hooks", "eager", "aot_eager"]
LENGTHS = [3, 11, 1, 20, 7, 7, 2, 16, 5, 9, 4, 13]
SITES = ["transformer.h.0", "transformer.h.1.mlp.input"]
quiet = {"progress": False, "use_cache": False}


@functools.cache
def raw():
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    return tf.GPT2LMHeadModel(config).eval()


@functools.cache
def wrap(engine="hooks"):
    model = LanguageModel(raw())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """In place of the suite's own, which makes Dynamo forget the shared models after every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _captures_are_of_this_file():
    yield
    wrap.cache_clear()
    raw.cache_clear()
    torch._dynamo.reset()


def prompts():
    torch.manual_seed(1)
    return [torch.randint(0, 50, (n,)) for n in LENGTHS]


def by_hand(ids):
    """One prompt's values at `SITES`, by plain hooks."""
    seen = {}
    block, mlp = raw().transformer.h[0], raw().transformer.h[1].mlp
    handles = [
        block.register_forward_hook(lambda m, a, out: seen.update({SITES[0]: out[0] if type(out) is tuple else out})),
        mlp.register_forward_pre_hook(lambda m, a: seen.update({SITES[1]: a[0]})),
    ]
    with torch.no_grad():
        raw()(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: value[0] for name, value in seen.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batching", [{"tokens_per_batch": 64}, {"batch_size": 5, "shard_size": 30}])
def test_every_token_of_every_prompt(tmp_path, engine, batching):
    ids = prompts()
    with assert_max_compiles(4):
        found = wrap(engine).harvest(ids, SITES, tmp_path / "a", **batching, **quiet)
    want = [by_hand(x) for x in ids]
    for name in SITES:
        torch.testing.assert_close(found[name][:], torch.cat([w[name] for w in want]))
    assert len(found) == sum(LENGTHS) and found.sites == tuple(SITES)
    assert found["prompt"][:].tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert found["position"][:].tolist() == [p for n in LENGTHS for p in range(n)]
    assert torch.equal(found["token"][:].long(), torch.cat(ids))
    assert len(found.manifest["shards"]) == (1 if "tokens_per_batch" in batching else 3)


POSITIONS = {
    "the last": -1,
    "behind the first": slice(1, None),
    "two": [0, -1],
    "every other": slice(None, None, 2),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions(tmp_path, positions):
    ids = prompts()
    found = wrap().harvest(ids, SITES[0], tmp_path / "a", positions=positions, **quiet)
    index = [positions] if isinstance(positions, int) else positions
    torch.testing.assert_close(found[SITES[0]][:], torch.cat([by_hand(x)[SITES[0]][index] for x in ids]))


class Right:
    """As much of a tokenizer as ids need."""

    padding_side, pad_token_id = "right", 0


def test_padding_on_the_right(tmp_path):
    model = LanguageModel(raw(), tokenizer=Right())
    found = model.harvest(prompts(), SITES[0], tmp_path / "a", **quiet)
    torch.testing.assert_close(found[SITES[0]][:], torch.cat([by_hand(x)[SITES[0]] for x in prompts()]))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", "a", "b", "c", "d"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="?", padding_side="left")


KINDS = {
    "strings": ["a b c", "d", "b b"],
    "rows with text": [{"text": "a b c", "id": 7}, {"text": "d", "id": 8}, {"text": "b b", "id": 9}],
    "ids": [[1, 2, 3], [4], [2, 2]],
    "arrays": [np.array([1, 2, 3]), np.array([4]), np.array([2, 2])],
    "tokenised rows": [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]},
        {"input_ids": [4, 0, 0], "attention_mask": [1, 0, 0]},
        {"input_ids": [0, 2, 2], "attention_mask": [0, 1, 1]},
    ],
}


@pytest.mark.parametrize("items", KINDS.values(), ids=KINDS)
def test_what_a_data_set_may_hold(tmp_path, items):
    model = LanguageModel(raw(), tokenizer=tokenizer())
    found = model.harvest(iter(items), SITES[0], tmp_path / "a", **quiet)
    assert found["token"][:].tolist() == [1, 2, 3, 4, 2, 2]
    want = [by_hand(torch.tensor(ids))[SITES[0]] for ids in ([1, 2, 3], [4], [2, 2])]
    torch.testing.assert_close(found[SITES[0]][:], torch.cat(want))


def test_a_path_with_and_without_the_model_in_front(tmp_path):
    model = wrap()
    paths = ["model.transformer.h.1", "transformer.h.2.mlp.input", model.transformer.h[0], "model.lm_head.output"]
    found = model.harvest(prompts(), paths, tmp_path / "a", **quiet)
    assert found.sites == ("transformer.h.1", "transformer.h.2.mlp.input", "transformer.h.0", "lm_head.output")
    assert torch.equal(found["model.transformer.h.1"][:], found["transformer.h.1"][:])
    with pytest.raises(KeyError, match="there is no column `model.transformer.h.3`"):
        found["model.transformer.h.3"]


def test_dtype_names_and_functions(tmp_path):
    model = wrap()
    sites = {"z": lambda: model.transformer.h[0].attn.c_proj.input, "mlp": model.transformer.h[2].mlp}
    found = model.harvest(prompts(), sites, tmp_path / "a", dtype=torch.bfloat16, max_length=4, **quiet)
    assert found.sites == ("z", "mlp") and found["z"][0].dtype == torch.bfloat16
    assert len(found) == sum(min(n, 4) for n in LENGTHS)
    about = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert about["sites"]["mlp"] == "model.transformer.h.2.mlp.output" and about["sites"]["z"].startswith("function ")
    assert about["columns"]["z"] == {"shape": [16], "dtype": "bfloat16"} and about["complete"]
    assert about["hardware"]["cores"] == os.cpu_count() and about["versions"]["torch"] == torch.__version__
    assert repr(found).startswith(f"Activations(z: ({len(found)}, 16) bfloat16; mlp: ")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_forward_ends_behind_the_last_site(tmp_path, engine):
    called = []
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    module[2].register_forward_hook(lambda *_: called.append(1))
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    rows = [torch.randn(3) for _ in range(7)]
    found = model.harvest(rows, ["0", "1.input"], tmp_path / "a", batch_size=4, progress=False)
    assert not called and found.columns == ("0", "1.input", "prompt") and len(found) == 7
    torch.testing.assert_close(found["0"][:], module[0](torch.stack(rows)).detach())
    assert found["prompt"][:].tolist() == list(range(7))


def test_rows_of_several_shapes_and_keywords(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool1d(2)

        def forward(self, x, *, scale):
            return self.pool(x * scale[..., None])

    rows = [{"x": torch.randn(2, n), "scale": torch.full((2,), float(n))} for n in (4, 6, 4, 5)]
    found = NNsight(Net()).harvest(rows, "pool", tmp_path / "a", progress=False)
    want = [nn.AdaptiveAvgPool1d(2)(r["x"] * r["scale"][:, None]) for r in rows]
    torch.testing.assert_close(found["pool"][:], torch.stack(want))


def test_rows_that_do_not_fit_one_array(tmp_path):
    model = NNsight(nn.Sequential(nn.Identity(), nn.Identity()))
    rows = [torch.ones(n) for n in (3, 3, 4)]
    with pytest.raises(ValueError, match=r"test_harvest\.py:\d+: a row of `0` has shape \(3,\) and \(4,\)"):
        model.harvest(rows, "0", tmp_path / "a", progress=False)
    with pytest.raises(
        ValueError, match=r"the values of prompts 2 to 2 are 0 \(4,\) float32, .* those before 0 \(3,\)"
    ):
        model.harvest(rows, "0", tmp_path / "b", shard_size=2, progress=False)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["000000.safetensors", "manifest.json"]


def test_a_shard_may_have_no_rows(tmp_path, capsys):
    found = wrap().harvest([[1], [2, 3], [4], [5]], SITES[0], tmp_path / "a", positions=slice(1, None), shard_size=1)
    assert [shard["rows"] for shard in found.manifest["shards"]] == [1, 0]
    assert found["token"][:].tolist() == [3] and found["prompt"][:].tolist() == [1]
    torch.testing.assert_close(found[SITES[0]][:], by_hand(torch.tensor([2, 3]))[SITES[0]][1:])
    assert "5.00tok" in capsys.readouterr().err.replace(" ", "")  # the bar: tokens, and tokens a second


def test_one_row_a_prompt(tmp_path):
    torch.manual_seed(0)
    bert = tf.BertModel(
        tf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    model = LanguageModel(bert, tokenizer=Right())
    found = model.harvest(prompts(), "pooler", tmp_path / "a", positions=None, progress=False)
    with torch.no_grad():
        want = torch.cat([bert(x[None]).pooler_output for x in prompts()])
    torch.testing.assert_close(found["pooler"][:], want)
    assert found.columns == ("pooler", "prompt")
    with pytest.raises(ValueError, match=r"test_harvest\.py:\d+: the site `pooler` has shape \(12, 16\)"):
        model.harvest(prompts(), "pooler", tmp_path / "b", progress=False)


def test_few_widths_and_little_padding():
    widths = {width(n) for n in range(1, 1025)}
    assert len(widths) < 32 and all(n <= width(n) < n * 1.26 + 8 for n in range(1, 1025))


def sizes(folder):
    return {k: v for k, v in json.loads((folder / "manifest.json").read_text())["reading"].items() if k in READING}


READING = ("tokens_per_batch", "pairs")


@pytest.mark.parametrize("engine", ENGINES)
def test_no_compile_for_a_single_row(tmp_path, engine):
    """Prompts of which one fits a batch go in pairs, and one that is left over goes with those before it."""
    seen, model = [], wrap(engine)
    model._module.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape), with_kwargs=True)
    ids = [torch.arange(1, n + 1) for n in (30, 29, 28, 7, 6)]
    model.harvest(ids, SITES[0], tmp_path / "a", **quiet)
    assert all(rows >= 2 for rows, _ in seen)
    items = [Item(i, x, "") for i, x in enumerate(ids)]
    assert list(Batches(None, 32, pairs=True)(items, True)) == [([0, 1], 32), ([2, 3, 4], 32)]
    assert list(Batches(None, 32)(items, True)) == [([0], 32), ([1], 32), ([2], 32), ([3, 4], 8)]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, {"tokens_per_batch": 512, "pairs": True}),
        ({"tokens_per_batch": 64}, {"tokens_per_batch": 64}),
        ({"batch_size": 2}, {"tokens_per_batch": 512}),
    ],
)
def test_how_prompts_are_batched_stands_in_the_manifest(tmp_path, given, read):
    wrap().harvest(prompts(), SITES[0], tmp_path / "a", **given, **quiet)
    assert sizes(tmp_path / "a") == read


def test_a_folder_of_an_earlier_version_goes_on_as_it_was_begun(tmp_path):
    """It has batches of 4096 tokens."""
    path, model = tmp_path / "a", wrap()
    model.harvest(prompts()[:4], SITES[0], path, shard_size=1, tokens_per_batch=4096, **quiet)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    found = model.harvest(prompts(), SITES[0], path, shard_size=1, **quiet)
    assert sizes(path) == {"tokens_per_batch": 4096} and len(found) == sum(LENGTHS)


# -- the folder ----------------------------------------------------------------------------------------------------


def content(folder):
    """All bytes of a harvest, but for when it was made."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    about = json.loads(found.pop("manifest.json"))
    return found, {k: v for k, v in about.items() if k != "created"}


def test_an_interrupted_one_goes_on(tmp_path):
    model, ids, forwards = wrap(), prompts(), []
    whole = model.harvest(ids, SITES, tmp_path / "whole", shard_size=20, **quiet)

    def failing():
        yield from ids[:8]
        raise ConnectionError("the data set is gone")

    with pytest.raises(ConnectionError):
        model.harvest(failing(), SITES, tmp_path / "a", shard_size=20, **quiet)
    part = Activations(tmp_path / "a")
    assert 0 < len(part) < len(whole) and repr(part).endswith("not complete)")
    handle = raw().register_forward_pre_hook(
        lambda m, a, kw: forwards.append(kw["input_ids"].shape[0]), with_kwargs=True
    )
    model.harvest(ids, SITES, tmp_path / "a", shard_size=20, **quiet)
    done = sum(forwards)
    model.harvest(ids, SITES, tmp_path / "a", shard_size=20, **quiet)
    handle.remove()
    assert 0 < done == sum(forwards) < len(ids)  # neither twice nor again
    assert content(tmp_path / "a") == content(tmp_path / "whole")


def test_what_a_folder_refuses(tmp_path):
    model, ids = wrap(), prompts()
    out = tmp_path / "a"
    model.harvest(ids, SITES, out, **quiet)
    torch.manual_seed(5)
    other = LanguageModel(tf.GPT2LMHeadModel(raw().config).eval())
    swapped = [*ids[:3], ids[4], ids[3], *ids[5:]]
    for what, run in {
        "another model, or the same with other weights": lambda: other.harvest(ids, SITES, out, **quiet),
        "other sites": lambda: model.harvest(ids, SITES[:1], out, **quiet),
        "another dtype": lambda: model.harvest(ids, SITES, out, dtype=torch.float16, **quiet),
        "other positions": lambda: model.harvest(ids, SITES, out, positions=-1, **quiet),
        "another way of reading": lambda: model.harvest(ids, SITES, out, max_length=3, **quiet),
        "another tokenizer": lambda: LanguageModel(raw(), tokenizer=tokenizer()).harvest(ids, SITES, out, **quiet),
        "another data set": lambda: model.harvest(swapped, SITES, out, **quiet),
        "another data set: it is complete": lambda: model.harvest([*ids, ids[0]], SITES, out, **quiet),
        "another data set: its prompts 0 to 11": lambda: model.harvest(ids[:4], SITES, out, **quiet),
    }.items():
        with pytest.raises(StoreError, match=rf"test_harvest\.py:\d+: the folder `.*` is of {what}"):
            run()
    with pytest.raises(StoreError, match="is of something else than a sweep"):
        model.sweep(lambda t, i: model.lm_head.output, ids[0], {"i": [1]}, store=out, progress=False)
    with pytest.raises(StoreError, match="holds no results"):
        Activations(tmp_path)


def test_bad_input(tmp_path):
    model = wrap()
    with pytest.raises(
        UnknownModuleError, match=r"there is no module `transformer.h.9`; did you mean `transformer.h.\d`"
    ):
        model.harvest(prompts(), "transformer.h.9", tmp_path / "a", **quiet)
    with pytest.raises(ValueError, match="`token` says where a row is from"):
        model.harvest(prompts(), {"token": "transformer.h.0"}, tmp_path / "a", **quiet)
    with pytest.raises(PromptError, match=r"prompt 2 has 1 tokens and no position 1"):
        model.harvest(prompts(), SITES, tmp_path / "b", positions=1, **quiet)
    with pytest.raises(PromptError, match="row 0 of the data set has neither `input_ids` nor `text`; there is `body`"):
        model.harvest([{"body": "a"}], SITES, tmp_path / "c", **quiet)
    with pytest.raises(PromptError, match="prompt 1 of the data set has no tokens"):
        model.harvest([[1], []], SITES, tmp_path / "d", **quiet)
    with pytest.raises(PromptError, match="an item of this data set is a int"):
        NNsight(nn.Linear(1, 1)).harvest([1], "", tmp_path / "e", progress=False)


KILLED = """
import sys, torch, transformers as tf
from nnsight_fx import LanguageModel
torch.set_num_threads(1)
torch.manual_seed(0)
config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)
model = LanguageModel(tf.GPT2LMHeadModel(config).eval())
torch.manual_seed(1)
prompts = [torch.randint(0, 50, (n,)) for n in torch.randint(1, 30, (400,)).tolist()]
def slowly():
    import time
    for i, p in enumerate(prompts):
        time.sleep(0.005 if sys.argv[2] == "slow" else 0)
        yield p
model.harvest(slowly(), ["transformer.h.1"], sys.argv[1], shard_size=200, progress=False)
"""


@pytest.mark.slow  # stores have theirs in `make test`
def test_kill_9(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "a"), "slow"])
    threads = torch.get_num_threads()

    def here(name):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / name), "fast"])
        exec(KILLED, {"__name__": "killed"})
        return content(tmp_path / name)

    try:
        whole = here("whole")
        until = time.monotonic() + 120
        while len(list((tmp_path / "a").glob("[0-9]*.safetensors"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        before = json.loads((tmp_path / "a" / "manifest.json").read_text())
        assert not before["complete"] and 2 <= len(before["shards"]) < len(whole[0])
        assert here("a") == whole
    finally:
        torch.set_num_threads(threads)


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    return wrap().harvest(prompts(), SITES, tmp_path_factory.mktemp("h") / "a", shard_size=25, **quiet)


def test_rows_by_number(harvested):
    whole = harvested[:]
    acts = harvested[SITES[0]]
    assert len(acts) == len(harvested) == sum(LENGTHS) and len(harvested.manifest["shards"]) > 2
    for index in (0, 41, -1, 97):
        assert torch.equal(acts[index], whole[SITES[0]][index])
        assert harvested[index]["prompt"] == whole["prompt"][index]
    for index in (slice(20, 60), slice(None, None, -7), slice(5, 5), [3, 90, 3, -1], torch.tensor([50, 2])):
        want = (
            whole[SITES[0]][torch.tensor(range(98)[index]) if isinstance(index, slice) else index]
            if index != slice(5, 5)
            else torch.empty(0, 16)
        )
        assert torch.equal(acts[index], want)
    assert torch.equal(acts[whole["position"] == 0], whole[SITES[0]][whole["position"] == 0])
    assert torch.equal(harvested.prompt(3)[SITES[0]], whole[SITES[0]][whole["prompt"] == 3])
    with pytest.raises(IndexError, match="row 98 of 98"):
        acts[98]
    with pytest.raises(IndexError, match="no prompt 12"):
        harvested.prompt(12)
    with pytest.raises(KeyError, match="no column `h`"):
        harvested["h"]


def test_batches(harvested):
    acts = harvested[SITES[0]]
    assert torch.equal(torch.cat(list(acts.batches(10))), acts[:])
    first, again = (list(acts.batches(10, seed=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), acts[:])
    order = torch.randperm(98, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat(first), acts[order])
    assert [len(b) for b in acts.batches(10)][-1] == 8 and len(list(acts.batches(10, drop_last=True))) == 9
    both = next(harvested.batches(4, seed=0))
    assert torch.equal(
        both["position"], harvested["position"][torch.randperm(98, generator=torch.Generator().manual_seed(0))[:4]]
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader(harvested, workers):
    loader = DataLoader(harvested[SITES[0]], batch_size=16, num_workers=workers)
    assert torch.equal(torch.cat(list(loader)), harvested[SITES[0]][:])
    if not workers:
        rows = next(iter(DataLoader(harvested, batch_size=5)))
        assert torch.equal(rows["position"], harvested["position"][:5])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux what is mapped")
def test_what_is_read_is_mapped(harvested):
    acts = Activations(harvested.path)
    row = acts[0][SITES[0]]
    with open("/proc/self/maps") as maps:
        assert str(harvested.path / "000000.safetensors") in maps.read()
    row += 1  # what is given is a copy: the file stays as it is
    assert not torch.equal(acts[0][SITES[0]], row)
