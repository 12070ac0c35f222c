#!/usr/bin/env python3
"""Our convolution beside PyTorch's, in one run on the same cores.

    benches/peers/conv.py [--threads N] [--rounds N] [--json OUT]

Makes a virtual environment under target/peers and installs PyTorch into it (once; the PyPI wheel for Linux brings
CUDA libraries along and takes about 5 GB of disk). The two sides take turns for some rounds; each side's best time
counts, since a machine's noise only adds.
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

TORCH = r"""
import json, sys, time
import torch
import torch.nn.functional as F

threads = int(sys.argv[1])
torch.set_num_threads(threads)

def best(f):
    f(); f()
    start, best = time.perf_counter(), float("inf")
    while time.perf_counter() - start < 1.5:
        t = time.perf_counter(); f(); best = min(best, time.perf_counter() - t)
    return best * 1e3

rows = {}
with torch.inference_mode():
    for h, w, c, k in [(270, 480, 48, 3), (180, 320, 64, 3), (256, 256, 128, 3), (64, 64, 256, 1)]:
        times = []
        for layout in (torch.channels_last, torch.contiguous_format):
            conv = torch.nn.Conv2d(c, c, k, padding=k // 2).to(memory_format=layout)
            x = torch.randn(1, c, h, w).to(memory_format=layout)
            times.append(best(lambda: F.silu(conv(x), inplace=True)))
        rows[f"{k}x{k} {c}->{c} {h}x{w}"] = min(times)

times = []
for layout in (torch.channels_last, torch.contiguous_format):
    layers = []
    for _ in range(8):
        layers += [torch.nn.Conv2d(48, 48, 3, padding=1), torch.nn.SiLU(inplace=False)]
    net = torch.nn.Sequential(*layers).to(memory_format=layout)
    x = torch.randn(8, 48, 64, 64).to(memory_format=layout)
    def step():
        net.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
    times.append(best(step))
rows["training step 8 x (3x3 48->48 + SiLU), batch 8, 64x64"] = min(times)
print(json.dumps({"version": torch.__version__, "rows": rows}))
"""


def python():
    """The environment's Python, made and filled if it is not there."""
    exe = ENVIRONMENT / "bin" / "python"
    if not exe.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    if subprocess.run([exe, "-c", "import torch"], capture_output=True).returncode != 0:
        print("installing PyTorch ...", file=sys.stderr)
        subprocess.run([exe, "-m", "pip", "install", "--quiet", "torch", "numpy"], check=True)
    return exe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of either side (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of either side (default 3)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    exe = python()
    threads = str(args.threads)
    environment = dict(os.environ, RAYON_NUM_THREADS=threads, OMP_NUM_THREADS=threads)
    build = ["cargo", "bench", "--quiet", "--bench", "conv", "--no-run"]
    subprocess.run(build, cwd=ROOT, check=True)
    ours, theirs, flop, version = {}, {}, {}, ""
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds} ...", file=sys.stderr)
        bench = ["cargo", "bench", "--quiet", "--bench", "conv", "--", "--json", "--threads", threads]
        out = subprocess.run(bench, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        for row in json.loads(out.stdout)["rows"]:
            ours[row["name"]] = min(ours.get(row["name"], float("inf")), row["ms"])
            flop[row["name"]] = row["flop"]
        out = subprocess.run([exe, "-c", TORCH, threads], env=environment, check=True, capture_output=True, text=True)
        peer = json.loads(out.stdout)
        version = peer["version"]
        for name, ms in peer["rows"].items():
            theirs[name] = min(theirs.get(name, float("inf")), ms)
    print(f"{args.threads} thread(s), PyTorch {version}; ratio: PyTorch's time over ours, above 1 we are faster")
    print(f"{'':56} {'ours':>9} {'PyTorch':>9} {'ratio':>6} {'GFLOP/s a thread':>17}")
    for name, ms in ours.items():
        rate = flop[name] / ms / 1e6 / args.threads
        print(f"{name:56} {ms:6.2f} ms {theirs[name]:6.2f} ms {theirs[name] / ms:6.2f} {rate:17.1f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "pytorch": version, "ours": ours, "theirs": theirs}, indent=1))


if __name__ == "__main__":
    main()
