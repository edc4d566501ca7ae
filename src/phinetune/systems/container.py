"""A module in a Docker container, through the Docker SDK: image, mounts, user, streams, and nothing left behind.

The job's folder and the folders of the work are mounted under the paths that they have here, so that a job means the same inside and
outside. Not here: what the container says (running.py), and other engines than the one that the SDK finds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phinetune.errors import ConfigError, MissingPackageError, SystemRunError
from phinetune.events import Note, OnEvent
from phinetune.systems.config import SystemConfig
from phinetune.systems.log import LogFile
from phinetune.systems.process import Started

_GRACE = 10  # seconds between the request to end and the kill
_PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_VERBOSITY")


def docker_client() -> Any:
    """A `docker.DockerClient` whose engine has answered. Raises MissingPackageError without the SDK, SystemRunError without an engine."""
    try:
        import docker
    except ImportError:
        raise MissingPackageError(
            "docker: the Docker SDK for Python is not installed", "pip install 'phinetune[docker]'"
        ) from None
    try:
        client = docker.from_env()
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise SystemRunError(
            f"docker: no engine answers: {_line(error)}", "start Docker, or set DOCKER_HOST to where its engine listens"
        ) from None
    return client


def build_place(system: SystemConfig) -> tuple[Path, Path]:
    """(folder that a build sees, dockerfile) of a system whose image is built."""
    dockerfile = Path(system.dockerfile or "Dockerfile").expanduser()
    if system.build_context is None:
        return dockerfile.absolute().parent, dockerfile.absolute()
    context = Path(system.build_context).expanduser().absolute()
    return context, context / dockerfile


def start_container(
    system: SystemConfig, module: str, job_file: Path, folders: Sequence[Path], log: LogFile, on_event: OnEvent
) -> Started:
    """`python -m module job_file` in a container of the system's image; the image is built or fetched where needed.

    Raises ConfigError for run_params that the SDK does not take, SystemRunError for folders that are not there and for what the engine
    refuses.
    """
    absent = [str(f) for f in folders if not f.exists()]
    if absent:
        raise SystemRunError([f"{f}: no such folder, so no container can see it" for f in absent])
    client = docker_client()
    left: list[tuple[str, Any]] = [("the connection", client.close)]

    def close() -> None:
        while left:
            what, undo = left.pop()
            try:
                undo()
            except Exception as error:
                log.say(f"# {what} is left behind: {_line(error)}")
                with contextlib.suppress(Exception):  # the listener may be why this ends
                    on_event(Note(f"docker: {what} is left behind: {_line(error)}", warning=True))

    try:
        with _engine_errors():
            image = _image(client, system, log, on_event)
            if system.clean_image:
                left.append((f"image {image}", lambda: client.images.remove(image, force=True)))
            arguments = _arguments(client, system, module, job_file, folders, on_event)
            container = _create(client, image, arguments)
            left.append((f"container {container.id[:12]}", lambda: container.remove(force=True, v=True)))
            container.start()
    except BaseException:
        close()
        raise

    def stop() -> None:
        with contextlib.suppress(
            Exception
        ):  # gone already, or removed by force in `close`, which says what it cannot do
            container.stop(timeout=_GRACE)

    def wait() -> int:
        with _engine_errors():
            return int(container.wait()["StatusCode"])

    return Started(
        f"docker image {system.image or image}",
        _stream(container, stdout=True),
        _stream(container, stdout=False),
        wait,
        stop,
        close,
    )


def _image(client: Any, system: SystemConfig, log: LogFile, on_event: OnEvent) -> str:
    """Name or id of the system's image: built from its dockerfile, found, or fetched."""
    from docker.errors import BuildError, ImageNotFound

    if not (system.dockerfile or system.build_context):
        name = str(system.image)
        try:
            client.images.get(name)
        except ImageNotFound:
            on_event(Note(f"docker: fetching image {name}"))
            client.images.pull(name)
        return name
    context, dockerfile = build_place(system)
    on_event(Note(f"docker: building {system.image or 'an image'} from {dockerfile}"))
    lines: Any = ()
    try:
        image, lines = client.images.build(
            path=str(context), dockerfile=str(dockerfile), tag=system.image, buildargs=dict(system.build_args), rm=True
        )
    except BuildError as error:
        lines = error.build_log
        raise SystemRunError(
            f"docker: {dockerfile}: {_line(error)} (log: {log.file})", "the log holds the whole output of the build"
        ) from None
    finally:
        for entry in lines:
            log.add(str(entry.get("stream", entry.get("error", ""))).encode("utf-8", "replace"))
    return str(image.id)


def _arguments(
    client: Any, system: SystemConfig, module: str, job_file: Path, folders: Sequence[Path], on_event: OnEvent
) -> dict[str, Any]:
    """What `containers.create` gets: ours over the user's run_params, mounts of both."""
    seen = list(dict.fromkeys(str(p.absolute()) for p in (*folders, job_file.parent)))
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    arguments = dict(system.run_params)
    if "user" not in arguments and hasattr(os, "getuid") and not _is_rootless(client):
        arguments["user"] = (
            f"{os.getuid()}:{os.getgid()}"  # what it writes into the mounted folders belongs to the user
        )
        environment["HOME"] = str(job_file.parent)  # that user need not have a home there
    theirs = arguments.pop("volumes", {})
    if isinstance(theirs, list):
        arguments["volumes"] = [*theirs, *(f"{folder}:{folder}:rw" for folder in seen)]
    else:
        arguments["volumes"] = {**theirs, **{folder: {"bind": folder, "mode": "rw"} for folder in seen}}
    if system.accelerator.device == "gpu" and not {"device_requests", "runtime"} & set(arguments):
        if _has_gpu():
            arguments["device_requests"] = [{"count": -1, "capabilities": [["gpu"]]}]
        else:
            text = "docker: torch finds no GPU on this machine, so the container gets none"
            on_event(Note(f"{text}; run_params.device_requests gives it one", warning=True))
    return {
        **arguments,
        "entrypoint": ["python"],  # whatever the image's own is
        "command": ["-m", module, str(job_file)],
        "environment": {**environment, **system.environment},
        "working_dir": system.work_dir or str(job_file.parent),
    }


def _create(client: Any, image: str, arguments: dict[str, Any]) -> Any:
    try:
        return client.containers.create(image, **arguments)
    except TypeError as error:  # what the SDK raises for arguments that it does not have
        raise ConfigError(
            f"run_params: {_line(error)}", "the keys are those of the Docker SDK's containers.run"
        ) from error


def _is_rootless(client: Any) -> bool:
    """True if root in the container is the user outside, so that the user's own number would be somebody else."""
    return any("rootless" in str(option) for option in client.info().get("SecurityOptions") or ())


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _stream(container: Any, stdout: bool) -> Iterator[bytes]:
    """One of the container's two streams as it comes, from the start."""
    try:
        yield from container.logs(stdout=stdout, stderr=not stdout, stream=True, follow=True)
    except Exception as error:
        if stdout:
            raise SystemRunError(f"docker: the connection to the container is lost: {_line(error)}") from error
        yield f"# the rest is lost: {_line(error)}\n".encode("utf-8", "replace")


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """What the engine or the SDK refuses, as errors of the tree."""
    from docker.errors import DockerException

    try:
        yield
    except (DockerException, OSError) as error:
        raise SystemRunError(f"docker: {_line(error)}", "the engine's own log may say more") from error


def _line(error: BaseException) -> str:
    """What `error` says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
