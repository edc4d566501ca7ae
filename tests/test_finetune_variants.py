"""Every kind of adapter through the stages: trained, killed and resumed bit for bit, evaluated, merged, read by PEFT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import phinetune
import phinetune.lora as lora
from phinetune.artifact import partial_folder
from phinetune.errors import AdapterError, ConfigError
from phinetune.events import Note
from phinetune.generation.load import load_adapted
from phinetune.model.load import LoadPlan, load_model, quiet_transformers
from phinetune.model.probe import distance, probe_logits
from phinetune.workflow.finetune import finetune
from test_training import FAST, FP32, Kill, adapter_bytes, killed_at
from tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "slices": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora-dora": {"init_lora_weights": "olora", "use_dora": True, "lora_alpha": 4},
    "modules": {"modules_to_save": ["lm_head", "model.norm"], "target_modules": ["o_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"], "use_rslora": True},
    "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 8}, "loraplus_lr_ratio": 4},
    "layers": {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1], "bias": "all"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_goes_through_every_stage(
    name: str, phi3_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    peft = {"r": 4, "lora_alpha": 8, **VARIANTS[name]}
    config = {**FAST, "num_train_epochs": 4, "save_steps": 3}
    whole = finetune(str(phi3_folder), tone_data, config, peft, FP32, tmp_path / "whole")
    losses = whole.manifest["figures"]["train_loss"]
    assert losses[-1] < losses[0]
    with pytest.raises(Kill):
        finetune(str(phi3_folder), tone_data, config, peft, FP32, tmp_path / "again", on_event=killed_at(8))
    resumed = finetune(str(phi3_folder), tone_data, config, peft, FP32, tmp_path / "again")
    assert resumed.manifest["figures"]["resumed_at_step"] > 0
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)

    # what is loaded says what was trained, and so does what is merged
    model, contract = load_adapted(whole.folder, FP32, on_event=lambda event: None)
    adapted = probe_logits(model, contract)
    assert distance(adapted, whole.manifest["probe_logits"]) < 1e-4
    plain = probe_logits(load_model(phi3_folder, LoadPlan(torch.float32, CPU)), contract)
    assert (adapted - plain).abs().max() > 0.01
    merged = phinetune.merge(str(whole.folder), tmp_path / "merged")
    logits = probe_logits(load_model(merged.folder, LoadPlan(torch.float32, CPU)), contract)
    assert (logits - adapted).abs().max() < 1e-4
    assert phinetune.evaluate(str(whole.folder), model_kwargs=FP32, max_new_tokens=2).count > 0

    # and PEFT reads the same from the file
    from peft import PeftModel

    with quiet_transformers():
        theirs = PeftModel.from_pretrained(load_model(phi3_folder, LoadPlan(torch.float32, CPU)), str(whole.folder))
    ids = torch.tensor([list(contract.probes[0].ids)])
    assert (theirs.eval()(input_ids=ids).logits[0, -1] - adapted[0]).abs().max() < 1e-4


def test_only_what_the_configuration_names_is_trained(
    phi3_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    result = finetune(str(phi3_folder), tone_data, FAST, {"r": 4, "target_modules": ["v_proj"]}, FP32, tmp_path / "a")
    phinetune.merge(str(result.folder), tmp_path / "m")
    before, after = (load_file(str(f / "model.safetensors")) for f in (phi3_folder, tmp_path / "m"))
    for name in before:
        rows = (before[name] != after[name]).flatten(1).any(1).nonzero().flatten() if before[name].dim() > 1 else None
        if name.endswith("qkv_proj.weight"):
            assert rows is not None and rows.min() >= 64 + 32 and len(rows) > 0  # q 64, k 32, v 32 rows
        else:
            assert torch.equal(before[name], after[name])


def test_a_different_learning_rate_for_B_changes_the_result(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    plain = finetune(str(llama_folder), tone_data, FAST, {"r": 4}, FP32, tmp_path / "plain")
    one = finetune(str(llama_folder), tone_data, FAST, {"r": 4, "loraplus_lr_ratio": 1}, FP32, tmp_path / "one")
    four = finetune(str(llama_folder), tone_data, FAST, {"r": 4, "loraplus_lr_ratio": 4}, FP32, tmp_path / "four")
    assert adapter_bytes(plain.folder) == adapter_bytes(one.folder) != adapter_bytes(four.folder)


def test_groups_of_lora_plus() -> None:
    from torch import nn

    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], bias="lora_only"))
    groups = lora.loraplus_groups(model, 1e-3, 8.0, 0.1, 1e-4)
    names = {id(p): n for n, p in model.named_parameters()}
    by_rate = {(g["lr"], g["weight_decay"]): sorted(names[id(p)] for p in g["params"]) for g in groups}
    assert by_rate == {
        (1e-4, 0.1): ["0.lora_A", "0.lora_B"],
        (1e-3, 0.1): ["1.lora_A", "2.weight"],
        (8e-3, 0.1): ["1.lora_B"],
        (8e-3, 0.0): ["1.bias", "2.bias"],
    }
    with pytest.raises(ConfigError, match="loraplus_lr_ratio: must be above 0"):
        lora.loraplus_groups(model, 1e-3, 0.0)
    with pytest.raises(ConfigError, match="nothing in the model learns"):
        lora.loraplus_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3, 2.0)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"target_modules": ["q_proj", "qkv_prj"]}, '"qkv_prj" matches no layer'),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora does not go with slices"),
        ({"target_modules": ["k_proj"], "r": 33}, "qkv_proj: r=33 does not fit a 64 -> 32 layer"),
        ({"modules_to_save": ["lm_haed"]}, 'modules_to_save: "lm_haed" matches no module, did you mean "lm_head"'),
        ({"layers_to_transform": [7]}, "layers_to_transform: 7 matches no layer"),
        ({"rank_pattern": {"q_prj": 2}}, 'rank_pattern: "q_prj" matches no layer'),
        ({"fused_modules": {"o_proj": {"a": 1, "b": 2}}}, "fused_modules.o_proj: the widths add up to 3"),
    ],
)
def test_what_cannot_be_is_refused_before_training_and_leaves_nothing(
    peft: dict[str, Any], message: str, phi3_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError) as caught:
        finetune(str(phi3_folder), tone_data, FAST, {"r": 4, **peft}, FP32, tmp_path / "out")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_the_file_carries_the_bases_content_and_another_base_is_refused(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    result = finetune(str(llama_folder), tone_data, FAST, {"r": 4}, FP32, tmp_path / "out")
    saved = lora.read_adapter(result.folder)
    assert saved.base_key == result.manifest["base_key"]
    (result.folder / "manifest.json").unlink()  # the weights' file says it too
    from safetensors.torch import load_file, save_file

    weights = load_file(str(llama_folder / "model.safetensors"))
    import shutil

    other = Path(shutil.copytree(llama_folder, tmp_path / "other"))
    weights["model.norm.weight"][0] += 1
    save_file(weights, str(other / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="was trained on another base model"):
        phinetune.merge(str(result.folder), tmp_path / "merged", str(other))
    assert json.loads((result.folder / "adapter_config.json").read_text())["r"] == 4


KILLED_MERGE = """
import os, signal, sys
import phinetune
from phinetune.events import Progress
from phinetune.model.contract import PromptContract
steps = 0
def on_event(event):
    global steps
    steps += isinstance(event, Progress)
    if steps == 16:
        os.kill(os.getpid(), int(sys.argv[3]))
