#!/usr/bin/env python3
"""Compares our convolution with PyTorch's, in one run on the same cores.

    benches/peers/conv.py [--threads N] [--rounds N] [--json OUT]

Makes a virtual environment under target/peers and installs PyTorch into it once. The PyPI wheel for
Linux includes CUDA libraries and takes about 5 GB of disk. Both sides run in turn for some rounds.
Each side's best time counts, because the noise of a machine only adds time.
"""

import json

import peers

TORCH = peers.TORCH + r"""
rows = {}
with torch.inference_mode():
    for h, w, c, k in [(270, 480, 48, 3), (180, 320, 64, 3), (256, 256, 128, 3), (64, 64, 256, 1)]:
        times = []
        for layout in (torch.channels_last, torch.contiguous_format):
            conv = torch.nn.Conv2d(c, c, k, padding=k // 2).to(memory_format=layout)
            x = torch.randn(1, c, h, w).to(memory_format=layout)
            times.append(best(lambda: F.silu(conv(x), inplace=True), 1.5))
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
    times.append(best(step, 1.5))
rows["training step 8 x (3x3 48->48 + SiLU), batch 8, 64x64"] = min(times)
print(json.dumps({"version": torch.__version__, "rows": rows}))
"""


def main():
    args = peers.parser(__doc__).parse_args()
    ours, theirs, flop, version = {}, {}, {}, ""
    for mine, peer in peers.turns("conv", TORCH, args):
        peers.least(ours, {row["name"]: row["ms"] for row in mine["rows"]})
        flop = {row["name"]: row["flop"] for row in mine["rows"]}
        peers.least(theirs, peer["rows"])
        version = peer["version"]
    print(f"{args.threads} thread(s), PyTorch {version}; ratio: PyTorch's time over ours")
    print(f"{'':56} {'ours':>9} {'PyTorch':>9} {'ratio':>6} {'GFLOP/s a thread':>17}")
    for name, ms in ours.items():
        rate = flop[name] / ms / 1e6 / args.threads
        print(f"{name:56} {ms:6.2f} ms {theirs[name]:6.2f} ms {theirs[name] / ms:6.2f} {rate:17.1f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "pytorch": version, "ours": ours, "theirs": theirs}, indent=1))


if __name__ == "__main__":
    main()
