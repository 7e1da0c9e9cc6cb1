"""What users of interpretability tools posted, as programs of ours: a table of them, in order."""

from . import programs_patching

PROGRAMS = [*programs_patching.PROGRAMS]
