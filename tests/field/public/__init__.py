"""What users of interpretability tools posted, as programs of ours: a table of them, in order, and the page that shows it."""

from pathlib import Path

from . import (
    programs_continued,
    programs_features,
    programs_generation,
    programs_gradients,
    programs_knockouts,
    programs_patching,
    programs_reading,
    programs_steering,
    programs_torch,
)

PROGRAMS = [
    *programs_patching.PROGRAMS,
    *programs_knockouts.PROGRAMS,
    *programs_steering.PROGRAMS,
    *programs_generation.PROGRAMS,
    *programs_continued.PROGRAMS,
    *programs_gradients.PROGRAMS,
    *programs_reading.PROGRAMS,
    *programs_features.PROGRAMS,
    *programs_torch.PROGRAMS,
]
PAGE = Path(__file__).parents[3] / "docs" / "field.md"
HEAD = """# Programs of users

What people wanted of interpretability tools, by their questions and bug reports in public trackers. We read each thread and
wrote the program anew (`tests/field/public/`), on a tiny random model; its values must be those of plain hooks on every engine.
Written by `python -m tests.field.public`.

| # | what the user wanted | where | model |
| --: | --- | --- | --- |
"""


def page() -> str:
    """The text of docs/field.md."""
    rows = [f"| {n} | {p.what} | [{_short(p.source)}]({p.source}) | {p.model} |" for n, p in enumerate(PROGRAMS, 1)]
    return HEAD + "\n".join(rows) + "\n"


def _short(source: str) -> str:
    host, *rest = source.removeprefix("https://").split("/")
    return f"{rest[0]}/{rest[1]}#{rest[-1]}" if host == "github.com" else host
