# %% [markdown]
# # Task 12, a notebook
# Cells as jupytext and VS Code read them. Heat maps show as a cell's last value, without `%matplotlib inline`.

# %%
import torch
from common import CLEAN, CORRUPTED, check, hooks, plain, record, smollm2, timed, token

from nnsight_fx import patching

model = smollm2()

# %% [markdown]
# Which layer holds the name that comes next, at which token?

# %%
mary, john = token(model, " Mary"), token(model, " John")


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, mary] - logits[:, -1, john]


with timed("work"):
    found = patching.patch(
        model, CLEAN, CORRUPTED, difference, layers=range(0, 30, 5), positions=range(9, 14), progress=False
    )
print(found)

# %% [markdown]
# The title has both runs without a patch, the colours are centred on the corrupted one, and the axis has the tokens.

# %%
found.heatmap(bar="logit(' Mary') - logit(' John')")

# %% [markdown]
# The same by hand, for one cell.

# %%
module = plain(model)
clean, corrupted = (model.tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPTED))
(stream,) = record(module, clean, [module.model.layers[15]])


def put(block, args, out):
    out[:, 9] = stream[:, 9]


with torch.no_grad(), hooks({module.model.layers[15]: put}):
    check(found["result"][3, 0], difference(module(corrupted).logits)[0])
