"""`phinetune.lora` used on its own: without any other library than torch and safetensors, and the page of the docs that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import phinetune

DOCS = Path(__file__).parents[1] / "docs"
PROGRAM = """
import torch
from torch import nn
from safetensors.torch import save_file
import phinetune.lora as lora
from phinetune.errors import PhinetuneError

net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
twin = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
twin.load_state_dict(net.state_dict())
ids = torch.tensor([[1, 2, 3]])
import os; os.makedirs("base")
save_file(net.state_dict(), "base/model.safetensors")
config = lora.parse_lora_config({"r": 2, "target_modules": ["0", "1", "3"], "task_type": None, "use_dora": True})
adapter = lora.inject(net, config)
optimizer = torch.optim.SGD(lora.loraplus_groups(net, 0.1, 4.0))
for _ in range(3):
    net(ids).square().sum().backward()
    optimizer.step()
lora.save_adapter(adapter, "adapter")
adapters = lora.Adapters(twin)
adapters.load("a", "adapter")
adapters.use("a")
assert torch.allclose(twin(ids), net(ids), atol=1e-6)
torch.save(lora.lora_state_dict(net), "factors.pt")
lora.load_lora_state_dict(net, "factors.pt")
expected = net(ids)
lora.merge(net)
assert torch.allclose(net(ids), expected, atol=1e-5)
lora.merge_files("base", "adapter", "merged")
from safetensors.torch import load_file
merged = load_file("merged/model.safetensors")
assert all(torch.equal(merged[k], v) for k, v in net.state_dict().items())
try:
    lora.inject(twin, lora.LoraConfig(r=2))
except PhinetuneError as error:
    print(error)
lora.Conv2d(2, 2, 3, r=1), lora.MergedLinear(4, 6, r=1, enable_lora=[True, False])
print("alone")
"""


def needed_by(*names: str) -> dict[str, metadata.Distribution]:
    """The distributions called `names` and everything that they need, as installed here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        needs = [need for need in found[name].requires or [] if "extra ==" not in need]
        waiting += [re.match(r"[A-Za-z0-9_.-]+", need)[0].lower() for need in needs]  # type: ignore[index]
    return found


def test_the_library_works_with_torch_and_safetensors_only(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for distribution in needed_by("torch", "safetensors", "numpy").values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    assert not {"pydantic", "transformers", "accelerate", "peft", "yaml"} & {f.name for f in site.iterdir()}
    environment = {"PYTHONPATH": f"{site}:{Path(phinetune.__file__).parents[1]}", "HOME": str(tmp_path)}
    arguments = [sys.executable, "-S", "-c", PROGRAM]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("alone") and "is a LoRA layer already" in result.stdout


def test_importing_the_library_imports_nothing() -> None:
    code = "import sys, phinetune.lora; sys.exit(1 if {'torch', 'safetensors', 'pydantic'} & set(sys.modules) else 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there_and_documented() -> None:
    import inspect

    import phinetune.lora as lora

    assert lora.__all__ == sorted(lora.__all__)
    for name in lora.__all__:
        assert inspect.getdoc(getattr(lora, name)), name


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "lora.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 9
    exec(compile("\n".join(blocks), "lora.md", "exec"), {"__name__": "page"})
    said = capsys.readouterr().out
    assert 'did you mean "words"?' in said and "enable_lora=[True, False, True]" in said and "tensors copied" in said
