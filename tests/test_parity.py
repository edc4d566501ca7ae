"""What reaches the exported model is what reached the trained one: token ids, chat template, stop tokens; and long prompts, on both sides
of a switch of rotary factors and of a sliding window, compute what torch computes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import phinetune
from phinetune.data import examples as examples_module
from phinetune.data.batches import padded_batch, tree_batch
from phinetune.data.encoding import MASKED
from phinetune.data.examples import load_examples
from phinetune.data.messages import parse_data_config
from phinetune.errors import DataError, ExportError
from phinetune.events import Note
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.prompts import TEXTS, settle_tokenizer, template_problems, text_probes, token_problems
from phinetune.exporting.verify import verify
from phinetune.generation.onnx_backend import load_onnx, onnx_runtime
from phinetune.model.contract import Probe, load_contract
from phinetune.model.load import load_base_contract
from tiny import PHI_TEMPLATE, PROMPT, tiny_folder, tone_rows, write_rows

INT4 = ExportConfig(algorithm="default")


def export(source: Path, folder: Path, notes: list[str] | None = None, **config: Any) -> Any:
    def listen(event: Any) -> None:
        if notes is not None and isinstance(event, Note):
            notes.append(event.text)

    return phinetune.export(str(source), folder, config, on_event=listen)


@pytest.fixture
def int4(tmp_path: Path, llama_folder: Path) -> Path:
    return export(llama_folder, tmp_path / "int4", algorithm="default").folder


# Token ids and the chat template


def test_the_texts_that_are_compared_are_in_many_scripts(llama_folder: Path) -> None:
    whole = "".join(TEXTS)
    for low, high in (
        (0x600, 0x6FF),
        (0x900, 0x97F),
        (0x4E00, 0x9FFF),
        (0x300, 0x36F),
        (0x1F300, 0x1FAFF),
        (0x11E, 0x131),
    ):
        assert any(low <= ord(c) <= high for c in whole), hex(low)
    for text in ("\t", "\r\n", "\n\n", "   ", "\u00a0", "asubuhi", "œ"):
        assert text in whole
    contract = load_base_contract(llama_folder)
    probes = text_probes(contract)
    assert len(probes) == len(TEXTS) + 1
    assert "<|end|>" in probes[-1].text.split("<|user|>\n")[1].split("after")[0]  # written by the user
    assert all(probe.text.endswith("<|assistant|>\n") for probe in probes)


def test_prompts_and_template_of_a_right_export_raise_no_alarm(int4: Path) -> None:
    contract, tokenizer = load_contract(int4), onnx_runtime().Tokenizer(str(int4))
    assert token_problems(tokenizer, contract, ()) == [] and template_problems(tokenizer, contract) == ([], [])
    found = verify(int4, INT4, contract)
    assert found["prompts_compared"] == len(contract.probes) + len(TEXTS) + 1 and "not_verified" not in found


def swap(folder: Path, first: str, second: str) -> None:
    """Exchange two tokens of the exported folder's tokenizer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words[first], words[second] = words[second], words[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_script_that_no_training_prompt_has_is_compared_too(int4: Path) -> None:
    contract = load_contract(int4)
    swap(int4, "à", "À")  # bytes 0xE0, with which Devanagari begins, and 0xC0, which is in no text
    with pytest.raises(ExportError) as caught:
        verify(int4, INT4, contract)
    (problem,) = caught.value.problems
    assert "ONNX Runtime's tokenizer differs from the one trained with at token" in problem and "नमस्ते" in problem


def test_many_texts_that_differ_are_one_line_that_names_the_first(int4: Path) -> None:
    contract = load_contract(int4)
    swap(int4, "a", "e")
    with pytest.raises(ExportError) as caught:
        verify(int4, INT4, contract, [Probe("a", (1,))])
    (problem,) = caught.value.problems
    assert repr(contract.probes[0].text[:60]) in problem and "texts differ)" in problem


def test_a_chat_template_that_was_exchanged_is_caught(int4: Path) -> None:
    file = int4 / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|assistant|>\n", "<|assistant|>"))
    with pytest.raises(ExportError) as caught:
        verify(int4, INT4, load_contract(int4))
    (problem,) = caught.value.problems
    assert "the chat template as ONNX Runtime applies it differs from the one trained with at character" in problem
    assert "'' instead of '\\n'" in problem


