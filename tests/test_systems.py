"""Where work runs: configs refuse what cannot be, and what a module does elsewhere arrives here: events, result, errors, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import phinetune
from phinetune import errors
from phinetune.cli.app import main as command
from phinetune.config import parse, read_yaml
from phinetune.errors import ConfigError, DataError, MissingPackageError, OutputError, PhinetuneError, SystemRunError
from phinetune.events import Event, Note, Progress
from phinetune.model import compute
from phinetune.systems import container, process
from phinetune.systems import machine as machine_module
from phinetune.systems.config import (
    PROVIDERS,
    AcceleratorConfig,
    SystemConfig,
    builder_provider,
    environment_of,
    python_of,
    system_problems,
    target_problems,
)
from phinetune.systems.log import LogFile, is_secret, secrets_in, without_secrets
from phinetune.systems.machine import Machine, instruction_sets, this_machine
from phinetune.systems.running import run_module
from phinetune.systems.wire import Outcome, read_event, write_event, write_outcome

SOURCE = Path(phinetune.__file__).parents[1]

MODULE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from phinetune.errors import DataError
from phinetune.events import Note, Progress
from phinetune.systems.running import serve_job

def wait_for(file):
    for _ in range(1000):
        if Path(file).exists():
            return
        time.sleep(0.01)
    raise RuntimeError(f"{file} never came")

def main(job, on_event):
    what = job["what"]
    if what == "report":
        on_event(Note("here", warning=True))
        on_event(Progress("working", 1, 2, {"loss": 0.5}))
        on_event(Progress("counting", 3))
        print("printed by Python")
        os.write(1, b"written by a library\\n")
        subprocess.run(["echo", "printed by a child"])
        path = os.environ["PATH"].split(os.pathsep)
        return {"job": job, "variables": dict(os.environ), "path": path, "folder": os.getcwd(), "python": sys.executable}
    if what == "stream":
        print("first line", flush=True)
        sys.stderr.write("half a line"); sys.stderr.flush()
        on_event(Progress("waiting", 0))
        wait_for(job["file"])
        return {}
    if what == "secrets":
        print("the token is " + job["model_kwargs"]["token"] + ", the variable is " + os.environ["HF_TOKEN"])
        for part in (job["model_kwargs"]["token"][:9], job["model_kwargs"]["token"][9:]):
            sys.stderr.write(part); sys.stderr.flush(); time.sleep(0.05)
        raise RuntimeError("refused: " + os.environ["HF_TOKEN"])
    if what == "sleep":
        if job.get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "60"])
        try:
            Path(job["pids"] + ".new").write_text(f"{os.getpid()} {child.pid}")
            os.rename(job["pids"] + ".new", job["pids"])
            on_event(Note("asleep"))
            time.sleep(60)
        finally:
            Path(job["pids"] + ".cleared").write_text("")
    if what == "data error":
        raise DataError(["rows.jsonl:3: empty", "rows.jsonl:9: not JSON, \\u00e4\\u20ac"], "mend the rows")
    if what == "bug":
        raise KeyError("column") from ValueError("cause")
    if what == "exit":
        os._exit(3)
    if what == "fall":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "full":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "quit":
        sys.exit("no more")
    if what == "nothing":
        return object()
    if what == "talk":
        print("x" * job["size"])
        return {"talked": True}
    if what == "set":
        return {"a": {1}}
    if what == "late":
        import atexit
        atexit.register(os._exit, 7)
        return {"done": True}

if __name__ == "__main__":
    if os.environ.get("BEFORE"):
        print("noise before the border")
        print("\\x1e{broken")
        print("half a line", end="")
    raise SystemExit(serve_job(main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module that is run elsewhere."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "elsewhere.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def variables(modules: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(modules), str(SOURCE)])}


def script(file: Path, text: str) -> Path:
    """An executable shell script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def elsewhere(tmp_path: Path, variables: dict[str, str]) -> SystemConfig:
    """Another environment: this interpreter behind a script that sets a variable."""
    wrapper = script(tmp_path / "env" / "bin" / "python", f'THROUGH=wrapper exec {sys.executable} "$@"')
    return SystemConfig("python", python=str(wrapper.parents[1]), environment=variables)


