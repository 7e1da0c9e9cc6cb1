"""What users of interpretability tools posted, as programs of ours: a table of them, in order."""

from . import programs_generation, programs_gradients, programs_patching, programs_reading, programs_steering

PROGRAMS = [
    *programs_patching.PROGRAMS,
    *programs_steering.PROGRAMS,
    *programs_generation.PROGRAMS,
    *programs_gradients.PROGRAMS,
    *programs_reading.PROGRAMS,
]
