# mypy: disable-error-code="misc"
"""Runs a job on a deployment of NVFlare: submits it as an administrator, and waits for its end.

The administrator is whoever the startup kit was made for. The models of the rounds come with the
job's result, when the job is over; where the server's files can be seen, as they do on a POC, each
comes as soon as it is stored.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nvflare.apis.job_def import RunStatus
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

import fedavg_core as fc
from nvflare_adapter.job import NAME, Job

__all__ = ["run", "submit"]

_POLL_SECONDS = 0.5
_LOGIN_SECONDS = 60.0
_CONNECT_SECONDS = 60
_UNDER_WAY = [
    RunStatus.SUBMITTED.value,
    RunStatus.APPROVED.value,
    RunStatus.DISPATCHED.value,
    RunStatus.RUNNING.value,
]


def run(job: Job) -> None:
    """Run a job on the deployment that its startup kit is for.

    Args:
        job: The job.
    """
    submit(job, Path(job.startup_kit), watch=lambda number: None)


def submit(job: Job, kit: Path, watch: Callable[[str], Path | None]) -> None:
    """Run a job on a deployment. An interrupt, and the end of the parent process, abort it.

    Args:
        job: The job; its models are stored where `Job.models` says.
        kit: The folder of an administrator's startup kit.
        watch: Called again and again with the number that NVFlare gave the job, empty before; says
            in which folder the server stores the models, None if that cannot be seen.

    Raises:
        SystemExit: The job did not end well.
    """
    job.models.mkdir()
    user = json.loads((kit / "startup" / "fed_admin.json").read_text())["admin"]["username"]
    recipe = job.recipe()
    session = new_secure_session(user, str(kit), timeout=_LOGIN_SECONDS)
    try:
        _wait_for_clients(session, job.clients, watch)
        with tempfile.TemporaryDirectory() as folder:
            recipe.export(folder)
            number = session.submit_job(str(Path(folder) / NAME))
        try:
            status = _wait_for_the_end(session, number, job.models, watch)
        except BaseException:
            with contextlib.suppress(Exception):  # the server may be what has failed
                session.abort_job(number)
            raise
        result = Path(session.download_job_result(number)) / "workspace"
        _store(result / "models", job.models)
        for path in (result / "models").glob("*.*"):  # the best model, and audits
            if not (job.models / path.name).exists():
                shutil.copyfile(path, job.models / path.name)
        if status != RunStatus.FINISHED_COMPLETED.value:
            errors = result / "error_log.txt"
            print(errors.read_text() if errors.is_file() else "", flush=True)
            sys.exit(f"NVFlare ended the job as {status}")
    finally:
        session.close()


def _wait_for_clients(session: Session, clients: int, watch: Callable[[str], Path | None]) -> None:
    """A job is for the clients that are connected when it starts."""
    until = time.monotonic() + _CONNECT_SECONDS
    while len(connected := session.get_system_info().client_info) < clients:
        watch("")
        if time.monotonic() > until:
            names = ", ".join(sorted(client.name for client in connected)) or "none"
            sys.exit(f"nvflare_adapter: expected {clients} connected clients, got {names}")
        time.sleep(_POLL_SECONDS)


def _wait_for_the_end(
    session: Session, number: str, models: Path, watch: Callable[[str], Path | None]
) -> str:
    parent, status, heard = os.getppid(), "", time.monotonic()
    while True:
        stored = watch(number)
        if stored is not None:
            with contextlib.suppress(fc.CheckpointError):  # the server clears up at the end
                _store(stored, models)
        try:
            status, heard = session.get_job_meta(number)["status"], time.monotonic()
        except Exception:  # the job goes on where its server cannot be reached for a while
            if time.monotonic() - heard > _CONNECT_SECONDS:
                raise
        if status and status not in _UNDER_WAY:
            return status
        if os.getppid() != parent:
            raise KeyboardInterrupt
        time.sleep(_POLL_SECONDS)


def _store(source: Path, models: Path) -> None:
    """Store the checkpoints of a folder that are not stored yet, each whole or not at all."""
    for path in fc.CheckpointStore(source).paths() if source.is_dir() else ():
        target = models / path.name
        if not target.exists():
            fc.save_checkpoint(target, fc.load_checkpoint(path))
