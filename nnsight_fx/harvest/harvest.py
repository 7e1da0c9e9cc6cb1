"""`model.harvest`: the activations of a data set, on disk as they come."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from tqdm.auto import tqdm

from .. import atomic
from ..draws import draw_for, own_draws
from ..engine.clock import listening
from ..envoys.envoy import Envoy, host_of, path_of
from ..envoys.paths import resolved
from ..errors import StoreError, UnknownModuleError
from ..folder import Folder
from ..folder import read as manifest_of
from ..lines import user_line
from ..names import shown
from ..plan.tree import first
from ..report.provenance import environment, hashed, of_model
from ..report.runs import as_one
from ..tracing.saving import save
from .activations import WHERE, Activations
from .prompts import Batches, Item, Positions, Reader, kept, rows_of

VERSION = 1
TOKENS = 4096  # a batch
CACHED = 512  # a batch on a CPU: what a layer makes of it stays in the cache (measured: 1.3 times as fast as 4096)
SAME = {
    "version": "another version of nnsight_fx",
    "structure": "another model",
    "weights": "another model, or the same with other weights",
    "tokenizer": "another tokenizer",
    "sites": "other sites",
    "dtype": "another dtype",
    "positions": "other positions",
    "reading": "another way of reading",
}


def harvest(
    model: Envoy,
    dataset: Iterable,
    sites: object,
    out: str | os.PathLike,
    *,
    positions: Positions = slice(None),  # noqa: B008  (a slice of constants)
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    shard_size: int = 2**16,
    max_length: int | None = None,
    column: str = "text",
    seed: int = 0,
    progress: bool = True,
    compile: object = None,
    **options: object,
) -> Activations:
    """Write activations of a data set to a folder, and return them.

    ```python
    found = model.harvest(texts, ["transformer.h.6", "transformer.h.7.mlp"], out="runs/h6", dtype=torch.float16)
    for batch in found["transformer.h.6"].batches(4096, seed=0):   # (4096, d), shuffled over everything
        train(sae, batch)
    ```

    Args:
        dataset: prompts: strings, token ids, or dicts with `input_ids` (and `attention_mask`) or with text in `column`, as
            the rows of a HF `datasets` object are. It is read once, in order, and never held whole. For a model without
            tokens: tensors, or dicts of them, each one row of input, without the batch's dimension.
        sites: paths: of modules, whose output is meant, or ending in `.output` or `.input`; envoys; a list of these; or a dict
            of names, whose values may be functions, too, called in the trace: `{"z": lambda: model.h[3].attn.c_proj.input}`.
        out: a folder. One that was begun goes on: after a crash it ends with the same bytes.
        positions: which tokens of a prompt give a row: a slice (all by default), a position or several, negative ones from
            the end. `None`: the value has one row a prompt. Padding never gives one.
        dtype: what is written; by default what the model computes.
        batch_size, tokens_per_batch: prompts in a forward, or tokens with padding: by default 4096, and 512 on a CPU, whose
            cache holds no more (then two prompts at least). Prompts of similar length go together, padded to one of four widths
            an octave, so that there are few shapes.
        shard_size: rows (about) in a file: what is held in memory, and what a crash costs.
        max_length: longer prompts are cut.
        seed: of what a model in train mode draws.
        options: the model's keywords, `use_cache=False`, say.

    The forward ends behind the last site. Gradients are off.

    Raises:
        StoreError: `out` holds another model's activations, or other sites, positions, prompts.
        UnknownModuleError: a path that the model does not have.
        PromptError: an item that is no prompt.
    """
    chosen = named_sites(model, sites)
    reader = Reader(model, column, max_length)
    batches = _batches(model, out, batch_size, tokens_per_batch)
    reading: dict[str, object] = {
        "batch_size": batch_size,
        "tokens_per_batch": batches.tokens,
        "shard_size": shard_size,
    }
    if batches.pairs:  # a folder of an earlier version goes on as it was begun
        reading["pairs"] = True
    about = {
        "format": "nnsight_fx.harvest",
        "version": VERSION,
        **of_model(model),
        "tokenizer": _tokenizer(model) if reader.tokens else None,
        "sites": {name: site.told for name, site in chosen.items()},
        "dtype": _name(dtype),
        "positions": repr(positions) if reader.tokens else "None",
        "reading": {**reading, "max_length": max_length, "column": column, "seed": seed, "options": hashed(options)},
        **environment(model, compile),
        "shards": [],
        "rows": 0,
        "complete": False,
    }
    if not isinstance(dataset, Iterable):
        raise TypeError(f"{user_line()}: a data set is an iterable of prompts or inputs, and this is {dataset!r}.")
    shape = Shape(model, reader, chosen, positions if reader.tokens else None, dtype, {"compile": compile, **options})
    items = reader.read(dataset)
    folder = Folder(out, about, SAME)
    with (
        tqdm(unit="tok", unit_scale=True, disable=not progress, initial=_verified(folder, items)) as bar,
        listening(bar.set_postfix_str),
        as_one(model, "harvest", user_line()),
    ):
        for window in _windows(items, shape, shard_size):
            _write(folder, window, shape, batches, seed, bar)
    folder.write(complete=True)
    return Activations(out)


def _batches(model: Envoy, out: str | os.PathLike, size: int | None, tokens: int | None) -> Batches:
    """How prompts are batched: as they were in a folder that goes on, else as it suits the device."""
    host = host_of(model)
    on_cpu = host.device is None or host.device.type == "cpu"
    if os.path.exists(os.path.join(os.fspath(out), "manifest.json")):
        old = manifest_of(out).get("reading", {})
        auto, pairs = old.get("tokens_per_batch", TOKENS), old.get("pairs", False)
    else:
        auto, pairs = CACHED if on_cpu else TOKENS, on_cpu and tokens is None and size is None
    return Batches(size, auto if tokens is None else tokens, pairs)


@dataclass
class HarvestedSite:
    """A value that is harvested: what gives it, and what the manifest says of it."""

    read: Callable[[], Any]
    told: str


def named_sites(model: Envoy, sites: object) -> dict[str, HarvestedSite]:
    """The sites by name."""
    if not isinstance(sites, Mapping):
        several = list(sites) if isinstance(sites, list | tuple) else [sites]
        sites = {_name_of(model, s): s for s in several}
    found = {name: _site(model, what) for name, what in sites.items()}
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{user_line()}: `sites` are paths, envoys, or a dict of names to these or to functions.")
    if taken := sorted(found.keys() & set(WHERE)):
        raise ValueError(f"{user_line()}: `{taken[0]}` says where a row is from; give the site another name.")
    return found


def _name_of(model: Envoy, what: object) -> Any:
    """The name of a site: its module's own path, and of which of its values, where that was said."""
    if isinstance(what, Envoy):
        return shown(path_of(what))
    if not isinstance(what, str):
        return what
    envoy, rest = resolved(model, what)
    return ".".join([shown(path_of(envoy)), *rest])


