"""Models of Hugging Face transformers with factorized layers: saved, and loaded as they are.

Importing this module registers a quantization method ``tensormoe``. ``from_pretrained`` then builds
the layers that a folder's ``config.json`` describes before it loads weights, so that no dense
experts are allocated. ``save_pretrained`` needs nothing: :func:`tensormoe_torch.compress` and
:func:`tensormoe_torch.replace` mark what they change. For layers put in by hand, call
:func:`attach`.

>>> import tempfile
>>> import torch
>>> import transformers
>>> import tensormoe_torch
>>> import tensormoe_torch.huggingface
>>> sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
>>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
>>> surgery = tensormoe_torch.replace(model, "transformer.h.*.mlp", experts=4, drop=0.0)
>>> with tempfile.TemporaryDirectory() as folder:
...     model.save_pretrained(folder)
...     again = transformers.AutoModelForCausalLM.from_pretrained(folder)
>>> type(again.transformer.h[0].mlp).__name__
'MuMoEMLP'
>>> tokens = torch.arange(8).reshape(1, 8)
>>> torch.equal(again(tokens).logits, model(tokens).logits)
True
"""

from __future__ import annotations

from tensormoe_torch.huggingface._requirements import lacking

if absent := lacking():
    raise absent

from tensormoe_torch.huggingface._attach import attach, detach
from tensormoe_torch.huggingface._config import TensormoeConfig
from tensormoe_torch.huggingface._quantizer import TensormoeQuantizer

__all__ = ["TensormoeConfig", "TensormoeQuantizer", "attach", "detach"]
