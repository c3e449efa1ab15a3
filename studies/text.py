"""The study's text: domains whose held-out documents are cut short, so that many count, filtered or not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import prismoe
from prismoe.data.filters import WEB_DOMAINS
from prismoe.data.reader import read_documents
from prismoe.folder import make_folder, write_atomic
from prismoe.progress import Progress
from studies.parent import DOMAINS

__all__ = ["FILTERS", "domains_of", "prepare_text"]

CHARACTERS = 750  # of a held-out document: about one window
FILTERS = {
    "fluent": prismoe.FilterSpec("perplexity", drop=0.15, arguments={"max_bytes": 1024}),
    "no_advertisements": prismoe.FilterSpec("linear", drop=0.5),
}


def prepare_text(
    texts: Iterable[str], *, parent: Path, corpora: Path, out: Path, documents: int, on_progress: Progress
) -> None:
    """Everything that `domains_of` gives for `texts`, in `out`; what is there already is not made again."""
    sources = {name: _source(corpora / name, out / "heldout" / f"{name}.jsonl", documents) for name in DOMAINS}
    prismoe.prepare(sources, tokenizer=parent, out=out / "all", on_progress=on_progress)
    web = {name: sources[name] for name in WEB_DOMAINS}
    for text in sorted({*texts} - {"all"}):
        spec, sifted = FILTERS[text], out / f"sift-{text}"
        if spec.name == "perplexity":
            spec = prismoe.FilterSpec(spec.name, spec.drop, spec.domains, {**spec.arguments, "model": str(parent)})
        prismoe.sift(web, filters=[spec], tokenizer=parent, out=sifted, on_progress=on_progress)
        prismoe.prepare(web, tokenizer=parent, keep=sifted, out=out / text, on_progress=on_progress)


def domains_of(text: str, out: Path) -> list[Path]:
    """Folders of the seven domains, with the web's filtered where `text` is the name of a filter."""
    return [out / (text if name in WEB_DOMAINS else "all") / name for name in DOMAINS]


def _source(folder: Path, heldout: Path, documents: int) -> prismoe.DomainSource:
    if not heldout.exists():
        found = [document.text for file in sorted(folder.glob("heldout*")) for document in read_documents(file)]
        random.Random(0).shuffle(found)  # files are sorted by where their documents come from
        lines = [json.dumps({"content": text[:CHARACTERS]}) for text in found[:documents]]
        make_folder(heldout.parent)
        write_atomic(heldout, ("\n".join(lines) + "\n").encode())
    return prismoe.DomainSource(train=(str(folder / "train-*"),), heldout=(str(heldout),))
