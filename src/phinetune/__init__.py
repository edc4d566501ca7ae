"""phinetune: a small language model from your data to your hardware.

    import phinetune

    phinetune.finetune("microsoft/Phi-3-mini-4k-instruct", "data.jsonl", output_dir="adapter")
    phinetune.evaluate("adapter")
    phinetune.merge("adapter", "merged")
    phinetune.export("merged", "onnx-int4", {"precision": "int4"})

Names are imported when they are first used, so `import phinetune` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phinetune.data.messages import DataConfig
    from phinetune.errors import PhinetuneError
    from phinetune.exporting.config import ExportConfig
    from phinetune.generation.load import load_generator
    from phinetune.lora.config import LoraConfig
    from phinetune.olive.reading import run_file
    from phinetune.serving.chat import ChatSession
    from phinetune.workflow.assess import assess
    from phinetune.workflow.compare import compare
    from phinetune.workflow.evaluate import evaluate
    from phinetune.workflow.export import export
    from phinetune.workflow.export_adapters import export_adapters
    from phinetune.workflow.finetune import finetune
    from phinetune.workflow.forecast_training import plan
    from phinetune.workflow.merge import merge
    from phinetune.workflow.passes import Pass, PassJob
    from phinetune.workflow.quickstart import quickstart
    from phinetune.workflow.truncate import truncate

_HOME = {
    "Pass": "phinetune.workflow.passes",
    "PassJob": "phinetune.workflow.passes",
    "run_file": "phinetune.olive.reading",
    "ChatSession": "phinetune.serving.chat",
    "DataConfig": "phinetune.data.messages",
    "ExportConfig": "phinetune.exporting.config",
    "LoraConfig": "phinetune.lora.config",
    "PhinetuneError": "phinetune.errors",
    "assess": "phinetune.workflow.assess",
    "compare": "phinetune.workflow.compare",
    "evaluate": "phinetune.workflow.evaluate",
    "export": "phinetune.workflow.export",
    "export_adapters": "phinetune.workflow.export_adapters",
    "finetune": "phinetune.workflow.finetune",
    "load_generator": "phinetune.generation.load",
    "merge": "phinetune.workflow.merge",
    "plan": "phinetune.workflow.forecast_training",
    "quickstart": "phinetune.workflow.quickstart",
    "truncate": "phinetune.workflow.truncate",
}

__version__ = "0.1.0"
__all__ = [
    "ChatSession",
    "DataConfig",
    "ExportConfig",
    "LoraConfig",
    "Pass",
    "PassJob",
    "PhinetuneError",
    "__version__",
    "assess",
    "compare",
    "evaluate",
    "export",
    "export_adapters",
    "finetune",
    "load_generator",
    "merge",
    "plan",
    "quickstart",
    "run_file",
    "truncate",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'phinetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(n for n in globals() if n.startswith("__"))])
