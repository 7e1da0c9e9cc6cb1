"""Sessions and sweeps: many traces as few runs."""
