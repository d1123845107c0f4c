"""Chat templates in the forms that model makers document, in short, and a tokenizer with their tokens."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CHATML = "{% for m in messages %}" + _TURN + "{% endfor %}"
TEMPLATES = {
    "chatml": _CHATML + _PROMPT,
    "qwen2.5": (
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML + _PROMPT
    ),
    # reasoning of earlier turns is dropped; the last turn has a place for it, whether there is any or not
    "qwen3": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set answer = m.content.split('</think>')[-1].lstrip('\\n') %}{% set thought = '' %}"
        "{% if '</think>' in m.content %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\\n' }}"
        "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ answer + '<|im_end|>\\n' }}"
        "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _PROMPT
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% set text = system + m.content if loop.first else m.content %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # the system's text stands in the last of the user's turns
    "mistral": (
        "{% set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
        "{% set chat = messages[1:] if system else messages %}{{ bos_token }}"
        "{% for m in chat %}{% if m.role == 'user' %}{% set last = loop.last or loop.index == loop.length - 1 %}"
        "{{ '[INST] ' + (system if last else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # a whole chat ends with a token of its own
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    # the answer has a channel, and its last turn another end
    "harmony": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        "{% else %}{% set role = 'developer' if m.role == 'system' else m.role %}"
        "{{ '<|start|>' + role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    # marks the assistant's tokens: header, text and end token
    "smollm3": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}" + _TURN + "{% endgeneration %}{% else %}" + _TURN + "{% endif %}{% endfor %}" + _PROMPT
    ),
    # marks the text alone
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}" + _PROMPT
    ),
    # marks some turns alone: those that do not begin with "It"
    "partly": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and m.content[:2] != 'It' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}" + _PROMPT
    ),
    # has no generation prompt, so that a model begins its turn by itself
    "unprompted": _CHATML,
    # without special tokens, and with a space that the answer's first token takes in
    "plain": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
# what the model is asked to write for "Hello you." after one question, by template
WRITTEN = {
    "chatml": "Hello you.<|im_end|>",
    "qwen2.5": "Hello you.<|im_end|>",
    "qwen3": "<think>\n\n</think>\n\nHello you.<|im_end|>",
    "llama2": " Hello you. </s>",
    "llama3": "Hello you.<|eot_id|>",
    "mistral": " Hello you.</s>",
    "gemma": "Hello you.<end_of_turn>",
    "phi3": "Hello you.<|end|>",
    "deepseek": "Hello you.</s>",
    "harmony": "<|channel|>final<|message|>Hello you.<|return|>",
    "smollm3": "Hello you.<|im_end|>",
    "marked": "Hello you.<|im_end|>",
    "partly": "Hello you.<|im_end|>",
    "unprompted": "<|im_start|>assistant\nHello you.<|im_end|>",
    "plain": "Hello you.\n",
}
_SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
]


@cache
def _byte_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" Hello you. Hello you. What is it? It is so. user assistant system model final think\n\n"] * 3
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of up to 400 tokens with one of the templates, one of one's own, or with none."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_pairs(), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = None if template is None else TEMPLATES.get(template, template)
    return tokenizer
