"""Writes docs/field.md."""

from . import PAGE, page

PAGE.write_text(page())
