"""prismoe turns a dense decoder checkpoint into a Mixture-of-Experts model in a standard architecture.

    plan = make_plan(source, num_experts=8, top_k=2)
    convert(source, plan, target="mixtral", out="moe")
    verify("moe", source=source)

Names are loaded when they are first used: `import prismoe` costs nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismoe.account import Account, account
    from prismoe.calibrate import CalibrateConfig, calibrate
    from prismoe.checkpoint import FFN, Checkpoint
    from prismoe.config import load_config
    from prismoe.config.settings import Config
    from prismoe.convert import Conversion, convert
    from prismoe.data.filters import FilterSpec
    from prismoe.data.filters.linear import TrainedFilter, train_filter
    from prismoe.data.mixture import Mixture
    from prismoe.data.prepare import DomainSource, Prepared, prepare
    from prismoe.data.shards import Domain
    from prismoe.data.sift import Sifted, sift
    from prismoe.densify import Densified, densify
    from prismoe.errors import InputError, InterruptedRun, NumericalError, PrismoeError, ResourceError, UsageError
    from prismoe.evaluate import Control, Scores, evaluate, static_control
    from prismoe.importing import Imported, import_checkpoint
    from prismoe.plan import LayerPlan, Plan, make_plan, plan_shape
    from prismoe.recover import RecoverConfig, Recovered, recover
    from prismoe.reference import reference_loss
    from prismoe.report import write_report
    from prismoe.routing.prune_experts import PrunedExperts, prune_experts
    from prismoe.routing.record import RoutingTrace
    from prismoe.routing.similarity import Similarity, similarity
    from prismoe.routing.trace import trace
    from prismoe.run import Run, run
    from prismoe.stats.calibration import Calibration
    from prismoe.train.pretrain import Trained, pretrain
    from prismoe.train.settings import PretrainConfig
    from prismoe.tune import Tuned, tune
    from prismoe.tune.settings import TuneConfig
    from prismoe.verify import Certificate, verify

__all__ = [
    "FFN",
    "Account",
    "CalibrateConfig",
    "Calibration",
    "Certificate",
    "Checkpoint",
    "Config",
    "Control",
    "Conversion",
    "Densified",
    "Domain",
    "DomainSource",
    "FilterSpec",
    "Imported",
    "InputError",
    "InterruptedRun",
    "LayerPlan",
    "Mixture",
    "NumericalError",
    "Plan",
    "Prepared",
    "PretrainConfig",
    "PrismoeError",
    "PrunedExperts",
    "RecoverConfig",
    "Recovered",
    "ResourceError",
    "RoutingTrace",
    "Run",
    "Scores",
    "Sifted",
    "Similarity",
    "Trained",
    "TrainedFilter",
    "TuneConfig",
    "Tuned",
    "UsageError",
    "account",
    "calibrate",
    "convert",
    "densify",
    "evaluate",
    "import_checkpoint",
    "load_config",
    "make_plan",
    "plan_shape",
    "prepare",
    "pretrain",
    "prune_experts",
    "recover",
    "reference_loss",
    "run",
    "sift",
    "similarity",
    "static_control",
    "trace",
    "train_filter",
    "tune",
    "verify",
    "write_report",
]

# The same as the imports above, which only type checkers see; a test compares them.
_HOMES = {
    "account": ("Account", "account"),
    "calibrate": ("CalibrateConfig", "calibrate"),
    "checkpoint": ("FFN", "Checkpoint"),
    "config": ("load_config",),
    "config.settings": ("Config",),
    "convert": ("Conversion", "convert"),
    "data.filters": ("FilterSpec",),
    "data.filters.linear": ("TrainedFilter", "train_filter"),
    "data.mixture": ("Mixture",),
    "data.prepare": ("DomainSource", "Prepared", "prepare"),
    "data.shards": ("Domain",),
    "data.sift": ("Sifted", "sift"),
    "densify": ("Densified", "densify"),
    "errors": ("InputError", "InterruptedRun", "NumericalError", "PrismoeError", "ResourceError", "UsageError"),
    "evaluate": ("Control", "Scores", "evaluate", "static_control"),
    "importing": ("Imported", "import_checkpoint"),
    "plan": ("LayerPlan", "Plan", "make_plan", "plan_shape"),
    "recover": ("RecoverConfig", "Recovered", "recover"),
    "reference": ("reference_loss",),
    "report": ("write_report",),
    "routing.prune_experts": ("PrunedExperts", "prune_experts"),
    "routing.record": ("RoutingTrace",),
    "routing.similarity": ("Similarity", "similarity"),
    "routing.trace": ("trace",),
    "run": ("Run", "run"),
    "stats.calibration": ("Calibration",),
    "train.pretrain": ("Trained", "pretrain"),
    "train.settings": ("PretrainConfig",),
    "tune": ("Tuned", "tune"),
    "tune.settings": ("TuneConfig",),
    "verify": ("Certificate", "verify"),
}


class _Package(ModuleType):
    """`prismoe.convert` is the verb, also after the file of that name was imported (`sys.modules` keeps the file)."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
