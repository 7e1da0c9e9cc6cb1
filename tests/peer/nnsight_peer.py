"""Programs run on nnsight 0.8.1, in an interpreter of its own.

    from nnsight_peer import run_peer

    out = run_peer('''
    model = NNsight(torch.nn.Linear(2, 2))
    with model.trace(x):
        y = model.output.save()
    out["y"] = y
    ''', x=torch.ones(1, 2))
    out["y"]                                 # a plain tensor, computed by nnsight

Importing nnsight patches torch, so it never enters the test process: this file is both the caller's side
and, run as a script by the peer's interpreter, the side that imports nnsight. One peer process serves all
programs of a test process, since the import takes seconds. Programs and values travel as files: nnsight reads
the source of what it runs, and `torch.save` keeps values to the bit, dtypes and strides included.
"""

import atexit
import functools
import os
import select
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds for one program, the peer's own start included


class PeerError(Exception):
    """A program raised on nnsight. `types` names the exception's class and its bases, nearest first."""

    def __init__(self, types: list[str], trace: str):
        super().__init__(trace)
        self.types = types


def run_peer(program: str, **values: Any) -> dict[str, Any]:
    """Run `program` on nnsight and return what it put into its dict `out`.

    The program sees `torch`, `nnsight`, `NNsight`, `LanguageModel`, an empty `out` and `values`. Values and
    results are tensors, numbers, strings, None, and dicts, lists and tuples of these; results come detached.
    It starts from seed 0 as each test does, with the test's number of threads: equal programs, equal bits.

    Raises `PeerError` if the program does.
    """
    return _peer().run(textwrap.dedent(program), values)


@functools.cache
def _peer() -> "_Peer":
    peer = _Peer()
    atexit.register(peer.close)
    return peer


class _Peer:
    """The caller's side: a process that is sent a folder's name and answers when it has run what is there."""

    def __init__(self):
        python = os.environ.get("NNSIGHT_PEER_PYTHON", str(ROOT / ".peer/bin/python"))
        if not Path(python).exists():  # an error, never a skip: an unchecked peer looks like an equal one
            raise FileNotFoundError(f"no nnsight interpreter at {python}: run `make .peer/.stamp`")
        self.folder = tempfile.TemporaryDirectory(prefix="nnsight-peer-")
        self.log = Path(self.folder.name) / "log"
        self.count = 0
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).resolve())],
                cwd=self.folder.name,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(self, program: str, values: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        folder = Path(self.folder.name) / str(self.count)
        folder.mkdir()
        (folder / "program.py").write_text(program)
        torch.save({"values": values, "threads": torch.get_num_threads()}, folder / "inputs.pt")
        self._ask(folder)
        result = torch.load(folder / "result.pt", weights_only=True)
        if "types" in result:
            raise PeerError(**result)
        return result["out"]

    def _ask(self, folder: Path) -> None:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        if self.process.poll() is None:
            print(folder, file=stdin, flush=True)
            if select.select([stdout], [], [], TIMEOUT)[0] and stdout.readline() == "done\n":
                return
        log = self.log.read_text()[-4000:]
        self.close()
        _peer.cache_clear()  # the next program gets a new process
        raise RuntimeError(f"nnsight's process died or took over {TIMEOUT} s:\n{log}")

    def close(self) -> None:
        with self.process as process:  # closes its pipes and waits
            process.kill()
        self.folder.cleanup()


def _serve() -> None:
    """The peer's side. It ends with its standard input, so it never outlives the tests."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what programs print goes to the log
    for line in sys.stdin:
        folder = Path(line.strip())
        inputs = torch.load(folder / "inputs.pt", weights_only=True)
        torch.set_num_threads(inputs["threads"])
        torch.save(_execute(folder / "program.py", inputs["values"]), folder / "result.pt")
        print("done", file=answers, flush=True)


def _execute(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    import traceback

    import nnsight  # pyright: ignore[reportMissingImports]
    from torch.utils._pytree import tree_map_only

    torch.manual_seed(0)
    out: dict[str, Any] = {}
    scope = {"torch": torch, "nnsight": nnsight, "out": out, "__name__": "__main__", "__file__": str(path)}
    scope |= {"NNsight": nnsight.NNsight, "LanguageModel": nnsight.LanguageModel, **values}
    try:
        exec(compile(path.read_text(), str(path), "exec"), scope)
    except Exception as error:
        types = [cls.__name__ for cls in type(error).__mro__]
        return {"types": types, "trace": traceback.format_exc()}
    return {"out": tree_map_only(torch.Tensor, torch.Tensor.detach, out)}


if __name__ == "__main__":
    _serve()
