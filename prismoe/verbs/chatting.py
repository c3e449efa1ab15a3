"""The verbs that have a model write: `chat`, `generate` and `mt-bench`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError, UsageError
from prismoe.verbs.job import Job

if TYPE_CHECKING:
    from prismoe.chat.tokenexperts import TokenExperts
    from prismoe.config.options import MtBenchOptions
    from prismoe.console import Screen

__all__ = ["chat", "generate", "mt_bench"]


def chat(job: Job) -> dict[str, Any]:
    """Turns come from the terminal or, one a line, from a pipe."""
    from prismoe.chat.dialogue import Dialogue
    from prismoe.chat.talk import talk
    from prismoe.config.options import ChatOptions, read_options
    from prismoe.generate.sampling import Sampling
    from prismoe.generate.speaker import Speaker

    (system,), overrides = _texts(job.overrides, "system")
    options = read_options(ChatOptions, overrides)
    sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, _seed(job, options.seed))
    model = _model(job)
    with (
        Speaker(model, template=options.template, device=options.device, offline=job.flags.offline) as speaker,
        Dialogue(speaker, sampling=sampling, system=" ".join(system), experts=options.experts) as dialogue,
    ):
        terminal = sys.stdin.isatty() and not job.screen.json
        if terminal:
            job.screen.note(f"{model}: /help for what can be said beside, /quit to leave")
        turns = talk(_typed() if terminal else _piped(), dialogue, _Shown(job.screen), catch=terminal)
    return {"model": str(model), "turns": [turn.to_dict() for turn in turns]}


class _Shown:
    """A chat on the screen: answers on stdout as they come, remarks on stderr."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def text(self, text: str) -> None:
        if not self._screen.json:
            if self._screen.out.is_terminal:  # a model may write what moves the cursor or worse
                text = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        if not self._screen.json:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def experts(self, found: TokenExperts) -> None:
        from prismoe.showanswers import show_experts

        show_experts(self._screen, found.to_dict())

    def note(self, text: str) -> None:
        self._screen.note(text)

    def error(self, text: str) -> None:
        self._screen.error(text)


def _typed() -> Iterator[str]:
    """Lines from a person; Ctrl-C drops the line that is being typed, Ctrl-D ends."""
    import readline  # noqa: F401 - gives `input` editing and a history

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _piped() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin


def generate(job: Job) -> dict[str, Any]:
    """`prismoe generate MODEL FILE --out ANSWERS.jsonl`, or prompt=TEXT, once or more often."""
    from prismoe.config.options import GenerateOptions, read_options
    from prismoe.generate.answers import answer_file, answer_prompts
    from prismoe.generate.prompts import Prompt, read_prompts
    from prismoe.generate.sampling import Sampling
    from prismoe.generate.speaker import Speaker
    from prismoe.showanswers import show_answered

    (texts,), overrides = _texts(job.overrides, "prompt")
    options = read_options(GenerateOptions, overrides)
    if bool(texts) == bool(job.others):
        raise UsageError(f"{len(job.others)} files, {len(texts)} prompts", where=job.verb, needed="FILE or prompt=TEXT")
    if job.others and job.flags.out is None:
        raise UsageError("out is not set", where=job.verb, needed="--out FILE.jsonl")
    sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, _seed(job, options.seed))
    chat = options.template is not None
    prompts = [Prompt.plain(text, chat=chat) for text in texts]
    prompts += [prompt for file in job.others for prompt in read_prompts(Path(file), chat=chat)]
    template = options.template or ("model" if any(prompt.messages for prompt in prompts) else None)
    model = _model(job)
    with (
        Speaker(model, template=template, device=options.device, offline=job.flags.offline) as speaker,
        job.screen.progress() as on_progress,
    ):
        if job.flags.out is None:
            size = options.batch_size
            rows = answer_prompts(speaker, prompts, sampling=sampling, batch_size=size, on_progress=on_progress)
        else:
            receipt = answer_file(
                speaker,
                prompts,
                out=Path(job.flags.out),
                sampling=sampling,
                batch_size=options.batch_size,
                force=job.flags.force,
                on_progress=on_progress,
            ).to_dict()
    if job.flags.out is not None:
        show_answered(job.screen, receipt)
        return receipt
    for row in rows:
        job.screen.line(row["text"])
    return {"answers": rows}


