"""optuna, as far as a search needs it: studies in a file or a database, samplers, pruners, and which trials still count.

Not here: what is proposed when (`search.py`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from phinetune.artifact import content_key
from phinetune.errors import ConfigError
from phinetune.workflow.config import SearchConfig
from phinetune.workflow.plan import Workflow, default_evaluation
from phinetune.workflow.spaces import Space

_WARMUP = 4  # trials whose training is never stopped


def study_key(workflow: Workflow) -> str:
    """What must be equal for two runs to share a study: everything but how many trials there are and who runs them."""
    config = workflow.config
    search = (
        {k: v for k, v in asdict(config.search).items() if k in ("sampler", "order", "seed", "truncate_rank")}
        if config.search
        else {}
    )
    goals = [config.constraints, config.objectives]
    passes = [[(e.type.lower(), e.values, e.path) for e, _ in several] for several in workflow.alternatives.values()]
    return content_key(
        "study", 1, workflow.source.key, passes, workflow.digests, goals, asdict(default_evaluation(config)), search
    )


def open_study(workflow: Workflow, search: SearchConfig, name: str, limit: int, worker: bool = False) -> Any:
    """The study called `name`, made if need be. Raises ConfigError for a storage that cannot be opened."""
    import optuna

    directions: Any = ["minimize"] * max(1, len(workflow.goals.objectives))
    sampler = _sampler(search, bool(workflow.goals.constraints), limit, worker)
    storage = _storage(workflow, search)
    with quiet_optuna():
        return optuna.create_study(
            storage=storage, study_name=name, directions=directions, sampler=sampler, load_if_exists=True
        )


def open_losses(workflow: Workflow, search: SearchConfig, name: str) -> Any:
    """The study of held-out losses beside it: optuna's pruners work on one objective, a search may have several."""
    import optuna

    pruner: Any = optuna.pruners.MedianPruner(n_startup_trials=_WARMUP)
    if search.pruner == "halving":
        pruner = optuna.pruners.SuccessiveHalvingPruner()
    storage = _storage(workflow, search)
    with quiet_optuna():
        return optuna.create_study(storage=storage, study_name=f"{name}-losses", pruner=pruner, load_if_exists=True)


def _storage(workflow: Workflow, search: SearchConfig) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if search.storage:
        try:
            return optuna.storages.get_storage(search.storage)
        except Exception as error:
            raise ConfigError(f"search.storage: cannot be opened: {str(error).splitlines()[0]}") from error
    folder = workflow.store.folder / "studies"
    folder.mkdir(exist_ok=True)
    with quiet_optuna():
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / f"{study_key(workflow)[:32]}.log")))


def _sampler(search: SearchConfig, constrained: bool, limit: int, worker: bool) -> Any:
    import optuna

    seed = search.seed + (7919 * os.getpid() if worker else 0)  # workers must not propose the same
    limits: dict[str, Any] = {}
    if constrained:
        limits["constraints_func"] = lambda trial: trial.user_attrs.get("shortfalls") or [0.0]
    with quiet_optuna():
        if search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, limit // 4), **limits)
        if search.sampler == "tpe":
            start = min(10, max(3, limit // 3))
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=start, multivariate=True, **limits)
        return optuna.samplers.RandomSampler(seed=seed)


def distribution(space: Space) -> Any:
    """What optuna draws for `space`: the index of a choice, or a number."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.choices:
        return CategoricalDistribution(tuple(range(len(space.choices))))
    if space.is_integer:
        return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
    return FloatDistribution(space.low, space.high, log=space.log, step=space.step)


def is_void(trial: Any) -> bool:
    """True for a trial that stands for nothing: a repeated proposal, or one beyond the end."""
    return bool(trial.user_attrs.get("void")) or "chosen" not in trial.user_attrs


def is_stale(trial: Any) -> bool:
    """True for a trial of an earlier run that failed or was broken off: it is tried again."""
    return trial.state.name == "FAIL" or (trial.state.name == "RUNNING" and is_dead(trial))


def is_dead(trial: Any) -> bool:
    """True if the process that ran `trial` was one of this machine's and is gone."""
    node, pid = trial.user_attrs.get("by") or (None, 0)
    if node != platform.node() or os.name != "posix" or pid == os.getpid():
        return node is None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """optuna warns of parts of itself that are young."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
