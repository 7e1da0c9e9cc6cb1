"""One text of a language model on nnsight 0.8.1 and on ours: prompts, batches, generation step by step."""

import textwrap
from typing import Any

import pytest
import torch

import same_models
from nnsight_fx import LanguageModel
from nnsight_peer import run_peer
from test_same_text import MODELS

pytestmark = pytest.mark.peer

PROGRAMS = {
    "prompt": """
        with model.trace("a b c d"):
            out["h"] = model.transformer.h[0].output.save()
            out["y"] = model.lm_head.output.save()
    """,
    "batch": """
        with model.trace(["a b c d", "e f"]):
            model.transformer.h[0].output[:, -1] = 0
            out["y"] = model.lm_head.output[:, -1].save()
    """,
    "invokes": """
        with model.trace() as tracer:
            with tracer.invoke("a b c d"):
                out["h"] = model.transformer.h[0].output[:, -1].save()
                model.transformer.h[0].output[:, -1] = 1
                out["first"] = model.lm_head.output[:, -1].save()
            with tracer.invoke(["e f", "g h a"]):
                out["second"] = model.lm_head.output[:, -1].save()
    """,
    "patched": """
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke("a b c d"):
                h = model.transformer.h[0].output[:, -1]
                barrier()
            with tracer.invoke("e f"):
                barrier()
                model.transformer.h[0].output[:, -1] = h
                out["y"] = model.lm_head.output[:, -1].save()
    """,
    "lens": """
        with model.trace("a b c d"):
            for i, block in enumerate(model.transformer.h):
                out[f"lens{i}"] = model.lm_head(model.transformer.ln_f(block.output)).save()
    """,
    "field": """
        with model.trace("a b c d"):
            model.output.logits = model.output.logits * 2
            out["y"] = model.output.logits.save()
    """,
    "generate": """
        with model.generate("a b c", max_new_tokens=4, do_sample=False) as tracer:
            for step in tracer.iter[0:4]:
                out[f"y{step}"] = model.lm_head.output.save()
            out["tokens"] = tracer.result.save()
    """,
    "one_step": """
        with model.generate("a b c", max_new_tokens=4, do_sample=False) as tracer:
            for step in tracer.iter[2]:
                model.transformer.h[0].output[:] += 3
                out["y"] = model.lm_head.output.save()
            out["tokens"] = tracer.result.save()
    """,
    "into_the_cache": """
        with model.generate("a b c", max_new_tokens=4, do_sample=False) as tracer:
            model.transformer.h[0].output[:, 0] = 1
            out["prompt"] = model.lm_head.output.save()
            for step in tracer.iter[1:4]:
                out[f"y{step}"] = model.lm_head.output.save()
            out["tokens"] = tracer.result.save()
    """,
    "sampled": """
        torch.manual_seed(9)
        with model.generate("a b c", max_new_tokens=5, do_sample=True, top_k=5) as tracer:
            out["tokens"] = tracer.result.save()
    """,
    "generator_output": """
        with model.generate("a b c", max_new_tokens=3, do_sample=False):
            out["tokens"] = model.generator.output.save()
    """,
    "cache_of_steps": """
        with model.generate("a b c", max_new_tokens=3, do_sample=False) as tracer:
            cache = tracer.cache([model.lm_head])
            out["tokens"] = tracer.result.save()
        out["n"] = torch.tensor(len(cache["model.lm_head"]))
    """,
}


@pytest.mark.parametrize("engine", ["hooks", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_text_gives_the_same_values(name, engine):
    text = "with torch.no_grad():\n" + textwrap.indent(textwrap.dedent(PROGRAMS[name]), "    ")
    net = same_models.gpt2()
    start = f"{MODELS}\nnet = gpt2()\nnet.load_state_dict(state)\nmodel = LanguageModel(net, tokenizer=tokenizer())\n"
    theirs = run_peer(start + text, state=net.state_dict())
    model, ours = LanguageModel(net, tokenizer=same_models.tokenizer()), {}
    if engine == "eager":
        model.compile(backend="eager")
    scope: dict[str, Any] = {"torch": torch, "model": model, "out": ours}
    exec(text, scope)
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
