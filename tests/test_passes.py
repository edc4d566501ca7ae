"""The table of passes: ours, those of packages and of user scripts; and how a pass's keys become its config."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phinetune.errors import ConfigError
from phinetune.systems.config import AcceleratorConfig
from phinetune.workflow import passes as module
from phinetune.workflow.config import PassEntry
from phinetune.workflow.passes import Pass, find_pass, parse_pass, pass_table, script_passes
from phinetune.workflow.stages import PASSES, REFUSED
from workflows import SCRIPT


@dataclass(frozen=True)
class Keys:  # as a third party writes it: a plain dataclass
    x: int = 0
    name: str = "n"


def nothing(job: Any, folder: Path) -> None: ...


THIRD = Pass(nothing, Keys, ("hf",), "hf")


class Entry:
    """An entry point."""

    def __init__(self, name: str, loaded: Any, value: str = "package:thing") -> None:
        self.name, self.loaded, self.value = name, loaded, value

    def load(self) -> Any:
        if isinstance(self.loaded, BaseException):
            raise self.loaded
        return self.loaded


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    def entry_points(group: str) -> list[Entry]:
        assert group == "phinetune.passes"
        return list(entries)

    monkeypatch.setattr(module.metadata, "entry_points", entry_points)


def entry(type: str = "Pad", script: str | None = None, **values: Any) -> PassEntry:
    return PassEntry("p", type, None, None, script, values, "passes.p")


def refusal(function: Any, *arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert all("\n" not in p for p in caught.value.problems)
    return caught.value.problems


# --- the table ---


def test_passes_are_found_in_any_case_and_refused_ones_say_what_to_do() -> None:
    table = pass_table()
    assert set(PASSES) <= set(table)
    for name, pass_ in PASSES.items():
        assert find_pass(entry(name.upper()), table) is find_pass(entry(name.lower()), table) is pass_
    assert refusal(find_pass, entry("LoRa2"), table) == [
        "passes.p.type: no pass is called 'LoRa2', did you mean \"LoRA\"?"
    ]
    for name, why in REFUSED.items():
        assert refusal(find_pass, entry(name.lower()), table) == [
            f"passes.p.type: no pass is called {name.lower()!r}: {why}"
        ]


def test_a_package_adds_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("Prune", THIRD))
    assert find_pass(entry("prune"), pass_table()) is THIRD


def test_every_entry_point_that_is_not_right_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        Entry("lora", THIRD, "a:x"),
        Entry("Prune", THIRD, "b:x"),
        Entry("prune", THIRD, "c:x"),
        Entry("Broken", ImportError("no module\nsecond line"), "d:x"),
        Entry("Leaver", SystemExit(3), "e:x"),
        Entry("Odd", 42, "f:x"),
    )
    assert refusal(pass_table) == [
        "a:x: adds a pass called lora, which is phinetune's own",
        "c:x: adds a pass called prune, which is added by b:x already",
        "the pass Broken of d:x cannot be loaded: ImportError: no module",
        "the pass Leaver of e:x cannot be loaded: SystemExit: 3",
        "f:x: must be a phinetune.Pass (found: int)",
    ]


@pytest.mark.parametrize("wrong", [{"config": dict}, {"config": Keys()}, {"run": None}, {"takes": "hf"}, {"takes": ()}])
def test_a_pass_that_cannot_work_is_refused_where_it_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="a Pass needs"):
        Pass(**{"run": nothing, "config": Keys, "takes": ("hf",), "gives": "hf", **wrong})


# --- user scripts ---


def script(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_script_adds_its_passes_and_is_imported_once(tmp_path: Path) -> None:
    file = script(
        tmp_path,
        SCRIPT + "\nfrom pathlib import Path as P\nwith (P(__file__).parent / 'n').open('a') as f: f.write('x')\n",
    )
    first = find_pass(entry(script=file), pass_table())
    assert find_pass(entry("PAD", file), pass_table()) is first and (tmp_path / "n").read_text() == "x"
    script(tmp_path, SCRIPT + "\nVERSION = 2\n")
    assert find_pass(entry(script=file), pass_table()) is not first  # another content is another script


def test_two_scripts_of_the_same_content_are_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found = script_passes(script(tmp_path / name, SCRIPT), "p")["Pad"]
        assert found.run.__globals__["__file__"] == str(tmp_path / name / "mine.py")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nowhere_to_be_found", "fails to import: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def f(:", "fails to import: SyntaxError"),
        ("1 / 0", "fails to import: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "fails to import: SystemExit: 3"),
        ("import sys; sys.exit()", "fails to import: SystemExit"),
        ("import sys; del sys.modules[__name__]; 1 / 0", "fails to import: ZeroDivisionError"),
        ("from phinetune.workflow.passes import Pass\nPASSES = {'A': Pass(None, dict, ('hf',), 'hf')}", "fails to import: TypeError"),
        ("", "must define PASSES"),
        ("PASSES = {}", "must define PASSES"),
        ("PASSES = [1]", "must define PASSES"),
        ("PASSES = {'A': print}", "must define PASSES"),
        ("\0", "fails to import: "),
    ],
)  # fmt: skip
def test_a_script_that_does_not_import_or_holds_nothing_is_named_by_its_key(
    text: str, reason: str, tmp_path: Path
) -> None:
    file = script(tmp_path, text)
    for _ in range(2):  # a second try says the same
        (problem,) = refusal(find_pass, entry("A", file), pass_table())
        assert problem.startswith(f"passes.p.user_script: {file}") and reason in problem
    if "fails" in reason:
        assert not any(
            name.startswith("phinetune_user_script") and getattr(m, "__file__", "") == file
            for name, m in sys.modules.items()
        )


@pytest.mark.parametrize("name", ["none.py", ".", "text.txt"])
def test_a_script_that_is_no_python_file_is_refused(name: str, tmp_path: Path) -> None:
    script(tmp_path, "PASSES = {}", "text.txt")
    (problem,) = refusal(script_passes, str(tmp_path / name), "passes.p.user_script")
    assert problem.startswith(f"passes.p.user_script: {tmp_path / name}: ")


# --- keys ---


def test_flat_keys_of_lora_are_gathered_beside_the_group() -> None:
    values = {"r": 4, "lora_alpha": 8, "peft_config": {"lora_dropout": 0.1}, "training_config": {"max_steps": 1}}
    config = parse_pass(entry("LoRA", **values), PASSES["LoRA"], values)
    assert config.peft_config == {"lora_dropout": 0.1, "r": 4, "lora_alpha": 8}
    assert config.training_config == {"max_steps": 1} and config.data is None


def test_a_key_in_both_places_and_a_group_that_is_none_are_refused() -> None:
    values: dict[str, Any] = {"r": 4, "lora_alpha": 2, "peft_config": {"r": 8, "lora_alpha": 2}}
    assert refusal(parse_pass, entry(), PASSES["LoRA"], values) == [
        "passes.p: r is given here and in peft_config",
        "passes.p: lora_alpha is given here and in peft_config",
    ]
    (problem,) = refusal(parse_pass, entry(), PASSES["LoRA"], {"r": 4, "peft_config": 5})
    assert problem.startswith("passes.p.peft_config: input should be")


def test_all_unknown_keys_and_wrong_values_are_named_at_once() -> None:
    values = {"lora_alpa": 1, "qant_type": "nf4", "quant_type": "int3", "double_quant": "maybe", "r": 4}
    found = refusal(parse_pass, entry(), PASSES["QLoRA"], values)
    assert found[:2] == [
        'passes.p.lora_alpa: unknown key, did you mean "lora_alpha"?',
        'passes.p.qant_type: unknown key, did you mean "quant_type"?',
    ]
    assert {p.split(": ")[0] for p in found[2:]} == {"passes.p.quant_type", "passes.p.double_quant"}


@pytest.mark.parametrize("name", [n for n in PASSES if n != "TruncateAdapter"])
def test_every_pass_of_ours_knows_its_keys_and_needs_none(name: str) -> None:
    assert parse_pass(entry(name), PASSES[name], {}) == PASSES[name].config()
    (problem,) = refusal(parse_pass, entry(name), PASSES[name], {"zzz": 1})
    assert problem == "passes.p.zzz: unknown key"


def test_a_plain_dataclass_of_a_third_party_is_as_strict() -> None:
    assert parse_pass(entry(), THIRD, {"x": 3}) == Keys(3)
    assert refusal(parse_pass, entry(), THIRD, {"nam": "q", "x": "y"}) == [
        'passes.p.nam: unknown key, did you mean "name"?',
        "passes.p.x: input should be a valid integer, unable to parse string as an integer (found: 'y')",
    ]


def test_what_the_result_is_for_decides_what_nobody_said() -> None:
    target = AcceleratorConfig(device="gpu", execution_provider="CUDAExecutionProvider")
    for name in ("ModelBuilder", "OnnxConversion", "Rtn"):
        assert parse_pass(entry(name), PASSES[name], {}, target).execution_provider == "cuda"
        assert parse_pass(entry(name), PASSES[name], {"execution_provider": "cpu"}, target).execution_provider == "cpu"
        assert parse_pass(entry(name), PASSES[name], {}, AcceleratorConfig()).execution_provider == "cpu"
    assert parse_pass(entry("MergeAdapterWeights"), PASSES["MergeAdapterWeights"], {}, target).base == "auto"


def test_a_target_that_nothing_can_be_built_for_is_named_by_the_pass() -> None:
    target = AcceleratorConfig(device="gpu", execution_provider="ROCMExecutionProvider")
    found = refusal(parse_pass, entry(), PASSES["ModelBuilder"], {"presicion": "int4"}, target)
    assert found[0] == 'passes.p.presicion: unknown key, did you mean "precision"?'
    assert found[1].startswith("passes.p: ROCMExecutionProvider: the ONNX builder has no models for it")
