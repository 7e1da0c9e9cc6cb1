"""What a forward of transformers calls its cache: `cache` from 5.24 on, `past_key_values` before."""

import inspect

from transformers import LlamaForCausalLM

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
