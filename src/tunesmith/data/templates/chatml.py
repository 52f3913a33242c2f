"""ChatML, the built-in chat template for base models; it is used only when it is asked for."""

from __future__ import annotations

NAME = "chatml"
TOKENS = ("<|im_start|>", "<|im_end|>")

TEMPLATE = r"""
{%- set first = namespace(at=0) %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {%- set first.at = 1 %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'These functions can be called:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '</tools>\nA call is written as\n<tool_call>\n' }}
    {{- '{"name": NAME, "arguments": {...}}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages[first.at:] %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function or call %}
        {{- '\n' if message.content or not loop.first else '' }}
        {{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
        {%- if function.arguments is string %}
            {{- function.arguments }}
        {%- else %}
            {{- function.arguments | tojson }}
        {%- endif %}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()
"""Keeps every turn as it was, so a chat never branches; calls and reasoning as in Qwen's form."""
