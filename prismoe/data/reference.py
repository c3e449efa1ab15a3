"""Reference losses: what a dynamic mixing rule compares a domain's held-out loss with, and where they come from.

A file holds what `reference_loss` measured; a mapping in a config holds numbers from elsewhere (a paper, a fit).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prismoe.data.shards import Domain
from prismoe.errors import InputError
from prismoe.folder import Manifest, versions, write_json_atomic
from prismoe.strictjson import read_json

__all__ = ["DomainReference", "Reference", "heldout_sha256", "resolve_reference"]

KIND = "reference-loss"


@dataclass(frozen=True)
class DomainReference:
    """Nats a held-out token, its standard error over documents (None: one document), and what exactly was scored."""

    loss: float
    standard_error: float | None
    scored_tokens: int
    documents: int
    domain_sha256: str  # of the domain's manifest
    heldout_sha256: str  # of the held-out tokens themselves: more training text leaves them as they are


@dataclass(frozen=True)
class Reference:
    """Receipt of `reference_loss`. `seq_len` and `max_tokens` are those of `evaluate`, `model` says which it was."""

    losses: dict[str, DomainReference]
    model: dict[str, Any]
    tokenizer_sha256: str
    seq_len: int
    max_tokens: int | None
    kind: str = KIND
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write it as JSON; a reader sees the old file or the whole new one."""
        write_json_atomic(path, self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> Reference:
        """Read what `write` wrote.

        Raises:
            InputError: no such file, or not one of these.
        """
        path = Path(path)
        try:
            found = read_json(path)
        except InputError as error:
            raise InputError(error.found, where=error.where, needed=error.needed, hint=_HINT) from error
        try:
            if found["kind"] != KIND:
                raise ValueError(f"a file of kind {found['kind']!r}")
            losses = {name: DomainReference(**entry) for name, entry in found.pop("losses").items()}
            return cls(losses=losses, **found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not a file of reference losses ({error!r})", where=str(path), hint=_HINT) from error


_HINT = "`prismoe reference-loss MODEL DATA --out reference.json` writes one"


def heldout_sha256(domain: Domain) -> str:
    """What identifies the held-out text of a prepared domain: a hash over those of its files, from the manifest."""
    manifest = Manifest.read(domain.folder)
    assert manifest is not None, "an opened domain has a manifest"
    hashes = [entry["sha256"] for name, entry in sorted(manifest.files.items()) if name.startswith("heldout")]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def resolve_reference(
    given: str | Path | Mapping[str, float], domains: Sequence[Domain], *, seq_len: int, max_tokens: int | None
) -> tuple[dict[str, float], list[str]]:
    """Losses by domain from a file or a mapping, and what makes them hard to compare with training's own.

    Training measures on windows of `seq_len` over up to `max_tokens` of each held-out text. Whether every domain is
    there and finite is for the rule to say.

    Raises:
        InputError: a file that is none of ours, or was measured with another tokenizer.
    """
    if not isinstance(given, str | Path):
        return dict(given), []
    found = Reference.read(given)
    warnings = []
    for domain in domains:
        if domain.tokenizer_sha256 != found.tokenizer_sha256:
            raise InputError(
                f"measured with another tokenizer than domain {domain.name} was prepared with",
                where=str(given),
                needed="losses over the same tokens",
                hint="measure them again on these domains, with a model of this tokenizer",
            )
    here = {domain.name: domain for domain in domains}
    if moved := [n for n, e in found.losses.items() if n in here and heldout_sha256(here[n]) != e.heldout_sha256]:
        warnings.append(f"the reference losses of {', '.join(moved)} were measured on other held-out text")
    if found.seq_len != seq_len:
        warnings.append(
            f"the reference losses were measured on windows of {found.seq_len}, training's are of {seq_len}"
        )
    elif found.max_tokens != max_tokens:
        measured = f"up to {found.max_tokens} tokens a domain"
        warnings.append(f"the reference losses were measured on {measured}, training's on up to {max_tokens}")
    return {name: entry.loss for name, entry in found.losses.items()}, warnings
