"""A whole job on NVFlare's simulator, beside the same job of NVFlare's own recipe.

    python -m benchmarks.nvflare_job [--megabytes 1000] [--tensors 200] [--clients 2] [--rounds 2]
                                     [--laps 3]

The clients bring a float32 model of many tensors, add 1 to each number, and send the whole of it,
so that the work is to carry the models about, to average and to keep them. NVFlare's recipe writes
only one of the tensors to a file after a round; this package's writes all of them. So the time is
also given without that of the files, as NVFlare's log has it. Each job runs in processes of its
own, in turns. What is reported is the median of the laps: the time from start to end, the highest
memory of the process that has the server in it, and that of all processes together; and how this
package's stand to NVFlare's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.machine import describe_machine

__all__ = ["main"]

_POLL_SECONDS = 0.05
_GIB = 2**30
_CLIENT = """
import sys
import numpy as np
import nvflare.client as flare

elements, tensors = int(sys.argv[1]), int(sys.argv[2])
flare.init()
while flare.is_running():
    model = flare.receive().params
    if "tensor_0" not in model:
        rng = np.random.default_rng(len(flare.get_site_name()))
        model = {f"tensor_{n}": rng.random(elements, dtype=np.float32) for n in range(tensors)}
        model["numpy_key"] = np.zeros(1, np.float32)
    for name in model:
        model[name] = model[name] + np.float32(1)
    flare.send(flare.FLModel(params=model, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
    del model
"""


def _run_job(name: str, folder: str, settings: dict[str, Any]) -> None:
    """What the process of a job does."""
    from nvflare.app_common.np.recipes import fedavg as theirs
    from nvflare.recipe.sim_env import SimEnv

    from nvflare_adapter import recipe as ours

    start = {} if name == "ours" else {"model": [0.0]}  # NVFlare's cannot do without
    recipe = (ours if name == "ours" else theirs).NumpyFedAvgRecipe(
        name="job",
        min_clients=settings["clients"],
        num_rounds=settings["rounds"],
        train_script="client.py",
        train_args=f"{settings['elements']} {settings['tensors']}",
        **start,
    )
    recipe.execute(SimEnv(num_clients=settings["clients"], workspace_root=folder))


def _measure(name: str, settings: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "client.py").write_text(_CLIENT)
        command = [sys.executable, "-m", "benchmarks.nvflare_job", name, folder]
        started = time.perf_counter()
        peaks: dict[tuple[int, str], int] = {}
        together = 0
        with (Path(folder) / "log").open("wb") as log:
            job = psutil.Popen(
                [*command, json.dumps(settings)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            )
            while job.poll() is None:
                now = 0
                for process in (job, *_under(job)):
                    try:
                        used = process.memory_info().rss
                        role = "client" if "simulator_worker" in str(process.cmdline()) else ""
                    except psutil.Error:
                        continue
                    key = process.pid, role
                    peaks[key] = max(peaks.get(key, 0), used)
                    now += used
                together = max(together, now)
                time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - started
        text = (Path(folder) / "log").read_text(errors="replace")
        last = f"Round {settings['rounds'] - 1} "
        if job.returncode != 0 or last not in text:
            raise SystemExit(f"{name}: the job failed\n" + text[-3000:])
    server = max(peak for (_, role), peak in peaks.items() if not role)
    return {
        "seconds": seconds,
        "seconds without files": seconds - _in_files(text),
        "server GiB": server / _GIB,
        "all GiB": together / _GIB,
    }


def _in_files(log: str) -> float:
    """How many seconds went into storing the models."""
    found = re.findall(r"(\d\d):(\d\d):(\d\d),(\d\d\d) .*(Start|End) persist model", log)
    return sum(
        (3600 * int(hours) + 60 * int(minutes) + int(seconds) + int(milli) / 1000)
        * (1 if what == "End" else -1)
        for hours, minutes, seconds, milli, what in found
    )


def _under(job: psutil.Process) -> list[psutil.Process]:
    try:
        return list(job.children(recursive=True))
    except psutil.Error:
        return []


def main() -> None:
    """Run the command."""
    if len(sys.argv) == 4 and sys.argv[1] in ("ours", "nvflare"):
        return _run_job(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description="A whole job, beside NVFlare's own recipe.")
    for name, value in (
        ("megabytes", 1000),
        ("tensors", 200),
        ("clients", 2),
        ("rounds", 2),
        ("laps", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    read = vars(parser.parse_args())
    elements = read["megabytes"] * 1_000_000 // 4 // read["tensors"]
    laps: dict[str, list[dict[str, float]]] = {"nvflare": [], "ours": []}
    for _ in range(read["laps"]):
        for name, taken in laps.items():
            taken.append(_measure(name, {**read, "elements": elements}))
            print(name, {what: round(value, 2) for what, value in taken[-1].items()}, flush=True)
    middle = {
        name: {what: median(lap[what] for lap in taken) for what in taken[0]}
        for name, taken in laps.items()
    }
    ratios = {what: middle["ours"][what] / value for what, value in middle["nvflare"].items()}
    print("ours / NVFlare's", {what: round(ratio, 3) for what, ratio in ratios.items()})
    print(json.dumps(describe_machine()))
    return None


if __name__ == "__main__":
    main()
