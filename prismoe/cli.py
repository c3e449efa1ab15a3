"""The command line: runs a verb of verbs/table.py. Results on stdout, progress and errors on stderr, exit codes from
errors.py.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from prismoe.errors import InputError, InterruptedRun, PrismoeError, ResourceError, UsageError
from prismoe.verbs.job import Job
from prismoe.verbs.table import FLAGS, SUBJECT, VERBS, takers

if TYPE_CHECKING:
    from prismoe.console import Screen

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="prismoe --help")


def _parser() -> _Parser:
    parser = _Parser(prog="prismoe", add_help=False, allow_abbrev=False)
    parser.add_argument("verb", nargs="?")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    for name, flag in FLAGS.items():
        parser.add_argument(name, **flag.parsed)
    return parser


def _flag_lines(verb: str | None) -> str:
    """One paragraph for each option; of a verb those that it accepts."""
    lines = []
    for name, flag in FLAGS.items():
        if verb is None or flag.every or name in VERBS[verb].flags:
            with_verbs = f"with {found}: " if verb is None and (found := takers(name)) else ""
            text = (with_verbs + flag.what).replace("\n", "\n" + " " * 17)
            lines.append(f"  {f'{name} {flag.value}':<14} {text}\n")
    return "options:\n" + "".join(lines)


def help_text(verb: str | None = None) -> str:
    """The page of `prismoe --help`, or of one verb with every config key that it reads."""
    if verb is None:
        rows = "\n".join(f"  {name:<14} {found.what}" for name, found in VERBS.items())
        return (
            "prismoe turns a dense checkpoint into a Mixture-of-Experts model in a standard architecture.\n\n"
            f"usage: prismoe VERB {SUBJECT[0]} [section.key=value ...] [options]\n\n"
            f"verbs (prismoe VERB --help shows what it takes):\n{rows}\n\n{_flag_lines(None)}\n"
            "exit codes: 2 usage or config, 3 bad input, 4 resources, 5 numerical, 75 interrupted, resumable"
        )
    found = VERBS[verb]
    page = f"prismoe {verb}: {found.what}\n\nusage: {found.usage(verb)}"
    if found.keys is not None:
        from prismoe.config.keys import key_lines

        page += "\n\nconfig keys, in the YAML or as section.key=value:\n" + "\n".join(key_lines(found.keys))
    if found.options:
        from prismoe.config import options

        lines = options.option_lines(getattr(options, found.options))
        page += "\n\nits own, as key=value:\n" + "\n".join(lines)
    return f"{page}\n\n{_flag_lines(verb)}"


def _read(argv: Sequence[str]) -> argparse.Namespace:
    flags = _parser().parse_intermixed_args(argv)
    if flags.verb is not None and flags.verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(flags.verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "prismoe --help"
        raise UsageError(f"unknown verb {flags.verb!r}", needed=f"one of {', '.join(VERBS)}", hint=hint)
    for name, flag in FLAGS.items() if flags.verb is not None else ():
        given = getattr(flags, flag.name or name[2:].replace("-", "_")) not in (None, False)
        if given and not flag.every and name not in VERBS[flags.verb].flags:
            needed = f"prismoe {found}" if (found := takers(name)) else "a verb that takes it"
            raise UsageError(f"{name} with {flags.verb}", needed=needed, hint=f"prismoe {flags.verb} --help")
    return flags


def _job(flags: argparse.Namespace, screen: Screen) -> Job:
    verb = VERBS[flags.verb]
    subjects = [text for text in flags.rest if "=" not in text]
    overrides = tuple(text for text in flags.rest if "=" in text)
    usage = verb.usage(flags.verb)
    if len(subjects) > len(verb.takes) and not any(path.endswith("...]") for path in verb.takes):
        found = " after ".join(repr(text) for text in reversed(subjects[: len(verb.takes) + 1][-2:]))
        raise UsageError(found, needed=usage)
    if overrides and verb.keys is None and not verb.options:
        raise UsageError(overrides[0], needed=usage)
    return Job(flags.verb, subjects[0] if subjects else None, overrides, flags, screen, tuple(subjects[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SIGTERM stops it as Ctrl-C does."""
    with _terminable():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show ✓ shows ? instead of failing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    debug, as_json = "--debug" in argv, "--json" in argv
    try:
        flags = _read(argv)
        if flags.version:
            from prismoe.folder import versions

            print(f"prismoe {versions().get('prismoe', '(not installed)')}")
            return 0
        if flags.help or flags.verb is None:
            print(help_text(flags.verb))
            return 0
        if flags.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        from prismoe.console import Screen
        from prismoe.folder import unchecked

        screen = Screen(json=as_json)
        job = _job(flags, screen)
        with unchecked() if flags.no_verify else nullcontext():
            screen.result({"verb": flags.verb, **VERBS[flags.verb].work(job)})
        return 0
    except BrokenPipeError:
        # The reader has gone (| head); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if debug or not (isinstance(error, Exception | KeyboardInterrupt) or _panic(error)):
            raise
        return _tell(_with_command(_for_people(error), argv), as_json=as_json)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is raised as KeyboardInterrupt, so that whatever is open is put in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can have handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_command(error: PrismoeError, argv: Sequence[str]) -> PrismoeError:
    """Where the same command continues, that command."""
    if not isinstance(error, InterruptedRun) or not error.hint.endswith(AGAIN) or "RANK" in os.environ:
        return error
    return InterruptedRun(error.found, where=error.where, hint=f"{error.hint}: {shlex.join(['prismoe', *argv])}")


AGAIN = "the same command continues"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESOURCES = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE)


def _panic(error: BaseException) -> bool:
    """A failure below Python: no `Exception`, and of a class that every library makes for itself."""
    return type(error).__name__ == "PanicException"


def _for_people(error: BaseException) -> PrismoeError:
    """Every exception as the one line that it deserves."""
    if isinstance(error, PrismoeError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRun(f"stopped by {error or 'SIGINT'}", hint=AGAIN)
    from prismoe.room import exhausted, unwritten

    if isinstance(error, OSError) and error.errno in RESOURCES:
        if error.filename is None:
            return ResourceError(str(error.strerror))
        return unwritten(Path(os.fsdecode(error.filename)), error, what="not possible")
    if isinstance(error, MemoryError | OSError | RuntimeError) and (found := exhausted(error)):
        return found
    text = " ".join(str(error).split())[:300]
    if _panic(error):
        return InputError(f"failed below Python ({text})", where="a library", hint="is a tokenizer.json damaged?")
    return PrismoeError(f"{type(error).__name__}: {text}", where="internal error", hint="--debug shows where")


def _tell(error: PrismoeError, *, as_json: bool) -> int:
    from prismoe.console import Screen

    screen = Screen(json=as_json)
    screen.error(str(error))
    screen.result({"error": str(error), "exit_code": error.exit_code})
    return error.exit_code
