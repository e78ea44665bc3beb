"""Runs a job on a deployment of its own: server and clients are processes on this machine.

It is provisioned as any deployment is, with certificates of its own, in a temporary folder, and its
server listens on a port of its own. So several can run at the same time. All its processes, and
those which they start, have a mark in their environment, by which they are ended, whichever of
them is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from nvflare_adapter.deployment import submit
from nvflare_adapter.job import NAME, Job

__all__ = ["Poc", "deployed", "run"]

_ADMINISTRATOR = "admin@poc.local"
_BUILDERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("workspace.WorkspaceBuilder", {}),
    ("static_file.StaticFileBuilder", {"config_folder": "config", "scheme": "grpc"}),
    ("cert.CertBuilder", {}),
    ("signature.SignatureBuilder", {}),
)
_MARK = "NVFLARE_ADAPTER_POC"
_PORTS = range(20_000, 32_000)  # below those that systems give to outgoing connections


@dataclass(frozen=True)
class Poc:
    """A deployment on this machine.

    Attributes:
        sites: The folder that has the startup kits of all.
        server: The server's process.
        mark: The value of the mark that its processes have in their environment.
    """

    sites: Path
    server: subprocess.Popen[bytes]
    mark: str

    @property
    def kit(self) -> Path:
        """The startup kit of its administrator."""
        return self.sites / _ADMINISTRATOR

    def watch(self, number: str) -> Path | None:
        """Where the server stores a job's models.

        Args:
            number: The number of the job, or empty.

        Returns:
            The folder; None without a number.

        Raises:
            SystemExit: The server has ended.
        """
        if self.server.poll() is not None:
            sys.exit(f"nvflare_adapter: the server ended with exit code {self.server.returncode}")
        return self.sites / "server" / number / "models" if number else None

    def processes(self) -> list[psutil.Process]:
        """All its processes.

        Returns:
            Those that run now.
        """
        return _marked(self.mark)


def run(job: Job) -> None:
    """Run a job.

    Args:
        job: The job.
    """
    with deployed([f"site-{number + 1}" for number in range(job.clients)]) as poc:
        submit(job, poc.kit, poc.watch)


@contextlib.contextmanager
def deployed(clients: Sequence[str]) -> Iterator[Poc]:
    """Start a deployment, and end it.

    Args:
        clients: The names of its clients.

    Yields:
        The deployment, whose server and clients may still be about to start.
    """
    with tempfile.TemporaryDirectory(prefix="fedavg-poc-", ignore_cleanup_errors=True) as folder:
        sites = _provision(Path(folder), clients)
        mark = uuid.uuid4().hex
        started: list[subprocess.Popen[bytes]] = []
        try:
            started.extend(_start(sites / name, mark) for name in ("server", *clients))
            yield Poc(sites, started[0], mark)
        finally:
            while left := _marked(mark):
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(left, timeout=5)
            for one in started:
                one.wait()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _provision(folder: Path, clients: Sequence[str]) -> Path:
    port = _free_port()
    server = {"fed_learn_port": port, "admin_port": port, "default_host": "localhost"}
    people = {"org": "poc", "role": "project_admin"}
    project = {
        "api_version": 3,
        "name": NAME,
        "description": "A deployment on one machine",
        "participants": [
            {"name": "server", "type": "server", "org": "poc", **server},
            *({"name": name, "type": "client", "org": "poc"} for name in clients),
            {"name": _ADMINISTRATOR, "type": "admin", **people},
        ],
        "builders": [
            {"path": f"nvflare.lighter.impl.{path}", "args": arguments}
            for path, arguments in _BUILDERS
        ],
    }
    path = folder / "project.yml"
    path.write_text(json.dumps(project))
    arguments = ["provision", "-p", str(path), "-w", str(folder)]
    command = [sys.executable, "-m", "nvflare.cli", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    sites = folder / NAME / "prod_00"
    for name in ("server", *clients):
        _configure(sites / name / "local", folder)
    return sites


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _configure(local: Path, storage: Path) -> None:
    """Let a site store where nobody else does, start jobs at once, and allow our components."""
    text = (local / "resources.json.default").read_text()
    resources = json.loads(text.replace("/tmp/nvflare", str(storage)))
    if "class_allow_list" in resources:
        resources["class_allow_list"].append("nvflare_adapter.")
    for component in resources["components"]:
        if component["id"] == "job_scheduler":
            component["args"]["min_schedule_interval"] = 1.0
    (local / "resources.json").write_text(json.dumps(resources))


def _start(site: Path, mark: str) -> subprocess.Popen[bytes]:
    role = "server" if site.name == "server" else "client"
    program = f"nvflare.private.fed.app.{role}.{role}_train"
    settings = ["secure_train=true", "org=poc", "config_folder=config", f"uid={site.name}"]
    arguments = ["-m", str(site), "-s", f"fed_{role}.json", "--set", *settings]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", program, *arguments],
        cwd=site,
        env={**os.environ, _MARK: mark},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