def run(system: SystemConfig, job: dict[str, Any], log: Path, on_event: Callable[[Event], None] | None = None) -> Any:
    return run_module(system, "elsewhere", job, [log.parent], log, on_event or (lambda event: None))


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# configs


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"device": "tpu"}, "a.device: input should be 'cpu', 'gpu', 'npu' or 'any'"),
        ({"device": "gpu", "execution_provider": "CudaExecutionProvider"}, 'did you mean "CUDAExecutionProvider"?'),
        ({"execution_provider": "CUDAExecutionProvider"}, "CUDAExecutionProvider runs on gpu, not on cpu"),
        (
            {"device": "npu", "execution_provider": "DmlExecutionProvider", "memory": "16 apples"},
            "memory: must be bytes",
        ),
        ({"memory": 0}, "memory: must be bytes"),
        ({"memory": -5}, "memory: must be bytes"),
        ({"memory": "-5GB"}, "memory: must be bytes"),
        ({"memory": "0GB"}, "memory: must be bytes"),
        ({"memory": "GB"}, "memory: must be bytes"),
        ({"memory": ""}, "memory: must be bytes"),
        ({"memory": [1]}, "a.memory"),
        ({"execution_provider": 3}, "a.execution_provider"),
        ({"devise": "cpu"}, 'a.devise: unknown key, did you mean "device"?'),
    ],
)
def test_what_an_accelerator_cannot_be(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(AcceleratorConfig, values, "a")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("16GB", 16 * 10**9), ("16 gib", 2**34), ("1.5MB", 1_500_000), ("512", 512), (7, 7), ("2KiB", 2048), (None, None)],
)
def test_memory_is_kept_in_bytes(memory: Any, expected: int | None) -> None:
    config = AcceleratorConfig(memory=memory)
    assert config.memory == config.memory_bytes == expected
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"type": "cloud"}, "s.type: input should be 'local', 'python', 'docker' or 'azureml'"),
        ({"python": "/usr/bin/python"}, "python: belongs to type python, this system is of type local"),
        ({"environment": {"A": "1"}}, "environment: belongs to type python or docker"),
        ({"prepend_to_path": ["/x"]}, "prepend_to_path: belongs to type python"),
        ({"image": "x"}, "image: belongs to type docker"),
        ({"type": "python", "python": "p", "dockerfile": "x"}, "dockerfile: belongs to type docker, this system is of type python"),
        ({"build_context": "."}, "build_context: belongs to type docker"),
        ({"build_args": {"A": "1"}}, "build_args: belongs to type docker"),
        ({"run_params": {"init": True}}, "run_params: belongs to type docker"),
        ({"work_dir": "/w"}, "work_dir: belongs to type docker"),
        ({"clean_image": True}, "clean_image: belongs to type docker"),
        ({"type": "docker", "image": "x", "options": {"a": 1}}, "options: belongs to type azureml"),
        ({"type": "docker", "image": "x", "prepend_to_path": ["/x"]}, "prepend_to_path: belongs to type python"),
        ({"type": "python"}, "type python needs an interpreter or the folder of an environment"),
        ({"type": "docker"}, "type docker needs an image, or a dockerfile"),
        ({"type": "docker", "image": "x", "build_args": {"A": "1"}}, "build_args: there is no dockerfile"),
        ({"type": "docker", "image": "x", "clean_image": True}, "clean_image: there is no dockerfile"),
        ({"type": "docker", "image": "x", "work_dir": "w"}, "work_dir: must be an absolute path"),
        ({"type": "docker", "image": "x", "run_params": {"command": "sh"}}, "run_params.command: is set by phinetune"),
        ({"type": "docker", "image": "x", "run_params": {"environment": {}}}, "run_params.environment: use environment of the system"),
        ({"type": "docker", "image": "x", "run_params": {"volumes": "/a:/b"}}, "run_params.volumes: must be a list or a mapping"),
        ({"type": "python", "python": "p", "environment": {"A=B": "1"}}, "environment: 'A=B' cannot be the name of a variable"),
        ({"type": "python", "python": "p", "environment": {"A": 1}}, "s.environment.A: input should be a valid string"),
        ({"type": "python", "python": "p", "prepend_to_path": "/x"}, "s.prepend_to_path: input should be a valid list"),
        ({"type": "python", "python": 3}, "s.python: input should be a valid string"),
        ({"type": "docker", "image": "x", "clean_image": "perhaps"}, "s.clean_image: input should be a valid boolean"),
        ({"accelerator": {"devise": "cpu"}}, 's.accelerator.devise: unknown key, did you mean "device"?'),
        ({"accelerator": {"memory": "much"}}, "s.accelerator: memory: must be bytes"),
        ({"imagee": "x"}, 's.imagee: unknown key, did you mean "image"?'),
    ],
)  # fmt: skip
def test_what_a_system_cannot_be(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(SystemConfig, values, "s")
    assert problem in str(error.value)


def test_every_problem_of_a_system_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"image: belongs.*; work_dir: belongs"):
        SystemConfig(image="x", work_dir="/w")
    with pytest.raises(ValueError, match="type: must be one of"):
        SystemConfig("cloud")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: must be one of"):
        AcceleratorConfig("tpu")  # type: ignore[arg-type]


def test_good_systems_are_read() -> None:
    values = {
        "type": "docker",
        "image": "x",
        "accelerator": {"device": "gpu", "execution_provider": "CUDAExecutionProvider"},
    }
    system = parse(SystemConfig, values)
    assert system.accelerator == AcceleratorConfig("gpu", "CUDAExecutionProvider") and system.image == "x"
    assert parse(SystemConfig, {}) == SystemConfig() and SystemConfig().accelerator.device == "cpu"
    assert parse(SystemConfig, {"type": "azureml", "options": {"workspace": {"name": "w"}}}).options == {
        "workspace": {"name": "w"}
    }


def test_the_builders_names_of_the_providers() -> None:
    named = {name: builder for name, (_, builder) in PROVIDERS.items() if builder}
    assert all(builder_provider(name) == builder for name, builder in named.items())
    assert named["DmlExecutionProvider"] == "dml" and named["NvTensorRTRTXExecutionProvider"] == "NvTensorRtRtx"
    with pytest.raises(ConfigError, match="QNNExecutionProvider: the ONNX builder has no models for it"):
        builder_provider("QNNExecutionProvider")
    with pytest.raises(ConfigError, match='did you mean "CUDAExecutionProvider"'):
        builder_provider("CudaExecutionProvider")


# what speaks against a system


def machine(**changes: Any) -> Machine:
    nothing = Machine("Linux", "a processor", 1, (), None, None, (), (), {}, {}, {}, ())
    return dataclasses.replace(nothing, **changes)


