"""Load a base model for this machine: dtype, attention and device from what was asked and what there is, each replacement said once.

`model_kwargs` are those of `from_pretrained`, under old and new names. Not here: adapters, the 4-bit format, where the folder comes from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.errors import ConfigError, ModelError, did_you_mean, first_line
from phinetune.events import Note, OnEvent, log_event
from phinetune.model.compute import available_memory, bfloat16_speedup, default_device, default_dtype
from phinetune.model.contract import PromptContract, load_contract, load_tokenizer, make_contract
from phinetune.model.folder import HUB_KEYS, stored_dtype, weight_files
from phinetune.model.grid import Grid
from phinetune.model.grid_weight import hold_on_grid
from phinetune.model.memory import release_freed_memory
from phinetune.model.quantized import (
    Format,
    from_pretrained_options,
    keep_readable,
    quantize_layers,
    quiet_bitsandbytes,
    read_format,
)

if TYPE_CHECKING:
    import torch

SPARE = 1.3
"""Free memory that a model in memory asks for, over the bytes of its weights."""
_NO_EFFECT = ("use_safetensors", "low_cpu_mem_usage", "subfolder", "variant")


@dataclass(frozen=True)
class LoadPlan:
    """What `load_model` will do: decided before anything is loaded. `attention` None leaves the choice to the model."""

    dtype: torch.dtype
    device: torch.device
    attention: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = field(default_factory=dict)
    quantization: Format | None = None


def plan_load(
    folder: Path, model_kwargs: dict[str, Any] | None = None, longest: int | None = None, on_event: OnEvent = log_event
) -> LoadPlan:
    """The plan for `model_kwargs` (names of `from_pretrained`) on this machine; `longest` is the longest sequence expected, in tokens.

    Raises ConfigError for names that neither `from_pretrained` nor the model's config knows, and for values that cannot be.
    """
    kwargs = dict(model_kwargs or {})
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    trust = kwargs.pop("trust_remote_code", False)
    if not isinstance(trust, bool):
        raise ConfigError(f"model_kwargs.trust_remote_code: must be true or false (found: {trust!r})")
    quantization = read_format(kwargs)
    for name in [k for k in kwargs if k in _NO_EFFECT]:
        on_event(Note(f"model_kwargs.{name}: has no effect, the model is read from a local folder of safetensors"))
    kwargs = {k: v for k, v in kwargs.items() if k not in (*_NO_EFFECT, *HUB_KEYS)}
    device = _device(kwargs.pop("device_map", None), on_event)
    dtype = _dtype(kwargs.pop("dtype", None), folder, device, on_event)
    attention = _attention(kwargs.pop("attn_implementation", None), device, dtype, longest, on_event)
    overrides = _config_overrides(kwargs, folder, trust)
    if isinstance(quantization, Grid):
        on_event(Note(f"model: linear layers on {quantization}, products in {str(dtype)[6:]}"))
    elif quantization is not None:
        double = ", double quantization" if quantization.double_quant else ""
        on_event(
            Note(f"model: linear layers in 4 bits ({quantization.quant_type}{double}), products in {str(dtype)[6:]}")
        )
    return LoadPlan(dtype, device, attention, trust, overrides, quantization)


def _device(asked: Any, on_event: OnEvent) -> torch.device:
    import torch

    here = default_device()
    if asked in (None, "auto", "balanced", "sequential"):
        return here
    if isinstance(asked, dict):
        asked = asked.get("") if set(asked) == {""} else None
        if asked is None:
            raise ConfigError(
                "model_kwargs.device_map: a model spread over devices cannot be trained here",
                'use "auto", a device such as "cuda:0", or leave it out',
            )
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"model_kwargs.device_map: not a device (found: {asked!r})", 'use "auto", "cpu", "cuda:0", or leave it out'
        ) from None
    if device.type != "cpu" and device.type != here.type:
        on_event(Note(f"model_kwargs.device_map: {device} is not on this machine, using {here}", warning=True))
        return here
    return device


def _dtype(asked: Any, folder: Path, device: torch.device, on_event: OnEvent) -> torch.dtype:
    import torch

    if asked is None:
        fastest = default_dtype(device)
        on_event(Note(f"model: weights in {str(fastest)[6:]} ({_compared(bfloat16_speedup(device))})"))
        return fastest
    if asked == "auto":
        asked = stored_dtype(folder)
    dtype: Any = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"model_kwargs.torch_dtype: not a floating point type (found: {asked!r})",
            "use bfloat16, float32, or leave it out",
        )
    if dtype == torch.float16 and device.type == "cpu":
        best = default_dtype(device)
        on_event(
            Note(f"model_kwargs.torch_dtype: float16 cannot be trained on a CPU, using {str(best)[6:]}", warning=True)
        )
        return best
    if dtype == torch.bfloat16 and default_dtype(device) != torch.bfloat16:
        on_event(
            Note(
                f"model_kwargs.torch_dtype: using float32 ({_compared(bfloat16_speedup(device))})",
                warning=True,
            )
        )
        return torch.float32
    return dtype


def _compared(speedup: float) -> str:
    """What `bfloat16_speedup` found, in words."""
    if speedup >= 1:
        return f"bfloat16 products run {speedup:.1f} x as fast as float32 here, measured"
    return (
        f"float32 products run {1 / speedup:.1f} x as fast as bfloat16 here, measured"
        if speedup
        else "no bfloat16 products here"
    )


_SHORT = 256  # tokens; up to here two batched products and a softmax beat the fused kernel on CPUs (forward + backward, measured)


def _attention(
    asked: Any, device: torch.device, dtype: torch.dtype, longest: int | None, on_event: OnEvent
) -> str | None:
    import torch

    known = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
    if asked is None:
        return "eager" if device.type == "cpu" and longest is not None and longest <= _SHORT else None
    if asked not in known:
        raise ConfigError(
            f"model_kwargs.attn_implementation: unknown {asked!r}{did_you_mean(str(asked), known)}",
            f"use one of {', '.join(known)}",
        )
    if asked.startswith("flash_attention"):
        module = "flash_attn" if asked.endswith("2") else "flash_attn_3"
        if (
            device.type != "cuda"
            or importlib.util.find_spec(module) is None
            or dtype not in (torch.bfloat16, torch.float16)
        ):
            on_event(
                Note(
                    f"model_kwargs.attn_implementation: {asked} is not to be had on this machine, using the best it has",
                    warning=True,
                )
            )
            return _attention(None, device, dtype, longest, on_event)
    return str(asked)


def _config_overrides(kwargs: dict[str, Any], folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What is left must be fields of the model's config (`use_cache`, `rope_scaling`, ...)."""
    if not kwargs:
        return {}
    from transformers import PreTrainedModel

    config = read_model_config(folder, trust_remote_code)
    fields = {*config.to_dict(), *inspect.signature(type(config).__init__).parameters, "use_cache"} - {"self", "kwargs"}
    unknown = [k for k in kwargs if k not in fields]
    if unknown:
        known = {
            *fields,
            *inspect.signature(PreTrainedModel.from_pretrained).parameters,
            "torch_dtype",
            "device_map",
            "trust_remote_code",
            "attn_implementation",
        }
        raise ConfigError([f"model_kwargs.{k}: unknown key{did_you_mean(k, known)}" for k in unknown])
    return kwargs


