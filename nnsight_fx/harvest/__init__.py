"""Activations of a data set on disk: `model.harvest` writes them, `Activations` reads them."""
