#!/usr/bin/env python3
"""The networks of benches/gpu.rs in PyTorch on a CUDA device: f16, channels last, torch.compile with max-autotune, which records a
CUDA graph.

    benches/peers/gpu.py [--device cuda] [--size 3840x2160]

The bare network on a tensor in the device's memory, without interpolation, whitening, and what turns the result into pixels;
compare with the column "computation" of benches/gpu.rs, which has all of those. Weights are random. Needs PyTorch alone;
benches/gpu.sh puts it beside the benchmark. With --device cpu it runs in f32 without compilation, to try it.
"""

import argparse
import statistics
import time

import torch
from torch import nn


class Pair(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.second(nn.functional.leaky_relu(self.first(x), 0.1))


def plain(latent, channels, depth):
    layers = [nn.Conv2d(latent, channels, 3, padding=1), nn.LeakyReLU(0.1)]
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Conv2d(channels, latent, 3, padding=1))


def residual(latent, channels, depth):
    pairs = [Pair(channels) for _ in range(depth)]
    head = [nn.Conv2d(latent, channels, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*head, *pairs, nn.Conv2d(channels, latent, 3, padding=1))


# name, network, channels of the latent, r
STUDENTS = [
    ("tiny r 4", lambda: plain(16, 32, 4), 16, 4),
    ("small", lambda: residual(24, 64, 4), 24, 4),
]


def milliseconds(run, device):
    """The median of a run's times."""
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < 3 or len(times) < 3:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="3840x2160", help="of the upscaled frame")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device")
        return
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    width, height = map(int, args.size.split("x"))
    print(f"\nPyTorch {torch.__version__}, the bare network for {width}x{height}\n")
    print("| student | milliseconds |\n|---|---|")
    for name, network, channels, r in STUDENTS:
        layers = network().to(device, dtype, memory_format=torch.channels_last).eval()
        frame = torch.randn(1, channels, -(-height // r), -(-width // r), device=device, dtype=dtype)
        frame = frame.to(memory_format=torch.channels_last)
        if device.type == "cuda":
            layers = torch.compile(layers, mode="max-autotune")
        with torch.inference_mode():
            for _ in range(3):
                layers(frame)
            print(f"| {name} | {milliseconds(lambda: layers(frame), device):.3f} |", flush=True)


if __name__ == "__main__":
    main()
