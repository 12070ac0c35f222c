#!/usr/bin/env python3
"""Compares our engine with ONNX Runtime and OpenVINO on identical networks and the same cores.

    benches/peers/engine.py [--threads N] [--rounds N] [--time SECONDS] [--level L] [--torch]
        [--json OUT]

Makes a virtual environment under target/peers (or $TADSR_PEERS) and installs both runtimes into it
once, with --torch also PyTorch, a download of several gigabytes. `tadsr-train export --onnx` writes
every network. First each runtime must agree with our engine's example to 1e-4 of the largest value.
Then all run in turn for some rounds. Each side's best time counts, because the noise of a machine
only adds time.

Both peers also run the networks quantised to int8: ONNX Runtime by its static quantisation with one
scale per channel of the weights (QDQ), OpenVINO by NNCF. --level holds our engine, OpenVINO and
PyTorch to an instruction set: AVX2, or what every x86-64 has, for OpenVINO SSE4.1. ONNX Runtime
cannot be held.

Our time is that of a whole frame, from planes to planes. The time of the peers is that of the bare
network between tensors in memory, without interpolation, whitening and conversion to pixels. ONNX
Runtime runs with its defaults. For OpenVINO the faster of the latency and throughput hints counts,
for PyTorch the faster of its memory formats.
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
WORK = ROOT / "target" / "peers-engine"
# Names of each level of TADSR_CPU: of oneDNN, which OpenVINO and PyTorch use, and of PyTorch.
LEVELS = {"avx2": ("AVX2", "avx2"), "portable": ("SSE41", "default")}

COMMON = r"""
import json, sys, time
import numpy as np

def tensors(path):
    data = open(path, "rb").read()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8:8 + size])
    body = data[8 + size:]
    return {k: np.frombuffer(body[slice(*v["data_offsets"])], np.float32).reshape(v["shape"])
            for k, v in head.items() if k != "__metadata__"}

def best(f, seconds):
    f(); f()
    start, best, runs = time.perf_counter(), float("inf"), 0
    while time.perf_counter() - start < seconds or runs < 3:
        t = time.perf_counter(); f(); best = min(best, time.perf_counter() - t); runs += 1
    return best * 1e3

def ort_session(path, threads, shape=None):
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if shape is not None:
        for name, size in zip(("n", "height_latent", "width_latent"), (shape[0], shape[2], shape[3])):
            options.add_free_dimension_override_by_name(name, size)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

def ov_model(path, threads, precision, hint="LATENCY", shape=None):
    import openvino as ov
    core = ov.Core()
    model = core.read_model(path)
    if shape is not None:
        model.reshape(list(shape))
    return core.compile_model(model, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": hint, "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision})
"""

CHECK = COMMON + r"""
onnx_path, example_path = sys.argv[1:3]
example = tensors(example_path)
outputs = {k for k in example if k == "residual" or k.endswith("_out")}
inputs = {k: v for k, v in example.items() if k not in outputs}
session = ort_session(onnx_path, 1)
compiled = ov_model(onnx_path, 1, "f32")
names = [o.name for o in session.get_outputs()]
results = {"ONNX Runtime": dict(zip(names, session.run(None, inputs)))}
request = compiled.create_infer_request()
request.infer(inputs)
results["OpenVINO"] = {name: request.get_tensor(name).data for name in names}
worst = {}
for runtime, result in results.items():
    for name, want in ((k, example[k]) for k in outputs):
        got = result[name]
        border = (got.shape[2] - want.shape[2]) // 2
        if border:
            got = got[:, :, border:-border, border:-border]
        assert got.shape == want.shape, (runtime, name, got.shape, want.shape)
        error = float(np.abs(got - want).max() / np.abs(want).max())
        worst[runtime] = max(worst.get(runtime, 0), error)
        assert error < 1e-4, f"{runtime}, {onnx_path}, {name}: differs by {error:.1e} of the largest value"
print(json.dumps(worst))
"""

# Quantises a network for both runtimes. Speed does not depend on the values of the calibration.
QUANTISE = COMMON + r"""
import logging
logging.disable(logging.WARNING)
import nncf, openvino as ov
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
onnx_path, for_ort, for_ov, channels = *sys.argv[1:4], int(sys.argv[4])
rng = np.random.default_rng(2)
inputs = [rng.standard_normal((1, channels, 48, 48)).astype(np.float32) for _ in range(8)]

class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = [{"latent": x} for x in inputs]

    def get_next(self):
        return self.left.pop() if self.left else None

