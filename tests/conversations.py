"""Chat templates that use what templates use, and conversations for them: system messages, tools, many turns."""

from __future__ import annotations

from typing import Any

TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "headers with date and tools": """
{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<s>system ' ~ strftime_now('%Y') ~ '\\n\\n' ~ system }}
{%- if tools is not none %}
{{ 'Tools:' }}
{%- for tool in tools %}
{{ tool | tojson(indent=4) }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.function.name + '(' }}
            {%- for name, value in call.function.arguments | items %}
                {{- name + '=' + value | tojson }}{{ ', ' if not loop.last }}
            {%- endfor %}
            {{- ')</call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- '<result>' + (message.content if message.content is string else message.content | tojson) + '</result>' }}
    {%- else %}
        {{- '<' + message.role + '>' + message.content }}
    {%- endif %}
{%- endfor %}""",
    "alternating": """
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ '<<SYS>>' + message.content + '<</SYS>>' }}{% continue %}{% endif %}
{% if message.role not in ['user', 'assistant', 'tool'] %}{{ raise_exception('no such role') }}{% endif %}
{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{% elif message.content %}{{ ' ' + message.content.strip() + eos_token }}
{% endif %}
{% endfor %}""",
    "generation blocks and thoughts": """
{%- set ns = namespace(last=messages | length - 1, thoughts=0) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- if message.reasoning_content is defined and loop.index0 >= ns.last - 1 %}
            {%- set ns.thoughts = ns.thoughts + 1 %}
            {{- '<think>' ~ message.reasoning_content ~ '</think>' }}
        {%- endif %}
        {{- message.content | default('', true) }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|' ~ message.role ~ '|>' ~ message.content }}
    {%- endif %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}{{ '%d thoughts' % ns.thoughts }}""",
    "macros and documents": """
{% macro say(role, text) -%}
<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro %}
{% if documents %}{% for document in documents %}[{{ loop.index }}] {{ document.title }}: {{ document['text'] }}
{% endfor %}{% endif %}
{% for message in messages if message.content %}
{{ say('model' if message.role == 'assistant' else 'user', message.content) }}{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | map(attribute='role') | join(',') }}
{{ {'a': [1, 2.5, none, true], 'é': '<&>'} | tojson(ensure_ascii=true, sort_keys=true) }}""",
    "json of all": """{{ messages | tojson }}|{{ tools | tojson }}|{{ documents | tojson(separators=(',', ':')) }}""",
    "defined": """
{{ tools is defined }} {{ tools is none }} {{ nothing is defined }} {{ bos_token }}{{ unk_token }}
{% for key, value in messages[0].items() | sort %}{{ key }}={{ value }};{% endfor %}
{% set last = messages[-1] %}{{ last.content[:5] ~ last['content'].split(' ')[0].upper() }}{{ last.nothing }}""",
    "blocks that trim": """
{% if messages %}
  {% for message in messages -%}
    {{ loop.index0 }} {{ message.content | replace('\\n', ' ') }} {{ loop.cycle('odd', 'even') }}
  {%+ endfor %}
{% endif %}
    {# a comment #}
{{ dict(a=1)['a'] }} {{ range(3) | list }} {{ 'x' if false }}""",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place, in °C.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["place"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}}
DOCUMENTS = [{"title": "A", "text": "first <b>"}, {"title": "Ä", "text": "second"}]

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [{"role": "user", "content": "Hello, 世界!\n"}]},
    "system": {
        "messages": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Why is the sky blue?"}]
    },
    "many turns": {
        "messages": [
            {"role": "system", "content": "You count."},
            *({"role": role, "content": f"{role} {n}\n"} for n in range(4) for role in ("user", "assistant")),
            {"role": "user", "content": "and now 🙂?"},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "Weather in Zürich & <Bern>?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"celsius": 21.5}', "name": "weather"},
            {"role": "assistant", "content": "21.5 °C.", "thinking": "say it"},
            {"role": "user", "content": "Thanks"},
        ],
        "tools": [WEATHER],
    },
    "documents": {
        "messages": [
            {"role": "user", "content": "What do they say?"},
            {"role": "assistant", "content": "Both.", "reasoning": None, "reasoning_content": "read"},
            {"role": "user", "content": "Cite 'them' \"all\""},
        ],
        "documents": DOCUMENTS,
        "add_generation_prompt": False,
    },
}