def mt_bench(job: Job) -> dict[str, Any]:
    """Answers of MODEL, or judgments of a folder of answers; both where everything for both is named."""
    from prismoe.config.options import MtBenchOptions, read_options
    from prismoe.folder import Manifest
    from prismoe.mtbench.answering import KIND

    options = read_options(MtBenchOptions, job.overrides)
    if options.prompts is None and (options.judge is not None or options.results is not None):
        raise UsageError(
            "no prompts for the judge", where=job.verb, needed="prompts=FILE (FastChat's judge_prompts.jsonl)"
        )
    if options.judge is not None and job.flags.offline:
        raise UsageError("judge with --offline", where=job.verb, needed="one of them")
    endpoint = _endpoint(options)  # what is wrong with it is told before any work
    subject = Path(job.subject or "")
    manifest = Manifest.read(subject) if job.subject and subject.is_dir() else None
    found: dict[str, Any] = {}
    if manifest is not None and manifest.kind == KIND:
        if job.flags.out is not None or options.questions is not None:
            raise UsageError("answers that are there already", where=str(subject), needed="no questions and no --out")
        out = subject
    else:
        out, found = _answer(job, options)
    if options.prompts is not None:
        judged = _judge(job, options, out, endpoint)
        found = {**found, **judged, "warnings": [*found.get("warnings", ()), *judged["warnings"]]}
    elif not found:
        raise UsageError("answers are all there", where=str(out), needed="prompts=FILE, to have them judged")
    for warning in found["warnings"]:
        job.screen.warning(warning)
    return found


def _answer(job: Job, options: MtBenchOptions) -> tuple[Path, dict[str, Any]]:
    from prismoe.generate.speaker import Speaker
    from prismoe.mtbench.answering import answer_questions
    from prismoe.showanswers import show_answers

    model = _model(job)
    if options.questions is None or job.flags.out is None:
        raise UsageError("questions or --out is not set", where=job.verb, needed="questions=FILE --out DIR")
    out = Path(job.flags.out)
    with (
        Speaker(model, template=options.template, device=options.device, offline=job.flags.offline) as speaker,
        job.screen.progress() as on_progress,
    ):
        answers = answer_questions(
            speaker,
            Path(options.questions),
            out=out,
            model_id=options.model_id or Path(job.subject or "").resolve().name,
            max_new_tokens=options.max_new_tokens,
            seed=_seed(job, options.seed),
            batch_size=options.batch_size,
            force=job.flags.force,
            on_progress=on_progress,
        )
    receipt = answers.to_dict()
    show_answers(job.screen, receipt)
    return out, {"answered": receipt, "warnings": list(answers.warnings)}


def _judge(job: Job, options: MtBenchOptions, out: Path, endpoint: Any) -> dict[str, Any]:
    from prismoe.mtbench.judging import judge_answers
    from prismoe.showanswers import show_judged

    with job.screen.progress() as on_progress:
        receipt = judge_answers(
            out,
            prompts=Path(options.prompts or ""),
            judge_model=options.judge_model,
            references=None if options.references is None else Path(options.references),
            endpoint=endpoint,
            results=None if options.results is None else Path(options.results),
            parallel=options.parallel,
            on_progress=on_progress,
        ).to_dict()
    show_judged(job.screen, receipt)
    return {"judged": receipt, "warnings": list(receipt["warnings"])}


def _endpoint(options: MtBenchOptions) -> Any:
    from prismoe.mtbench.endpoint import Endpoint

    return None if options.judge is None else Endpoint(options.judge, key_env=options.key_env)


def _texts(overrides: Sequence[str], *names: str) -> tuple[list[list[str]], list[str]]:
    """Values of the options that are text as it was typed, not YAML, and the other options."""
    found = [[text.partition("=")[2] for text in overrides if text.partition("=")[0] == name] for name in names]
    return found, [text for text in overrides if text.partition("=")[0] not in names]


def _seed(job: Job, seed: int) -> int:
    return seed if job.flags.seed is None else job.flags.seed


def _model(job: Job) -> str | Path:
    """The subject, or of a folder of `run` or `tune` the model in it."""
    if job.subject is None:
        raise UsageError("no model", where=job.verb, needed="a model folder or hub name")
    folder = Path(job.subject)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return job.subject
    for name in ("model", "train/model", "recovered", "moe"):
        if (folder / name / "config.json").is_file():
            return folder / name
    raise InputError("no model in it", where=job.subject, needed="config.json")