def test_a_target_that_is_not_here_can_be_built_for_but_not_run() -> None:
    cuda = AcceleratorConfig("gpu", "CUDAExecutionProvider")
    here = machine(providers=("CPUExecutionProvider",))
    assert target_problems(cuda, here, runs_here=False) == []
    assert target_problems(cuda, here) == [
        "execution_provider: CUDAExecutionProvider is not available on this machine (here are CPUExecutionProvider)"
    ]
    assert target_problems(cuda, machine(providers=("CUDAExecutionProvider",))) == []
    assert "ONNX Runtime has none here" in target_problems(cuda, machine())[0]
    assert target_problems(AcceleratorConfig("gpu", "CPUExecutionProvider"), here) == []
    assert "no GPU" in target_problems(AcceleratorConfig("gpu"), here)[0]
    gpu = machine_module.Accelerator("cuda:0", "a GPU", 1)
    assert target_problems(AcceleratorConfig("gpu"), machine(accelerators=(gpu,))) == []
    assert "no NPU" in target_problems(AcceleratorConfig("npu"), here)[0]
    assert target_problems(AcceleratorConfig(), here) == target_problems(AcceleratorConfig("any"), here) == []


def test_a_python_system_is_asked_before_work_starts(elsewhere: SystemConfig, tmp_path: Path) -> None:
    assert system_problems(elsewhere) == system_problems(SystemConfig()) == []

    def problem(python: Path | str, **more: Any) -> str:
        found = system_problems(SystemConfig("python", python=str(python), **more))
        assert len(found) == 1 and "\n" not in found[0]
        return found[0]

    assert "no such interpreter" in problem(tmp_path / "missing")
    assert "no Python environment" in problem(tmp_path)
    (tmp_path / "text").write_text("")
    assert "is not a program that can be run" in problem(tmp_path / "text")
    without = problem(script(tmp_path / "bare", f'exec {sys.executable} -S -E "$@"'))
    assert "cannot import phinetune (ModuleNotFoundError: No module named 'phinetune'); install it there: " in without
    old = problem(script(tmp_path / "old", "echo noise; echo phinetune=0.0.1"))
    assert f"has phinetune 0.0.1, this is {phinetune.__version__}; install it there" in old
    assert "exit status 9" in problem(script(tmp_path / "odd", "exit 9"))
    (tmp_path / "no-shebang").write_bytes(b"\x7fELF")
    (tmp_path / "no-shebang").chmod(0o755)
    assert "cannot be run" in problem(tmp_path / "no-shebang")
    assert "prepend_to_path: /nowhere: no such folder" in problem(
        elsewhere.python or "", prepend_to_path=["/nowhere"], environment=elsewhere.environment
    )
    assert system_problems(SystemConfig("azureml")) == ["azureml is not supported yet; use a local system"]


def test_an_interpreter_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.systems.config._ASK_SECONDS", 0.2)
    slow = script(tmp_path / "slow", "exec sleep 20")
    assert "did not answer" in system_problems(SystemConfig("python", python=str(slow)))[0]


def test_interpreters_are_found_by_file_folder_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = script(tmp_path / "env" / "bin" / "python", "exit 0")
    for place in (python, python.parent, python.parents[1]):
        assert python_of(SystemConfig("python", python=str(place))) == python
    assert python_of(SystemConfig("python", prepend_to_path=[str(python.parent)])) == python
    monkeypatch.setenv("PATH", str(python.parent))
    assert python_of(SystemConfig("python", python="python")) == python
    monkeypatch.setenv("PYTHONHOME", "/wrong")
    system = SystemConfig("python", python=str(python), prepend_to_path=["/first"], environment={"A": "b"})
    found = environment_of(system, python)
    assert found["PATH"].split(os.pathsep) == ["/first", str(python.parent), str(python.parent)]
    assert found["A"] == "b" and "PYTHONHOME" not in found


# over the border


def test_variables_path_events_and_result_cross_the_border(elsewhere: SystemConfig, tmp_path: Path) -> None:
    system = dataclasses.replace(
        elsewhere, environment={**elsewhere.environment, "A_VARIABLE": "a value", "BEFORE": "1"}, prepend_to_path=[str(tmp_path)]
    )  # fmt: skip
    heard: list[Event] = []
    log = tmp_path / "logs" / "run.log"
    result = run(system, {"what": "report", "place": tmp_path, "n": [1, None, 0.5]}, log, heard.append)
    assert heard == [Note("here", True), Progress("working", 1, 2, {"loss": 0.5}), Progress("counting", 3)]
    assert result["job"] == {"what": "report", "place": str(tmp_path), "n": [1, None, 0.5]}
    assert result["variables"]["A_VARIABLE"] == "a value" and result["variables"]["THROUGH"] == "wrapper"
    assert result["path"][:2] == [str(tmp_path), str(tmp_path / "env" / "bin")]
    text = log.read_text()
    for line in ("noise before the border", "printed by Python", "written by a library", "printed by a child"):
        assert f"{line}\n" in text
    assert "\x1e{broken\n" in text and "half a line" in text  # a mark alone makes no event; pipes are read in any order
    assert "A_VARIABLE" in text and "a value" not in text and '"stage"' not in text


