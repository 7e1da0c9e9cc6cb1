"""Activations of a data set on disk: `model.harvest` writes them, `Activations` reads them.

`prompts.py` reads the data set in windows, `harvest.py` runs a window as batches and writes a shard, `activations.py` reads shards.
A harvest that was stopped goes on behind its last shard.
May import: `report/`, `engine/`, `envoys/` and what is below them. Start with `harvest.py`.
"""
