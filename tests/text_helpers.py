"""Chat templates and tiny tokenizers for the tests of text to batches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from train.data.chat import ChatTemplate
from train.data.examples import DataReport, Examples, build_examples
from train.data.template_files import load_chat_template
from train.data.template_process import TemplateProcess
from train.data.tokenizer import Tokenizer, load_tokenizer

# In the style of GLM-4.7: no end-of-turn token, reasoning only after the last user message, `<think>` in the prompt.
GLM_TEMPLATE = """\
[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {% set ns.last_user = loop.index0 -%}
    {%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>{{ m.content }}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if loop.index0 > ns.last_user and reasoning -%}
{{ '<think>' + reasoning.strip() + '</think>' }}
{%- else -%}
{{ '</think>' }}
{%- endif -%}
{%- if m.content and m.content.strip() -%}
{{ m.content.strip() }}
{%- endif -%}
{%- for call in m.tool_calls or [] %}
{%- set call = call.function if call.function else call %}
{{- '<tool_call>' + call.name -}}
{%- for key, value in call.arguments.items() -%}
<arg_key>{{ key }}</arg_key><arg_value>{{ value | tojson if value is not string else value }}</arg_value>
{%- endfor -%}</tool_call>
{%- endfor %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|observation|>' -}}
{%- endif -%}
<tool_response>{{ m.content }}</tool_response>
{%- elif m.role == 'system' -%}
<|system|>{{ m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{ '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}
{%- endif -%}
"""

# In the style of Qwen3: `<|im_end|>` ends a turn, earlier reasoning is dropped, the last turn always has a think block.
QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# In the style of Qwen3.5: the prompt ends `<think>\\n`, a turn without reasoning is `<think>\\n\\n</think>\\n\\n…`.
THINK_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# In the style of Mistral: BOS, strict alternation, EOS after each turn, no text for the generation prompt.
MISTRAL_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""

# Marks assistant text for other trainers, stops a loop early, tells the year.
MARKED_TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'stop' %}{% break %}{% endif %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{% set text = message.content %}{{ text | trim }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

# No special token at all.
PLAIN_TEMPLATE = """\
{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""

TEMPLATES = {
    "glm": GLM_TEMPLATE,
    "qwen": QWEN_TEMPLATE,
    "think": THINK_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
    "marked": MARKED_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
}
# What ends generation with each template, besides eos_token.
STOPS = {
    "glm": ("<|user|>", "<|observation|>"),
    "qwen": ("<|im_end|>",),
    "think": ("<|im_end|>",),
    "marked": ("<|im_end|>",),
}

SPECIAL = (
    *("<s>", "</s>", "<pad>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|im_start|>", "<|im_end|>"),
)
# Added, but not special, as in the real checkpoints.
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "How many clips did Natalia sell in May? She sold 48/2 = 24 clips.\n#### 72\n\n",
    "User: hello there, what is 2 + 3? Assistant: it is 5. user assistant system\n",
    'naïve café, 数学, {"name": "get_weather", "arguments": {"city": "Paris"}}\n',
]


def byte_level_tokenizer() -> Any:
    """A byte-level BPE tokenizer of the tokenizers library: 400 ids, specials first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 - len(ADDED),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    return tokenizer


def save_checkpoint_texts(folder: Path, template: str | None = None) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json, generation_config.json and, if named, a template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": 1000000,
        },
    )
    stops = [tokenizer.token_to_id(token) for token in ("</s>", *STOPS.get(template or "", ()))]
    write_json(folder / "generation_config.json", {"eos_token_id": stops})
    if template is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    return folder


def sentencepiece_model(path: Path) -> None:
    """A tiny byte-fallback BPE model, as Llama 2's: identity normaliser, a space put before a text."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_digits=True,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def say(*contents: str, **last: Any) -> list[dict[str, Any]]:
    """A conversation user, assistant, user, …; `last` are further fields of its last message."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    messages[-1].update(last)
    return messages


class Setup:
    """A tokenizer and a template, and what they make of rows."""

    def __init__(self, folder: Path, template: str | None = None):
        self.folder = save_checkpoint_texts(folder / "model", template)
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        self.template: ChatTemplate | TemplateProcess | None = load_chat_template(
            self.folder, self.tokenizer.special_tokens
        )
        self.path = folder / "rows.jsonl"

    def build(self, *rows: Any, form: str = "messages", **options: Any) -> tuple[Examples, DataReport]:
        rows = tuple({"messages": row} if isinstance(row, list) else row for row in rows)
        write_lines(self.path, *rows)
        settings: dict[str, Any] = {"sequence_length": 4096, **options}
        return build_examples(self.path, form=form, tokenizer=self.tokenizer, template=self.template, **settings)  # type: ignore[arg-type]

    def text(self, examples: Examples, index: int) -> str:
        return self.tokenizer.decode(examples[index][0])

    def learnt(self, examples: Examples, index: int = 0) -> list[str]:
        """The text of each run of labelled tokens."""
        tokens, mask = examples[index]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0]))))
        return [self.tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]
