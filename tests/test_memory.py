"""Loading in 4 bits a weight at a time, pages given back, and freed memory kept: the same numbers, less memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from phinetune.errors import ConfigError
from phinetune.model import load, quantized
from phinetune.model.load import LoadPlan, load_model, quiet_transformers
from phinetune.model.memory import MappedFiles, keep_freed_memory
from phinetune.model.quantized import Quantization, quantize, quantized_layers, quiet_bitsandbytes
from phinetune.training.config import read_training_config
from zoo import MODELS, zoo_model

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (48, 40), (3, 10), (1, 7)])
def test_slices_quantize_to_the_bytes_of_bitsandbytes(
    shape: tuple[int, int], double: bool, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    monkeypatch.setattr(quantized, "_SLICE", 256)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = quantize(weight, Quantization(kind, double))
    theirs, reference = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(packed, theirs) and torch.equal(state.absmax, reference.absmax)
    mine, other = state.as_dict(packed=True), reference.as_dict(packed=True)
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    assert torch.equal(dequantize_4bit(packed, state), dequantize_4bit(theirs, reference))


@pytest.mark.parametrize("name", MODELS)
def test_mapped_models_become_what_transformers_makes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_transformers():
        zoo_model(name).to(torch.bfloat16).save_pretrained(str(tmp_path))
    plan = LoadPlan(torch.bfloat16, CPU, quantization=Quantization())
    ours = load_model(tmp_path, plan)
    monkeypatch.setattr(load, "_is_stored_in", lambda folder, dtype: False)
    theirs = load_model(tmp_path, plan)
    assert quantized_layers(ours) == quantized_layers(theirs)
    assert (quantized_layers(ours) == []) == (name == "falcon")  # its linear layers are of a class of its own
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    for layer in quantized_layers(ours):
        a, b = ours.get_submodule(layer), theirs.get_submodule(layer)
        assert (a.compute_dtype, a.source_cls, a.quant_state is a.weight.quant_state) == (
            b.compute_dtype,
            b.source_cls,
            True,
        )
        assert a.weight.dtype == torch.uint8 and not a.weight.requires_grad
    ids = torch.tensor([[3, 4, 5, 6]])
    with quiet_bitsandbytes():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_weights_of_another_dtype_are_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet_transformers():
        zoo_model("llama").save_pretrained(str(tmp_path))  # float32 on disk
    monkeypatch.setattr(load, "quantize_layers", lambda *a: pytest.fail("a copy of the whole model would be made"))
    model = load_model(tmp_path, LoadPlan(torch.bfloat16, CPU, quantization=Quantization()))
    assert quantized_layers(model) and model.dtype == torch.bfloat16


def mapped_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_pages_of_a_mapped_weight_are_given_back(tmp_path: Path) -> None:
    saved = {"first": torch.randn(1 << 20), "second": torch.randn(1 << 20)}  # 4 MiB each
    save_file(saved, str(tmp_path / "model.safetensors"))
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        first, second = (file.get_slice(name)[...] for name in ("first", "second"))
    assert torch.equal(first, saved["first"]) and torch.equal(second, saved["second"])  # all pages are here now
    before = mapped_bytes()
    released = MappedFiles().release(first)
    assert (4 << 20) - 8192 <= released <= 4 << 20
    assert before - mapped_bytes() >= 3 << 20
    assert torch.equal(first, saved["first"]) and torch.equal(second, saved["second"])  # read from the file again


def test_memory_that_is_not_a_mapped_weight_is_never_given_back(tmp_path: Path) -> None:
    own = torch.arange(1 << 20)
    assert MappedFiles().release(own) == 0 and int(own[-1]) == (1 << 20) - 1
    save_file({"w": torch.randn(1024, 1024)}, str(tmp_path / "model.safetensors"))
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        weight = file.get_slice("w")[...]
    files = MappedFiles()
    assert files.release(weight.t()) == 0 and files.release(weight[0, :16]) == 0  # not contiguous; within one page


FAULTS = """
import resource, sys, torch
from phinetune.model.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():  # 100 MB in blocks of 4 MB, all freed
    blocks = [torch.ones(1 << 20) for _ in range(25)]
step(), step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_not_faulted_in_again() -> None:
    # by glibc's first thresholds, fixed: those that it finds by itself give memory back only if nothing lies above it by chance
    limits = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

    def faults(how: str) -> int:
        command, environment = [sys.executable, "-c", FAULTS, how], {**os.environ, **limits}
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    plain, kept = faults("plain"), faults("keep")
    assert 5 * kept < plain, (kept, plain)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False and MappedFiles().release(torch.ones(1 << 20)) == 0


def test_the_switch_is_a_truth_value() -> None:
    assert read_training_config({}).keep_freed_memory is True
    assert read_training_config({"keep_freed_memory": False}).keep_freed_memory is False
    with pytest.raises(ConfigError, match="keep_freed_memory: must be true or false"):
        read_training_config({"keep_freed_memory": "yes"})
