"""The optimizer that a run gets: the one asked for where this machine has it, else the nearest, said once and before anything is loaded.

8-bit states (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization") are bitsandbytes' own, which keeps them on CPUs, too:
2.03 bytes a trained parameter instead of 8, for tensors of 4096 elements or more. Its paged optimizers need CUDA. The step itself, and
how its state is saved and read back, are the Trainer's and bitsandbytes'.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from phinetune.errors import ConfigError
from phinetune.events import Note, OnEvent, log_event

if TYPE_CHECKING:
    import torch

_PACKAGES = {
    "adamw_bnb": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "lion": "bitsandbytes",
    "rmsprop_bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "adamw_apex": "apex",
    "adamw_anyprecision": "torchdistx",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
}
"""How an optimizer's name begins, and the module that it comes from; torch and transformers have the others."""


def available_optimizer(asked: Any, device: torch.device, on_event: OnEvent = log_event) -> str:
    """The name for `asked` (a value of training_config.optim) on `device`.

    Raises ConfigError where nothing near is to be had; transformers checks the names themselves.
    """
    name = found = str(getattr(asked, "value", asked))
    if name.startswith("paged_") and device.type != "cuda":  # what is paged out to the CPU's memory is there already
        found = {"paged_adamw": "adamw_torch_fused", "paged_adamw_32bit": "adamw_torch_fused"}.get(name, name[6:])
    package = next((package for start, package in _PACKAGES.items() if found.startswith(start)), None)
    if package is not None and importlib.util.find_spec(package) is None:
        if "adamw" not in name:
            raise ConfigError(
                f"training_config.optim: {name} is not to be had on this machine, it needs {package}",
                "use adamw_torch_fused",
            )
        found = "adamw_torch_fused"
    if found != name:
        on_event(Note(f"training_config.optim: {name} is not to be had on this machine, using {found}", warning=True))
    return found
