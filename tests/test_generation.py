"""Generators: batches answer like single prompts, streams like batches, ONNX like torch, and stop where the contract says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import phinetune
from phinetune.errors import AdapterError, ExportError, ModelError
from phinetune.evaluation.metrics import exact_match, wilson_interval
from phinetune.exporting.prompts import TEXTS
from phinetune.generation.load import load_generator
from phinetune.generation.protocol import Sampling, stream_text
from phinetune.generation.torch_backend import TorchGenerator, choose
from phinetune.serving.chat import ChatSession, single_field_template
from tiny import PROMPT

FP32 = {"torch_dtype": "float32"}
PROMPTS = [[2, 7, 42], [2, 100, 5, 200, 9, 13, 27], [2, 50], [2, 61, 62, 63, 64]]


@pytest.fixture(scope="module")
def generator(llama_folder: Path) -> Any:
    return load_generator(str(llama_folder), FP32)


def test_batched_answers_are_those_of_single_prompts_in_order(generator: Any) -> None:
    batched = [c.ids for c in TorchGenerator(generator.model, generator.contract, batch_size=3).complete(PROMPTS, 12)]
    assert batched == [next(iter(generator.complete([p], 12))).ids for p in PROMPTS]


def test_streaming_gives_the_same_tokens(generator: Any) -> None:
    for prompt, whole in zip(PROMPTS, generator.complete(PROMPTS, 12), strict=True):
        assert tuple(generator.stream(prompt, Sampling(12))) == whole.ids


def test_an_answer_ends_at_the_first_stop_id(generator: Any) -> None:
    for completion in generator.complete(PROMPTS, 60):
        stops = [i for i, t in enumerate(completion.ids) if t in generator.contract.stop_ids]
        assert completion.stopped == bool(stops) and (not stops or stops == [len(completion.ids) - 1])


def test_streamed_text_never_splits_a_character(generator: Any) -> None:
    text = "été, 你好 and 🙂!"
    pieces = list(stream_text(generator.contract, iter(generator.contract.tokenize(text))))
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces) and len(pieces) > 5


def test_sampling_is_seeded_and_stays_within_top_p() -> None:
    logits = torch.tensor([5.0, 4.0, 0.0, -3.0])

    def draws(top_p: float, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, Sampling(temperature=1.0, top_p=top_p), generator) for _ in range(200)]

    assert draws(1.0, 0) == draws(1.0, 0) != draws(1.0, 1)
    assert set(draws(0.5, 0)) == {0} and set(draws(0.9, 0)) == {0, 1}
    assert choose(logits, Sampling(), torch.Generator()) == 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, phi3_folder: Path) -> dict[str, Path]:
    """A tiny Phi-3 through every stage: adapter, merged, fp32 and int4 ONNX."""
    from tiny import tone_rows, write_rows

    root = tmp_path_factory.mktemp("stages")
    data = {"path": str(write_rows(root / "tone.jsonl", tone_rows(40))), **PROMPT}
    training = {"num_train_epochs": 8, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    phinetune.finetune(str(phi3_folder), data, training, {"r": 8, "lora_alpha": 8}, FP32, root / "adapter")
    phinetune.merge(str(root / "adapter"), root / "merged")
    for precision in ("fp32", "int4"):
        phinetune.export(str(root / "merged"), root / precision, {"precision": precision})
    return {name: root / name for name in ("adapter", "merged", "fp32", "int4")}


def test_every_stage_is_evaluated_on_the_same_examples(stages: dict[str, Path]) -> None:
    rows = {name: phinetune.evaluate(str(folder), model_kwargs=FP32) for name, folder in stages.items()}
    assert {r.count for r in rows.values()} == {8}
    assert rows["adapter"].correct == rows["merged"].correct == rows["fp32"].correct
    assert rows["adapter"].wrong == rows["merged"].wrong == rows["fp32"].wrong
    assert rows["adapter"].stop_rate == 1.0


def test_merged_logits_are_the_adapters(stages: dict[str, Path]) -> None:
    adapter, merged = (load_generator(str(stages[n]), FP32) for n in ("adapter", "merged"))
    for probe in adapter.contract.probes:
        ids = torch.tensor([list(probe.ids)])
        with torch.inference_mode():
            assert (adapter.model(ids).logits - merged.model(ids).logits).abs().max() < 1e-5


def test_fp32_onnx_logits_are_torchs(stages: dict[str, Path]) -> None:
    merged, onnx = load_generator(str(stages["merged"]), FP32), load_generator(str(stages["fp32"]))
    for probe in merged.contract.probes:
        with torch.inference_mode():
            expected = merged.model(torch.tensor([list(probe.ids)])).logits[0, -1]
        assert (torch.from_numpy(onnx.logits(probe.ids)) - expected).abs().max() < 1e-3


def test_the_contract_is_the_same_in_every_folder(stages: dict[str, Path]) -> None:
    from phinetune.model.contract import load_contract

    contracts = [load_contract(folder).as_dict() for folder in stages.values()]
    assert all(c == contracts[0] for c in contracts)


def test_the_export_compared_the_prompts_of_the_training(stages: dict[str, Path]) -> None:
    from phinetune.artifact import read_manifest
    from phinetune.model.contract import load_contract
    from phinetune.workflow.export import training_probes

    manifest, contract = read_manifest(stages["int4"]), load_contract(stages["int4"])
    assert manifest["verified"]["prompts_compared"] == len(contract.probes) + 40 + len(TEXTS) + 1
    probes = training_probes(manifest, contract)
    assert len(probes) == 40 and "phrase number 0" in probes[0].text
    assert training_probes({**manifest, "data_sha256": "of another file"}, contract) == []


def test_onnx_streams_what_it_completes_and_stops(stages: dict[str, Path]) -> None:
    onnx = load_generator(str(stages["int4"]))
    prompt = onnx.contract.prompt_ids([{"role": "user", "content": "What is the tone of this phrase? phrase number 3"}])
    whole = next(iter(onnx.complete([prompt], 12)))
    assert tuple(onnx.stream(prompt, Sampling(12))) == whole.ids and whole.stopped
    assert len(list(onnx.stream(prompt, Sampling(3, temperature=2.0, seed=1)))) <= 3


def test_an_adapter_refuses_another_base(stages: dict[str, Path], llama_folder: Path, tmp_path: Path) -> None:
    from tiny import tiny_folder

    with pytest.raises(AdapterError, match="was trained on another base model"):
        load_generator(str(stages["adapter"]), FP32, base_model=str(llama_folder))
    with pytest.raises(AdapterError, match="was trained on another base model"):
        phinetune.merge(
            str(stages["adapter"]), tmp_path / "m", base_model=str(tiny_folder(tmp_path / "tied", "phi3", tie=True))
        )
    assert not (tmp_path / "m").exists()


def test_merging_or_exporting_the_wrong_kind_is_refused(stages: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        phinetune.merge(str(stages["merged"]), tmp_path / "m")
    with pytest.raises(ExportError, match="is an ONNX folder already"):
        phinetune.export(str(stages["int4"]), tmp_path / "m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds neither a model, an adapter nor an ONNX model"):
        load_generator(str(tmp_path / "empty"))


def test_a_broken_onnx_folder_is_one_line(stages: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(stages["int4"], tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="ONNX Runtime cannot load this model"):
        load_generator(str(broken))


# Chat.


def test_a_conversation_grows_and_forgets(generator: Any) -> None:
    session = ChatSession(generator, Sampling(5), system="Be kind.")
    answer = "".join(session.reply("Hello"))
    assert [m["role"] for m in session.messages] == ["user", "assistant"] and session.messages[1][
        "content"
    ] == answer.strip()
    list(session.reply("And now?"))
    assert len(session.messages) == 4
    session.reset()
    assert session.messages == []


def test_the_oldest_turns_go_when_the_context_is_full(generator: Any) -> None:
    session = ChatSession(generator, Sampling(8))
    for i in range(12):
        list(session.reply(f"message number {i} " + "and so on " * 5))
    prompt = session._prompt()
    assert len(prompt) <= generator.contract.max_length - 8 and len(session.messages) < 24
    with pytest.raises(ModelError, match="the message has"):
        list(session.reply("much too long " * 200))


def test_a_trained_template_is_filled_and_stands_alone(generator: Any) -> None:
    session = ChatSession(generator, Sampling(3), template="What is the tone of this phrase? {phrase}")
    list(session.reply("one"))
    list(session.reply("two {with} braces"))
    assert (
        session.messages[0]["content"] == "What is the tone of this phrase? two {with} braces"
        and len(session.messages) == 2
    )
    assert (
        single_field_template("no field") is None
        and single_field_template("{a} and {b}") is None
        and single_field_template("{a}?") == "{a}?"
    )


# Metrics.


def test_exact_match_forgives_white_space_only() -> None:
    assert exact_match(" joy\n", "joy") == 1.0
    assert exact_match("Joy", "joy") == exact_match("joy.", "joy") == exact_match("", "joy") == 0.0


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775)]
)
def test_wilson_interval_against_published_values(share: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=1e-4)
