"""Shared parts of the comparisons: the environment with PyTorch, and the alternation of both sides.

For machines without Rust, TADSR_BENCHES is a folder with executables of our benchmarks. PyTorch is
then that of the running Python.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("TADSR_PEERS", ROOT / "target" / "peers"))

BENCHES = os.environ.get("TADSR_BENCHES")

# Start of every PyTorch program: threads, device of all tensors, and a function that returns the
# best time of another function in milliseconds.
TORCH = r"""
import contextlib, json, math, os, sys, time
import torch
import torch.nn.functional as F

torch.set_num_threads(int(sys.argv[1]))
CUDA = os.environ.get("TADSR_DEVICE", "cpu").startswith("cuda")
if CUDA:
    torch.set_default_device(os.environ["TADSR_DEVICE"])
    torch.backends.cudnn.benchmark = True

# Waits for submitted work.
finish = torch.cuda.synchronize if CUDA else lambda: None

def best(f, seconds=1.0):
    f(); f()
    finish()
    start, best = time.perf_counter(), float("inf")
    while time.perf_counter() - start < seconds:
        t = time.perf_counter(); f(); finish(); best = min(best, time.perf_counter() - t)
    return best * 1e3
"""


def parser(doc, threads=1, rounds=3, devices=False):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=threads, help=f"threads of either side (default {threads})")
    p.add_argument("--rounds", type=int, default=rounds, help=f"turns of either side (default {rounds})")
    p.set_defaults(device="cpu")
    if devices:
        p.add_argument("--device", help="of both sides: cpu, or cuda, in 16 bits there (default cpu)")
    p.add_argument("--json", type=Path, help="also write the numbers here")
    return p


def python():
    """Returns the Python of the virtual environment, and creates it if necessary."""
    if BENCHES:
        return Path(sys.executable)
    exe = ENVIRONMENT / "bin" / "python"
    if not exe.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    if subprocess.run([exe, "-c", "import torch"], capture_output=True).returncode != 0:
        print("installing PyTorch ...", file=sys.stderr)
        subprocess.run([exe, "-m", "pip", "install", "--quiet", "torch", "numpy"], check=True)
    return exe


def bench(name, device="cpu"):
    """Builds our benchmark and returns its command."""
    if BENCHES:
        return [Path(BENCHES) / name] + (["--device", device] if device != "cpu" else [])
    command = ["cargo", "bench", "--quiet", "--bench", name]
    if device != "cpu":
        command += ["--features", "cuda"]
    subprocess.run([*command, "--no-run"], cwd=ROOT, check=True)
    return [*command, "--"] + (["--device", device] if device != "cpu" else [])


def environment(args):
    threads = str(args.threads)
    return dict(os.environ, RAYON_NUM_THREADS=threads, OMP_NUM_THREADS=threads, TADSR_DEVICE=args.device)


def turns(name, torch, args):
    """Runs our benchmark and the PyTorch program in turn. Yields the JSON objects of both."""
    exe, threads = python(), str(args.threads)
    sides = [[*bench(name, args.device), "--json", "--threads", threads], [exe, "-c", torch, threads]]
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds} ...", file=sys.stderr)
        run = dict(cwd=ROOT, env=environment(args), check=True, stdout=subprocess.PIPE, text=True)
        yield [json.loads(subprocess.run(side, **run).stdout) for side in sides]


def least(into, rows):
    """Updates the lowest time of every row."""
    for name, ms in rows.items():
        into[name] = min(into.get(name, float("inf")), ms)
