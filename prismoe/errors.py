"""Every error a user can meet: one line that says where, what was found, what was needed, and one hint.

Exit codes (also the process exit codes of the command line): 2 usage or config, 3 bad input data or
checkpoint, 4 resources, 5 numerical, 75 interrupted but resumable (BSD `EX_TEMPFAIL`).
"""

from __future__ import annotations

__all__ = [
    "InputError",
    "InterruptedRun",
    "NumericalError",
    "PrismoeError",
    "ResourceError",
    "UsageError",
]


class PrismoeError(ValueError):
    """Base of all errors meant for users. `str(error)` is the whole line that the command line prints.

    Args:
        found: what was found, as a clause without a final stop.
        where: file, file:line, tensor or field the error is about.
        needed: what would have been right.
        hint: one thing to do about it.
    """

    exit_code = 1
    lines = False  # whether there may be several, each a problem of its own

    def __init__(self, found: str, *, where: str = "", needed: str = "", hint: str = "") -> None:
        self.found, self.where, self.needed, self.hint = found, where, needed, hint
        line = f"{where}: {found}" if where else found
        if needed:
            line += f"; needed {needed}"
        if hint:
            line += f" (hint: {hint})"
        super().__init__(_for_a_terminal(line, lines=self.lines))


class UsageError(PrismoeError):
    """A wrong argument, config key or combination of them."""

    exit_code = 2
    lines = True


class InputError(PrismoeError):
    """A checkpoint, plan, text or token shard that is damaged, hostile or not supported."""

    exit_code = 3


class ResourceError(PrismoeError):
    """Disk, memory, permission or an output folder that is in use."""

    exit_code = 4


class NumericalError(PrismoeError):
    """A number that is not finite, or an equivalence that does not hold."""

    exit_code = 5


class InterruptedRun(PrismoeError):
    """Stopped before the end; the same command continues."""

    exit_code = 75


MAX_LINE = 1000


def _for_a_terminal(text: str, *, lines: bool) -> str:
    """What a file said is shown, not obeyed: no control characters, no line without end."""
    if lines and "\n" in text:
        return "\n".join(_for_a_terminal(line, lines=False) for line in text.split("\n"))
    if not text.isprintable():
        text = "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode()
            for letter in " ".join(text.split())
        )
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 300]} … {text[-290:]}"
