"""A line on the terminal while a trace captures or compiles, which takes seconds: what it is about, and for how long."""

from __future__ import annotations

import sys
import threading

from tqdm.auto import tqdm

from ..config import CONFIG

AFTER = 1.0  # seconds that pass before it is shown; it is drawn anew as often


class Waiting:
    """The line of one thread. What takes less than `AFTER` seconds shows nothing."""

    def __init__(self) -> None:
        self.doing, self.over = "", threading.Event()
        self.shown: threading.Thread | None = None

    def __call__(self, doing: str) -> None:
        """Say what is done now; `""` is the end of it."""
        self.doing = doing
        if doing and self.shown is None and CONFIG.APP.PROGRESS and sys.stderr is not None and sys.stderr.isatty():
            self.over = threading.Event()
            self.shown = threading.Thread(target=self._show, args=(self.over,), name="nnsight_fx-waiting", daemon=True)
            self.shown.start()
        elif not doing and self.shown is not None:
            self.over.set()
            self.shown.join()
            self.shown = None

    def _show(self, over: threading.Event) -> None:
        if over.wait(AFTER):
            return
        with tqdm(desc=self.doing, bar_format="nnsight_fx: {desc}{elapsed}", leave=False, file=sys.stderr) as line:
            line.start_t -= AFTER
            while not over.wait(AFTER):
                line.set_description(self.doing)
