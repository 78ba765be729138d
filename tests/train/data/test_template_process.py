"""Templates that somebody else wrote: within limits of time and memory, and of what they can reach."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from quant.common.errors import NibbleError
from tests.processes import LIMIT
from tests.text_helpers import TEMPLATES, say
from train.data import template_process
from train.data.chat import ChatTemplate, Conversation, RenderError
from train.data.template_files import load_chat_template
from train.data.template_process import CPU_SECONDS, MEMORY, TemplateProcess

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOO_LONG = r"takes more than \d seconds"
TOO_MUCH = r"needs (too much|more than 1 GiB of) memory"
# Told apart from the others: what is a constant is computed when the template is compiled.
BEYOND = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}": TOO_LONG,
    "{{ (messages | length + 8) ** (9 ** 9) }}": TOO_LONG,
    "{{ 9 ** (9 ** 9) }}": TOO_LONG,
    "{{ '{:>9000000000}'.format('x') }}": TOO_MUCH,
    "{{ '{:>9000000000}'.format(messages[0].content) }}": TOO_MUCH,
    "{{ '%9000000000d' % 1 }}": TOO_MUCH,
    "{{ 'ab' * 7000000000 }}": TOO_MUCH,
    "{{ messages[0].content * 7000000000 }}": TOO_MUCH,
    "{{ [1] * 7000000000 }}": TOO_MUCH,
    "{{ 'x'.center(10 ** 10) }}": TOO_MUCH,
    "{{ messages[0].content | center(10 ** 10) }}": TOO_MUCH,
    "{{ 'x' | indent(10 ** 10, true) }}": TOO_MUCH,
    "{{ messages | tojson(indent=10 ** 10) }}": TOO_MUCH,
    "{{ [1] | batch(10 ** 10, 'x') | list }}": TOO_MUCH,
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}": TOO_MUCH,
    "{{ 'x' * (2 ** 25) }}": r"writes 33,554,432 characters, more than 16,777,216",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": r"nested too deep, or a macro that calls itself",
    "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}": r"nested too deep|memory",
    "{{ " + "[" * 150 + "]" * 150 + " }}": r"nested too deep|not a valid Jinja template",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000: r"nested too deep|not a valid Jinja template|crashes",
    "{% break %}": r"not a valid Jinja template: 'break' outside loop",
    "{% continue %}": r"not a valid Jinja template: 'continue' not properly in loop",
    "{{ 1 | nothing }}": r"line 1: not a valid Jinja template: No filter named 'nothing'",
}


@pytest.mark.parametrize("source", BEYOND, ids=range(len(BEYOND)))
def test_a_template_beyond_its_limits_is_an_error_with_the_file(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some use up their time, the others need memory or end at once.
    monkeypatch.setattr(template_process, "CPU_SECONDS", 1 if BEYOND[source] == TOO_LONG else CPU_SECONDS)
    path = tmp_path / "chat_template.jinja"
    path.write_text(source)

    def render() -> None:
        template = load_chat_template(tmp_path, {})
        assert template is not None
        template.render(say("hi"))

    with pytest.raises(NibbleError, match=BEYOND[source]) as caught:
        render()
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500
    # Whatever it tried took place elsewhere, and no more of it than this.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 1.5 * MEMORY


def test_a_template_that_goes_wrong_for_some_rows_only_ends_the_run_at_these() -> None:
    source = "{{ messages[0].content }}{% if messages[0].content == 'bomb' %}{{ 'x' * 10 ** 10 }}{% endif %}"
    template = TemplateProcess(source, {}, where="here")
    found = template.renderings_of([(say(text, "a"), [False, True], None) for text in ("fine", "better")])
    assert [isinstance(one, list) for one in found] == [True, True]
    with pytest.raises(NibbleError, match=TOO_MUCH):
        template.renderings_of([(say(text, "a"), [False, True], None) for text in ("fine", "bomb")])


@pytest.mark.slow
def test_it_is_what_the_template_is_here() -> None:
    chats: list[Conversation] = [
        (say("q", "a"), [False, True], None),
        (say("q", "a", "b"), [True, True, False], [{"name": "f"}]),
    ]
    for source in TEMPLATES.values():
        here, there = ChatTemplate(source, TOKENS), TemplateProcess(source, TOKENS, where="")
        assert list(map(repr, there.renderings_of(chats * 500))) == list(map(repr, here.renderings_of(chats))) * 500
        assert there.closing() == here.closing()
        assert there.following("tool") == here.following("tool")
        assert there.render(say("é\ud800"), add_generation_prompt=True) == here.render(
            say("é\ud800"), add_generation_prompt=True
        )
    refused = TemplateProcess("{{ raise_exception('no ' + messages[0].content) if tools }}", {}, where="")
    (one, other) = refused.renderings_of([(say("x", "y"), [False, True], tools) for tools in ([{}], None)])
    assert (str(one), other) == ("no x", [])
    with pytest.raises(RenderError, match=r"^no z$"):
        refused.render(say("z"), [{}])
    dated = TemplateProcess("{{ strftime_now('%d %b %Y') }}", {}, where="", now=datetime(2024, 7, 26))
    assert dated.render(say("hi")) == "26 Jul 2024"
    odd = TemplateProcess("{{ messages[0].content }}", {}, where="")
    assert odd.render([{"role": "user", "content": datetime(2024, 7, 26)}]) == "<datetime>", "as in transformers"


# Ways out of the sandbox that were found over the years.
ATTACKS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "{{ [''] | map('{0.__class__.__mro__}'.format) | list }}",
    "{{ '' | attr('__class__') | attr('__mro__') }}",
    "{{ [''] | map(attribute='__class__.__mro__') | first }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__closure__[0].cell_contents }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ range.mro() }}",
    "{% set n = namespace() %}{{ n.__class__.__init__.__globals__ }}",
    "{% for x in messages recursive %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "{% macro f() %}{% endmacro %}{{ f._environment.globals }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{{ (messages | map('string') | first).__add__.__self__.__class__.__mro__ }}",
    "{{ dict.mro() }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_templates_reach_nothing_but_their_variables(attack: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def refused(render: object) -> bool:
        """Whether it is an error, or nothing that Python keeps for itself is in the text."""
        try:
            text = str(render())  # type: ignore[operator]
        except Exception:  # noqa: BLE001 - of transformers' rendering and of ours
            return True
        return not any(word in text for word in ("class", "module", "root:", "uid=", "built-in", "<function"))

    messages = say("hi", "a")
    assert refused(lambda: render_jinja_template([messages], chat_template=attack)), "the standard itself doesn't hold"
    assert refused(lambda: ChatTemplate(attack).render(messages))
    assert messages == say("hi", "a")


def test_the_process_ends_with_the_run_that_started_it() -> None:
    code = (
        "from train.data.template_process import TemplateProcess\n"
        "a, b = (TemplateProcess('x', {}, where='x') for _ in range(2))\n"
        "print(a._process.pid, b._process.pid, flush=True)\n"
        "del a\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=LIMIT, check=False)
    end = time.monotonic() + LIMIT
    while any(map(running, said.stdout.split())):
        assert time.monotonic() < end
        time.sleep(0.01)


def running(pid: bytes) -> bool:
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a process for which nobody waits


def test_its_modules_are_found_wherever_the_command_was_given(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    code = f"import sys; sys.path.insert(0, {str(Path.cwd())!r})\n" + (
        "from train.data.template_process import TemplateProcess\n"
        "print(TemplateProcess('{{ messages[0].content }}', {}, where='x').render([{'content': 'hi'}]))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    said = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, timeout=LIMIT, check=True)
    assert said.stdout == b"hi\n"
