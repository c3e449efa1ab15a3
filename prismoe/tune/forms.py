"""The forms in which instruction data is published, each as a function from a row to (role, text) turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, UsageError
from prismoe.registry import suggestion

__all__ = ["FORMS", "LEFT_OUT", "Role", "Turns", "check_name", "recognise", "turns"]

Role = Literal["system", "user", "assistant"]
Turns = list[tuple[Role, str]]
Row = dict[str, Any]
LEFT_OUT = "not the preferred answer"  # a reason that was asked for: counted, but no refusal
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
}
_INPUTS, _OUTPUTS, _COMPLETIONS = ("input", "context"), ("output", "response"), ("response", "completion")


def check_name(form: str) -> None:
    """Refuse a form that is none.

    Raises:
        UsageError: with the nearest name.
    """
    if form not in ("auto", *FORMS):
        raise UsageError(
            f"unknown form {form!r}", needed="auto, " + ", ".join(FORMS), hint=suggestion(form, ("auto", *FORMS))
        )


def recognise(row: Row, where: str) -> str:
    """The form of a row by its fields.

    Raises:
        InputError: preferences, of which nobody said which answer to learn; or no known form.
    """
    if _is_preference(row):
        raise InputError(
            "a row of preferences ("
            + ("chosen and rejected answers" if "chosen" in row else "label true or false")
            + ")",
            where=where,
            needed="conversations to learn from",
            hint="form=preferred takes the chosen answers and the rows labelled true",
        )
    for name, (_, fits) in FORMS.items():
        if fits(row):
            return name
    raise InputError(
        "a row of no known form (fields: " + (", ".join(sorted(row)[:8]) or "none") + ")",
        where=where,
        needed="conversations; messages; instruction with output or response; or prompt with response or completion",
    )


def turns(row: Row, form: str, where: str) -> Turns:
    """What is said in a row of `form`, in order.

    Raises:
        BadDocument: a row of another form, an unknown role, or content that is no text.
    """
    read, fits = FORMS[form]
    if not fits(row):
        fields = ", ".join(sorted(row)[:8]) or "none"
        raise BadDocument(f"not in the form {form} (fields: {fields})", reason="another form", where=where)
    return read(row, where)


def _is_preference(row: Row) -> bool:
    return {"chosen", "rejected"} <= row.keys() or isinstance(row.get("label"), bool)


def _first(row: Row, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _sharegpt(row: Row, where: str) -> Turns:
    return _said(row["conversations"], "user", where)


def _messages(row: Row, where: str) -> Turns:
    return _said(row["messages"], "user", where)


def _alpaca(row: Row, where: str) -> Turns:
    """Instruction and input are one question, a line each; `history` holds earlier pairs of question and answer."""
    found: Turns = [("system", _text(row["system"], where))] if row.get("system") else []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadDocument("a history that is no list of pairs", reason="not a turn", where=where)
        found += [("user", _text(pair[0], where)), ("assistant", _text(pair[1], where))]
    question = [_text(row["instruction"], where), _text(_first(row, _INPUTS) or "", where)]
    found.append(("user", "\n".join(part for part in question if part.strip())))
    return [*found, ("assistant", _text(_first(row, _OUTPUTS), where))]


def _prompt_response(row: Row, where: str) -> Turns:
    return _said(row["prompt"], "user", where) + _said(_first(row, _COMPLETIONS), "assistant", where)


def _preferred(row: Row, where: str) -> Turns:
    """The dialogue before the answers, then the chosen one; of labelled rows those labelled true."""
    if "chosen" not in row:
        if row["label"] is False:
            raise BadDocument("labelled false", reason=LEFT_OUT, where=where)
        rest = {name: value for name, value in row.items() if name != "label"}
        form = next((name for name, (_, fits) in FORMS.items() if fits(rest)), "preferred")
        return turns(rest, form, where)
    chosen = _said(row["chosen"], "assistant", where)
    if any(role == "user" for role, _ in chosen):
        return chosen
    before = _first(row, ("conversations", "messages", "prompt"))
    return _said(before if before is not None else [], "user", where) + chosen


def _said(value: Any, role: Role, where: str) -> Turns:
    """Turns of a list of messages or of one; bare text is said by `role`."""
    if isinstance(value, str):
        return [(role, value)]
    found: Turns = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise BadDocument(f"a turn that is a JSON {type(item).__name__}", reason="not a turn", where=where)
        name = _first(item, ("from", "role"))
        known = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if known is None:
            raise BadDocument(
                f"unknown role {name!r}", reason="unknown role", where=where, needed="one of " + ", ".join(_ROLES)
            )
        found.append((known, _text(_first(item, ("value", "content")), where)))
    return found


def _text(value: Any, where: str) -> str:
    """Text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
        value = next(part for part, text in zip(value, parts, strict=True) if not isinstance(text, str))
    kind = f"a part of type {value.get('type')!r}" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
    raise BadDocument(f"content that is {kind}", reason="not text", where=where, needed="text")


FORMS: dict[str, tuple[Callable[[Row, str], Turns], Callable[[Row], bool]]] = {
    "sharegpt": (_sharegpt, lambda row: "conversations" in row),
    "messages": (_messages, lambda row: "messages" in row),
    "alpaca": (_alpaca, lambda row: "instruction" in row and _first(row, _OUTPUTS) is not None),
    "prompt_response": (_prompt_response, lambda row: "prompt" in row and _first(row, _COMPLETIONS) is not None),
    "preferred": (_preferred, _is_preference),
}
