"""What a user holds: `NNsight`, `LanguageModel`, and what hangs on them (edits, cache, programs, prompts).

Each verb of the model is a method that makes a request of a room below. `host.py` is the model as the rooms below see it,
`inputs.py` and `prompts.py` say where inputs come from.
May import: every room but `analysis/` and `cli/`. Start with `model.py`, then `host.py`.
"""