def _site(model: Envoy, what: Any) -> HarvestedSite:
    if isinstance(what, Envoy):
        return HarvestedSite(lambda: first(what.output), f"{what.path}.output")
    if not isinstance(what, str):
        return HarvestedSite(lambda: first(what()), f"function {hashed(what)}")
    envoy, rest = resolved(model, what)
    if rest not in ([], ["input"], ["output"]):
        raise UnknownModuleError(
            f"{user_line()}: `{what}` is no module's output or input. Anything else is a function in a dict of names: "
            f'`{{"{rest[-1]}": lambda: model.get("{what}")}}`.'
        )
    read = (lambda: envoy.input) if rest == ["input"] else (lambda: first(envoy.output))
    return HarvestedSite(read, f"{envoy.path}.{(rest or ['output'])[0]}")


@dataclass
class Shape:
    """How prompts become rows."""

    model: Envoy
    reader: Reader
    sites: dict[str, HarvestedSite]
    positions: Positions
    dtype: torch.dtype | None
    options: dict

    def places(self, item: Item) -> list[int]:
        """The position of each row that an item gives."""
        return [0] if self.positions is None else kept(item, self.positions)

    def run(self, items: list[Item], width: int | None, places: list[list[int]]) -> dict[str, torch.Tensor]:
        """One forward: the rows of each site, item by item, on the CPU."""
        args, kwargs = rows_of(items) if width is None else (([item.value for item in items],), {"pad_to": width})
        values: dict = {}
        with torch.no_grad(), self.model.trace(*args, **kwargs, **self.options) as tracer:
            for name, site in self.sites.items():
                values[name] = save(site.read())
            tracer.stop()
        chosen: Any = slice(None)
        if self.positions is not None and width is not None:
            starts = [width - item.length if host_of(self.model).inputs.left else 0 for item in items]
            columns = [start + p for start, ps in zip(starts, places, strict=True) for p in ps]
            rows = [i for i, ps in enumerate(places) for _ in ps]
            chosen = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
        expected = (len(items),) if isinstance(chosen, slice) else (len(items), width)
        found = {}
        for name, value in values.items():
            if tuple(value.shape[: len(expected)]) != expected:
                raise ValueError(
                    f"{user_line()}: the site `{name}` has shape {tuple(value.shape)}, which does not begin with {expected}: "
                    "(prompts, tokens). For a value with one row a prompt give `positions=None`."
                )
            found[name] = value.detach()[chosen].to("cpu", self.dtype)
        return found


