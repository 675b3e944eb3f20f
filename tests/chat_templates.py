"""Small chat templates of the kinds that models have, as test inputs."""

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Takes the thoughts out of answers before the last question, and writes an empty thought into the
# last answer, as Qwen3 does; asked not to think, it opens an answer behind an empty thought.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% set content = parts[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ content }}{% else %}{{ content }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system's text, or the tools, stand in front of the last question only.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if (rest | selectattr('role', 'equalto', 'user') | list)[-1] == m and system is defined %}"
    "[INST] {{ system }}\n\n{{ m.content }}[/INST]{% else %}[INST] {{ m.content }}[/INST]"
    "{% endif %}"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
# Writes the last answer only, as templates that summarise do: no other one can be found.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[...]\n"
    "{% else %}[{{ m.role }}] {{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Opens a thought in front of every answer, and writes it only where an answer has one, as
# templates of models do that always think.
THINKING = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n[{{ m.content }}]<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# A tool's word stands in the turn that called it, and a turn that goes on with no content has no
# end, as in Gemma 4's.
SAME_TURN = (
    "{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]{% else %}"
    "{% if m.role == 'user' %}<start_of_turn>user\n{{ m.content }}<end_of_turn>\n"
    "{% else %}{% if messages[loop.index0 - 1].role != 'tool' %}<start_of_turn>model\n{% endif %}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}"
    "{% if m.content %}{{ m.content }}<end_of_turn>\n{% endif %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<start_of_turn>model\n"
    "{% endif %}"
)
# Writes a tool's word behind the call, and what was said with the call behind both.
MOVED = (
    "{% for m in messages %}{% if m.role == 'user' %}<start_of_turn>user\n"
    "{{ m.content }}<end_of_turn>\n{% elif m.role == 'assistant' %}<start_of_turn>model\n"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }}){% endfor %}"
    "{% if m.tool_calls and not loop.last %}[{{ messages[loop.index].content }}]{% endif %}"
    "{{ m.content }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# A tool's word has to follow a call, and a call has no other content, as in Mistral's.
STRICT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}<{{ m.content }}>"
    "{% elif m.tool_calls %}({{ m.tool_calls[0].function.name }})</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# A turn ends where the next one begins, as in GLM's.
NEXT_TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The end of the last turn begins as the marks of others do.
ENDS_AT_LAST = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|the end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]
ENDS = {"<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>"}
