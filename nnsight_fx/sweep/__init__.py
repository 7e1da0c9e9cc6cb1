"""A session as one program: its traces are put off, grouped, and run together where that gives the same numbers."""
