"""Activations of a data set on disk: `model.harvest` writes them, `Activations` reads them.

May import: `report/`, `engine/`, `envoys/` and what is below them. Start with `harvest.py`.
"""