quantize_static(onnx_path, for_ort, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
model = ov.Core().read_model(onnx_path)
ov.save_model(nncf.quantize(model, nncf.Dataset(inputs), subset_size=8), for_ov, compress_to_fp16=False)
print("{}")
"""

ORT = COMMON + r"""
import onnxruntime
threads, seconds = int(sys.argv[1]), float(sys.argv[2])
rows = {}
for case in json.loads(sys.argv[3]):
    x = np.random.default_rng(1).standard_normal(case["shape"]).astype(np.float32)
    row = {}
    for precision, path in (("f32", case["onnx"]), ("int8", case["ort_int8"])):
        session = ort_session(path, threads, x.shape)
        row[precision] = best(lambda: session.run(None, {"latent": x}), seconds)
    rows[case["name"]] = row
print(json.dumps({"version": onnxruntime.__version__, "rows": rows}))
"""

OV = COMMON + r"""
import openvino
threads, seconds = int(sys.argv[1]), float(sys.argv[2])
rows = {}
for case in json.loads(sys.argv[3]):
    x = np.random.default_rng(1).standard_normal(case["shape"]).astype(np.float32)
    row = {}
    for precision, path, hint in (
        ("f32", case["onnx"], "LATENCY"),
        ("f32", case["onnx"], "THROUGHPUT"),
        ("bf16", case["onnx"], "LATENCY"),
        ("int8", case["ov_int8"], "LATENCY"),
    ):
        # Outside the quantised layers an int8 model has the given precision.
        other = "f32" if precision == "int8" else precision
        try:
            request = ov_model(path, threads, other, hint, x.shape).create_infer_request()
        except RuntimeError:
            # OpenVINO cannot run this precision with the instruction set that it is held to.
            continue
        ms = best(lambda: request.infer([x], share_inputs=True, share_outputs=True), seconds)
        row[precision] = min(row.get(precision, float("inf")), ms)
    rows[case["name"]] = row
print(json.dumps({"version": openvino.__version__, "rows": rows}))
"""


TORCH = COMMON + r"""
import onnx, torch
from onnx import numpy_helper
threads, seconds = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(threads)

class Network(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.graph = onnx.load(path).graph
        self.weights = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in self.graph.initializer}

    def forward(self, x):
        values = {self.graph.input[0].name: x} | self.weights
        for node in self.graph.node:
            inputs = [values[name] for name in node.input]
            if node.op_type == "Conv":
                y = torch.nn.functional.conv2d(*inputs, padding=1)
            elif node.op_type == "LeakyRelu":
                y = torch.nn.functional.leaky_relu(*inputs, node.attribute[0].f)
            elif node.op_type == "Add":
                y = inputs[0] + inputs[1]
            else:
                assert node.op_type == "Identity", node.op_type
                y = inputs[0]
            values[node.output[0]] = y
        return values[self.graph.output[0].name]

rows = {}
for case in json.loads(sys.argv[3]):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(case["shape"]).astype(np.float32))
    want = ort_session(case["onnx"], 1).run(None, {"latent": x.numpy()})[0]
    ms = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network, x = Network(case["onnx"]), x.to(memory_format=layout)
        for name, weight in network.weights.items():
            if weight.dim() == 4:
                network.weights[name] = weight.to(memory_format=layout)
        with torch.inference_mode():
            error = np.abs(network(x).numpy() - want).max() / np.abs(want).max()
            assert error < 1e-4, f"PyTorch, {case['onnx']}: differs by {error:.1e} of the largest value"
            ms.append(best(lambda: network(x), seconds))
    rows[case["name"]] = {"f32": min(ms)}
print(json.dumps({"version": torch.__version__, "rows": rows}))
"""


def python(torch):
    """Returns the Python of the virtual environment, and creates it if necessary."""
    exe = ENVIRONMENT / "bin" / "python"
    if not exe.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    packages = ["numpy", "onnx", "onnxruntime", "openvino", "nncf"] + ["torch"] * torch
    if subprocess.run([exe, "-c", f"import {', '.join(packages)}"], capture_output=True).returncode != 0:
        print(f"installing {', '.join(packages)} ...", file=sys.stderr)
        subprocess.run([exe, "-m", "pip", "install", "--quiet", *packages], check=True)
    return exe


def output(command, **more):
    """Returns the last line of a command's output as JSON."""
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout
    return json.loads(out.strip().splitlines()[-1])


def bench(*args, **more):
    return output(["cargo", "bench", "--quiet", "-p", "tadsr", "--bench", "engine", "--", *args], cwd=ROOT, **more)


