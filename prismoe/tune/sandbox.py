"""The program of the guarded process (`tune.guard`): renders one stranger's template, within limits, and nothing else.

It is run by its path, imports nothing of prismoe and speaks JSON lines: it reads the template, then lists of requests,
and writes a line for each.

The language is what stock `transformers` gives a chat template: Jinja's immutable sandbox with loop controls, `tojson`,
`raise_exception`, `strftime_now` and `{% generation %}` blocks. The clock stands still, so that a rendering depends on
the text alone.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import resource
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of address space, of which the interpreter and Jinja need some 50
SECONDS = 2  # of processor time for one request
MAX_TEXT = 16 << 20  # characters of one rendering
TODAY = datetime.datetime(2024, 7, 26)  # what published templates fall back to where there is no clock
# Two marks that no text can hold by chance or intent, of private characters that no filter changes.
MARKS = ["".join(chr(0xE000 + digit) for digit in secrets.token_bytes(8)) + end for end in ("\ue1f0", "\ue1f1")]

_EARLY = (
    r"{{ '\n' + m | tojson }}",
    "{{ m.none.none }}",
    "{% none",
)  # has Jinja load, before files are shut, all it needs


class Unfit(Exception):
    """The template cannot be used at all, whatever the conversation."""


class NotTold(Exception):
    """The answers of this conversation cannot be told from the rest of its text."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what is between is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface
    met = False

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block's body between two marks."""
        Generation.met = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in MARKS)
        return jinja2.nodes.Scope([begin, *body, end], lineno=line)


def compile_template(source: str) -> jinja2.Template:
    """The template in an environment of its own."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        allowed = {name: more[name] for name in ("separators", "sort_keys") if name in more}
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    for name in ("lipsum", "random"):  # they draw
        environment.globals.pop(name, None)
        environment.filters.pop(name, None)
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], messages: list[Any], prompt: bool) -> str:
    """The text with its marks."""
    chunks, size = [], 0
    for chunk in template.generate(
        **variables, messages=messages, tools=None, documents=None, add_generation_prompt=prompt
    ):
        size += len(chunk)
        if size > MAX_TEXT:
            raise Unfit(f"a text of more than {MAX_TEXT >> 20} million characters")
        chunks.append(chunk)
    return "".join(chunks)


def marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and where the marked parts are."""
    spans: list[tuple[int, int]] = []
    parts, position, begin = [], 0, -1
    for part in re.split(f"({MARKS[0]}|{MARKS[1]})", text):
        if part == MARKS[0]:
            if begin >= 0:
                raise Unfit("a generation block within another")
            begin = position
        elif part == MARKS[1]:
            if begin < 0:
                raise Unfit("a generation block whose beginning was cut away")
            spans.append((begin, position))
            begin = -1
        else:
            parts.append(part)
            position += len(part)
    if begin >= 0:
        raise Unfit("a generation block whose end was cut away")
    return "".join(parts), spans


def by_prefix(show: Callable[[int, bool], str], messages: list[Any], text: str) -> list[tuple[int, int]]:
    """Where the answers are, in a template without marks: the text up to each is what the template writes for the
    turns before it with the generation prompt, and the text up to its end is what it writes for the turns with it.
    Both must be beginnings of the whole, and nothing but space may stand between the prompt and the answer's text.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, end = len(show(turn, True)), len(show(turn + 1, False))
        if show(turn, True) != text[:begin] or show(turn + 1, False) != text[:end] or begin >= end:
            raise NotTold("no generation marks, and what it writes for a conversation's beginning is not how it begins")
        if not text[begin:end].lstrip().startswith(message["content"].strip()):
            raise NotTold("no generation marks, and the answer's text does not follow the generation prompt")
        spans.append((begin, end))
    return spans


def answer(request: dict[str, Any], template: jinja2.Template, variables: dict[str, Any]) -> Any:
    """The reply to one request."""
    messages = request["messages"]

    def show(number: int, prompt: bool) -> str:
        return render(template, variables, messages[:number], prompt)

    text, spans = marked(show(len(messages), request["prompt"]))
    if not Generation.met and not request["prompt"]:
        spans = by_prefix(show, messages, text)
    return {"text": text, "spans": spans}


def limit() -> None:
    """No more memory than that, no files, no processes, no core."""
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(kind, (most, most))


def grant() -> None:
    """Processor time for one request."""
    until = math.ceil(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def attempt(work: Callable[[], Any]) -> Any:
    """What the work gives, or what went wrong as {"error", "fatal"}."""
    try:
        return work()
    except MemoryError:
        return {"error": f"more than {MEMORY >> 20} MiB of memory", "fatal": True}
    except RecursionError:
        return {"error": "recursion without an end", "fatal": True}
    except Unfit as error:
        return {"error": str(error), "fatal": True}
    except NotTold as error:
        return {"error": str(error), "fatal": False, "reason": "answers not told from the rest"}
    except SecurityError as error:
        return {"error": f"forbidden in a template ({error})", "fatal": True}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "fatal": True}
    except Exception as error:  # noqa: BLE001 - a template can raise whatever it likes
        return {"error": str(error) or type(error).__name__, "fatal": False}


def main() -> None:
    """Serve until the input ends."""
    source, output = sys.stdin.buffer, sys.stdout.buffer

    def reply(found: Any) -> None:
        output.write(json.dumps(found).encode() + b"\n")
        output.flush()

    first = json.loads(source.readline())
    for text in _EARLY:
        with suppress(jinja2.TemplateError):
            compile_template(text).render(m="")
    limit()
    grant()
    compiled: list[jinja2.Template] = []

    def begin() -> Any:
        compiled.append(compile_template(first["template"]))
        return {"marks": Generation.met}

    reply(attempt(begin))
    for line in source:
        for request in json.loads(line):
            grant()
            reply(attempt(partial(answer, request, compiled[0], first["variables"])))


if __name__ == "__main__":
    main()
