"""Writes qwen3.json: what Jinja2 makes of Qwen3's own chat template. Run it in this folder with the path of Qwen3's
tokenizer_config.json; the result is committed, the template is not."""

import json
import sys

import jinja2
import jinja2.sandbox

env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
env.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
with open(sys.argv[1], encoding="utf-8") as f:
    template = env.from_string(json.load(f)["chat_template"])

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter & <Temperatur> für einen Ort, \"jetzt\"",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1}}, "required": ["place"]},
        },
    },
    {"type": "function", "function": {"name": "noop", "parameters": {}}},
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "Köln", "days": 2, "x": 1.0}}}
CONVERSATIONS = [
    ([{"role": "user", "content": "Hi"}], None, {}),
    ([{"role": "user", "content": "Hi"}], None, {"enable_thinking": False}),
    ([{"role": "user", "content": "Hi"}], None, {"enable_thinking": True, "add_generation_prompt": False}),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}], None, {}),
    (
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "no thoughts"},
            {"role": "user", "content": "ok"},
        ],
        None,
        {},
    ),
    ([{"role": "user", "content": "Go"}, {"role": "assistant", "content": "odd</think>rest"}], None, {"add_generation_prompt": False}),
    ([{"role": "user", "content": "Weather?"}], TOOLS, {}),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}], TOOLS, {}),
    (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "12°C", "tool_call_id": "call_1"},
            {"role": "tool", "content": "13°C", "tool_call_id": "call_1"},
        ],
        TOOLS,
        {},
    ),
    (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
            {"role": "tool", "content": "12°C"},
            {"role": "assistant", "content": "<think>\nwarm\n</think>\n\n12°C"},
            {"role": "user", "content": "Thanks"},
        ],
        TOOLS,
        {"enable_thinking": False},
    ),
]

cases = []
for messages, tools, kwargs in CONVERSATIONS:
    variables = {"messages": messages, "tools": tools, "add_generation_prompt": True, **kwargs}
    cases.append({"messages": messages, "tools": tools, "kwargs": kwargs, "prompt": template.render(**variables)})

with open("qwen3.json", "w", encoding="utf-8") as f:
    json.dump(cases, f, ensure_ascii=False, indent=1)
    f.write("\n")
