"""What `verify` found: every check with its number, its limit and the place where it was worst."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.errors import InputError, NumericalError
from prismoe.folder import write_json_atomic
from prismoe.plan.strength import far_off
from prismoe.strictjson import read_json

__all__ = ["CERTIFICATE", "Certificate", "Check", "LayerNumbers"]

CERTIFICATE = "certificate.json"


@dataclass(frozen=True)
class Check:
    """One promise. `measured` is the worst number found, at `where`; it must not exceed `limit`.

    A number that is not finite never passes. `limit` None means reported, not judged.
    """

    name: str
    measured: float
    limit: float | None
    where: str
    meaning: str

    @property
    def passed(self) -> bool:
        return self.limit is None or self.measured <= self.limit


@dataclass(frozen=True)
class LayerNumbers:
    """One layer. Errors are relative Frobenius errors over the tokens; None where the number does not apply.

    Attributes:
        kind: "partition", "upcycling", "sharing", "changed", "branches" or "dense" (the layer was left alone).
        input: FFN input of the MoE layer against the dense layer's (attention, norms, rotary embedding). Where
            branches are averaged, the dense model is that mean, here and in norm_ratio.
        plan: stock FFN output at the real K and router against a float64 evaluation of the plan on the dense weights.
        routing: tokens for which the stock router did not keep the K largest logits (beyond float32 rounding).
        all_experts: stock FFN output with every expert on, unit gates, over the scale, against the dense FFN.
        upcycled: stock FFN output at the real K and router against the dense FFN.
        norm_ratio: ‖MoE FFN output‖ / ‖dense FFN output‖ at the real K and router.
    """

    layer: int
    kind: str
    input: float
    plan: float
    routing: int | None
    all_experts: float | None
    upcycled: float | None
    norm_ratio: float


@dataclass(frozen=True)
class Certificate:
    """The receipt of `verify`, also written into the folder as certificate.json.

    Attributes:
        source: fingerprint of the dense checkpoint.
        key: hash over everything that decides the result; the same key means nothing has changed since.
        target: model_type of the converted folder.
        input: where the token ids came from.
        whole: whether the folder was also loaded whole, as a user loads it, or why not.
    """

    source: str
    key: str
    target: str
    input: str
    num_tokens: int
    whole: str
    checks: tuple[Check, ...]
    layers: tuple[LayerNumbers, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a faithful conversion can still suffer from: a scale that makes its outputs far too small or large."""
        ratios = [row.norm_ratio for row in self.layers if row.kind != "dense" and 0 < row.norm_ratio < math.inf]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
        if not far_off(mean):
            return ()
        return (
            f"FFN outputs are {mean:.2g} times the dense model's, geometric mean of {len(ratios)} layers: "
            "plan.scale=measured keeps their size on calibration text, plan.scale=norm without it",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that is not finite becomes its name, because JSON has none."""
        found = asdict(self)
        found["passed"] = self.passed
        found["warnings"] = list(self.warnings)
        for row, check in zip(found["checks"], self.checks, strict=True):
            row["passed"] = check.passed
        named: dict[str, Any] = _without_nan(found)
        return named

    @classmethod
    def read(cls, folder: Path) -> Certificate | None:
        """The certificate in `folder`, None when there is none.

        Raises:
            InputError: certificate.json is there but is not one of ours.
        """
        path = Path(folder) / CERTIFICATE
        if not path.exists():
            return None
        raw = read_json(path)
        try:
            raw.pop("passed")
            raw.pop("warnings", None)
            checks = [{key: value for key, value in row.items() if key != "passed"} for row in raw.pop("checks")]
            layers = raw.pop("layers")
            return cls(
                **raw,
                checks=tuple(Check(**_with_nan(row)) for row in checks),
                layers=tuple(LayerNumbers(**_with_nan(row)) for row in layers),
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"not a readable certificate ({error})", where=str(path), hint="remove it and verify again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write certificate.json into the folder, whole or not at all."""
        write_json_atomic(Path(folder) / CERTIFICATE, self.to_dict())

    def raise_if_failed(self, folder: Path) -> None:
        """Raise for the first check that failed.

        Raises:
            NumericalError: with the number, the limit and the place.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            first, others = failed[0], ", ".join(check.name for check in failed[1:])
            raise NumericalError(
                f"check '{first.name}' failed: {first.meaning}: {first.measured:.3g}"
                + (f"; also failed: {others}" if others else ""),
                where=f"{folder}: {first.where}" if first.where else str(folder),
                needed=f"at most {first.limit:g}",
                hint=f"all numbers are in {CERTIFICATE}",
            )


_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"measured", "input", "plan", "all_experts", "upcycled", "norm_ratio"}
    return {key: _NAMES.get(value, value) if key in numbers else value for key, value in row.items()}
