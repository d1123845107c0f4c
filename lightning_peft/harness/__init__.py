"""lm-evaluation-harness as a client: a model type that evaluates any adapter folder with the harness's own tasks.

Importing this package imports `lm_eval` and registers the type `lightning-peft` with it.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("lm_eval") is None:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'lightning-peft[harness]'.", name="lm_eval")

from lightning_peft.harness.model import NAME as NAME
from lightning_peft.harness.model import AdaptedLM as AdaptedLM
