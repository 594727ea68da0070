"""shardway: the way for model weights between Hugging Face (safetensors) and Megatron-Core (torch_dist).

`import_hf` and `export_hf` convert checkpoints, `migrate` rewrites a Megatron one for other readers. `verify`
compares two of any kind or holds one against its record, `inspect` looks into one and `plan` says what a conversion
would do. `is_complete` tells whether something is a whole checkpoint, `clean` removes what killed runs have left,
`push_hf` uploads an export to the Hub. None of them needs torch, a GPU or a process group. `AutoBridge` saves live
models.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing itself would take longer to import than everything here

if TYPE_CHECKING:
    from shardway.bridge.auto import AutoBridge
    from shardway.convert.exporting import export_hf
    from shardway.convert.importing import import_hf
    from shardway.convert.migrating import MigrationReport, migrate
    from shardway.convert.planning import PlanReport, plan
    from shardway.convert.pushing import PushReport, push_hf
    from shardway.convert.report import ConversionReport
    from shardway.core.errors import Code, Problem, ShardwayError
    from shardway.run.cleaning import CleanReport, clean
    from shardway.run.progress import Progress
    from shardway.verification.complete import is_complete
    from shardway.verification.inspection import InspectReport, inspect
    from shardway.verification.pair import verify
    from shardway.verification.report import VerifyReport

# Where each public name lives; imported on first use, so that `import shardway` costs next to nothing.
_HOMES = {
    "AutoBridge": "bridge.auto",
    "CleanReport": "run.cleaning",
    "Code": "core.errors",
    "ConversionReport": "convert.report",
    "InspectReport": "verification.inspection",
    "MigrationReport": "convert.migrating",
    "PlanReport": "convert.planning",
    "Problem": "core.errors",
    "Progress": "run.progress",
    "PushReport": "convert.pushing",
    "ShardwayError": "core.errors",
    "VerifyReport": "verification.report",
    "clean": "run.cleaning",
    "export_hf": "convert.exporting",
    "import_hf": "convert.importing",
    "inspect": "verification.inspection",
    "is_complete": "verification.complete",
    "migrate": "convert.migrating",
    "plan": "convert.planning",
    "push_hf": "convert.pushing",
    "verify": "verification.pair",
}

__all__ = [
    "AutoBridge",
    "CleanReport",
    "Code",
    "ConversionReport",
    "InspectReport",
    "MigrationReport",
    "PlanReport",
    "Problem",
    "Progress",
    "PushReport",
    "ShardwayError",
    "VerifyReport",
    "__version__",
    "clean",
    "export_hf",
    "import_hf",
    "inspect",
    "is_complete",
    "migrate",
    "plan",
    "push_hf",
    "verify",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
