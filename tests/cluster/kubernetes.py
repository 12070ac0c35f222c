"""Runs the pods of an Indexed Job one after the other, as Kubernetes would, without a cluster.

    kubernetes.py JOB.yaml FOLDER

FOLDER stands in for the volume. A pod that fails is tried again as often as the job states.
"""

import os
import subprocess
import sys
from pathlib import Path

import yaml


def main():
    file, folder = sys.argv[1:]
    spec = yaml.safe_load(Path(file).read_text())["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert container["workingDir"] == mount["mountPath"]
    assert mount["name"] == pod["volumes"][0]["name"]
    failed = []
    for index in range(spec["completions"]):
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index)}
        command = [*container["command"], *container["args"]]
        for _ in range(spec["backoffLimitPerIndex"] + 1):
            if subprocess.run(command, cwd=folder, env=environment).returncode == 0:
                break
        else:
            failed.append(str(index))
    sys.exit(f"failed indexes: {','.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