def read_model_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder. Raises ModelError for an architecture that transformers does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a foreign folder makes transformers raise
        raise _load_error(folder, error) from error


def _load_error(folder: Path, error: Exception) -> ModelError:
    remote = "trust_remote_code" in str(error)
    hint = "set model_kwargs.trust_remote_code=true if you trust the code in that folder" if remote else ""
    return ModelError(f"{folder}: the model cannot be loaded: {first_line(error)}", hint)


def load_model(folder: Path, plan: LoadPlan) -> Any:
    """The causal language model in `folder`, by `plan`, in eval mode, on its device. Raises ModelError if weights are missing or misfit."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if plan.attention is None else {"attn_implementation": plan.attention}
    on_grid = isinstance(plan.quantization, Grid)
    mapped = not on_grid and plan.quantization is not None and _is_stored_in(folder, plan.dtype)
    if plan.quantization is not None and not isinstance(plan.quantization, Grid) and not mapped:
        options |= from_pretrained_options(plan.quantization, plan.dtype, plan.device)
    try:
        with quiet_transformers(), quiet_bitsandbytes():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=stored_dtype(folder) if on_grid else plan.dtype,
                **options,
                trust_remote_code=plan.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are named below, all of them
                output_loading_info=True,
                **plan.config_overrides,
            )
    except Exception as error:  # whatever a foreign folder makes transformers raise
        raise _load_error(folder, error) from error
    absent = sorted(info["missing_keys"])
    misfits = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info["mismatched_keys"])
    problems = [
        f"{folder}: {len(names)} weights {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for names, what in ((absent, "are missing"), (misfits, "have other shapes than config.json says"))
        if names
    ]
    if problems:
        raise ModelError(problems, "the weights do not belong to this config.json; copy or download the model again")
    release_freed_memory()
    if isinstance(plan.quantization, Grid):
        hold_on_grid(model, plan.quantization, plan.dtype)
    elif plan.quantization is not None:
        if mapped:
            with quiet_bitsandbytes():
                quantize_layers(model, plan.quantization, plan.dtype, plan.device)
            model.to(plan.device)
        model.is_quantized = False  # to the Trainer: it would refuse a quantized model whose adapter is not PEFT's own
        keep_readable(model)
        return model.eval()
    return model.to(plan.device).eval()


def _is_stored_in(folder: Path, dtype: torch.dtype) -> bool:
    """True if the weights in `folder` are plain numbers of `dtype`: they are then mapped, not read, when they are loaded."""
    try:
        return bool(stored_dtype(folder) == dtype)
    except ModelError:  # quantized already
        return False


def measuring_plan(folder: Path, trust_remote_code: bool = False, **more: Any) -> LoadPlan:
    """How the plain model in `folder` is loaded to be measured on the CPU: with every digit of its weights, in `measuring_dtype`."""
    import torch

    numbers = sum(f.stat().st_size for f in weight_files(folder)[0]) // stored_dtype(folder).itemsize
    dtype = measuring_dtype(stored_dtype(folder), numbers)
    return LoadPlan(dtype, torch.device("cpu"), None, trust_remote_code, **more)


def measuring_dtype(stored: torch.dtype, numbers: int) -> torch.dtype:
    """What a model of so many numbers, `stored` so, is computed in on the CPU where no digit may be lost.

    As it is stored; but 16 bits that this machine multiplies more slowly than float32, by tens of times where it has no instructions for
    them, become float32 where that fits into free memory.
    """
    import torch

    if stored.itemsize > 2 or stored == default_dtype(torch.device("cpu")):
        return stored
    free = available_memory()
    return torch.float32 if free is None or numbers * 4 * SPARE < free else stored


def load_base_contract(folder: Path, trust_remote_code: bool = False) -> PromptContract:
    """The prompt contract of a base model's folder: the saved one where phinetune wrote the folder, else made from its files."""
    if (folder / "prompt_contract.json").is_file():
        return load_contract(folder, trust_remote_code)
    from transformers import GenerationConfig

    config = read_model_config(folder, trust_remote_code)
    generation_config = None
    if (folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return make_contract(load_tokenizer(folder, trust_remote_code), config, generation_config)


def tied_embeddings(folder: Path, trust_remote_code: bool = False) -> dict[str, str]:
    """Output embedding's tensor name -> the input embedding's, where the model in `folder` has one tensor for both; else empty."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_model_config(folder, trust_remote_code)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a foreign folder makes transformers raise
        raise _load_error(folder, error) from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not config.get_text_config().tie_word_embeddings:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def save_generation_config(base: Path, contract: PromptContract, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the base model's generation config into `folder`, with the contract's stop and padding ids."""
    from transformers import GenerationConfig

    if (base / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(str(base), local_files_only=True)
    else:
        generation = GenerationConfig.from_model_config(read_model_config(base, trust_remote_code))
    _set_stop_ids(generation, contract)
    generation.save_pretrained(str(folder))


def _set_stop_ids(generation: Any, contract: PromptContract) -> None:
    if not generation.do_sample:  # hub models ship sampling values with do_sample off, which `save_pretrained` refuses
        generation.temperature = generation.top_p = generation.top_k = generation.min_p = generation.typical_p = None
    generation.eos_token_id = list(contract.stop_ids)
    generation.pad_token_id = contract.pad_token_id


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of transformers inside; its settings are as before afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