def test_a_template_that_the_runtime_cannot_apply_is_said(int4: Path) -> None:
    contract = load_contract(int4)
    broken = "{% for m in messages %}{{ m['content'] | nobody_knows }}{% endfor %}"
    (int4 / "chat_template.jinja").write_text(broken)
    notes: list[str] = []
    found = verify(int4, INT4, contract, (), lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    (unsure,) = found["not_verified"]
    assert unsure.startswith("ONNX Runtime cannot apply the model's chat template (") and f"export: {unsure}" in notes


def test_what_an_older_runtime_or_a_template_with_a_date_leaves_open_is_said(int4: Path) -> None:
    contract, tokenizer = load_contract(int4), onnx_runtime().Tokenizer(str(int4))
    problems, (unsure,) = template_problems(SimpleNamespace(encode=tokenizer.encode), contract)
    assert problems == [] and "applies no chat templates" in unsure
    dated = replace(contract, chat_template="{{ strftime_now('%d %b') }}" + contract.chat_template)
    problems, (unsure,) = template_problems(tokenizer, dated)
    assert problems == [] and "the day's date" in unsure


THINKING = (
    "{%- for message in messages %}{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def test_a_template_that_can_think_does_not_in_the_exported_folder_either(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "qwen3", tie=True, chat_template=THINKING)
    folder = export(source, tmp_path / "onnx", algorithm="default").folder
    contract = load_contract(folder)
    expected = contract.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert expected.endswith("<think>\n\n</think>\n\n") and contract.chat_template == THINKING
    tokenizer = onnx_runtime().Tokenizer(str(folder))
    assert tokenizer.apply_chat_template('[{"role": "user", "content": "x"}]', add_generation_prompt=True) == expected
    (folder / "chat_template.jinja").write_text(THINKING)  # as it came with the model
    with pytest.raises(ExportError, match=r"chat template .* differs .*'' instead of '<think>"):
        verify(folder, INT4, contract)


def sentencepiece_folder(folder: Path, pieces: list[str]) -> Path:
    """A tiny model whose tokenizer is of Llama's kind: blanks are ▁, bytes for what has no piece, one blank before a text at most."""
    from transformers import LlamaTokenizer

    tiny_folder(folder)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    merges = []
    for piece in pieces:
        words += [c for c in piece if c not in words]
        for i in range(2, len(piece) + 1):
            if piece[:i] not in words:
                words.append(piece[:i])
                merges.append((piece[: i - 1], piece[i - 1]))
    tokenizer = LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=merges, bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="</s>", legacy=False,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = PHI_TEMPLATE
    assert len(tokenizer) <= 320
    tokenizer.save_pretrained(str(folder))
    return folder


def test_a_tokenizer_that_the_runtime_misreads_is_written_in_another_form(tmp_path: Path) -> None:
    """The runtime gives each word after a special token a blank; in the form that is written it does not."""
    source = sentencepiece_folder(tmp_path / "model", ["▁the", "▁tone", "Hell", "▁is"])
    result = export(source, tmp_path / "onnx", algorithm="default")
    assert "not_verified" not in result.manifest["verified"]
    written = json.loads((result.folder / "tokenizer.json").read_text())
    assert written["normalizer"]["type"] == "Replace" and written["pre_tokenizer"]["type"] == "Split"
    contract, tokenizer = load_contract(result.folder), onnx_runtime().Tokenizer(str(result.folder))
    assert token_problems(tokenizer, contract, ()) == []
    contract.save(result.folder)  # as it came with the model
    (problem,) = token_problems(onnx_runtime().Tokenizer(str(result.folder)), contract, ())
    assert "at token 1 of" in problem or "at token 2 of" in problem
    assert settle_tokenizer(result.folder, contract) and not settle_tokenizer(result.folder, contract)


def test_a_tokenizer_for_which_no_form_helps_stays_as_it_is(tmp_path: Path) -> None:
    source = sentencepiece_folder(tmp_path / "model", ["t▁t", "▁the"])  # a piece across a blank
    text = (source / "tokenizer.json").read_text()
    with pytest.raises(ExportError, match="ONNX Runtime's tokenizer differs"):
        export(source, tmp_path / "onnx", algorithm="default")
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    shutil.copy(export(tiny_folder(tmp_path / "other"), tmp_path / "o").folder / "genai_config.json", folder)
    assert not settle_tokenizer(folder, load_base_contract(source))
    assert (folder / "tokenizer.json").read_text() == text


# A token that pads as well as stops


@pytest.fixture(scope="module")
def one_token(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model with one token for BOS, EOS and padding, and an adapter trained to say one word and stop."""
    root = tmp_path_factory.mktemp("one")
    source = tiny_folder(root / "model", chat_template=None)
    rows = [{"phrase": row["phrase"], "tone": "joy"} for row in tone_rows(32)]
    data = {"path": str(write_rows(root / "rows.jsonl", rows)), **PROMPT}
    config = {"num_train_epochs": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
    adapter = phinetune.finetune(str(source), data, config, {"target_modules": "all-linear"}, output_dir=root / "out")
    return SimpleNamespace(source=source, data=data, adapter=adapter.folder, root=root)


def test_a_stop_token_that_is_the_pad_token_is_learned_in_every_example(one_token: SimpleNamespace) -> None:
    contract = load_base_contract(one_token.source)
    assert (contract.pad_token_id, contract.stop_ids) == (0, (0,))
    train, test, ledger = load_examples(parse_data_config(one_token.data), contract, lambda event: None)
    rows = [*train, *test]
    assert len(rows) == 32 and all(row["labels"][-1] == 0 for row in rows) and ledger.unclosed == 0
    lengths = {len(row["labels"]) for row in rows}
    assert len(lengths) > 1  # there is padding
    batch = padded_batch(rows, contract.pad_token_id)
    width = max(lengths)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        length = len(row["labels"])
        assert int(labels[length - 1]) == 0 and labels[length:].tolist() == [MASKED] * (width - length)
        assert ids[length:].tolist() == [0] * (width - length)
    assert int((tree_batch(rows)["labels"] == 0).sum()) == len(rows)


def test_a_model_trained_with_such_a_token_stops(one_token: SimpleNamespace) -> None:
    result = phinetune.evaluate(str(one_token.adapter), one_token.data, split="all", max_new_tokens=12)
    assert result.stop_rate > 0.9 and result.value > 0.9


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_and_stops_in_onnx(precision: str, one_token: SimpleNamespace, tmp_path: Path) -> None:
    notes: list[str] = []
    result = export(one_token.adapter, tmp_path / "onnx", notes, precision=precision)
    settings = json.loads((result.folder / "genai_config.json").read_text())["model"]
    assert (settings["pad_token_id"], settings["eos_token_id"]) == (0, [0])
    assert result.manifest["verified"]["pad_is_stop_token"]
    assert any("one token, <|endoftext|>, to end answers and to fill up batches" in note for note in notes)
    generator = load_onnx(result.folder)
    prompts = [generator.contract.prompt_ids([{"role": "user", "content": f"phrase number {i}"}]) for i in range(6)]
    answers = list(generator.complete(prompts, 12))
    assert sum(answer.stopped for answer in answers) >= 5 and all(0 not in answer.ids[:-1] for answer in answers)


def test_another_pad_token_is_not_remarked_on(int4: Path) -> None:
    contract = replace(load_contract(int4), pad_token_id=9)
    notes: list[str] = []
    assert "pad_is_stop_token" not in verify(int4, INT4, contract, (), lambda e: notes.append(str(e))) and not notes


def masked_by_id(encode: Any) -> Any:
    """The fault: whatever is the pad token is masked, wherever it stands."""

    def masked(*args: Any) -> Any:
        example, *others = encode(*args)
        labels = [MASKED if label == 0 else label for label in example.labels]
        return (replace(example, labels=labels), *others)

    return masked


def test_padding_that_is_masked_by_its_id_is_caught_before_training(
    one_token: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_module, "encode_conversation", masked_by_id(examples_module.encode_conversation))
    with pytest.raises(DataError) as caught:
        phinetune.finetune(str(one_token.source), one_token.data, {"max_steps": 1}, output_dir=tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.endswith("only 0.0% of 32 examples teach the token that ends an answer (<|endoftext|>)")
    assert "masked by its place, not by its id" in caught.value.hint and not (tmp_path / "out").exists()


def test_one_answer_in_a_hundred_may_be_without_and_cut_ones_do_not_count(one_token: SimpleNamespace) -> None:
    from phinetune.workflow.training_request import check_closed

    contract = load_base_contract(one_token.source)
    ledger = examples_module.Ledger(used=100, unclosed=1)
    check_closed(ledger, contract, "x")
    with pytest.raises(DataError, match=r"x: only 98\.0% of 100 examples"):
        check_closed(replace(ledger, unclosed=2), contract, "x")
    with pytest.raises(DataError, match=r"only 90\.0% of 20 examples"):
        check_closed(replace(ledger, cut=80, unclosed=2), contract, "x")
    data = {"path": one_token.data["path"], "text": "{phrase} is {tone}", "max_length": 30, "too_long": "cut"}
    _, _, ledger = load_examples(parse_data_config(data), contract, lambda event: None)
    assert 0 < ledger.cut < ledger.used and ledger.unclosed == 0
    check_closed(ledger, contract, "x")


# Long prompts


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("long") / "model", "long")


def torch_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids_of(length: int) -> list[int]:
    return np.random.default_rng(0).integers(5, 320, size=length).tolist()


def test_prompts_on_both_sides_of_the_switch_of_factors(long_model: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    result = export(long_model, tmp_path / "onnx", notes, precision="fp32")
    generator, model = load_onnx(result.folder), torch_model(long_model)
    for length in (20, 63, 64, 65, 100, 200):
        with torch.no_grad():
            expected = model(torch.tensor([ids_of(length)])).logits[0, -1]
        assert float((torch.from_numpy(generator.logits(ids_of(length))) - expected).abs().max()) < 1e-3, length
    assert result.manifest["verified"]["logits_distance"] < 1e-3
    assert any("an answer that grows over 64 keeps what ONNX Runtime has cached" in note for note in notes)
    assert result.manifest["verified"]["logits_moved_by_growing_over"]["64"] > 0.05


def steps(folder: Path, model: Any, start: int, count: int) -> list[tuple[int, float, float]]:
    """(tokens so far, distance from torch on the whole sequence anew, from torch going on with its cache) of an answer, step by step."""
    og, generator, ids = onnx_runtime(), load_onnx(folder), ids_of(start)
    params = og.GeneratorParams(generator.model)
    params.set_search_options(max_length=start + count + 1, do_sample=False)
    running = og.Generator(generator.model, params)
    running.append_tokens(np.array(ids, dtype=np.int32))
    found = []
    with torch.no_grad():
        cached = model(torch.tensor([ids]), use_cache=True)
        for _ in range(count):
            running.generate_next_token()
            logits = torch.from_numpy(np.array(running.get_output("logits"), dtype=np.float32)[0, -1].copy())
            anew = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
            distances = [float((logits - x).abs().max()) for x in (anew, cached.logits[0, -1])]
            found.append((len(ids), *distances))
            ids.append(int(running.get_next_tokens()[0]))
            cached = model(torch.tensor([ids[-1:]]), past_key_values=cached.past_key_values, use_cache=True)
    return found  # type: ignore[return-value]


def test_an_answer_that_crosses_the_switch_goes_on_with_its_cache(long_model: Path, tmp_path: Path) -> None:
    """ONNX Runtime GenAI 0.18: keys of the first 64 tokens stay as the short factors turned them, new ones get the long factors. That is
    what torch computes with one cache; `transformers.generate` throws the cache away at the crossing."""
    folder = export(long_model, tmp_path / "onnx", precision="fp32").folder
    for length, anew, cached in steps(folder, torch_model(long_model), 40, 32):
        assert cached < 1e-3, length
        assert (anew < 1e-3) == (length <= 64), length


def test_at_4096_tokens_the_runtime_begins_anew(tmp_path: Path) -> None:
    """The original context of every Phi-3 and Phi-4 with two lists of factors: there it does as `transformers.generate` does."""
    source = tiny_folder(tmp_path / "model", "long")
    config = json.loads((source / "config.json").read_text())
    config |= {"original_max_position_embeddings": 4096, "max_position_embeddings": 8192}
    config["rope_parameters"]["original_max_position_embeddings"] = 4096
    (source / "config.json").write_text(json.dumps(config))
    notes: list[str] = []
    result = export(source, tmp_path / "onnx", notes, precision="fp32")
    assert result.manifest["verified"]["logits_moved_by_growing_over"]["4096"] < 1e-3
    assert not any("grows over" in note for note in notes)
    found = steps(result.folder, torch_model(source), 4094, 5)
    assert [length for length, _, _ in found] == [4094, 4095, 4096, 4097, 4098]
    assert all(anew < 1e-3 for _, anew, _ in found) and found[-1][2] > 0.01


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_factors_that_are_built_wrongly_are_caught_by_the_export(
    precision: str, long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short factors are used for the first tokens throughout: right for every short prompt."""
    import onnx
    from onnx.numpy_helper import from_array, to_array

    from phinetune.workflow import export as module

    def wrong(source: Path, folder: Path, *args: Any) -> None:
        build(source, folder, *args)
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        (choice,) = (n for n in model.graph.node if n.op_type == "If")
        branches = sorted(choice.attribute, key=lambda attribute: attribute.name)  # else, then
        short, long = ({n.output[0][:3]: n.attribute[0].t for n in branch.g.node} for branch in branches)
        for name, tensor in long.items():
            values = to_array(tensor).copy()
            values[:64] = to_array(short[name])
            tensor.CopyFrom(from_array(values, tensor.name))
        onnx.save(model, str(folder / "model.onnx"))

    build = module.build_onnx
    monkeypatch.setattr(module, "build_onnx", wrong)
    with pytest.raises(ExportError, match=r"logits.* differ from torch's by"):
        export(long_model, tmp_path / "onnx", precision=precision)


def test_contexts_that_take_too_long_are_said_not_to_be_verified(
    long_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("phinetune.workflow.parity._LONGEST", 48)
    notes: list[str] = []
    verified = export(long_model, tmp_path / "onnx", notes, precision="fp32").manifest["verified"]
    assert any("logits of prompts above 63 tokens were not verified" in note for note in notes)
    assert "logits_moved_by_growing_over" not in verified


@pytest.mark.parametrize("kind", ["window", "mistral", "gemma2"])
def test_sliding_windows_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """The builder leaves Phi-3's and Mistral's out, and cuts its caches so that prompts of many lengths fail."""
    source = tiny_folder(tmp_path / "model", kind)
    result = export(source, tmp_path / "onnx", precision="fp32")
    generator, model = load_onnx(result.folder), torch_model(source)
    for length in (3, 31, 33, 49, 50, 51, 52, 80, 200):
        with torch.no_grad():
            expected = model(torch.tensor([ids_of(length)])).logits[0, -1]
        assert float((torch.from_numpy(generator.logits(ids_of(length))) - expected).abs().max()) < 1e-3, length
    for length in (3, 30, 45):
        (answer,) = generator.complete([ids_of(length)], 30)
        wanted = model.generate(
            torch.tensor([ids_of(length)]), max_new_tokens=30, do_sample=False, eos_token_id=[4, 0], pad_token_id=0
        )
        assert list(answer.ids) == wanted[0, length:].tolist()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_window_that_was_left_out_is_caught_by_the_export(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.workflow.export.keep_window", lambda folder, config: None)
    source = tiny_folder(tmp_path / "model", "window")
    with pytest.raises(ExportError, match=r"logits.* differ from torch's by"):
        export(source, tmp_path / "onnx", precision=precision)


def test_prompts_that_the_runtime_refuses_are_an_error(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "window")
    with pytest.raises(ExportError, match=r"ONNX Runtime refuses a prompt of \d+ tokens"):
        export(source, tmp_path / "onnx", precision="fp32", extra_options={"windowed_kv_cache": True})
