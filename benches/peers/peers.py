"""What the comparisons share: the environment with PyTorch, and the turns that the two sides take."""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("TADSR_PEERS", ROOT / "target" / "peers"))

# The head of every PyTorch side: the best time of a function in milliseconds.
TORCH = r"""
import json, sys, time
import torch
import torch.nn.functional as F

torch.set_num_threads(int(sys.argv[1]))

def best(f, seconds=1.0):
    f(); f()
    start, best = time.perf_counter(), float("inf")
    while time.perf_counter() - start < seconds:
        t = time.perf_counter(); f(); best = min(best, time.perf_counter() - t)
    return best * 1e3
"""


def parser(doc, threads=1, rounds=3):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=threads, help=f"threads of either side (default {threads})")
    p.add_argument("--rounds", type=int, default=rounds, help=f"turns of either side (default {rounds})")
    p.add_argument("--json", type=Path, help="also write the numbers here")
    return p


def python():
    """The environment's Python, made and filled if it is not there."""
    exe = ENVIRONMENT / "bin" / "python"
    if not exe.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    if subprocess.run([exe, "-c", "import torch"], capture_output=True).returncode != 0:
        print("installing PyTorch ...", file=sys.stderr)
        subprocess.run([exe, "-m", "pip", "install", "--quiet", "torch", "numpy"], check=True)
    return exe


def turns(bench, torch, args):
    """Runs our bench and the PyTorch program in turn, each printing one JSON object, and yields both objects."""
    exe = python()
    threads = str(args.threads)
    environment = dict(os.environ, RAYON_NUM_THREADS=threads, OMP_NUM_THREADS=threads)
    subprocess.run(["cargo", "bench", "--quiet", "--bench", bench, "--no-run"], cwd=ROOT, check=True)
    sides = [
        ["cargo", "bench", "--quiet", "--bench", bench, "--", "--json", "--threads", threads],
        [exe, "-c", torch, threads],
    ]
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds} ...", file=sys.stderr)
        run = dict(cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        yield [json.loads(subprocess.run(side, **run).stdout) for side in sides]


def least(into, rows):
    """Keeps the least time of every row."""
    for name, ms in rows.items():
        into[name] = min(into.get(name, float("inf")), ms)
