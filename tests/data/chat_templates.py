"""Chat templates in the manner of the families they are named after, written for these tests.

They use the special tokens that the test vocabularies have: <s> </s> <|im_start|> <|im_end|>.
"""

CHATML = """\
{% for m in messages %}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

DEFAULT_SYSTEM = (
    """\
{% if messages[0].role != 'system' %}
<|im_start|>system
Be kind.<|im_end|>
{% endif %}
"""
    + CHATML
)

TEMPLATES = {
    "chatml": CHATML,
    "chatml with default system": DEFAULT_SYSTEM,
    "llama 2": """\
{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set rest = messages %}
{% set system = '' %}
{% endif %}
{% for m in rest %}
{% set text = system + m.content if loop.first else m.content %}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + text.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
""",
    "llama 3": """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
""",
    "llama 3 with date": """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date = strftime_now('%d %b %Y') %}
{%- else %}
    {%- set date = 'unknown' %}
{%- endif %}
{{- 'Today: ' + date + '\\n' }}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "mistral": """\
{{- bos_token }}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}
        {{- m.content + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('No system role') }}
{%- endif %}
{%- for m in messages %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<|im_start|>' + role + '\\n' + m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>model\\n' }}
{%- endif %}
""",
    "zephyr": """\
{% for m in messages %}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
""",
    "vicuna": """\
{{- 'A chat. ' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'ASSISTANT: ' + m.content + eos_token }}
    {%- else %}
        {{- m.role.upper() + ': ' + m.content + ' ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
""",
    "no end of turn": """\
{% for m in messages %}
### {{ m.role }}:
{{ m.content }}

{% endfor %}
{% if add_generation_prompt %}
### assistant:
{% endif %}
""",
    "end of text behind the end of turn": """\
{% for m in messages %}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% else %}
{{ eos_token }}
{% endif %}
""",
    "generation marks": """\
{% for m in messages %}
{% if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "empty thoughts in the last answer": """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "macro, break and tools": """\
{% macro turn(m) -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endmacro %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if loop.index > 99 %}{% break %}{% endif %}
{{- turn(m) }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "system folded into the first turn": """\
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
    {%- set text = (first if loop.first else '') + m.content %}
    {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "space before the answer": """\
{%- for m in messages %}
    {{- ('User: ' if m.role == 'user' else 'Assistant: ') + m.content }}
    {{- eos_token if m.role == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
""",
    "channels": """\
{%- for m in messages %}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant final\\n' + m.content + eos_token }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant' }}
{%- endif %}
""",
    "roles as tokens, no header for answers": """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>' + m.content + '<|im_end|>' }}
    {%- else %}
        {{- m.role + ' ' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>' }}
{%- endif %}
""",
    "loop facts": """\
{%- for m in messages %}
    {{- loop.index ~ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}
    {{- '\\n' if loop.revindex0 >= 0 and loop.length > 0 and (loop.previtem is defined or loop.first) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- (messages | length + 1) ~ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "names by lookup": """\
{%- set names = {'user': 'U', 'assistant': 'A', 'system': 'S'} %}
{%- for m in messages %}
    {{- names[m.role] + ': ' + m['content'].rstrip() + ('<|im_end|>' if m.role == 'assistant' else '\\n') }}
{%- endfor %}
{%- for key, name in names.items() if add_generation_prompt and key == 'assistant' %}
    {{- name + ': ' }}
{%- endfor %}
""",
}
NO_END = {"no end of turn"}
REFUSES_SYSTEM = {"mistral", "gemma"}
