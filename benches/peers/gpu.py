#!/usr/bin/env python3
"""Times the networks of benches/gpu.rs in PyTorch on a CUDA device, in f16 with channels last.

They run plainly, in a CUDA graph, with torch.compile (max-autotune), and with TensorRT if
torch_tensorrt is installed.

    benches/peers/gpu.py [--device cuda] [--size 3840x2160] [--ways eager,graph]

Times are those of the bare network on a tensor in device memory, without interpolation, whitening
and conversion to pixels. Compare the lowest with the column "computation" of benches/gpu.rs, which
includes all of these. The speed of a large matrix product is the peak for the TFLOP/s of the
convolutions. Weights are random. Needs only PyTorch; benches/gpu.sh copies it beside the benchmark.
With --device cpu it runs in f32 without compilation, as a test.
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
    ("tiny r 2", lambda: plain(4, 16, 4), 4, 2),
    ("small r 2", lambda: plain(4, 32, 8), 4, 2),
    ("base r 2", lambda: residual(4, 64, 5), 4, 2),
    ("tiny r 4", lambda: plain(16, 32, 4), 16, 4),
    ("small r 4", lambda: plain(16, 48, 7), 16, 4),
    ("base r 4", lambda: residual(16, 64, 5), 16, 4),
]


def milliseconds(run, device, calls=20):
    """Returns the median time of a call, over many consecutive calls without synchronisation."""
    times = []
    start = time.perf_counter()
    warm = False
    while not warm or time.perf_counter() - start < 3 or len(times) < 3:
        if not warm and time.perf_counter() - start > 0.5:
            start, warm, times = time.perf_counter(), True, []
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def graph(layers, frame):
    """Returns a CUDA graph of the network for one frame."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layers(frame)
    stream.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        layers(frame)
    return recorded.replay


def compiled(layers, frame):
    torch._dynamo.reset()
    torch._dynamo.mark_static_address(frame)
    fast = torch.compile(layers, mode="max-autotune")
    return lambda: fast(frame)


def tensorrt(layers, frame):
    import torch_tensorrt  # noqa: F401

    torch._dynamo.reset()
    fast = torch.compile(layers, backend="torch_tensorrt", options={"enabled_precisions": {torch.float16}})
    return lambda: fast(frame)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="3840x2160", help="of the upscaled frame")
    parser.add_argument("--ways", help="comma-separated: eager, graph, compile, tensorrt (default all)")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device")
        return
    ways = {"eager": lambda layers, frame: lambda: layers(frame)}
    dtype = torch.float32
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        dtype = torch.float16
        ways |= {"graph": graph, "compile": compiled, "tensorrt": tensorrt}
    asked = args.ways.split(",") if args.ways else ways
    if unknown := [way for way in asked if way not in ways]:
        parser.error(f"--ways {','.join(unknown)}: with --device {device} there are {', '.join(ways)}")
    width, height = map(int, args.size.split("x"))
    print(f"\nPyTorch {torch.__version__}, the bare network for {width}x{height}\n")
    print("| network | way | milliseconds |\n|---|---|---|")
    with torch.inference_mode():
        for name, network, channels, r in STUDENTS:
            layers = network().to(device, dtype, memory_format=torch.channels_last).eval()
            frame = torch.randn(1, channels, -(-height // r), -(-width // r), device=device, dtype=dtype)
            frame = frame.to(memory_format=torch.channels_last)
            for way in asked:
                try:
                    run = ways[way](layers, frame)
                    for _ in range(3):
                        run()
                    print(f"| {name} | {way} | {milliseconds(run, device):.3f} |", flush=True)
                except Exception as error:  # no C compiler, or no TensorRT
                    reason = str(error).strip() or repr(error)
                    print(f"| {name} | {way} | not available: {reason.splitlines()[0][:80]} |", flush=True)
        if device.type == "cuda":
            a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
            ms = milliseconds(lambda: a @ b, device)
            print(f"\nmatrix product of 8192 x 8192 in f16: {2 * 8192**3 / ms / 1e9:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
