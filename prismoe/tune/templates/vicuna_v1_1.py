"""Vicuna v1.1 as FastChat writes it: `SYSTEM USER: question ASSISTANT: answer</s>USER: question …`.

The space after the system sentence also stands where there is none, as in LLaMA-MoE's tuning (its system sentence was
empty); the end token is the tokenizer's own. The space before an answer is the answer's: a prompt ends with the colon.
"""

from __future__ import annotations

__all__ = ["TEMPLATE", "TOKENS"]

TOKENS = ()
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ (message['content'] if message['role'] == 'system' else '') + ' ' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
