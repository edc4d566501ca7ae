"""Peak memory of one LoRA training step on a model of Phi-3-mini's real size, QLoRA and bfloat16, whole process.

    python benchmarks/memory.py [--cases "qlora, checkpointing;bf16, checkpointing"] [--steps 1] [--layers 32] [--length 512] [--folder FOLDER]

Makes a model with Phi-3-mini's shapes (3.8 B parameters, random bfloat16 weights) once, then runs each case in a process of its own:
`load_model`, `inject` (r=16, all linear layers), and steps of loss, backward and AdamW on one sequence of random tokens, all of which are
learned. What is reported is the whole process's resident memory, with Python, torch and the pages of mapped weight files: after loading,
after injecting, and the peak (the kernel's high-water mark of this program). Writes benchmarks/results/memory.json. Needs 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from phi3_shape import make_base

RESULTS = Path(__file__).parent / "results" / "memory.json"
CASES: dict[str, dict[str, Any]] = {
    "qlora": {"quantized": True, "checkpoint": 0},
    "qlora, 20 layers checkpointed": {"quantized": True, "checkpoint": 20},
    "qlora, checkpointing": {"quantized": True, "checkpoint": "all"},
    "bf16": {"quantized": False, "checkpoint": 0},
    "bf16, checkpointing": {"quantized": False, "checkpoint": "all"},
    "bf16, checkpointing, adamw_8bit": {"quantized": False, "checkpoint": "all", "optim": "adamw_8bit"},
}
"""Name -> what is asked for."""


def resident() -> dict[str, int]:
    """MB resident now: in all, memory of the process itself, pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 // 10**6 for name, key in _FIELDS.items()}


_FIELDS = {"all": "VmRSS", "own": "RssAnon", "mapped": "RssFile"}


def peak() -> int:
    """MB resident at most so far."""
    from phinetune.evaluation.memory import resident_peak

    most = resident_peak()
    assert most is not None  # noqa: S101  where `resident` can be read, this can
    return most // 10**6


def measure(base: Path, case: dict[str, Any], steps: int, length: int) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    from phinetune.lora.config import LoraConfig
    from phinetune.lora.injection import inject
    from phinetune.model.load import LoadPlan, load_model
    from phinetune.model.quantized import Quantization
    from phinetune.training.checkpointing import checkpoint_layers
    from phinetune.training.loss import supervised_loss

    found: dict[str, Any] = {"imports": resident()}
    start = time.perf_counter()
    quantization = Quantization() if case["quantized"] else None
    model = load_model(base, LoadPlan(torch.bfloat16, torch.device("cpu"), None, quantization=quantization)).train()
    found |= {"load_seconds": round(time.perf_counter() - start, 1), "loaded": resident(), "peak_of_loading": peak()}
    torch.manual_seed(0)
    inject(model, LoraConfig(r=16, lora_alpha=16))
    checkpoint_layers(model, case["checkpoint"])
    found["injected"] = resident()
    optimizer = make_optimizer(case.get("optim", "adamw"), [p for p in model.parameters() if p.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its states are there before the step that is measured, as in every step but a run's first
    optimizer.zero_grad()
    ids = torch.randint(3, model.config.vocab_size, (1, length))
    found |= {"seconds": [], "losses": []}
    for _ in range(steps):
        start = time.perf_counter()
        loss = supervised_loss(model, model.get_output_embeddings(), {"input_ids": ids, "labels": ids}, model.dtype)
        if not found["seconds"]:
            found["forward"] = resident()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found["seconds"].append(round(time.perf_counter() - start, 1))
        found["losses"].append(round(float(loss.detach()), 4))
    found["optimizer_mb"] = round(sum(t.nbytes for s in optimizer.state.values() for t in tensors(s)) / 1e6, 1)
    return {**found, "after": resident(), "peak": peak()}


def tensors(state: dict[str, Any]) -> list[Any]:
    """The tensors of one parameter's state that are its own: bitsandbytes shares its two code tables among all parameters."""
    return [t for name, t in state.items() if hasattr(t, "nbytes") and not name.startswith("qmap")]


def make_optimizer(name: str, parameters: list[Any]) -> Any:
    """AdamW as the Trainer makes it, with states of 32 or 8 bits."""
    import torch

    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=2e-4)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 1), ("layers", 32), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cases", default="qlora, checkpointing;bf16, checkpointing", help=f"of {'; '.join(CASES)}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "phinetune-memory-benchmark")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    base = make_base(asked.folder, asked.layers)
    if asked.one:
        print(json.dumps(measure(base, CASES[asked.one], asked.steps, asked.length)))
        return
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in asked.cases.split(";"):
        command = [sys.executable, __file__, "--one", case.strip(), "--folder", str(asked.folder)]
        command += [f"--{name}={getattr(asked, name)}" for name in ("steps", "layers", "length")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{case:34} peak {found['peak']:6} MB, of loading {found['peak_of_loading']:6}, {found['seconds']} s a step"
        )
        print(json.dumps(found))
        result[f"{asked.layers} layers, {asked.length} tokens, {case.strip()}"] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
