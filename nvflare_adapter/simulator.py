# mypy: disable-error-code="misc"
"""Runs a job on NVFlare's simulator."""

from __future__ import annotations

import sys

from nvflare.recipe.sim_env import SimEnv

from nvflare_adapter.job import Job

__all__ = ["run"]

_MOST_PROCESSES = 16


def run(job: Job) -> None:
    """Run a job.

    Args:
        job: The job; its persistor stores the models where `Job.models` says.
    """
    environment = SimEnv(
        num_clients=job.clients,
        num_threads=min(job.clients, _MOST_PROCESSES),
        workspace_root=job.folder,
    )
    try:
        job.recipe().execute(environment)
    except RuntimeError as error:  # from NVFlare 2.9 on; what failed stands further up in the log
        sys.exit(str(error))
