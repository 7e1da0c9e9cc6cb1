"""What a user holds: `NNsight`, `LanguageModel`, and what hangs on them (edits, cache, programs, prompts).

Everything below is reached from here: a verb of the model is a method that makes a request of a room below.
May import: every room but `analysis/` and `cli/`. Start with `model.py`.
"""
