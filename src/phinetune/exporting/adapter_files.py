"""Files of an adapter's factors for an ONNX graph: `.onnx_adapter` for ONNX Runtime, safetensors and .npz for other programs. No pickles.

Every file is read back and compared with what was written. Not here: what the factors are (`lora_inputs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors
from phinetune.errors import ConfigError, ExportError, did_you_mean

SUFFIXES = {"onnx_adapter": ".onnx_adapter", "safetensors": ".safetensors", "numpy": ".npz"}
_VERSION = 1


def check_formats(formats: Sequence[str]) -> None:
    """Raise ConfigError for a format that there is not."""
    if unknown := [f for f in formats if f not in SUFFIXES]:
        texts = [f"formats: no such format {name!r}{did_you_mean(name, SUFFIXES)}" for name in unknown]
        raise ConfigError(texts, f"the formats are {', '.join(SUFFIXES)}")


def write_factors(folder: Path, name: str, inputs: Mapping[str, Any], formats: Sequence[str]) -> list[str]:
    """Write `inputs` (input's name -> array) as NAME.onnx_adapter, and in the other `formats`; the files' names.

    Raises ExportError if a file does not hold what was written.
    """
    written = []
    with disk_errors(folder):
        for form in dict.fromkeys(("onnx_adapter", *formats)):
            file = folder / f"{name}{SUFFIXES[form]}"
            _WRITERS[form](file, dict(inputs))
            _compare(file, inputs, _READERS[form](file))
            written.append(file.name)
    return written


def _compare(file: Path, inputs: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    import numpy as np

    if set(found) != set(inputs) or not all(
        np.array_equal(inputs[n], found[n]) and inputs[n].dtype == found[n].dtype for n in inputs
    ):
        raise ExportError(f"{file}: does not hold what was written", "the installed onnxruntime may be damaged")


def _write_onnx(file: Path, inputs: dict[str, Any]) -> None:
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    adapter.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in inputs.items()})
    adapter.export_adapter(str(file))


def _read_onnx(file: Path) -> dict[str, Any]:
    import onnxruntime

    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


def _write_safetensors(file: Path, inputs: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(inputs, str(file))


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    found: dict[str, Any] = load_file(str(file))
    return found


def _write_numpy(file: Path, inputs: dict[str, Any]) -> None:
    import numpy as np

    with file.open("wb") as stream:
        np.savez(stream, **inputs)


def _read_numpy(file: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(file, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


_WRITERS = {"onnx_adapter": _write_onnx, "safetensors": _write_safetensors, "numpy": _write_numpy}
_READERS = {"onnx_adapter": _read_onnx, "safetensors": _read_safetensors, "numpy": _read_numpy}
