#!/usr/bin/env python3
"""Upscales films on a Ray cluster, with a task for each segment.

    RAY_ADDRESS=auto upscale_ray.py FILMS SETTINGS..

CPUS_PER_TASK is 4 by default. tasks.sh describes FILMS and SETTINGS. All nodes need tadsr-train in
PATH, and this folder and the films at the same paths.
"""

import os
import subprocess
import sys
from pathlib import Path

import ray

HERE = Path(__file__).resolve().parent
CPUS = int(os.environ.get("CPUS_PER_TASK", 4))


@ray.remote(num_cpus=CPUS, max_retries=3, retry_exceptions=True)
def run(folder, film, out, step, settings, *_after):
    """Makes a segment of a film, or joins all of them after other tasks."""
    command = [HERE / "step.sh", film, out, step, *settings, "--threads", str(CPUS)]
    # A worker that is killed does not leave the script running.
    status = subprocess.run(["setpriv", "--pdeathsig", "KILL", *command], cwd=folder).returncode
    if status:
        raise RuntimeError(f"step.sh ended with status {status}")


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    films, *settings = sys.argv[1:]
    command = [HERE / "tasks.sh", films, *settings]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if listed.returncode:
        sys.exit(listed.returncode)
    ray.init()
    segments, joins = {}, {}
    for line in listed.stdout.splitlines():
        film, out, number = line.split("\t")
        task = run.remote(os.getcwd(), film, out, number, settings)
        segments.setdefault((film, out), {})[number] = task
    for (film, out), tasks in segments.items():
        # It does not run if a segment has failed.
        joins[out] = run.remote(os.getcwd(), film, out, "join", settings, *tasks.values())
    failures = 0
    for (film, out), tasks in segments.items():
        for step, task in [*tasks.items(), ("join", joins[out])]:
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                failures += 1
                name = "join" if step == "join" else f"segment {step}"
                print(f"{name} of '{film}' failed: {str(error).splitlines()[-1]}", file=sys.stderr)
    if failures:
        sys.exit("Finished segments are kept: remove the cause and run the same command again.")


if __name__ == "__main__":
    main()
