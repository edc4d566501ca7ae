"""The training benchmark: README's table is what the results say, the stacks train the same thing, operations are counted right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tone_rows, write_rows

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import first_step  # noqa: E402
import flops  # noqa: E402
import tables  # noqa: E402
import train  # noqa: E402
import workloads  # noqa: E402
from stacks import STACKS, missing  # noqa: E402


def results() -> dict[str, Any]:
    """Results of one workload: phinetune and two variants of a peer."""

    def stack(group: str, rates: list[float], peak: float) -> dict[str, Any]:
        return {"group": group, "tokens_per_second": rates, "median": sorted(rates)[1], "peak_gb": peak, "losses": [7.0, 6.0]}  # fmt: skip

    stacks = {
        "phinetune": stack("phinetune", [900.0, 1000.0, 1100.0], 1.2),
        "PEFT float32, sdpa": stack("PEFT in a plain loop, float32 adapters", [200.0, 250.0, 260.0], 2.0),
        "PEFT float32, eager": stack("PEFT in a plain loop, float32 adapters", [300.0, 310.0, 290.0], 2.4),
    }
    workload = {"title": "short, batch 8", "tokens_per_step": [400], "stacks": stacks, "ratios": train.ratios(stacks)}
    return {"workloads": {"short8": workload}, "first_step": {"median_step": 4.26}}


def test_readme_holds_the_table_of_the_results() -> None:
    measured = tables.read_results()
    _, table, _ = tables.between_markers((ROOT / "README.md").read_text(encoding="utf-8"))
    assert table == tables.readme_table(measured) + "\n" + tables.others_table()


def test_the_table_shows_the_fastest_of_each_group_and_ratios_by_round() -> None:
    lines = tables.readme_table(results()).splitlines()
    assert lines[2:4] == [
        "| **phinetune** | **1000, 1.2 GB** |",
        "| PEFT in a plain loop, float32 adapters | 300, 2.4 GB |",
    ]
    assert "| phinetune against the fastest PEFT loop | 3.2 x, 0.50 x |" in lines  # median of 3.0, 3.23, 3.79
    assert lines[-1] == "From the command to the end of the first step: 4.3 s."
    assert "against PEFT (PEFT float32, eager): 3.23 x the speed" in tables.terminal_table(results())


def test_other_processors_have_a_row_for_each_workload_of_their_file(tmp_path: Path) -> None:
    found = results()
    found["workloads"]["short8"]["arithmetic"] = {"share_counted": 0.71}
    for file in tables.OTHERS:
        (tmp_path / file).write_text(json.dumps(found), encoding="utf-8")
    *rows, empty, first = tables.others_table(tmp_path).splitlines()[2:]
    of_each = ", ".join(f"4.3 s on the {name.partition(':')[0]}" for name in tables.OTHERS.values())
    assert (empty, first) == ("", f"To the end of the first step: {of_each}.")
    assert rows == [
        f"| {name} | short, batch 8 | 1000, 1.2 GB | - | 3.2 x, 0.50 x | 71% |" for name in tables.OTHERS.values()
    ]


def test_the_table_goes_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n", encoding="utf-8")
    tables.write_readme(results(), page)
    text = page.read_text(encoding="utf-8")
    assert (
        text == f"above\n{tables.BEGIN}\n{tables.readme_table(results())}\n{tables.others_table()}{tables.END}\nbelow\n"
    )
    with pytest.raises(ValueError, match="needs the lines"):
        tables.between_markers("no markers")
    with pytest.raises(SystemExit, match="run it first"):
        tables.write_readme({}, page)


def test_other_losses_or_tokens_stop_the_run() -> None:
    train.check_first_losses({"a": 7.00, "b": 7.05})
    for wrong in (7.3, float("nan")):
        with pytest.raises(SystemExit, match="do not train the same thing"):
            train.check_first_losses({"a": 7.0, "b": wrong})
    train.check_tokens("a", [3, 4], [3, 4])
    train.check_tokens("a", [7], [3, 4])
    with pytest.raises(SystemExit, match="instead of"):
        train.check_tokens("a", [4, 3], [3, 4])


def test_long_rows_are_numbered_distinct_and_seeded(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", tone_rows(50)))
    tone = {row["phrase"]: row["tone"] for row in tone_rows(50)}
    first, again, other = (next(workloads.conversations(file, 22, seed)) for seed in (0, 0, 1))
    assert first == again != other
    asked, answered = (first[key].splitlines() for key in ("prompt", "completion"))
    assert [line.split(". ")[0] for line in asked] == [line.split(". ")[0] for line in answered] == [str(i) for i in range(1, 23)]  # fmt: skip
    phrases = [line.split(". ", 1)[1] for line in asked]
    assert len(set(phrases)) == 22
    assert [tone[phrase] for phrase in phrases] == [line.split(". ", 1)[1] for line in answered]
    write_rows(tmp_path / "others.jsonl", [{"text": "a"}])
    with pytest.raises(SystemExit, match="columns phrase and tone"):
        next(workloads.conversations(str(tmp_path / "others.jsonl"), 1, 0))


def test_products_are_counted_inside_autograd_functions() -> None:
    from phinetune.lora.functional import lora_linear

    n, width, out, r = 6, 8, 10, 2
    x = torch.randn(n, width, requires_grad=True)
    weight, A, B = torch.randn(out, width), torch.randn(r, width), torch.randn(out, r)
    with flops.Count() as count:
        lora_linear(x, weight, None, A.requires_grad_(), B.requires_grad_(), 1.0).sum().backward()
    assert count.flops == 4 * n * width * out + 6 * n * r * (width + out)
    assert not count.unknown


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_step_counts_what_the_formula_says(llama_folder: Path, attention: str) -> None:
    from phinetune.data.batches import padded_batch
    from phinetune.lora.config import LoraConfig
    from phinetune.lora.injection import inject
    from phinetune.model.load import LoadPlan, load_model
    from phinetune.training.loss import supervised_loss

    model = load_model(llama_folder, LoadPlan(torch.float32, torch.device("cpu"), attention)).train()
    inject(model, LoraConfig(r=4))
    rows = [{"input_ids": list(range(5, 45)), "labels": [-100] * 30 + list(range(35, 45))}] * 3
    with flops.Count() as count:
        supervised_loss(model, model.get_output_embeddings(), padded_batch(rows, 0), torch.float32).backward()
    assert (count.tokens, count.pairs) == (3 * 40, 3 * 40 * 40)
    expected = flops.model_flops(llama_folder, 4, count.tokens, count.pairs, 30)["total"]
    again = 2 * count.pairs * 64 * 2 * (attention == "sdpa")  # its backward computes the scores a second time
    assert 0.93 * expected < count.flops - again < 1.01 * expected  # no gradient goes below the first layer
    assert not count.unknown


def test_the_gemm_rate_is_a_rate() -> None:
    assert 0.01 < flops.gemm_rate(64, 64, 64, seconds=0.0) < 1e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_is_compared_with_float32_where_it_is_the_faster_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "training_dtype", lambda: dtype)
    monkeypatch.setattr(train, "missing", lambda stack: None)
    assert any(stack.all_float32 for stack in train.chosen_stacks(None)) == (dtype == torch.float32)
    asked = "TRL, all in float32, eager"
    assert [stack.name for stack in train.chosen_stacks([asked])] == [asked]


def test_the_table_names_what_the_rate_is_of() -> None:
    for dtype, name in (("bfloat16", "bf16"), ("float32", "float32")):
        found = results()
        for workload in found["workloads"].values():
            workload["arithmetic"] = {"dtype": dtype, "share_counted": 0.5}
        assert f"the machine's {name} GEMM rate | 50%" in tables.readme_table(found)


def test_stacks_train_the_same_rows_in_turn(llama_folder: Path, tone_file: Path, tmp_path: Path) -> None:
    wanted = ["phinetune", "TRL, sdpa", "PEFT bfloat16, sdpa", "PEFT, all in float32, sdpa"]
    names = [name for name in wanted if missing(STACKS[name]) is None]
    options = f"--workload short8 --rounds 1 --steps 1 --results {tmp_path / 'train.json'}".split()
    options += ["--model", str(llama_folder), "--data", str(tone_file)]
    train.main([*options, *(word for name in names for word in ("--stack", name))])
    workload = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))["workloads"]["short8"]
    assert list(workload["stacks"]) == names
    for stack in workload["stacks"].values():
        assert (
            len(stack["losses"]) == len(workload["tokens_per_step"]) == 4
        )  # two rounds of an untimed and a timed step
        assert len(stack["tokens_per_second"]) == 1 and stack["median"] > 0
        assert 0 < stack["rss_gb"] <= stack["peak_gb"] + 0.01
        assert stack["losses"] == pytest.approx(workload["stacks"]["phinetune"]["losses"], rel=0.05)
    assert 0 < workload["arithmetic"]["counted"]["computed_tokens"] <= 2 * workload["arithmetic"]["real_tokens"]
    assert not workload["arithmetic"]["counted"]["without_formula"]
    peers = {"PEFT": "PEFT", "TRL SFTTrainer, its best settings": "TRL"}
    expected = {peer for peer, prefix in peers.items() if any(name.startswith(prefix) for name in names)}
    assert set(workload["ratios"]) == expected


def test_a_stack_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"(?s)phinetune: its process ended with exit code 1.*rows.jsonl: no such file"
    ):
        train.Worker(STACKS["phinetune"], tmp_path / "absent", tmp_path, 8, 2, tmp_path / "log")


@pytest.mark.slow
def test_the_first_step_is_timed_from_the_command(llama_folder: Path, tone_file: Path) -> None:
    measured = first_step.measure_first_step(str(llama_folder), str(tone_file), runs=1)
    assert 0.1 < measured["median_ready"] < measured["median_step"] < 300
    with pytest.raises(SystemExit, match="no-such-folder"):
        first_step.measure_first_step("no-such-folder", str(tone_file), runs=1)


def test_unknown_names_are_refused() -> None:
    for wrong in (["--workload", "medium"], ["--rounds", "0"], ["--steps", "1", "--warm", "0"]):
        with pytest.raises(SystemExit):
            train.parse(wrong)
    with pytest.raises(SystemExit, match="unknown stack"):
        train.chosen_stacks(["phinetune, faster"])


def test_a_gguf_file_holds_the_model_as_llama_cpp_rotates_it(llama_folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_file import write_gguf
    from safetensors.torch import load_file

    write_gguf(llama_folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "model.gguf"))
    found = {t.name: torch.from_numpy(t.data.astype("float32")) for t in reader.tensors}
    stored = load_file(str(llama_folder / "model.safetensors"))
    assert len(found) == len(stored) and found["output_norm.weight"].dim() == 1
    down = stored["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(found["blk.1.ffn_down.weight"], down, atol=1e-3)
    x, heads, width = torch.randn(64), 4, 16
    angle = 3.0 / 10000 ** (torch.arange(width // 2) * 2 / width)  # at position 3
    cos, sin = angle.cos(), angle.sin()

    def halves(q: torch.Tensor) -> torch.Tensor:
        a, b = q.view(heads, 2, width // 2).unbind(1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], 1)

    def pairs(q: torch.Tensor) -> torch.Tensor:
        a, b = q.view(heads, width // 2, 2).unbind(2)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], 1)

    ours = halves(stored["model.layers.0.self_attn.q_proj.weight"].float() @ x)
    assert torch.allclose(pairs(found["blk.0.attn_q.weight"] @ x), ours, atol=0.05)


def test_speed_is_compared_within_rounds() -> None:
    import speed

    rounds = [
        {"phinetune": {"prefill": 100.0 * n, "decode": 30.0}, "llama.cpp": {"prefill": 50.0 * m, "decode": 20.0}}
        for n, m in ((1, 1), (2, 4), (3, 2))
    ]
    found = speed.summary(rounds)
    assert found["engines"]["phinetune"]["prefill"] == 200 and found["ratios"]["phinetune"]["llama.cpp"] == {
        "prefill": 2.0, "decode": 1.5,
    }  # fmt: skip
