"""Searching: every sampler against brute force, constraints, failures, phases, several workers, going on, truncated ranks, pruning."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from phinetune.cli.app import main
from phinetune.errors import ConfigError, InfeasibleError
from phinetune.events import Progress
from phinetune.workflow.config import parse_workflow
from phinetune.workflow.outcome import RunResult
from phinetune.workflow.plan import prepare
from phinetune.workflow.run import run_workflow
from phinetune.workflow.search import Proposal, Pruned
from tiny import PROMPT
from workflows import runs, values, write_workflow

pytest.importorskip("optuna")

XS, YS = [0, 1, 2, 3, 4, 5], [0.0, 1.0, 2.0, 4.0]


def run(content: dict[str, Any], **options: Any) -> RunResult:
    return run_workflow(prepare(*parse_workflow(content)), **options)


def searched(model: Path, folder: Path, search: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = values(model, folder, pad={"x": {"choices": XS}, "y": {"choices": YS}})
    return content | {"objectives": ["min size"], "search": search, **more}


def padding(x: int, y: float) -> int:
    return int(1000 * (x - 3) ** 2 + 100 * abs(y - 2))


def test_exhaustive_search_is_brute_force(llama_folder: Path, tmp_path: Path) -> None:
    result = run(searched(llama_folder, tmp_path, {"sampler": "exhaustive"}))
    assert len(result.trials) == len(XS) * len(YS) == len(runs(tmp_path))
    assert result.best is not None and result.best.chosen == {"passes.pad.x": 3, "passes.pad.y": 2.0}
    sizes = {(t.chosen["passes.pad.x"], t.chosen["passes.pad.y"]): t.values["size"] for t in result.trials}
    smallest = min(sizes.values())
    assert all(abs(sizes[x, y] - smallest - padding(x, y)) < 20 for x, y in itertools.product(XS, YS))  # manifests


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_samplers_try_what_they_may_and_nothing_twice(llama_folder: Path, tmp_path: Path, sampler: str) -> None:
    result = run(searched(llama_folder, tmp_path, {"sampler": sampler, "trials": 12}))
    tried = [(t.chosen["passes.pad.x"], t.chosen["passes.pad.y"]) for t in result.trials]
    assert len(tried) == len(set(tried)) == 12 and set(tried) <= set(itertools.product(XS, YS))
    assert result.best is not None and result.best.values["size"] == min(t.values["size"] for t in result.trials)


def test_ranges_are_kept(llama_folder: Path, tmp_path: Path) -> None:
    content = values(
        llama_folder, tmp_path, pad={"x": {"low": 1, "high": 5, "step": 2}, "y": {"low": 0.5, "high": 4.0, "log": True}}
    )
    content |= {"objectives": ["min size"], "search": {"trials": 8, "sampler": "random"}}
    result = run(content)
    assert {t.chosen["passes.pad.x"] for t in result.trials} <= {1, 3, 5}
    assert all(0.5 <= t.chosen["passes.pad.y"] <= 4.0 for t in result.trials)


def test_constraints_decide_before_objectives(llama_folder: Path, tmp_path: Path) -> None:
    base = run(
        searched(llama_folder, tmp_path / "a", {"sampler": "exhaustive"}) if (tmp_path / "a").mkdir() is None else {}
    )
    smallest = min(t.values["size"] for t in base.trials)
    content = searched(llama_folder, tmp_path / "a", {"sampler": "exhaustive"})
    content |= {"constraints": [f"size >= {smallest + 3000:.0f} bytes"], "output_dir": str(tmp_path / "b")}
    result = run(content)
    assert result.best is not None and abs(result.best.values["size"] - smallest - 4000) < 20  # x 1 or 5, y 2
    assert len(runs(tmp_path / "a")) == len(XS) * len(YS)  # all from the cache


def test_relative_constraints_measure_the_model_that_goes_in(llama_folder: Path, tmp_path: Path) -> None:
    content = searched(llama_folder, tmp_path, {"sampler": "exhaustive"}, constraints=["size <= base + 1 KB"])
    result = run(content)
    assert result.base["size"] > 0
    assert all(t.feasible == (t.values["size"] <= result.base["size"] + 1000) for t in result.trials)
    with pytest.raises(InfeasibleError, match=r"size <= base \* 0.5: missed by"):
        run(content | {"constraints": ["size <= base * 0.5"], "output_dir": str(tmp_path / "other")})


def test_a_failing_trial_is_said_and_the_others_go_on(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = values(llama_folder, tmp_path, pad={"x": {"choices": [2, 7, 3]}})
    content |= {"objectives": ["min size"], "search": {"sampler": "exhaustive"}}
    assert main(["run", str(write_workflow(tmp_path, content))]) == 0
    shown = capsys.readouterr()
    assert "RuntimeError: seven does not work" in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err and "Traceback" in (tmp_path / "out" / "run.log").read_text()
    result = run(content)  # a failed trial is tried again, the others are not
    assert [line.split()[0] for line in runs(tmp_path)] == ["2", "7", "3", "7"]
    assert sorted((t.chosen["passes.pad.x"], bool(t.error)) for t in result.trials) == [
        (2, False),
        (3, False),
        (7, True),
    ]
    only_bad = content | {"passes": {"pad": {**content["passes"]["pad"], "x": 7, "y": {"choices": [1, 2]}}}}
    with pytest.raises(InfeasibleError, match="no trial came to an end: RuntimeError: seven does not work"):
        run(only_bad)


def test_a_finished_search_proposes_nothing_and_a_longer_one_goes_on(llama_folder: Path, tmp_path: Path) -> None:
    content = searched(llama_folder, tmp_path, {"sampler": "random", "trials": 4})
    first = run(content)
    bytes_before = (tmp_path / "out" / "results.json").read_bytes()
    again = run(content)
    assert [t.chosen for t in first.trials] == [t.chosen for t in again.trials] and len(runs(tmp_path)) == 4
    assert (tmp_path / "out" / "results.json").read_bytes() == bytes_before
    longer = run(searched(llama_folder, tmp_path, {"sampler": "random", "trials": 7}))
    assert [t.chosen for t in longer.trials[:4]] == [t.chosen for t in first.trials] and len(longer.trials) == 7


def test_a_winner_that_the_cache_lost_is_made_again(llama_folder: Path, tmp_path: Path) -> None:
    content = searched(llama_folder, tmp_path, {"sampler": "random", "trials": 4})
    workflow = prepare(*parse_workflow(content))
    best = run(content).best
    workflow.store.collect(0)
    assert workflow.store.entries() == []
    again = run(content | {"output_dir": str(tmp_path / "other")}).best
    assert again is not None and best is not None and again.chosen == best.chosen
    assert (tmp_path / "other" / "model" / "padding.bin").exists() and len(runs(tmp_path)) == 5


def test_alternatives_of_a_pass_are_searched(llama_folder: Path, tmp_path: Path) -> None:
    content = values(llama_folder, tmp_path, pad={"x": {"choices": [1, 3]}})
    content["passes"]["more"] = [
        {**content["passes"]["pad"], "x": 4},
        {**content["passes"]["pad"], "kind": "fancy", "x": {"choices": [2, 3]}},
    ]
    content |= {"objectives": ["min size"], "search": {"sampler": "exhaustive"}}
    result = run(content)
    assert result.best is not None and result.best.steps[-1].name == "more"
    assert result.best.chosen["passes.more"] == 1 and result.best.chosen["passes.more[1].x"] == 3


def test_pass_by_pass_fixes_the_best_of_the_passes_before(llama_folder: Path, tmp_path: Path) -> None:
    content = values(
        llama_folder, tmp_path, one={"x": {"choices": [1, 3, 5]}}, two={"y": {"choices": [0.0, 2.0]}, "x": 3}
    )
    content |= {"objectives": ["min size"], "search": {"sampler": "exhaustive", "order": "pass-by-pass"}}
    result = run(content)
    assert result.best is not None and result.best.chosen["passes.two.y"] == 2.0
    assert len(result.trials) == 3 + 2


def test_the_first_that_meets_every_constraint_ends_it(llama_folder: Path, tmp_path: Path) -> None:
    search = {"sampler": "exhaustive", "stop_when_met": True}
    result = run(searched(llama_folder, tmp_path, search, constraints=["size <= 1 GB"]))
    assert len(result.trials) == 1


def test_several_workers_share_one_study(llama_folder: Path, tmp_path: Path) -> None:
    content = values(llama_folder, tmp_path, pad={"x": {"choices": XS}, "seconds": 0.3})
    content |= {"objectives": ["min size"], "search": {"sampler": "exhaustive", "workers": 2}}
    result = run(content)
    assert sorted(t.chosen["passes.pad.x"] for t in result.trials) == XS
    assert sorted(int(line.split()[0]) for line in runs(tmp_path)) == XS  # nothing twice
    assert not (tmp_path / "out" / "worker-1.log").read_text().strip()


def test_a_search_of_several_machines_is_a_database(llama_folder: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    search = {"sampler": "random", "trials": 3, "storage": storage, "study": "mine"}
    assert len(run(searched(llama_folder, tmp_path, search)).trials) == 3
    assert (tmp_path / "study.db").stat().st_size > 0
    with pytest.raises(ConfigError, match=r"search.storage: cannot be opened"):
        run(searched(llama_folder, tmp_path, search | {"storage": "nonsense://x"}))


def test_ranks_are_tried_by_truncation_and_the_winner_is_trained(
    llama_folder: Path, tone_file: Path, tmp_path: Path
) -> None:
    training = {"max_steps": 2, "learning_rate": 1e-2}
    content = {
        "model": str(llama_folder),
        "data": {"path": str(tone_file), **PROMPT},
        "passes": {"lora": {"type": "LoRA", "r": {"choices": [1, 2, 4]}, "training_config": training}},
        "evaluate": {"metrics": ["perplexity"], "input_model": False},
        "objectives": ["min size", "min perplexity"],
        "search": {"sampler": "exhaustive", "truncate_rank": True, "pruner": "none"},
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }
    result = run(content)
    trained = {t.steps[0].key for t in result.trials if t.truncated}
    assert len(trained) == 1  # one training serves all three ranks
    assert [len(t.steps) for t in result.trials if t.truncated] == [2, 2, 1]
    winner = [t for t in result.trials if not t.truncated]
    assert len(winner) == 1 and winner[0].chosen["passes.lora.r"] == 1 and len(winner[0].steps) == 1


def test_a_training_that_is_behind_is_stopped() -> None:
    class Losses:
        def report(self, value: float, step: int) -> None:
            self.last = value

        def should_prune(self) -> bool:
            return self.last > 2

    proposal = Proposal(losses=Losses())
    listen = proposal.listen(lambda event: None)
    listen(Progress("training", 1, 10, {"loss": 5.0}))
    listen(Progress("training", 2, 10, {"eval_loss": 1.5}))
    with pytest.raises(Pruned, match="stopped at step 3"):
        listen(Progress("training", 3, 10, {"eval_loss": 2.5}))
    assert Proposal().listen(print) is print


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"search": None}, "passes.pad.x: a space of values needs a search"),
        ({"objectives": []}, "search: needs objectives or constraints"),
        ({"search": {"trials": 0}}, "trials must be above 0"),
        ({"search": {"smapler": "tpe"}}, 'search.smapler: unknown key, did you mean "sampler"'),
        ({"search": {"truncate_rank": True}}, "search.truncate_rank: no pass has a space of ranks"),
        ({"objectives": ["min sise"]}, "no metric is called 'sise', did you mean \"size\""),
        ({"objectives": ["smallest size"]}, "not an objective"),
        ({"constraints": ["size <= 3 ms"]}, "size is not counted in ms"),
    ],
)
def test_what_cannot_be_searched_is_said_before(
    llama_folder: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    content = {k: v for k, v in (searched(llama_folder, tmp_path, {"trials": 2}) | change).items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        run(content)
    assert problem in str(caught.value) and not runs(tmp_path)


def test_an_endless_space_cannot_be_searched_exhaustively(llama_folder: Path, tmp_path: Path) -> None:
    content = values(llama_folder, tmp_path, pad={"y": {"low": 0.0, "high": 1.0}, "user_script": {"choices": [1]}})
    with pytest.raises(ConfigError, match="without a step cannot be searched exhaustively"):
        run(
            values(llama_folder, tmp_path, pad={"y": {"low": 0.0, "high": 1.0}})
            | {"objectives": ["min size"], "search": {"sampler": "exhaustive"}}
        )
    with pytest.raises(ConfigError, match=r"passes.pad.user_script"):
        run(content)