def _windows(items: Iterator[Item], shape: Shape, rows: int) -> Iterator[list[tuple[Item, list[int]]]]:
    """Items until they make a shard, with their positions."""
    window: list[tuple[Item, list[int]]] = []
    count = 0
    for item in map(shape.reader.tokenised, items):
        window.append((item, shape.places(item)))
        count += len(window[-1][1])
        if count >= rows:
            yield window
            window, count = [], 0
    if window:
        yield window


def _write(folder: Folder, window: list, shape: Shape, batches: Batches, seed: int, bar: object) -> None:
    """One shard: its forwards, its file, and then its entry in the manifest."""
    items, places = [item for item, _ in window], [ps for _, ps in window]
    shards = folder.manifest["shards"]
    with own_draws(shape.model):
        draw_for(seed, len(shards))
        tensors = _values(items, places, shape, batches, bar)
    tensors["prompt"] = torch.tensor([item.number for item, ps in window for _ in ps], dtype=torch.long)
    if shape.positions is not None:
        tensors["position"] = torch.tensor([p for ps in places for p in ps], dtype=torch.int32)
        tensors["token"] = torch.cat([item.value[ps] for item, ps in window]).int()
    facts = {n: {"shape": list(t.shape[1:]), "dtype": _name(t.dtype)} for n, t in tensors.items()}
    prompts = [items[0].number, items[-1].number + 1]
    if folder.manifest.get("columns", facts) != facts:
        raise ValueError(
            f"{user_line()}: the values of prompts {prompts[0]} to {items[-1].number} are {_shown(facts)}, those before "
            f"{_shown(folder.manifest['columns'])}. One array holds what has one shape."
        )
    data = to_bytes(tensors, {"shard": str(len(shards))})
    name = f"{len(shards):06d}.safetensors"
    atomic.write(folder.path / name, data)
    shard = {
        "file": name,
        "rows": len(tensors["prompt"]),
        "prompts": prompts,
        "tokens": sum(item.length for item in items) if shape.reader.tokens else None,
        "inputs": _together(items),
        "digest": hashlib.blake2b(data, digest_size=16).hexdigest(),
    }
    folder.write(columns=facts, shards=[*shards, shard], rows=folder.manifest["rows"] + shard["rows"])


def _values(items: list[Item], places: list, shape: Shape, batches: Batches, bar: Any) -> dict[str, torch.Tensor]:
    """The rows of each site, in the order of the items."""
    starts = [0, *itertools.accumulate(len(ps) for ps in places)]
    tensors: dict[str, torch.Tensor] = {}
    for some, width in batches(items, shape.reader.tokens):
        found = shape.run([items[i] for i in some], width, [places[i] for i in some])
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in some])
        for name, value in found.items():
            if name not in tensors:
                tensors[name] = torch.empty(starts[-1], *value.shape[1:], dtype=value.dtype)
            if value.shape[1:] != tensors[name].shape[1:]:
                shapes = f"{tuple(tensors[name].shape[1:])} and {tuple(value.shape[1:])}"
                raise ValueError(
                    f"{user_line()}: a row of `{name}` has shape {shapes}, by the prompt. One array holds what has one shape."
                )
            tensors[name][rows] = value
        bar.update(sum(items[i].length for i in some) if shape.reader.tokens else len(some))
    return tensors


def _verified(folder: Folder, items: Iterator[Item]) -> int:
    """Pass over what is there, checking that it is the same data; the tokens in it."""
    done = 0
    for shard in folder.manifest["shards"]:
        begin, end = shard["prompts"]
        same = list(itertools.islice(items, end - begin))
        if len(same) != end - begin or _together(same) != shard["inputs"]:
            raise StoreError(
                f"{user_line()}: the folder `{folder.path}` is of another data set: its prompts {begin} to {end - 1} are not this "
                "one's. Give this harvest a folder of its own."
            )
        done += shard["tokens"] or shard["rows"]
    if folder.manifest["complete"] and next(items, None) is not None:
        raise StoreError(
            f"{user_line()}: the folder `{folder.path}` is of another data set: it is complete with {end if folder.manifest['shards'] else 0} "
            "prompts, and this one has more. Give this harvest a folder of its own."
        )
    return done


def _shown(facts: dict[str, dict]) -> str:
    return ", ".join(f"{name} {tuple(f['shape'])} {f['dtype']}" for name, f in facts.items())


def _together(items: list[Item]) -> str:
    return hashed([item.digest for item in items])


def _tokenizer(model: Envoy) -> str | None:
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    return (
        None if model.tokenizer is None else hashed(backend.to_str() if backend is not None else repr(model.tokenizer))
    )


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
