"""Where the weights of a training run come from, and what the folder it leaves looks like.

Either a folder is trained as it is, or a dense folder as the mixture that a plan makes of it (online upcycling): then
the recipes that `convert` would write to disk are carried out in memory, by each process for the rows that it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import PLAN, prepare
from prismoe.convert.layout import recipe_tensor
from prismoe.folder import Manifest
from prismoe.lowering import lower
from prismoe.plan import Plan, plan_shape
from prismoe.recipe import Copy, Recipe
from prismoe.target import absorbed, output_config
from prismoe.targets import find_target
from prismoe.train.fit import num_experts

__all__ = ["Origin"]


@dataclass(frozen=True, eq=False)
class Origin:
    """Attributes:
    checkpoint: the folder that is read.
    recipes: how each tensor of the model's folder is made of the tensors of `checkpoint`; empty when there are none.
    config: config.json of the model's folder, and the bytes of it.
    files: the other small files of the model's folder, the plan among them where one is known.
    parents: fingerprints of what it is made from.
    made_with: the plan that makes it here.
    """

    checkpoint: Checkpoint
    recipes: Mapping[str, Recipe]
    config: dict[str, Any]
    config_bytes: bytes
    files: Mapping[str, bytes]
    parents: Mapping[str, str]
    made_with: Plan | None = None

    @classmethod
    def folder(cls, checkpoint: Checkpoint) -> Origin:
        """A folder as it is."""
        files = {path.name: path.read_bytes() for path in checkpoint.side_files}
        if (plan := checkpoint.folder / PLAN).is_file():
            files[PLAN] = plan.read_bytes()
        return cls(
            checkpoint=checkpoint,
            recipes={name: Copy(name) for name in checkpoint.tensors},
            config=checkpoint.config,
            config_bytes=(checkpoint.folder / "config.json").read_bytes(),
            files=files,
            parents={"source": checkpoint.fingerprint},
        )

    @classmethod
    def upcycled(cls, checkpoint: Checkpoint, plan: Plan, *, target: str, pad_to: int, absorb: bool) -> Origin:
        """A dense folder as the mixture of `plan`, bit for bit what `convert` writes.

        Raises:
            UsageError, InputError: as `convert`.
        """
        job = prepare(checkpoint, plan, target, pad_to, 1 << 62, absorb=absorb)
        shape = absorbed(plan_shape(plan)) if absorb else plan_shape(plan)
        table = find_target(target)
        config = output_config(checkpoint, shape, table, pad_to=pad_to)
        return cls(
            checkpoint=checkpoint,
            recipes=lower(checkpoint, plan, table, pad_to=pad_to, absorb=absorb),
            config=config,
            config_bytes=(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(),
            files=job.files,
            parents={**job.parents, "conversion": job.key},
            made_with=plan,
        )

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer, 0 for a dense model."""
        return num_experts(self.config)

    @property
    def num_parameters(self) -> int:
        """Numbers in the model's folder."""
        return sum(math.prod(shape) for _, shape in self.tensors().values())

    def plan(self) -> Plan | None:
        """The plan of the mixture, where one is known.

        Raises:
            InputError: the one in the folder is damaged.
        """
        if self.made_with is None and PLAN in self.files:
            return Plan.load(self.checkpoint.folder / PLAN)
        return self.made_with

    @property
    def trained(self) -> bool:
        """Whether weights may have moved since a plan made them: of all but this plan's and those `convert` wrote."""
        if self.made_with is not None:
            return False
        manifest = Manifest.ours(self.checkpoint.folder)
        return manifest is None or manifest.kind != "convert"

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """safetensors dtype and shape of every tensor of the model's folder."""
        tensors = self.checkpoint.tensors
        return {key: recipe_tensor(recipe, tensors, key=key) for key, recipe in self.recipes.items()}
