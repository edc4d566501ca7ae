"""Merging an adapter into a model of Phi-3-mini's size: a plain copy of the files, phinetune's streaming merge, PEFT's merge_and_unload.

    python benchmarks/merge.py [--runs 3] [--folder FOLDER] [--layers 32]

Makes a model with Phi-3-mini's shapes (3.8 B parameters, random bfloat16 weights, four files) and a rank-16 adapter once, then runs the
three in turn, in another order each round, each in a process of its own, and writes benchmarks/results/merge.json: seconds and peak
resident memory (VmHWM) of each, medians. Before each run the model's files are read into the page cache, everything is written out, and
as much memory as the output needs is touched and freed: a virtual machine hands out memory that was not in use for a while slowly, to
whoever comes first. Needs about 25 GB of disk and 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from phi3_shape import LINEAR, make_base, shapes

RESULTS = Path(__file__).parent / "results" / "merge.json"

COPY = """
import shutil, sys
from pathlib import Path
base, adapter, out = map(Path, sys.argv[1:4])
out.mkdir()
for file in base.glob("*.safetensors"):
    shutil.copyfile(file, out / file.name)
"""
OURS = """
import sys
from phinetune.lora.stream import merge_files
report = merge_files(*sys.argv[1:4])
assert report.layers == 4 * LAYERS, report.layers
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make(folder: Path, layers: int) -> tuple[Path, Path]:
    """(base model, adapter) with Phi-3-mini's shapes; made once."""
    import torch
    from safetensors.torch import save_file

    base, adapter = make_base(folder, layers), folder / f"adapter-{layers}"
    if (adapter / "adapter_config.json").exists():
        return base, adapter
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir()
    torch.manual_seed(0)
    factors = {}
    for name, shape in shapes(base).items():
        layer = name.removesuffix(".weight")
        if layer.endswith(LINEAR):
            factors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(16, shape[1]) * 0.02
            factors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.02
    save_file(factors, str(adapter / "adapter_model.safetensors"), metadata={"format": "pt"})
    values = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": str(base)}))
    return base, adapter


def measure(code: str, base: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """(seconds, peak resident MB) of one run in a fresh process, the base's files in the page cache and nothing left to write."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in base.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(64 << 20):
                pass
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    subprocess.run([sys.executable, "-c", f"memory = b'1' * {int(size * 1.1)}"], check=True)
    tail = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    arguments = [sys.executable, "-c", code + tail, str(base), str(adapter), str(out)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if result.returncode:
        raise SystemExit(result.stderr)
    return seconds, int(result.stdout.split()[-1]) / 1024


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "phinetune-merge-benchmark")
    asked = parser.parse_args()
    base, adapter = make(asked.folder, asked.layers)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} files")
    programs = {"copy": COPY, "phinetune": OURS.replace("LAYERS", str(asked.layers)), "peft": PEFT}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(asked.runs):
        for name in (list(programs) * 2)[turn % 3 : turn % 3 + 3]:
            runs[name].append(measure(programs[name], base, adapter, asked.folder / "out"))
            print(f"{name:10} {runs[name][-1][0]:7.1f} s {runs[name][-1][1]:8.0f} MB", flush=True)
    shutil.rmtree(asked.folder / "out", ignore_errors=True)
    medians = {
        name: {
            "seconds": round(statistics.median(s for s, _ in values), 1),
            "peak_mb": round(statistics.median(m for _, m in values)),
        }
        for name, values in runs.items()
    }
    ratio = statistics.median(o[0] / c[0] for o, c in zip(runs["phinetune"], runs["copy"], strict=True))
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result = {
        "model_bytes": size,
        "machine": machine,
        "medians": medians,
        "time_over_copy": round(ratio, 2),
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"medians": medians, "time_over_copy": round(ratio, 2)}, indent=2))


if __name__ == "__main__":
    main()