def export(cases, exe):
    """Writes and checks the network of every case, and the bundled models from plane to plane."""
    tool = ROOT / "target" / "release" / "tadsr-train"
    jobs = [(c["model"], c["scale"], "latent", "45x31") for c in cases]
    jobs += [("tiny", scale, "planes", "45x31") for scale in (2, 4)]
    pictures = [("tiny", scale) for scale in (2, 3, 4)] + [("small-x4", scale) for scale in (2, 4)]
    jobs += [(*picture, "picture", size) for picture in pictures for size in ("45x31", "64x22")]
    for model, scale, ends, size in jobs:
        stem = f"{Path(model).stem}-{scale:g}-{ends}-{size}"
        onnx, example = WORK / f"{stem}.onnx", WORK / f"{stem}.safetensors"
        subprocess.run([tool, "export", "--model", model, "--scale", str(scale), "--ends", ends, "--onnx", onnx,
                        "--example", example, "--example-size", size], check=True, stdout=subprocess.DEVNULL)
        worst = output([exe, "-c", CHECK, onnx, example])
        print(f"{stem}: " + ", ".join(f"{k} differs by {v:.1e}" for k, v in worst.items()))
        for case in cases:
            if (case["model"], case["scale"], "latent") == (model, scale, ends):
                case["onnx"] = str(onnx)
    for case in cases:
        case["ort_int8"], case["ov_int8"] = (case["onnx"].replace(".onnx", end) for end in (".int8.onnx", ".int8.xml"))
        output([exe, "-c", QUANTISE, case["onnx"], case["ort_int8"], case["ov_int8"], str(case["latent"][1])])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of every side (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side (default 3)")
    parser.add_argument("--time", type=float, default=1.0, help="seconds for each measurement (default 1)")
    parser.add_argument("--level", choices=LEVELS, help="instruction set (default: the best of the machine)")
    parser.add_argument("--torch", action="store_true", help="also measure PyTorch")
    parser.add_argument("--json", type=Path, help="also write the numbers here, after each round")
    args = parser.parse_args()
    exe = python(args.torch)
    WORK.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cargo", "build", "--quiet", "--release", "-p", "tadsr", "--bin", "tadsr-train"], cwd=ROOT, check=True)
    cases = bench("--models", str(WORK))["cases"]
    export(cases, exe)
    threads, seconds = str(args.threads), str(args.time)
    environment = dict(os.environ, OMP_NUM_THREADS=threads)
    if args.level:
        onednn, aten = LEVELS[args.level]
        environment |= {"TADSR_CPU": args.level, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}
    listed = json.dumps([{"name": c["name"], "shape": c["latent"]} | {k: c[k] for k in ("onnx", "ort_int8", "ov_int8")}
                         for c in cases])
    times, versions, ours = {}, {}, {}
    peers = [("ONNX Runtime", ORT), ("OpenVINO", OV)] + [("PyTorch", TORCH)] * args.torch

    def note(name, who, ms):
        row = times.setdefault(name, {})
        row[who] = min(row.get(who, float("inf")), ms)

    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds} ...", file=sys.stderr)
        ours = bench("--json", "--threads", threads, "--time", seconds, env=environment)
        for row in ours["rows"]:
            note(row["name"], f"ours {row['precision']}", row["ms"])
        for who, script in peers:
            peer = output([exe, "-c", script, threads, seconds, listed], env=environment)
            versions[who] = peer["version"]
            for name, row in peer["rows"].items():
                for precision, ms in row.items():
                    note(name, f"{who} {precision}", ms)
        if args.json:
            report = {"threads": args.threads, "rounds": turn + 1, "versions": versions, "ms": times}
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    print(f"{threads} thread(s) of {ours['gflops'] / args.threads:.0f} GFLOP/s each; "
          + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print("ms for a frame: ours whole, theirs the bare network")
    columns = list(dict.fromkeys(who for row in times.values() for who in row))
    print(f"{'':36}" + "".join(f"{c:>18}" for c in columns))
    for name, row in times.items():
        print(f"{name:36}" + "".join(f"{row[c]:18.2f}" if c in row else f"{'-':>18}" for c in columns))
    print("ratio of their time to ours, above 1 we are faster")
    for name, row in times.items():
        for who in (c for c in row if c.startswith("ours")):
            ratios = ", ".join(f"{c} {row[c] / row[who]:.2f}" for c in row if not c.startswith("ours"))
            print(f"  {name}, {who}: {ratios}")


if __name__ == "__main__":
    main()
