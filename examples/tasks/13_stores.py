"""Task 13, stores: a sweep that is killed goes on where it was; an edit is saved, and loaded into another model.

python 13_stores.py              # starts itself in a process of its own, kills that, and goes on with its folder
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import CLEAN, CORRUPTED, check, hooks, plain, record, smollm2, timed, token

from nnsight_fx import patching


def sweep(model, folder):
    mary, john = token(model, " Mary"), token(model, " John")

    def difference(logits):
        return logits[:, -1, mary] - logits[:, -1, john]

    options = {"layers": range(0, 30, 5), "positions": range(9, 14), "chunk": 5, "progress": False}
    return patching.patch(model, CLEAN, CORRUPTED, difference, store=folder, **options)


def chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.safetensors"))


def main(folder: Path) -> None:
    with timed("work: begun and killed"):
        process = subprocess.Popen([sys.executable, __file__, str(folder / "sweep")])
        while len(chunks(folder)) < 2:
            assert process.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in chunks(folder)}
    model = smollm2()
    with timed("work: resumed"):
        found = sweep(model, folder / "sweep")
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "a chunk was computed again"
    print(f"{len(kept)} chunks were there, {len(chunks(folder))} are; {found}")

    # By hand: the whole grid's first and last row
    module = plain(model)
    clean, corrupted = (model.tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPTED))
    mary, john, by_hand = token(model, " Mary"), token(model, " John"), []
    for layer in (0, 25):
        (stream,) = record(module, clean, [module.model.layers[layer]])
        for position in range(9, 14):

            def put(block, args, out, position=position, stream=stream):
                out[:, position] = stream[:, position]

            with torch.no_grad(), hooks({module.model.layers[layer]: put}):
                logits = module(corrupted).logits[0, -1]
            by_hand.append(logits[mary] - logits[john])
    check(found["result"][[0, -1]], torch.stack(by_hand).view(2, -1))

    with timed("work: edit"):
        with model.edit() as edited:
            edited.model.layers[12].output[:, -1] *= 1.5
        edited.export_edits("louder", folder)
        other = smollm2()
        other.import_edits("louder", folder)
        with torch.no_grad(), other.trace(CLEAN):
            logits = other.lm_head.output.save()

    def louder(block, args, out):
        out[:, -1] *= 1.5

    with torch.no_grad(), hooks({module.model.layers[12]: louder}):
        check(logits, module(clean).logits)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sweep(smollm2(), sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