if sys.argv[4] == "after":  # the weights are whole, the tokenizer is not there
    PromptContract.save = lambda *args: os.kill(os.getpid(), int(sys.argv[3]))
phinetune.merge(sys.argv[1], sys.argv[2], on_event=on_event if sys.argv[4] == "within" else lambda event: None)
"""


@pytest.mark.parametrize("when", ["within", "after"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_merge_that_broke_off_goes_on_with_the_files_that_are_whole(
    how: signal.Signals, when: str, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    with quiet_transformers():
        tiny_model("phi3").save_pretrained(str(base), max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(str(base))
    adapter = finetune(str(base), tone_data, FAST, {"r": 4}, FP32, tmp_path / "adapter").folder
    phinetune.merge(str(adapter), tmp_path / "whole")
    arguments = [sys.executable, "-c", KILLED_MERGE, str(adapter), str(tmp_path / "out"), str(int(how)), when]
    assert subprocess.run(arguments, env=os.environ, capture_output=True).returncode != 0
    partial = partial_folder(tmp_path / "out")
    kept = {f.name: f.stat().st_ino for f in partial.glob("[!.]*.safetensors")} if when == "within" else {}
    assert (kept or when == "after") and not (tmp_path / "out").exists()
    assert partial.exists() or (how, when) == (signal.SIGINT, "after")
    phinetune.merge(str(adapter), tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    names = {f.name for f in (tmp_path / "whole").iterdir()}
    assert names == {f.name for f in (tmp_path / "out").iterdir()}
    for name in names - {"manifest.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_file_written_for_phi3_trains_a_model_whose_projections_are_apart(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    notes: list[str] = []
    targets = {"r": 4, "target_modules": ["o_proj", "qkv_proj"]}
    fused = finetune(
        *(str(llama_folder), tone_data, FAST, targets, FP32, tmp_path / "fused"),
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )
    assert "target_modules: qkv_proj is q_proj, k_proj, v_proj in this model" in notes
    named = {"r": 4, "target_modules": ["o_proj", "q_proj", "k_proj", "v_proj"]}
    parts = finetune(str(llama_folder), tone_data, FAST, named, FP32, tmp_path / "parts")
    assert adapter_bytes(fused.folder) == adapter_bytes(parts.folder)
    assert phinetune.merge(str(fused.folder), tmp_path / "merged").manifest["figures"]["layers"] == 8