def test_a_local_system_is_this_interpreter(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", variables["PYTHONPATH"])
    assert run(SystemConfig(), {"what": "report"}, tmp_path / "log")["python"] == sys.executable
    with pytest.raises(ConfigError, match="not supported yet"):
        run(SystemConfig("azureml"), {}, tmp_path / "log")


def test_the_log_grows_and_events_arrive_while_the_module_runs(elsewhere: SystemConfig, tmp_path: Path) -> None:
    log, signal_file, seen = tmp_path / "log", tmp_path / "go", []

    def on_event(event: Event) -> None:
        seen.append(until(lambda: "first line\nhalf a line" in log.read_text()))
        signal_file.write_text("")

    log.write_text("of an earlier run\n")
    assert run(elsewhere, {"what": "stream", "file": signal_file}, log, on_event) == {}
    assert seen == [True] and log.read_text().startswith("of an earlier run\n# ")


def test_errors_cross_the_border_with_problems_and_hint(elsewhere: SystemConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        run(elsewhere, {"what": "data error"}, tmp_path / "log")
    assert error.value.problems == ["rows.jsonl:3: empty", "rows.jsonl:9: not JSON, ä€"]
    assert error.value.hint == "mend the rows" and "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("what", "reason", "logged"),
    [
        ("bug", "KeyError: 'column'", 'raise KeyError("column") from'),
        ("exit", "ended with exit status 3", "# job"),
        ("fall", "ended with signal SIGSEGV", "# job"),
        ("full", "ended with signal SIGKILL (often: the memory was full)", "# job"),
        ("quit", "SystemExit: no more", "SystemExit: no more"),
        ("nothing", "TypeError: a result must be a dictionary, found object", "Traceback"),
        ("set", "TypeError: set cannot be handed to another process: {1}", "Traceback"),
        ("unknown", "TypeError: a result must be a dictionary, found NoneType", "Traceback"),
    ],
)
def test_a_bug_or_a_death_is_one_line_that_names_the_log(
    elsewhere: SystemConfig, tmp_path: Path, what: str, reason: str, logged: str
) -> None:
    log = tmp_path / "log"
    with pytest.raises(SystemRunError) as error:
        run(elsewhere, {"what": what}, log)
    (line,) = error.value.problems
    assert reason in line and line.endswith(f"(log: {log})") and "\n" not in line
    assert logged in log.read_text()


def test_a_death_behind_a_shell_and_a_module_that_is_not_there(elsewhere: SystemConfig, tmp_path: Path) -> None:
    behind = script(tmp_path / "behind", f'{sys.executable} "$@"\nexit $?')
    system = dataclasses.replace(elsewhere, python=str(behind))
    with pytest.raises(SystemRunError, match="exit status 139, SIGSEGV"):
        run(system, {"what": "fall"}, tmp_path / "log")
    with pytest.raises(SystemRunError, match=r"exit status 1: .*No module named absent"):
        run_module(system, "absent", {}, [], tmp_path / "log")
    silent = script(tmp_path / "silent", "exit 0")
    with pytest.raises(SystemRunError, match="ended without handing over a result"):
        run(SystemConfig("python", python=str(silent)), {}, tmp_path / "log")
    (tmp_path / "broken").write_bytes(b"\x7fELF")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(SystemRunError, match="broken: cannot be started"):
        run(SystemConfig("python", python=str(tmp_path / "broken")), {}, tmp_path / "log")


def test_a_result_is_not_lost_to_a_crash_after_it(elsewhere: SystemConfig, tmp_path: Path) -> None:
    heard: list[Event] = []
    assert run(elsewhere, {"what": "late"}, tmp_path / "log", heard.append) == {"done": True}
    assert [type(e) for e in heard] == [Note] and "exit status 7 after it had handed over its result" in heard[0].text  # type: ignore[union-attr]


def test_a_job_of_another_version_or_no_job_is_refused_over_there(
    elsewhere: SystemConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.systems.running.__version__", "9.9")
    with pytest.raises(ConfigError, match=r"the job comes from phinetune 9\.9"):
        run(elsewhere, {"what": "report"}, tmp_path / "log")
    (tmp_path / "text").write_text("[1]")
    for args in ([], [str(tmp_path / "absent")], [str(tmp_path / "text")]):
        done = subprocess.run(
            [sys.executable, "-m", "elsewhere", *args], capture_output=True, text=True, env={**os.environ, **elsewhere.environment}
        )  # fmt: skip
        found = read_event(done.stdout)
        assert done.returncode == 2 and isinstance(found, Outcome) and isinstance(found.error, ConfigError)


def test_what_json_does_not_have_cannot_be_a_job(elsewhere: SystemConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set cannot be handed to another process"):
        run(elsewhere, {"what": {1, 2}}, tmp_path / "log")


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_no_process(
    elsewhere: SystemConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: type[BaseException],
    stubborn: bool,
) -> None:
    monkeypatch.setattr(process, "_GRACE", 0.5 if stubborn else 10.0)
    pids = tmp_path / "pids"

    def on_event(event: Event) -> None:
        raise reason

    with pytest.raises(reason):
        run(elsewhere, {"what": "sleep", "pids": pids, "stubborn": stubborn}, tmp_path / "log", on_event)
    assert not any(is_running(int(pid)) for pid in pids.read_text().split())
    assert Path(f"{pids}.cleared").exists() == (not stubborn)  # asked first, it leaves things in order


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_when_this_side_ends_the_other_side_does(
    elsewhere: SystemConfig, tmp_path: Path, number: signal.Signals
) -> None:
    pids = tmp_path / "pids"
    code = (
        "from pathlib import Path; from phinetune.systems.config import SystemConfig\n"
        "from phinetune.systems.running import run_module\n"
        f"system = SystemConfig('python', python={elsewhere.python!r}, environment={elsewhere.environment!r})\n"
        f"run_module(system, 'elsewhere', {{'what': 'sleep', 'pids': {str(pids)!r}}}, [], Path({str(tmp_path / 'log')!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        assert until(pids.exists)
        parent.send_signal(number)
        assert parent.wait(20) != 0
        module, child = map(int, pids.read_text().split())
        assert until(lambda: not is_running(module)) and until(lambda: Path(f"{pids}.cleared").exists())
        assert until(lambda: not is_running(child))
    finally:
        parent.kill()
        parent.wait()


def test_secrets_are_not_in_the_log(elsewhere: SystemConfig, tmp_path: Path) -> None:
    variable, token = "hf_of-the-environment", "hf_of-the-job-12345"
    system = dataclasses.replace(elsewhere, environment={**elsewhere.environment, "HF_TOKEN": variable})
    log = tmp_path / "log"
    with pytest.raises(SystemRunError, match=r"RuntimeError: refused: \*\*\*") as error:
        run(system, {"what": "secrets", "model_kwargs": {"token": token, "tokenizer": "slow"}}, log)
    text = log.read_text()
    assert variable not in text + str(error.value) and token not in text and "HF_TOKEN" in text
    assert "the token is ***, the variable is ***" in text and '{"token": "***", "tokenizer": "slow"}' in text


def test_what_is_a_secret() -> None:
    yes = ("token", "hf_token", "HF_TOKEN", "apiKey", "AZURE_STORAGE_KEY", "db-password", "key", "client_secret")
    no = ("tokenizer", "max_new_tokens", "num_key_value_heads", "monkey", "PWD", "passes")
    assert all(map(is_secret, yes)) and not any(map(is_secret, no))
    job = {"a": [{"api_key": "0123456789", "x": 1}], "keys": {"key": ["abcdefgh", "short"]}, "token": True, "key": 12}
    assert secrets_in(job) == ["0123456789", "abcdefgh"]
    assert without_secrets(job) == {
        "a": [{"api_key": "***", "x": 1}], "keys": {"key": ["***", "***"]}, "token": True, "key": "***",
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_secret_is_struck_out_however_it_is_cut(tmp_path: Path, size: int) -> None:
    data = b"abcabcabd abcabc abcabcabcabd abc"
    with LogFile(tmp_path / "log", ["abcabcabd", "abd-and-more"]) as log:
        log.copy(data[i : i + size] for i in range(0, len(data), size))
    assert (tmp_path / "log").read_bytes() == b"*** abcabc abc*** abc"


def test_a_full_disk_under_the_log_does_not_stop_the_work(
    elsewhere: SystemConfig, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("64k")
    (disk / "filler").write_bytes(bytes(40_000))
    heard: list[Event] = []
    result = run(elsewhere, {"what": "talk", "size": 400_000}, disk / "log", heard.append)
    assert result == {"talked": True} and "the log is not complete: No space left on device" in heard[-1].text  # type: ignore[union-attr]


def test_a_log_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((OutputError, NotADirectoryError, FileExistsError)):
        LogFile(tmp_path / "file" / "log")


# the wire


EVENTS = [
    Note("plain"), Note("ä\n\x1e€ \ud800", True), Progress("s", 0), Progress("s", 1, 2, {"loss": 1.5, "n": 3.0}), Progress("s", 1, 2, {"loss": float("inf")}),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=repr)
def test_events_survive_the_wire(event: Event) -> None:
    stream = io.StringIO()
    write_event(stream, event)
    text = stream.getvalue()
    assert text.isascii() and text.count("\n") == 1 and read_event(text) == event


@pytest.mark.parametrize(
    "name", [n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, PhinetuneError)]
)
def test_every_error_of_the_tree_survives_the_wire(name: str) -> None:
    stream = io.StringIO()
    write_outcome(stream, Outcome(error=getattr(errors, name)(["one", "two"], "hint")))
    found = read_event(stream.getvalue())
    assert isinstance(found, Outcome) and type(found.error) is getattr(errors, name)
    assert found.error.problems == ["one", "two"] and found.error.hint == "hint"


def test_an_error_of_somebody_elses_comes_as_its_nearest_kin() -> None:
    class OwnError(DataError):
        """Of a plug-in."""

    stream = io.StringIO()
    write_outcome(stream, Outcome(error=OwnError("x")))
    found = read_event(stream.getvalue())
    assert isinstance(found, Outcome) and type(found.error) is DataError


@pytest.mark.parametrize(
    "line",
    ["", "text", "{}", '{"note": "x", "warning": false}', "\x1e", "\x1e[]", "\x1e3", "\x1e{}", '\x1e{"note": "x"}',
     '\x1e{"stage": "s", "done": "many", "total": null, "figures": {}}', '\x1e{"result": 3}', '\x1e{"error": "X"}'],
)  # fmt: skip
def test_what_is_no_event_is_noise(line: str) -> None:
    assert read_event(line) is None


def test_only_errors_of_the_tree_are_rebuilt() -> None:
    found = read_event('\x1e{"error": "did_you_mean", "problems": ["x"], "hint": ""}')
    assert isinstance(found, Outcome) and type(found.error) is PhinetuneError


# containers


class FakeEngine:
    """The part of the Docker SDK (docker-py 7) that is used here; a container is a process of this machine."""

    CREATE = (
        "command",
        "entrypoint",
        "environment",
        "user",
        "working_dir",
        "volumes",
        "device_requests",
        "shm_size",
        "init",
    )

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.known = {"here:1"}
        self.rootless = False
        self.build_error = ""
        self.down = ""
        self.images = types.SimpleNamespace(get=self.get, pull=self.pull, build=self.build, remove=self.remove_image)
        self.containers = types.SimpleNamespace(create=self.create)
        self.errors = types.ModuleType("docker.errors")
        self.errors.DockerException = type("DockerException", (Exception,), {})  # type: ignore[attr-defined]
        self.errors.APIError = type("APIError", (self.errors.DockerException,), {})  # type: ignore[attr-defined]
        self.errors.ImageNotFound = type("ImageNotFound", (self.errors.APIError,), {})  # type: ignore[attr-defined]
        self.errors.BuildError = type("BuildError", (self.errors.DockerException,), {})  # type: ignore[attr-defined]
        self.module = types.ModuleType("docker")
        self.module.errors = self.errors  # type: ignore[attr-defined]
        self.module.from_env = lambda: self  # type: ignore[attr-defined]

    def ping(self) -> bool:
        if self.down:
            raise self.errors.DockerException(self.down)
        return True

    def info(self) -> dict[str, Any]:
        return {"SecurityOptions": ["name=seccomp", *(["name=rootless"] if self.rootless else [])]}

    def close(self) -> None:
        self.calls.append(("close", None))

    def get(self, name: str) -> Any:
        if name not in self.known:
            raise self.errors.ImageNotFound(f"404 Client Error: No such image: {name}")
        return types.SimpleNamespace(id=name)

    def pull(self, repository: str) -> Any:
        self.calls.append(("pull", repository))
        if "nowhere" in repository:
            raise self.errors.APIError("500 Server Error:\npull access denied")
        return types.SimpleNamespace(id=repository)

    def build(self, *, path: str, dockerfile: str, tag: str | None, buildargs: dict[str, str], rm: bool) -> Any:
        self.calls.append(("build", {"path": path, "dockerfile": dockerfile, "tag": tag, "buildargs": buildargs}))
        lines = [{"stream": "Step 1/1 : FROM here:1\n"}, {"aux": {"ID": "sha256:1"}}]
        if self.build_error:
            error = self.errors.BuildError(self.build_error)
            error.build_log = iter([*lines, {"error": self.build_error}])
            raise error
        return types.SimpleNamespace(id="sha256:1"), iter(lines)

    def remove_image(self, image: str, force: bool = False) -> None:
        self.calls.append(("remove image", image))

    def create(self, image: str, command: list[str] | None = None, **kwargs: Any) -> Any:
        unknown = {"command", *kwargs} - set(self.CREATE)
        if unknown:
            raise TypeError(f"run() got an unexpected keyword argument '{min(unknown)}'")
        self.calls.append(("create", {"image": image, "command": command, **kwargs}))
        return FakeContainer(self, kwargs, command or [])

    def made(self, what: str) -> Any:
        return next(value for name, value in self.calls if name == what)


class FakeContainer:
    id = "0123456789abcdef"

    def __init__(self, engine: FakeEngine, kwargs: dict[str, Any], command: list[str]) -> None:
        self.engine, self.kwargs, self.command = engine, kwargs, command
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            env={"PATH": os.environ["PATH"], **self.kwargs["environment"]},
            cwd=self.kwargs["working_dir"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def logs(
        self, *, stdout: bool = True, stderr: bool = True, stream: bool = False, follow: bool = False
    ) -> Iterator[bytes]:
        assert self.process is not None and stream and follow and stdout != stderr
        source = self.process.stdout if stdout else self.process.stderr
        assert source is not None
        while chunk := os.read(source.fileno(), 100):
            yield chunk

    def wait(self) -> dict[str, Any]:
        assert self.process is not None
        code = self.process.wait()
        return {"Error": None, "StatusCode": 128 - code if code < 0 else code}

    def stop(self, timeout: int = 10) -> None:
        assert self.process is not None
        self.engine.calls.append(("stop", timeout))
        self.process.terminate()
        self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a container dies with its first process

    def remove(self, *, force: bool = False, v: bool = False) -> None:
        self.engine.calls.append(("remove", force))
        if self.process is not None and self.process.poll() is None:
            self.process.kill()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setitem(sys.modules, "docker", fake.module)
    monkeypatch.setitem(sys.modules, "docker.errors", fake.errors)
    return fake


def test_a_module_runs_in_a_container(engine: FakeEngine, variables: dict[str, str], tmp_path: Path) -> None:
    params = {"shm_size": "1g", "volumes": ["/data:/data:ro"]}
    system = SystemConfig(
        "docker", image="here:1", environment={**variables, "API_KEY": "secret-of-mine"}, run_params=params
    )
    heard: list[Event] = []
    result = run(system, {"what": "report"}, tmp_path / "log", heard.append)
    made = engine.made("create")
    job_file = made["command"][-1]
    assert made["image"] == "here:1" and made["entrypoint"] == ["python"] and made["command"][:2] == ["-m", "elsewhere"]
    folders = [str(tmp_path), str(Path(job_file).parent)]
    assert made["volumes"] == ["/data:/data:ro", *(f"{f}:{f}:rw" for f in folders)] and made["shm_size"] == "1g"
    assert made["user"] == f"{os.getuid()}:{os.getgid()}" and result["folder"] == str(Path(job_file).parent)
    assert result["variables"]["API_KEY"] == "secret-of-mine" and result["variables"]["HF_HUB_OFFLINE"] == "1"
    assert heard[0] == Note("here", True) and "secret-of-mine" not in (tmp_path / "log").read_text()
    assert [name for name, _ in engine.calls] == ["create", "remove", "close"] and not Path(job_file).exists()


def test_mounts_as_a_mapping_and_a_rootless_engine(
    engine: FakeEngine, variables: dict[str, str], tmp_path: Path
) -> None:
    engine.rootless = True
    params = {"volumes": {"/data": {"bind": "/data", "mode": "ro"}}}
    run(
        SystemConfig("docker", image="here:1", environment=variables, run_params=params, work_dir="/"),
        {"what": "report"},
        tmp_path / "log",
    )
    made = engine.made("create")
    assert made["volumes"]["/data"]["mode"] == "ro" and made["volumes"][str(tmp_path)] == {
        "bind": str(tmp_path),
        "mode": "rw",
    }
    assert "user" not in made and made["working_dir"] == "/" and "HOME" not in made["environment"]


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_asked_for_where_there_is_one(
    engine: FakeEngine, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(container, "_has_gpu", lambda: gpu)
    heard: list[Event] = []
    system = SystemConfig("docker", AcceleratorConfig("gpu"), image="here:1", environment=variables)
    run(system, {"what": "report"}, tmp_path / "log", heard.append)
    asked = engine.made("create").get("device_requests")
    assert asked == ([{"count": -1, "capabilities": [["gpu"]]}] if gpu else None)
    assert any(isinstance(e, Note) and "the container gets none" in e.text for e in heard) == (not gpu)


@pytest.mark.parametrize("clean", [True, False])
def test_images_are_built_and_removed(
    engine: FakeEngine, variables: dict[str, str], tmp_path: Path, clean: bool
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM here:1\n")
    system = SystemConfig(
        "docker", image="mine:1", build_context=str(tmp_path), build_args={"A": "1"}, clean_image=clean, environment=variables
    )  # fmt: skip
    assert system_problems(system) == []
    run(system, {"what": "report"}, tmp_path / "log")
    assert engine.made("build") == {
        "path": str(tmp_path), "dockerfile": str(tmp_path / "Dockerfile"), "tag": "mine:1", "buildargs": {"A": "1"},
    }  # fmt: skip
    assert engine.made("create")["image"] == "sha256:1" and "Step 1/1" in (tmp_path / "log").read_text()
    names = [name for name, _ in engine.calls]
    assert names[-2:] == (["remove image", "close"] if clean else ["remove", "close"])
    engine.build_error = "The command '/bin/sh -c pip install x'\nreturned a non-zero code: 1"
    with pytest.raises(SystemRunError, match=r"Dockerfile: The command .* returned a non-zero code: 1 \(log: "):
        run(system, {"what": "report"}, tmp_path / "log")
    assert "returned a non-zero code: 1" in (tmp_path / "log").read_text() and engine.calls[-1][0] == "close"


def test_missing_images_are_fetched_and_said(engine: FakeEngine, variables: dict[str, str], tmp_path: Path) -> None:
    heard: list[Event] = []
    run(
        SystemConfig("docker", image="far:1", environment=variables), {"what": "report"}, tmp_path / "log", heard.append
    )
    assert engine.made("pull") == "far:1" and heard[0] == Note("docker: fetching image far:1")
    with pytest.raises(SystemRunError, match="docker: 500 Server Error: pull access denied"):
        run(SystemConfig("docker", image="nowhere:1"), {}, tmp_path / "log")


def test_errors_and_deaths_in_a_container(engine: FakeEngine, variables: dict[str, str], tmp_path: Path) -> None:
    system = SystemConfig("docker", image="here:1", environment=variables)
    with pytest.raises(DataError, match="jsonl:3: empty"):
        run(system, {"what": "data error"}, tmp_path / "log")
    with pytest.raises(SystemRunError, match=r"elsewhere on docker image here:1: ended with exit status 137, SIGKILL"):
        run(system, {"what": "full"}, tmp_path / "log")
    with pytest.raises(SystemRunError, match="KeyError: 'column'"):
        run(system, {"what": "bug"}, tmp_path / "log")
    with pytest.raises(SystemRunError, match="no such folder, so no container can see it"):
        run_module(system, "elsewhere", {}, [tmp_path / "absent"], tmp_path / "log")
    with pytest.raises(ConfigError, match=r"run_params: run\(\) got an unexpected keyword argument 'shm'"):
        run(dataclasses.replace(system, run_params={"shm": 1}), {}, tmp_path / "log")
    assert engine.calls[-1][0] == "close"


def test_an_interrupt_stops_and_removes_the_container(
    engine: FakeEngine, variables: dict[str, str], tmp_path: Path
) -> None:
    pids = tmp_path / "pids"

    def on_event(event: Event) -> None:
        raise KeyboardInterrupt

    system = SystemConfig("docker", image="here:1", environment=variables)
    with pytest.raises(KeyboardInterrupt):
        run(system, {"what": "sleep", "pids": pids}, tmp_path / "log", on_event)
    assert [name for name, _ in engine.calls] == ["create", "stop", "remove", "close"]
    assert not any(is_running(int(pid)) for pid in pids.read_text().split()) and Path(f"{pids}.cleared").exists()


def test_what_cannot_be_removed_is_said(
    engine: FakeEngine, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeContainer, *, force: bool, v: bool) -> None:
        raise engine.errors.APIError("409 Client Error: removal is in progress")

    monkeypatch.setattr(FakeContainer, "remove", refuse)
    heard: list[Event] = []
    run(
        SystemConfig("docker", image="here:1", environment=variables),
        {"what": "report"},
        tmp_path / "log",
        heard.append,
    )
    text = "container 0123456789ab is left behind: 409 Client Error: removal is in progress"
    assert heard[-1] == Note(f"docker: {text}", warning=True) and text in (tmp_path / "log").read_text()


def test_a_docker_system_is_asked_before_work_starts(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system_problems(SystemConfig("docker", image="here:1")) == []
    engine.down = "Error while fetching server API version:\n[Errno 2] No such file or directory"
    assert system_problems(SystemConfig("docker", image="here:1")) == [
        "docker: no engine answers: Error while fetching server API version: [Errno 2] No such file or directory; "
        "start Docker, or set DOCKER_HOST to where its engine listens"
    ]
    found = system_problems(SystemConfig("docker", dockerfile=str(tmp_path / "Dockerfile")))
    assert found[0] == f"dockerfile: {tmp_path / 'Dockerfile'}: no such file" and len(found) == 2
    found = system_problems(SystemConfig("docker", build_context=str(tmp_path / "absent")))
    assert found[0] == f"build_context: {tmp_path / 'absent'}: no such folder"
    monkeypatch.setitem(sys.modules, "docker", None)
    assert system_problems(SystemConfig("docker", image="x")) == [
        "docker: the Docker SDK for Python is not installed; pip install 'phinetune[docker]'"
    ]
    with pytest.raises(MissingPackageError):
        run(SystemConfig("docker", image="x"), {}, tmp_path / "log")


def test_the_real_sdk_takes_what_the_fake_takes(tmp_path: Path) -> None:
    docker = pytest.importorskip("docker")
    import inspect

    from docker.models.containers import _create_container_args

    system = SystemConfig(
        "docker", image="x", run_params={"device_requests": [{"count": -1, "capabilities": [["gpu"]]}]}
    )
    arguments = container._arguments(FakeEngine(), system, "m", tmp_path / "job.json", [tmp_path], print)  # type: ignore[arg-type]
    made = _create_container_args({"image": "x", "version": "1.45", **arguments})
    assert made["command"] == ["-m", "m", str(tmp_path / "job.json")] and made["host_config"]["Binds"] == [
        f"{tmp_path}:{tmp_path}:rw"
    ]
    assert made["entrypoint"] == ["python"] and made["environment"]["PYTHONUNBUFFERED"] == "1"
    api = docker.APIClient
    for method, names in ((api.logs, ("stdout", "stderr", "stream", "follow")), (api.stop, ("timeout",)),
                          (api.remove_container, ("v", "force")), (api.remove_image, ("force",)),
                          (api.build, ("path", "dockerfile", "tag", "buildargs", "rm"))):  # fmt: skip
        assert set(names) <= set(inspect.signature(method).parameters), method
    fake = FakeEngine().errors
    assert all(
        issubclass(getattr(docker.errors, n), docker.errors.DockerException) for n in vars(fake) if n[0].isupper()
    )


def test_the_real_sdk_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(SystemRunError, match="docker: no engine answers"):
        container.docker_client()


# the machine


def test_the_page_on_systems_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "systems.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    system = parse(SystemConfig, read_yaml(written, "systems.md"))
    assert system.type == "python" and system.accelerator.memory_bytes == 16 * 10**9
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "systems.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[] ")


def test_this_machine_is_described(tmp_path: Path) -> None:
    here = this_machine(tmp_path / "not" / "yet")
    assert here.cores >= 1 and here.processor and here.free_disk[str(tmp_path / "not" / "yet")] > 0
    assert here.memory is None or here.available_memory is None or 0 < here.available_memory <= here.memory
    assert here.versions["torch"] and json.dumps(dataclasses.asdict(here))
    assert here.versions["phinetune"] == phinetune.__version__ and isinstance(hash(here.processor), int)


def test_the_speedup_is_shown_but_never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from phinetune.model import compute

    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    measured = iter([3.25])
    monkeypatch.setattr(compute, "_measure", lambda device: next(measured))
    assert this_machine().bfloat16_speedup == {}
    assert compute.bfloat16_speedup(torch.device("cpu")) == 3.25
    assert this_machine().bfloat16_speedup == {"cpu": 3.25} and compute.bfloat16_speedup(torch.device("cpu")) == 3.25
    (tmp_path / "machine.json").write_text("[]")
    assert this_machine().bfloat16_speedup == {}


def test_what_is_missing_is_said_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = machine_module.importlib.util.find_spec
    monkeypatch.setattr(machine_module.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find(n))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setitem(sys.modules, "torch", None)
    here = this_machine(tmp_path)
    assert "onnxruntime is not installed: pip install 'phinetune[onnx]'" in here.missing and here.providers == ()
    assert any(line.startswith("torch cannot be imported") for line in here.missing) and here.accelerators == ()
    assert any(line.startswith("the cache folder cannot be used") for line in here.missing)
    assert list(here.free_disk) == [str(tmp_path)]


def test_cuda_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    first, second = this_machine().accelerators
    assert first == machine_module.Accelerator("cuda:0", "NVIDIA H100 80GB HBM3", 85_000_000_000)
    assert second.device == "cuda:1"


def test_a_broken_onnxruntime_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    here = this_machine()
    assert any(line.startswith("onnxruntime is installed but broken") for line in here.missing) and not here.providers


def test_instruction_sets_in_our_words() -> None:
    assert instruction_sets("fpu sse avx avx2 f16c avx512f amx_bf16 avx512_bf16 amx_tile") == (
        "avx2", "f16c", "avx512f", "avx512_bf16", "amx", "amx_bf16",
    )  # fmt: skip
    assert instruction_sets("fp asimd aes asimdhp asimddp i8mm bf16") == (
        "neon",
        "neon_fp16",
        "neon_dotprod",
        "bf16",
        "i8mm",
    )
    assert instruction_sets("") == instruction_sets("avx3 asimdx") == ()


def test_a_containers_memory_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = compute.memory_limit
    assert limit(tmp_path) == (None, 0)
    for name, text in (
        ("memory.max", "max\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 5\ninactive_file 200\n"),
    ):
        (tmp_path / name).write_text(text)
    assert limit(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("1000\n")
    assert limit(tmp_path) == (1000, 500)
    monkeypatch.setattr(compute, "memory_limit", lambda: (1000, 500))
    here = this_machine()
    assert here.memory == 1000 and here.available_memory is not None and here.available_memory <= 500


def test_info_prints_and_gives_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = machine_module.Accelerator("cuda:0", "A GPU [with brackets]", 24 * 10**9)
    shown = machine(
        accelerators=(gpu,), memory=10**10, bfloat16_speedup={"cpu": 4.5}, missing=("x: pip install 'y[z]'",)
    )
    monkeypatch.setattr(machine_module, "this_machine", lambda output: shown)
    assert command(["info"]) == 0
    text = capsys.readouterr().out
    for part in (
        "10.00 GB, not known available",
        "cuda:0: A GPU [with brackets], 24.00 GB",
        "4.5 times as fast",
        "missing: x: pip install 'y[z]'",
    ):
        assert part in text
    assert command(["info", "--json", "-o", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["accelerators"] == [dataclasses.asdict(gpu)]
