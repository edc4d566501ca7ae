"""Merging from file to file: the same bits as in memory, untouched tensors byte for byte, tied embeddings, kills, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import phinetune.lora as lora
from phinetune.errors import AdapterError, ModelError, OutputError
from phinetune.events import Progress
from phinetune.lora import fold
from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.lora.config import LoraConfig
from phinetune.lora.stream import _Work, merge_files
from phinetune.model.folder import safetensors_header
from phinetune.model.load import quiet_transformers
from tiny import tiny_model
from zoo import MODELS, zoo_model

IDS = torch.tensor([[1, 7, 42, 100, 5, 20]])


def trained(model: Any, folder: Path, split: bool = False, **config: Any) -> torch.Tensor:
    """Save an adapter with random factors for `model` in `folder`; the logits of model + adapter."""
    adapter = lora.inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    torch.manual_seed(1)
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_A, std=0.1)
        nn.init.normal_(layer.lora_B, std=0.1)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.data.mul_(1.1)
    for part in (*adapter.modules.values(),):
        for parameter in part.parameters():
            parameter.data.add_(0.01)
    for bias in (p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")):
        bias.data.add_(0.1)
    lora.save_adapter(adapter, folder, "base", split=split)
    logits: torch.Tensor = model(IDS).logits.detach().float()
    return logits


def written(model: Any, folder: Path, shard: str = "1GB") -> Path:
    with quiet_transformers():
        model.save_pretrained(str(folder), max_shard_size=shard)
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 16}},
    "pissa": {"init_lora_weights": "pissa"},
    "slices": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "head": {"target_modules": ["o_proj", "lm_head"]},
    "embedding": {"target_modules": ["o_proj", "embed_tokens"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "modules": {"modules_to_save": ["norm", "lm_head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_files_and_memory_give_the_same_bits(
    name: str, tie: bool, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = written(tiny_model(kind, tie).to(dtype), tmp_path / "base", "60KB")
    adapted = trained(loaded(base), tmp_path / "adapter", **CONFIGS[name])
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    streamed, in_memory = loaded(tmp_path / "out"), loaded(base)
    lora.load_adapter(in_memory, tmp_path / "adapter")
    lora.merge(in_memory)
    ours, theirs = streamed.state_dict(), in_memory.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {p.dtype for p in streamed.parameters()} == {dtype}
    if dtype == torch.float32:
        assert (streamed(IDS).logits - adapted).abs().max() < 1e-5 * max(1.0, float(adapted.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture_merges_from_its_files(kind: str, tmp_path: Path) -> None:
    base = written(zoo_model(kind), tmp_path / "base")
    adapted = trained(loaded(base), tmp_path / "adapter")
    report = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(tmp_path / "out")(IDS).logits
    assert report.layers > 0 and (merged - adapted).abs().max() < 1e-5 * max(1.0, float(adapted.abs().max()))
    assert (merged - loaded(base)(IDS).logits).abs().max() > 0.01


def test_biases_merge_too(tmp_path: Path) -> None:
    base = written(zoo_model("opt"), tmp_path / "base")
    adapted = trained(loaded(base), tmp_path / "adapter", bias="all")
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-5 * max(1.0, float(adapted.abs().max()))


def test_an_adapter_split_by_slices_merges_into_the_fused_weights(tmp_path: Path) -> None:
    base = written(tiny_model("phi3"), tmp_path / "base")
    adapted = trained(
        loaded(base), tmp_path / "adapter", split=True, target_modules=["q_proj", "v_proj", "gate_proj", "o_proj"]
    )
    assert any("q_proj" in name for name in load_file(str(tmp_path / "adapter" / WEIGHTS_FILE)))
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-5


def raw_tensors(folder: Path) -> dict[str, bytes]:
    """Tensor name -> the bytes in its file."""
    found = {}
    for file in folder.glob("*.safetensors"):
        header, _ = safetensors_header(file)
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
    return found


def test_untouched_tensors_are_the_same_bytes_and_integers_too(tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base")
    file = base / "model.safetensors"
    odd = torch.tensor([float("nan"), float("-inf"), -0.0])
    save_file(
        {**load_file(str(file)), "counter": torch.arange(5), "odd": odd},
        str(file),
        metadata={"format": "pt", "by": "x"},
    )
    trained(tiny_model("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    report = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    before, after = raw_tensors(base), raw_tensors(tmp_path / "out")
    assert set(before) == set(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert report.tensors_copied == len(before) - 2 and report.layers == 2
    assert safetensors_header(tmp_path / "out" / "model.safetensors")[0]["__metadata__"] == {"format": "pt", "by": "x"}


def test_tied_embeddings_come_apart_and_the_config_and_the_index_say_so(tmp_path: Path) -> None:
    base = written(tiny_model("llama", tie=True), tmp_path / "base", "60KB")
    trained(loaded(base), tmp_path / "adapter", target_modules=["embed_tokens"])
    report = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert report.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors, was = raw_tensors(tmp_path / "out"), raw_tensors(base)
    assert tensors["lm_head.weight"] == was["model.embed_tokens.weight"] != tensors["model.embed_tokens.weight"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]
    assert index["metadata"]["total_size"] == sum(map(len, tensors.values()))


def test_progress_runs_to_the_end(tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base", "60KB")
    trained(tiny_model("llama"), tmp_path / "adapter")
    seen: list[Progress] = []
    merge_files(
        base,
        tmp_path / "adapter",
        tmp_path / "out",
        on_event=lambda e: seen.append(e) if isinstance(e, Progress) else None,
    )
    done = [e.done for e in seen]
    assert done == sorted(done) and seen[-1].done == seen[-1].total


KILLED = """
import os, signal, sys
from phinetune.lora.stream import _Work, merge_files
steps = 0
def on_event(event):
    global steps
    steps += 1
    if steps == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
