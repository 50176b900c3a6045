"""Chat templates in the manner of well-known families, short enough to read, each with what its assistant says.

`said` is the independent reference of the mask tests: what the target generates for a message, with its marker.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sstf.types import Message, Mode

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Thinks by default, drops the reasoning of answers before the last request, and writes an empty think block otherwise.
QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- set ns = namespace(request=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.request = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.request and (loop.last or reasoning) %}"
    "{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{%- if m.content or not loop.first %}{{- '\n' }}{%- endif %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- (call.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)

# One call a turn, in place of any text; a system turn is always there, and the tools stand in the first request.
LLAMA31 = (
    "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{%- if m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 %}{{- raise_exception('This model calls one tool at a time') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if loop.first and tools %}{{- (tools | tojson) + '\n\n' }}{%- endif %}"
    "{{- (m.content | trim) + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

# No generation prompt, a marker that is a special token INSIDE a turn, identities of nine characters, and the tools
# before the last request only (so that history changes with every request).
MISTRAL = (
    "{{- bos_token }}{%- set ns = namespace(request=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.request = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.request %}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}"
    "{%- if call.id is not defined or call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    '{{- \'{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) }}'
    "{{- ', \"id\": \"' + call.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}"
    "{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + (m.content | trim) + eos_token }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + (m.content | tojson) + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}"
    "{{- '[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('Only user, assistant and tool turns') }}{%- endif %}"
    "{%- endfor %}"
)

# The assistant is called `model`, there is no system turn, and the end-of-turn marker is not the tokenizer's end token.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (m['content'] | trim) }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Reasoning is part of the content and stays there; `/think` switches are left out.
INLINE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

# The prompt opens the think block itself, and history never holds reasoning.
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def _calls(message: Message, arguments: str) -> list[str]:
    return [
        f'{{"name": "{call.name}", "{arguments}": {json.dumps(call.arguments, ensure_ascii=False)}'
        for call in message.tool_calls
    ]


def chatml_said(message: Message, mode: Mode | None) -> str:
    return message.content + "<|im_end|>"


def qwen3_said(message: Message, mode: Mode | None) -> str:
    thought = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning is not None else ""
    calls = [f"<tool_call>\n{call}}}\n</tool_call>" for call in _calls(message, "arguments")]
    return thought + "\n".join([message.content] * bool(message.content) + calls) + "<|im_end|>"


def llama31_said(message: Message, mode: Mode | None) -> str:
    return (_calls(message, "parameters")[0] + "}" if message.tool_calls else message.content) + "<|eot_id|>"


def mistral_said(message: Message, mode: Mode | None) -> str:
    if not message.tool_calls:
        return f" {message.content}</s>"
    named = zip(_calls(message, "arguments"), message.tool_calls, strict=True)
    return "[TOOL_CALLS] [" + ", ".join(f'{call}, "id": "{own.id}"}}' for call, own in named) + "]</s>"


def gemma_said(message: Message, mode: Mode | None) -> str:
    return message.content + "<end_of_turn>"


def inline_said(message: Message, mode: Mode | None) -> str:
    thought = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning is not None else ""
    return thought + message.content + "<|im_end|>"


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, what conversations it takes, and what its assistant says."""

    template: str
    special: tuple[str, ...]
    bos: str
    eos: str
    said: Callable[[Message, Mode | None], str]
    system: bool = True
    calls: int = 0  # at most so many in a turn
    text_beside_calls: bool = False
    thinks: bool = False
    plain: Mode | None = None  # the mode of conversations without reasoning
    keeps_history: bool = True


FAMILIES = {
    "chatml": Family(CHATML, (), "<|im_start|>", "<|im_end|>", chatml_said),
    "qwen3": Family(
        QWEN3,
        (),
        "<|endoftext|>",
        "<|im_end|>",
        qwen3_said,
        calls=3,
        text_beside_calls=True,
        thinks=True,
        plain="plain",
        keeps_history=False,
    ),
    "llama31": Family(
        LLAMA31,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        llama31_said,
        calls=1,
    ),
    "mistral": Family(
        MISTRAL,
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "<s>",
        "</s>",
        mistral_said,
        system=False,
        calls=3,
        keeps_history=False,
    ),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", gemma_said, system=False
    ),
    "inline": Family(INLINE, (), "<|endoftext|>", "<|im_end|>", inline_said, thinks=True),
}


def use(tokenizer: PreTrainedTokenizerBase, family: Family) -> PreTrainedTokenizerBase:
    """Make the tokenizer one of that family."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    tokenizer.chat_template = family.template
    return tokenizer
