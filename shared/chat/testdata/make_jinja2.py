"""Writes jinja2.json: what Jinja2 3.1 makes of small templates in the environment in which transformers runs chat
templates. Run it in this folder; the result is committed, so tests need no Python."""

import json

import jinja2
import jinja2.ext
import jinja2.sandbox


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


class Generation(jinja2.ext.Extension):
    """Stands in for transformers' AssistantTracker: the tag has no effect on the text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
)
env.filters["tojson"] = tojson
env.globals["raise_exception"] = raise_exception

SPACES = [
    "a\n  {% if true %}\n    b\n  {% endif %}\nc\n",
    "text  {% if true %}y{% endif %}",
    "{{ 'a' }} {% if true %}y{% endif %}",
    "{% if true %}  {% if true %}y{% endif %}{% endif %}",
    "{% if true %}\n  {% if true %}y{% endif %}{% endif %}",
    "x\n  {#- comment -#}  \n y",
    "x\n  {# comment #}\n y",
    "x  {{- ' a ' -}}  y",
    "  {%+ if true %}y{% endif %}",
    "{% if true +%}\ny{% endif %}",
    "a\r\nb\r\n{% if true %}\r\nc{% endif %}",
    "x\n\n",
    "{ {%- if true %}a{% endif %} }",
    "{{ '{' }}{% if true %}{{ '%}' }}{% endif %}",
    "{%- for m in [1, 2] -%} {{ loop.last }} {%- endfor -%} z",
    "{% raw %}{{ x }} 'q' \\ {% endraw %}\n end",
    "{%- raw -%}  {% if %}  {%- endraw -%}  end",
    "{% generation %}\nx\n{% endgeneration %}\ny",
    "a {{- 'b' if true -}} c",
]

EXPRESSIONS = [
    "'a' + ('b' if x is defined else 'c')",
    "(1 if true else 2) + 1",
    "'a' if x is defined else 'b' if true else 'c'",
    "['p' if false else 'q', 'r'] | join('-')",
    "{'k': 'v' if true else 'w'} | tojson",
    "('a' if false) is none or true",
    "'if' + (' else ' if true else \"'\")",
    "dict(a=('x' if true else 'y'))['a']",
    "messages[-1].role ~ messages[-2].role ~ messages[0]['role']",
    "messages[1:][0].role",
    "messages[::-1][0].role",
    "messages[:-1] | length",
    "'a,b'.split(',')[-1] ~ 'ab'.split(',')[-1] ~ 'a,b,c'.rsplit(',', 1)[0] ~ 'a,b,c'.split(',', 1)[1]",
    "' a  b '.split() | join('|')",
    "' a  b c '.split(None, 1) | join('|')",
    "' a  b c '.rsplit(None, 1) | join('|')",
    "'  x \n'.strip() ~ '|' ~ ' y '.lstrip() ~ '|' ~ ' z '.rstrip() ~ '|'",
    "'\n\nx\n'.strip('\n') ~ 'xxaxx'.lstrip('x') ~ 'abc'.rstrip('cb')",
    "('  x \n' | trim) ~ '|'",
    "'abc'.startswith('a') ~ 'abc'.endswith(('x', 'c'))",
    "'abcabc'.count('b') ~ 'abc'.find('c') ~ 'abc'.find('x')",
    "'a\nb\r\nc'.splitlines() | join('|')",
    "'a-b'.replace('-', '+') ~ 'Ab'.upper() ~ 'Ab'.lower() ~ 'ab cd'.title()",
    "'x'.join(['a', 'b']) ~ 'xab'.removeprefix('x')",
    "tool | tojson",
    "tool | tojson(indent=2)",
    "tool | tojson(separators=(',', ':'), sort_keys=true)",
    "tool | tojson(ensure_ascii=true)",
    "numbers | tojson",
    "[1.0, 1e16, 123456789.5, 1e-5, 0.1, -0.0, true, none] | tojson",
    "tool.items() | map('first') | join(',')",
    "tool.keys() | join(',')",
    "tool.get('name') ~ tool.get('nope', 'd') ~ tool['name'] ~ tool.parameters.properties['b'].type",
    "'name' in tool and 'nope' not in tool",
    "tool is mapping and messages is iterable and messages is not mapping and 'a' is string",
    "range(3) | list | tojson",
    "range(5, 1, -2) | join(',')",
    "enable_thinking is defined and enable_thinking is false",
    "x is defined and x is false",
    "none is none and not (1 is none)",
    "x | default('d') ~ ('' | default('e', true))",
    "1 < 2 and not false or x",
    "(none | string) ~ (true | string) ~ (1.0 | string)",
    "7 // 2 ~ 7 % 3",
    "messages | length - 1",
    "(messages | selectattr('role', 'equalto', 'user') | list | length) ~ (messages | map(attribute='role') | join(','))",
    "messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | join(',')",
    "('a' ~ 1) * 2",
    "'é世' | length ~ ('é世' | upper)",
    "[3, 1, 2] | sort | first ~ ([3, 1] | last)",
    "'a' == \"a\" and 'a' != 'b'",
    "('x' in 'xyz') ~ ('a' in ['b'])",
    "raise_exception('no ' + 'way')",
]

STATEMENTS = [
    "{% for k, v in tool.items() %}{{ k }},{% endfor %}",
    "{% for k, v in tool | items %}{{ k }},{% endfor %}",
    "{% for k in tool %}{{ k }},{% endfor %}",
    "{% for a in [1, 2, 3] if a > 1 %}{{ loop.index }}:{{ a }} {% endfor %}",
    "{% for a in ([1] if false else [2, 3]) %}{{ a }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for a in [1, 2, 3, 4] %}{% if a == 2 %}{% continue %}{% elif a == 4 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "{% for a in [] %}a{% else %}none{% endfor %}",
    "{% for i in range(3) %}{{ i }}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0, t='') %}{% for a in [1, 2] %}{% set ns.n = ns.n + a %}{% set ns.t = ns.t ~ a %}{% endfor %}{{ ns.n }}{{ ns.t }}",
    "{% set a = 1 %}{% if true %}{% set a = 2 %}{% endif %}{{ a }}",
    "{% set a = 1 %}{% for b in [1] %}{% set a = 2 %}{% endfor %}{{ a }}",
    "{% set a = 'x' if true else 'y' %}{{ a }}",
    "{% set a %}text{{ 1 }}{% endset %}{{ a }}!",
    "{% macro m(a, b=2, c=none) %}{{ a }}{{ b }}{{ c is none }}{% endmacro %}{{ m(1) }}{{ m(1, b=5) }}{{ m(1, 2, 3) }}",
    "{% set n = namespace(v=0) %}{% macro inc() %}{% set n.v = n.v + 1 %}{% endmacro %}{{ inc() }}{{ inc() }}{{ n.v }}",
    "{% macro parts(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}{{ c.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}[{{ parts(m.content) | trim }}]{% endfor %}",
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}<{{ m.role }}>{% endif %}{{ loop.revindex }}{% endfor %}",
    "{% if messages[0].role == 'system' and messages|length > 1 %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ rest | length }}",
    "{% with a = 1 %}{{ a }}{% endwith %}",
    "{% if false %}a{% elif messages %}b{% else %}c{% endif %}",
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('Unknown role: ' ~ m.role) }}{% endif %}{% endfor %}ok",
]

VARIABLES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ],
    "tool": {
        "type": "function",
        "name": "größe",
        "parameters": {"properties": {"b": {"type": "string", "description": "it's <b> & \"q\"\n"}, "a": {"enum": [1, 2.5, None, True]}}, "required": []},
    },
    "numbers": [0, -1, 12345678901, 1.0, 2.5, 1e100],
    "enable_thinking": False,
}

cases = []
for source in SPACES + ["{{ " + e + " }}" for e in EXPRESSIONS] + STATEMENTS:
    case = {"template": source}
    try:
        case["output"] = env.from_string(source).render(**VARIABLES)
    except jinja2.exceptions.TemplateError as e:
        case["raised"] = str(e)
    cases.append(case)

with open("jinja2.json", "w", encoding="utf-8") as f:
    json.dump({"jinja2": jinja2.__version__, "variables": VARIABLES, "cases": cases}, f, ensure_ascii=False, indent=1)
    f.write("\n")