merge_files(*sys.argv[1:4], on_event=on_event)
"""


@pytest.mark.parametrize("moment", [1, 7, 14, 20])
def test_killed_and_run_again_gives_the_same_bytes(moment: int, tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base", "60KB")
    trained(tiny_model("llama"), tmp_path / "adapter")
    merge_files(base, tmp_path / "adapter", tmp_path / "whole")
    arguments = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), str(moment)]
    assert subprocess.run(arguments, env=os.environ).returncode == -signal.SIGKILL
    whole_files = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("[!.]*.safetensors")}
    assert (tmp_path / "out" / "merge.json").exists() and len(whole_files) < 7
    report = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert report.layers == 14 and len(report.surviving) == 14
    names = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for name, time in whole_files.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time, "a finished file was written again"


class Piece:
    """What `_Work` asks of a file."""

    def __init__(self, size: int, *entries: str) -> None:
        self.size, self.entries, self.opened = size, dict.fromkeys(entries), 0

    def open(self) -> None:
        self.opened += 1


def test_threads_are_at_files_of_their_own_as_long_as_there_are_enough() -> None:
    small, large, middle = Piece(1, "a", "b"), Piece(9, "c", "d", "e"), Piece(5, "f")
    work = _Work([small, large, middle])  # type: ignore[list-item]
    taken = [work._take() for _ in range(3)]
    assert taken == [(large, "c"), (middle, "f"), (small, "a")]
    work.threads[middle] -= 1  # its only tensor is written, and no other file waits
    rest = [work._take() for _ in range(4)]
    assert [job and job[1] for job in rest] == ["d", "b", "e", None]
    assert [p.opened for p in (small, large, middle)] == [1, 1, 1]


def test_what_a_killed_merge_of_another_adapter_left_is_not_used(tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base", "60KB")
    trained(tiny_model("llama"), tmp_path / "one")
    trained(tiny_model("llama"), tmp_path / "two", r=2)
    arguments = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "one"), str(tmp_path / "out"), "14"]
    assert subprocess.run(arguments, env=os.environ).returncode == -signal.SIGKILL
    merge_files(base, tmp_path / "two", tmp_path / "out")
    merge_files(base, tmp_path / "two", tmp_path / "fresh")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "fresh")


def test_how_much_of_a_change_the_rounding_leaves_is_measured(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    base = written(model, tmp_path / "base")
    adapter = lora.inject(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, layer in adapter.layers.items():
        nn.init.normal_(layer.lora_B, std=1e-7 if "down_proj" in name else 0.1)
    lora.save_adapter(adapter, tmp_path / "adapter")
    kept = merge_files(base, tmp_path / "adapter", tmp_path / "out").surviving
    assert all(abs(kept[name] - 1) < 0.05 for name in kept if "q_proj" in name)
    assert all(kept[name] < 0.5 for name in kept if "down_proj" in name), (
        "far below the rounding of bfloat16, and not noticed"
    )


def test_a_change_smaller_than_the_rounding_is_seen_in_slices_too(tmp_path: Path) -> None:
    model = tiny_model("phi3").to(torch.bfloat16)
    base = written(model, tmp_path / "base")
    adapter = lora.inject(model, LoraConfig(r=4, target_modules=["v_proj"]))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B, std=1e-7)
    lora.save_adapter(adapter, tmp_path / "adapter")
    assert max(merge_files(base, tmp_path / "adapter", tmp_path / "out").surviving.values()) < 0.5


def test_an_adapter_that_was_never_trained_has_no_change_to_lose(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = written(model, tmp_path / "base")
    lora.save_adapter(lora.inject(model, LoraConfig(r=4)), tmp_path / "adapter")
    report = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert report.layers == 14 and not report.surviving
    assert raw_tensors(base) == raw_tensors(tmp_path / "out")


def saved_by_peft(model: Any, folder: Path, **config: Any) -> torch.Tensor:
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config))
    torch.manual_seed(2)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(folder))
    logits: torch.Tensor = wrapped.eval()(IDS).logits.detach()
    return logits


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]], ids=["head", "embedding"])
def test_the_copies_that_peft_saves_beside_factors_do_not_take_their_place(
    tie: bool, targets: list[str], tmp_path: Path
) -> None:
    base = written(tiny_model("llama", tie), tmp_path / "base")
    adapted = saved_by_peft(loaded(base), tmp_path / "adapter", target_modules=targets)
    assert any("base_layer" in name for name in load_file(str(tmp_path / "adapter" / WEIGHTS_FILE)))
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-4
    copied = next(n for n in load_file(str(tmp_path / "adapter" / WEIGHTS_FILE)) if "base_layer" in n)
    change_adapter(tmp_path / "adapter", lambda s: s[copied].add_(1))
    with pytest.raises(AdapterError, match="is not the base model's"):
        merge_files(base, tmp_path / "adapter", tmp_path / "other")


def test_trained_biases_and_modules_of_peft_merge(tmp_path: Path) -> None:
    base = written(zoo_model("gpt2"), tmp_path / "base")
    options = {"target_modules": ["c_fc"], "bias": "all", "modules_to_save": ["ln_f"], "fan_in_fan_out": True}
    adapted = saved_by_peft(loaded(base), tmp_path / "adapter", **options)
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-4


def test_embeddings_that_are_tied_without_the_config_saying_so_come_apart(tmp_path: Path) -> None:
    base = written(zoo_model("gpt2"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # as in the files that people have of GPT-2
    (base / "config.json").write_text(json.dumps(config))
    adapted = trained(loaded(base), tmp_path / "adapter", target_modules=["wte"])
    assert merge_files(base, tmp_path / "adapter", tmp_path / "out").untied
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["phi3", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_whole_fused_layers_that_were_saved_split_merge(kind: str, dora: bool, tmp_path: Path) -> None:
    base = written(zoo_model(kind), tmp_path / "base")
    targets = {"phi3": ["qkv_proj", "gate_up_proj"], "gpt2": ["c_attn"]}[kind]
    bias = "lora_only" if kind == "gpt2" else "none"
    adapted = trained(loaded(base), tmp_path / "adapter", True, target_modules=targets, use_dora=dora, bias=bias)
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-4


def test_square_layers_of_gpt2_are_known_without_a_config_by_the_adapter(tmp_path: Path) -> None:
    base = written(zoo_model("gpt2"), tmp_path / "base")
    adapted = trained(loaded(base), tmp_path / "adapter", target_modules=[r"attn.c_proj"])
    config = (base / "config.json").read_text()
    (base / "config.json").unlink()
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(config)
    assert (loaded(tmp_path / "out")(IDS).logits - adapted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "lacking", [["copy_file_range"], ["copy_file_range", "preadv", "pwrite"]], ids=["macos", "windows"]
)
def test_systems_without_these_calls_write_the_same_bytes(
    lacking: list[str], folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, out = folders
    merge_files(base, adapter, tmp_path / "here")
    monkeypatch.setattr(fold.Folder, "fold_file", lambda *_: None)
    for call in lacking:
        monkeypatch.delattr(os, call)
    merge_files(base, adapter, out)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


# Output folders: nothing that is not the merge's own is touched.


def test_the_base_and_the_adapter_are_never_written_into(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = folders
    (tmp_path / "link").symlink_to(base)
    before = raw_tensors(base)
    for output in (base, adapter, tmp_path / "link"):
        with pytest.raises(OutputError, match="is an input of the merge"):
            merge_files(base, adapter, output)
    assert raw_tensors(base) == before


def test_files_that_no_merge_wrote_are_left_alone(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, out = folders
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(OutputError, match="is there already, and no merge wrote it"):
        merge_files(base, adapter, out)
    assert (out / "model.safetensors").read_bytes() == b"somebody's"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        merge_files(base, adapter, tmp_path / "file")


@pytest.mark.parametrize("journal", ["[]", '{"whole": []}', '{"whole": {"model.safetensors": 3}}', "{"])
def test_a_damaged_journal_is_started_over(journal: str, tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base", "60KB")
    trained(tiny_model("llama"), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merge.json").write_text(journal)
    assert merge_files(base, tmp_path / "adapter", tmp_path / "out").layers == 14


def test_a_finished_file_that_was_changed_since_is_written_again(tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base", "60KB")
    trained(tiny_model("llama"), tmp_path / "adapter")
    arguments = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "20"]
    assert subprocess.run(arguments, env=os.environ).returncode == -signal.SIGKILL
    whole = next((tmp_path / "out").glob("[!.]*.safetensors"))
    whole.write_bytes(whole.read_bytes()[:100])
    merge_files(base, tmp_path / "adapter", tmp_path / "out")
    merge_files(base, tmp_path / "adapter", tmp_path / "fresh")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "fresh")


def test_another_bases_key_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = written(model, tmp_path / "base")
    lora.save_adapter(lora.inject(model, LoraConfig(r=2)), tmp_path / "adapter", base_key="one")
    merge_files(base, tmp_path / "adapter", tmp_path / "out", base_key="one")
    with pytest.raises(AdapterError, match="was trained on another base model"):
        merge_files(base, tmp_path / "adapter", tmp_path / "out2", base_key="two")


# Bad input: one error that names everything, and nothing under the output's names.


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = written(tiny_model("llama"), tmp_path / "base")
    trained(tiny_model("llama"), tmp_path / "adapter")
    return base, tmp_path / "adapter", tmp_path / "out"


def change_adapter(adapter: Path, change: Any) -> None:
    state = load_file(str(adapter / WEIGHTS_FILE))
    change(state)
    save_file(state, str(adapter / WEIGHTS_FILE))


UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({f"{UP}.lora_A.weight": torch.full((4, 64), float("nan"))}), "up_proj.lora_A.weight: holds values"),
        (lambda s: s.pop(f"{UP}.lora_B.weight"), "up_proj: one of its two factors is missing"),
        (lambda s: [s.pop(k) for k in list(s) if "layers.1" in k], "layers.1.mlp.up_proj: is targeted, and missing in the file"),
        (lambda s: s.clear(), "the adapter's file holds no tensors"),
        (lambda s: s.update({f"{UP}.lora_A.weight": torch.zeros(2, 64)}), r"up_proj: its factors have shapes \(2, 64\)"),
        (lambda s: s.update({f"{UP}.lora_magnitude_vector": torch.ones(96)}), "up_proj: has DoRA lengths"),
        (lambda s: s.update({k.replace("mlp.up_proj", "input_layernorm"): s.pop(k) for k in list(s) if "0.mlp.up_proj" in k}), "input_layernorm.weight is"),
        (lambda s: s.update({f"{UP}.lora_A.weight": torch.zeros(4, 64, dtype=torch.complex64)}), "not the values of a layer"),
        (lambda s: s.update({f"{UP}.lora_B.weight": torch.zeros(95, 4)}), r"is for a weight of \(95, 64\)"),
        (lambda s: s.update({k.replace("up_proj", "in_proj"): s.pop(k) for k in list(s)}), "in_proj.weight: the base model's files have no"),
        (lambda s: s.update({k.replace("model.model.", "model.outer.model."): v.clone() for k, v in s.items()}), "changes model.layers.0"),
        (lambda s: s.update({f"{UP}.lora_B.weight": torch.full((96, 4), 3e38), f"{UP}.lora_A.weight": torch.ones(4, 64)}), "merging gives values that are not finite"),
    ],
)  # fmt: skip
def test_a_damaged_adapter_is_refused_by_name(folders: tuple[Path, Path, Path], change: Any, message: str) -> None:
    base, adapter, out = folders
    change_adapter(adapter, change)
    with pytest.raises(AdapterError, match=message):
        merge_files(base, adapter, out)
    assert not list(out.glob("[!.]*.safetensors"))


def test_all_misfits_are_named_at_once(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, out = folders
    change_adapter(
        adapter,
        lambda s: s.update({k: torch.zeros(95, 4) for k in s if "up_proj.lora_B" in k or "gate_proj.lora_B" in k}),
    )
    with pytest.raises(AdapterError) as caught:
        merge_files(base, adapter, out)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("cut", [5, 200, -10])
def test_a_truncated_base_is_refused(folders: tuple[Path, Path, Path], cut: int) -> None:
    base, adapter, out = folders
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        merge_files(base, adapter, out)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    base = written(tiny_model("llama"), tmp_path / "base", "60KB")
    trained(tiny_model("llama"), tmp_path / "adapter")
    next(base.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="model-00002"):
        merge_files(base, tmp_path / "adapter", tmp_path / "out")


def test_a_quantized_base_is_refused(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, out = folders
    file = base / "model.safetensors"
    state = load_file(str(file))
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**state, name: torch.zeros(64, 64, dtype=torch.uint8)}, str(file))
    with pytest.raises(AdapterError, match="is stored as U8; only floating point weights can be merged"):
        merge_files(base, adapter, out)


def test_the_base_is_left_alone(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, out = folders
    copied = shutil.copytree(base, tmp_path / "copy")
    merge_files(base, adapter, out)
    assert all((copied / f.name).read_bytes() == f.read_bytes() for f in base.iterdir())
