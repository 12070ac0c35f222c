"""Tests training by several processes with Open MPI, which scripts/test-mpi.sh installs."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy
import pytest

PROGRAM = os.environ["TADSR_TRAIN"]

RECIPE = """
name = "test"
size = "tiny"
scale = 2.0
conditioning = { denoise = true }
[data]
dirs = ["photos"]
preset = "stills"
hold_out = 3
[teacher]
widths = [16, 16]
blocks = 1
steps = 20
batch = 2
accumulate = 2
patch = 32
[student]
steps = 50
batch = 2
accumulate = 2
patch = 32
[student.distillation]
after = 0.2
regression = 0.1
score = 0.1
width = 16
"""

MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    source = "testsrc2=size=160x120:rate=1"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-frames:v", "4"]
    subprocess.run([*command, tmp_path / "photos/%d.png"], check=True)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def training(folder, out, *more):
    return [PROGRAM, "run", folder / "recipe.toml", "--out", folder / out, "--threads", "1", *more]


def run(command, timeout=120, **more):
    """Runs a command. Returns its exit status and its messages."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **more)
    return result.returncode, result.stdout + result.stderr


def tensors(path):
    """Returns the tensors of a checkpoint by name."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"F32": numpy.float32, "F64": numpy.float64}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = numpy.frombuffer(data[begin:end], kinds[entry["dtype"]])
    return found


def difference(one, other):
    """Returns the largest difference between the values of two checkpoints."""
    a, b = tensors(one / "checkpoint.safetensors"), tensors(other / "checkpoint.safetensors")
    assert a.keys() == b.keys()
    return max(numpy.abs(a[name] - b[name]).max() for name in a)


def test_two_ranks_train_the_model_of_one_process(folder):
    status, text = run(training(folder, "one"))
    assert status == 0, text
    for out in ["two", "again"]:
        status, text = run([*MPIRUN, "-n", "2", *training(folder, out)])
        assert status == 0, text
        assert text.count("student: 50 steps") == 1
    for part in [".", "teacher"]:
        assert difference(folder / "one" / part, folder / "two" / part) < 1e-6
        assert difference(folder / "two" / part, folder / "again" / part) == 0


def test_two_hosts_train_the_model_of_one_process(folder):
    assert run(training(folder, "one"))[0] == 0
    hosts = {"10.77.0.1": "tadsr-a", "10.77.0.2": "tadsr-b"}
    agent = folder / "agent"
    cases = "".join(f"{ip}) name={name};; " for ip, name in hosts.items())
    # Replaces ssh.
    agent.write_text(
        f'#!/bin/sh\ncase $1 in {cases} esac\nshift\n'
        'exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"\n'
    )
    agent.chmod(0o755)
    commands = [f"ip netns add {name}" for name in hosts.values()]
    commands += ["ip link add tadsr0 netns tadsr-a type veth peer name tadsr0 netns tadsr-b"]
    for ip, name in hosts.items():
        commands += [f"ip -n {name} addr add {ip}/24 dev tadsr0", f"ip -n {name} link set tadsr0 up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        network = ["btl", "tcp,self"], ["btl_tcp_if_include", "tadsr0"], ["oob_tcp_if_include", "tadsr0"]
        options = [word for pair in network for word in ["--mca", *pair]]
        options += ["--mca", "plm_rsh_agent", agent, "--host", ",".join(hosts)]
        command = ["unshare", "--uts", "sh", "-c", 'hostname tadsr-a; exec "$@"', "sh", *MPIRUN]
        command += [*options, "-n", "2", "sh", "-c", 'hostname; exec "$@"', "sh"]
        command += training(folder, "two")
        status, text = run(["ip", "netns", "exec", "tadsr-a", *command])
        assert status == 0, text
        assert all(name in text for name in hosts.values()), text
    finally:
        for name in hosts.values():
            subprocess.run(["ip", "netns", "delete", name])
    assert difference(folder / "one", folder / "two") < 1e-6


def start(folder, out, *options):
    """Starts a training on two ranks. Returns the launcher once there is a checkpoint."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.replace("steps = 50", "steps = 1500"))
    command = [*MPIRUN, *options, "-n", "2"]
    command += training(folder, out, "--save-every", "10")
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 60
    while not (folder / out / "checkpoint.safetensors").exists():
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    return launcher


def ranks(folder):
    """Returns the process numbers of the ranks that train in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(PROGRAM.encode()) and bytes(folder) in command:
                found.append(int(process.name))
    return sorted(found)


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_continues(folder):
    # Open MPI sends SIGTERM after this time, and SIGKILL after it again.
    launcher = start(folder, "run", "--mca", "odls_base_sigkill_timeout", "3")
    launcher.send_signal(signal.SIGINT)
    text = launcher.communicate(timeout=60)[0]
    assert "stopped at step" in text and "continue with the same command" in text
    assert ranks(folder) == []
    for out in ["run", "whole"]:
        assert run([*MPIRUN, "-n", "2", *training(folder, out)])[0] == 0
    assert difference(folder / "run", folder / "whole") == 0


def test_the_death_of_a_rank_ends_all_with_a_message(folder):
    launcher = start(folder, "run")
    os.kill(ranks(folder)[1], signal.SIGKILL)
    text = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0
    assert "exited on signal 9" in text
    assert ranks(folder) == []
    assert run([*MPIRUN, "-n", "2", *training(folder, "run")])[0] == 0


def test_an_error_on_one_rank_ends_all_and_names_the_rank(folder):
    other = folder / "other.toml"
    other.write_text(RECIPE.replace("steps = 50", "steps = 60"))
    first = training(folder, "run")
    second = [other if word == folder / "recipe.toml" else word for word in first]
    status, text = run([*MPIRUN, "-n", "1", *first, ":", "-n", "1", *second])
    assert status != 0
    assert "rank 1 has other data or options than rank 0" in text
    # A folder that only one rank finds.
    other.write_text(RECIPE.replace('"photos"', '"missing"'))
    status, text = run([*MPIRUN, "-n", "1", *first, ":", "-n", "1", *second])
    assert status != 0
    assert "tadsr-train: rank 1:" in text and "missing" in text
    assert ranks(folder) == []


def test_a_step_that_cannot_be_shared_is_an_error_that_is_told_once(folder):
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.replace("batch = 2\naccumulate = 2", "batch = 3\naccumulate = 1"))
    status, text = run([*MPIRUN, "-n", "2", *training(folder, "run")])
    assert status != 0
    assert text.count("2 ranks cannot share a step of 1 batches of 3 pairs") == 1
