import os
import resource
import time
from pathlib import Path

import pytest

from halfbyte.errors import (
    BackendError,
    FormatError,
    HalfbyteError,
    UnsafeArtifactError,
    UsageError,
)
from halfbyte.text import template_worker
from halfbyte.text.template import MAX_TEMPLATE_CHARACTERS, ChatTemplate, Rendering

MESSAGES = [{"role": "user", "content": "hi"}]
GROW = "{% set ns = namespace(x=START) %}{% for i in range(70) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"

HOSTILE = {
    "range": "{% for i in range(10**9) %}a{% endfor %}",
    "nested-ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "multiplication": "{{ 'a' * 10**10 }}",
    "list-multiplication": "{{ [0] * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) ** 9 }}",
    "power-of-ten": "{{ 10 ** (10 ** 10) }}",
    "doubling": GROW.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
    "shared-lists": GROW.replace("START", "['a']").replace("STEP", "[ns.x, ns.x]"),
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep-parentheses": "{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}",
    "center": "{{ 'a' | center(10**10) }}",
    "printf": "{{ '%010000000000d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "indent": "{{ messages | tojson(indent=10**9) }}",
    "long-output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    template = ChatTemplate(HOSTILE[name], {}, "model")
    with pytest.raises(UnsafeArtifactError, match="chat template of model"):
        template.render(MESSAGES, add_generation_prompt=False)
    assert time.monotonic() - start < 40 * template_worker.CPU_SECONDS  # the machine may be busy
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_template_that_was_stopped_stays_refused() -> None:
    template = ChatTemplate(HOSTILE["shared-lists"], {}, "model")
    with pytest.raises(UnsafeArtifactError):
        template.render(MESSAGES, add_generation_prompt=False)
    start = time.monotonic()
    with pytest.raises(UnsafeArtifactError):
        template.render(MESSAGES, add_generation_prompt=False)
    assert time.monotonic() - start < 0.1


@pytest.mark.parametrize(
    "source", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ lipsum(n=10) }}"]
)
def test_files_cannot_be_opened(source: str) -> None:
    with pytest.raises(FormatError, match="cannot be rendered"):
        ChatTemplate(source, {}, "model").render(MESSAGES, add_generation_prompt=False)


def test_an_enormous_template_is_refused_unread() -> None:
    with pytest.raises(UnsafeArtifactError, match="characters expected"):
        ChatTemplate(" " * (MAX_TEMPLATE_CHARACTERS + 1), {}, "model")


def test_what_templates_may_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {%- generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{{ strftime_now('%Y') | length }}{{ none is defined }}{{ '<' }}"
    )
    text = ChatTemplate(source, {"bos_token": "<s>"}, "model").render(
        [{"role": "usér", "content": "<a>"}] * 2, add_generation_prompt=False
    )
    assert text == '<s>{"role": "usér", "content": "<a>"}24True<'


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("{% if %}", FormatError, r"TemplateSyntaxError.*line 1"),
        ("{{ missing.attribute.of }}", FormatError, "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", UsageError, "roles must alternate"),
    ],
)
def test_faults_say_what_is_wrong(source: str, kind: type[HalfbyteError], message: str) -> None:
    with pytest.raises(kind, match=message):
        ChatTemplate(source, {}, "model").render(MESSAGES, add_generation_prompt=False)


def test_one_failing_rendering_does_not_spoil_the_others() -> None:
    template = ChatTemplate(
        "{{ messages[0].content }}{{ messages[0].x.y if add_generation_prompt }}", {}, "m"
    )
    good, bad = template.try_render([Rendering(MESSAGES, False), Rendering(MESSAGES, True)])
    assert good == "hi"
    assert isinstance(bad, FormatError)


def test_the_worker_ends_with_its_template() -> None:
    template = ChatTemplate("x", {}, "model")
    template.render(MESSAGES, add_generation_prompt=False)
    worker = template._worker
    assert worker is not None
    assert worker.poll() is None
    del template
    assert worker.returncode == 0


def test_a_forked_child_starts_a_worker_of_its_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "model")
    template.render(MESSAGES, add_generation_prompt=False)
    child = os.fork()
    if not child:
        ok = template.render([{"content": "child"}], add_generation_prompt=False) == "child"
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render(MESSAGES, add_generation_prompt=False) == "hi"


def test_a_worker_that_cannot_run_is_not_called_hostile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(template_worker, "__file__", str(broken))
    with pytest.raises(BackendError, match="exit status 3"):
        ChatTemplate("x", {}, "model").render(MESSAGES, add_generation_prompt=False)
