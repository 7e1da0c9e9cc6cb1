"""Ready-made interventions: `nn.Module`s from values to values, for use in any body.

```python
from nnsight_fx import interventions as iv

steer = iv.Add(768)                                    # trainable; state_dict() saves it
with model.trace(prompt):
    block = model.transformer.h[6]
    block.output = steer(block.output, scale=4.0)      # or on positions: h[:, -1] = steer(h[:, -1])
    loss = model.lm_head.output.logsumexp(-1).mean().save()
loss.backward()                                        # fills steer.vector.grad
```

Each takes the values of a site, any number of leading dimensions and the features last, and returns new ones of the same
shape and dtype; what it was given is never changed in place. They compute in the dtype of their parameters. On a
recorded value their operations are recorded like the body's own, so that they are spliced and compiled with the model;
on a plain tensor they run at once. A parameter's new value never recompiles.
"""

from .ablate import Mean, Resample, Zero
from .add import Add, Noise
from .interchange import BoundlessInterchange, Interchange, LowRankInterchange, RotatedInterchange, SigmoidMask
from .project import Projection
from .sae import SAESplice

__all__ = [
    "Add",
    "BoundlessInterchange",
    "Interchange",
    "LowRankInterchange",
    "Mean",
    "Noise",
    "Projection",
    "Resample",
    "RotatedInterchange",
    "SAESplice",
    "SigmoidMask",
    "Zero",
]
