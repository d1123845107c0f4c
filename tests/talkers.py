"""A tiny chat model with adapters of several kinds saved beside it: what tests of generating and chatting talk to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from edits import add_lora, add_offsets, fill
from peft import set_peft_model_state_dict
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import save_adapter
from lightning_peft.stack.stack import stack_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ 'A: ' if m.role == 'assistant' else 'Q: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
TARGETS = ["q_proj", "v_proj"]
PROMPTS = ["Q: What is it?\nA:", "Who is he?", "It is true. It is not false."]


def make_base(folder: Path, tokenizer: Any, kind: str = "llama", template: str | None = TEMPLATE) -> Path:
    """A folder of a tiny model that writes long answers and whose tokenizer has a chat template."""
    model: Any = tiny(kind)
    with torch.no_grad():  # special tokens are unlikely whatever is read
        model.get_output_embeddings().weight[:3] *= 1e-3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template is not None:
        own = AutoTokenizer.from_pretrained(folder)
        own.chat_template = template
        own.save_pretrained(folder)
    return folder


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def make_adapters(base: Path, folder: Path) -> Path:
    """Folders `edit`, `everywhere`, `lora`, `plain` (written by peft itself), `soft` (without a dial) and `stack`."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(0)  # whatever a process has drawn before
    model = loaded(base)
    stack = stack_of(model)
    for name, positions in (("edit", "answer"), ("everywhere", "all")):
        add_offsets(model, positions)
        save_adapter(model, folder / name)
        stack.remove("edit")
    stack.add(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "soft")
    fill(stack, "soft")
    save_adapter(model, folder / "soft")
    stack.remove("soft")
    add_lora(model, TARGETS)
    save_adapter(model, folder / "lora")
    tensors = {name: value.clone() for name, value in stack.tensors(stack["lora"]).items()}
    add_offsets(model, "answer")
    save_adapter(model, folder / "stack")
    plain: Any = get_peft_model(loaded(base), LoraConfig(r=2, lora_alpha=1, target_modules=TARGETS))
    set_peft_model_state_dict(plain, tensors)
    plain.save_pretrained(str(folder / "plain"))
    return folder
