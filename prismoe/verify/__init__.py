"""The certificate: proof that a converted folder is the dense model it was made from, cut as its plan says.

Bytes are compared with recipes carried out again, and the stock transformers class is run layer by layer in float32
on real text, against the dense stock class and against a float64 evaluation of the plan. Memory: one layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import PLAN
from prismoe.errors import InputError, UsageError
from prismoe.folder import MANIFEST, Manifest, sha256_file, versions
from prismoe.plan import Plan
from prismoe.progress import Progress, quiet
from prismoe.verify.certificate import CERTIFICATE, Certificate, Check, LayerNumbers

__all__ = ["CERTIFICATE", "Certificate", "Check", "LayerNumbers", "verify"]


def verify(
    folder: str | Path,
    *,
    source: str | Path | Checkpoint | None = None,
    branches: Sequence[str | Path] | None = None,
    tokens: int = 128,
    force: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Certificate:
    """Check a converted folder and write certificate.json into it.

    Args:
        folder: what `convert` wrote.
        source: the dense checkpoint that was converted (a folder of ours names it by fingerprint alone).
        branches: of a plan made of several checkpoints, their folders; None: where they were when it was made.
        tokens: how many tokens of text go through the layers (at most the model's positions).
        force: check again where a certificate of the same bytes, source, tokens and versions is there.
        offline: a source given by hub name must already be in the cache.

    Raises:
        UsageError: no source, or no tokens.
        InputError: not a complete converted folder, or `source` or a branch is not what it was made from.
        NumericalError: a check failed; the certificate is written first.
    """
    folder = Path(folder)
    if tokens < 1:
        raise UsageError(f"tokens is {tokens}", where="verify", needed="1 or more")
    if source is None:
        raise UsageError("source is not set", where=str(folder), needed="the dense checkpoint", hint="source=FOLDER")
    manifest = Manifest.read(folder)
    if manifest is None or manifest.kind != "convert":
        found = f"no {MANIFEST}" if manifest is None else f"{MANIFEST} of a '{manifest.kind}' folder"
        raise InputError(found, where=str(folder), needed="a finished output of convert", hint="run prismoe convert")
    dense = Checkpoint.open(source, offline=offline)
    if dense.fingerprint != manifest.parents.get("source"):
        raise InputError(
            "is not the checkpoint this folder was made from",
            where=str(dense.folder),
            needed=f"fingerprint {manifest.parents.get('source', 'unknown')[:12]}…, found {dense.fingerprint[:12]}…",
            hint="give the dense checkpoint, unchanged since",
        )
    plan = Plan.load(folder / PLAN)
    sources = plan.sources(dense, branches=branches, offline=offline)
    key = _key(folder, manifest=manifest, tokens=tokens)
    certificate = None if force else Certificate.read(folder)
    if certificate is None or certificate.key != key:
        from prismoe.verify.chain import certify  # torch and transformers are heavy: only here

        made = Checkpoint.open(folder, checked=False)  # its certificate says which file is not what was written
        certificate = certify(made, sources, plan, manifest=manifest, tokens=tokens, key=key, on_progress=on_progress)
        certificate.write(folder)
    certificate.raise_if_failed(folder)
    return certificate


def _key(folder: Path, *, manifest: Manifest, tokens: int) -> str:
    """Everything that decides a certificate, the bytes on disk included: a changed file is checked again."""
    sizes = {name: (folder / name).stat().st_mtime_ns for name in manifest.files if (folder / name).is_file()}
    parts = {"manifest": sha256_file(folder / MANIFEST), "tokens": tokens, "versions": versions(), "files": sizes}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
