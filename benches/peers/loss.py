#!/usr/bin/env python3
"""Measures what the int8 and bf16 inference of ONNX Runtime and OpenVINO costs in quality.

    benches/peers/loss.py --calibrate FOLDER --data FOLDER.. [--model NAME_OR_PATH@SCALE]..

Uses the virtual environment of engine.py and target/release/tadsr-train, which must be built. Each
network is exported from planes to planes at denoise 0 and detail 0, and its convolutions are
quantised: by ONNX Runtime's static quantisation (QDQ, one scale per channel), and by NNCF with its
defaults, both calibrated on squares of 60 images. Prints the loss of PSNR-Y against f32, in dB, on
images that Pillow shrinks by BICUBIC. `tadsr-train eval` measures our engine:

    tadsr-train eval --data FOLDER.. --scale 2 --condition clean --json OUT \\
        --model tiny-x2@denoise=0,precision=f32 --model tiny-x2@denoise=0,precision=int8
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import engine

MODELS = ["tiny-x2@2", "small-x2@2", "base-x2@2", "tiny-x4@4", "small-x4@4", "base-x4@4"]

MEASURE = engine.COMMON + r"""
import logging
logging.disable(logging.WARNING)
from pathlib import Path
from PIL import Image
import nncf, openvino as ov
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
onnx_path, scale, calibration, *folders = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]

def images(folder):
    return sorted(p for p in Path(folder).iterdir() if p.suffix in (".png", ".jpg"))

def luma(image):
    return np.asarray(image.convert("RGB"), np.float32) @ np.float32([65.481, 128.553, 24.966]) / (255 * 219)

def pair(path, side=None):
    '''Luma of an image, and of the image after it was shrunk and enlarged.'''
    image = Image.open(path).convert("RGB")
    x, y = (max(0, (n - side) // 2) if side else 0 for n in image.size)
    w, h = (min(side or n, n) // (4 * scale) * 4 for n in image.size)
    image = image.crop((x, y, x + w * scale, y + h * scale))
    low = image.resize((w, h), Image.BICUBIC)
    return luma(image), np.asarray(Image.fromarray(luma(low)).resize(image.size, Image.BICUBIC))[None, None]

def psnr(a, b):
    error = (a - np.clip(b, 0, 1))[scale:-scale, scale:-scale] * 219 / 255
    return -10 * np.log10(np.mean(error * error))

squares = [pair(p, 384)[1] for p in images(calibration)[::4][:60]]

class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = list(squares)

    def get_next(self):
        return {"y": self.left.pop()} if self.left else None

quantised = onnx_path.replace(".onnx", ".loss.onnx")
quantize_static(onnx_path, quantised, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=["Conv"])
model = ov.Core().read_model(onnx_path)
others = nncf.IgnoredScope(types=["Add", "Subtract", "Multiply", "Divide"], validate=False)
int8 = nncf.quantize(model, nncf.Dataset(squares), subset_size=len(squares), ignored_scope=others)

def openvino(model, precision):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda y: compiled([y])[0]

session = ort_session(quantised, 0)
ways = {"f32": openvino(model, "f32"), "OpenVINO bf16": openvino(model, "bf16"), "OpenVINO int8": openvino(int8, "f32"),
        "ONNX Runtime int8": lambda y: session.run(None, {"y": y})[0]}
pairs = [pair(p) for folder in folders for p in images(folder)]
means = {name: float(np.mean([psnr(want, way(y)[0, 0]) for want, y in pairs])) for name, way in ways.items()}
print(json.dumps({"images": len(pairs)} | {name: means["f32"] - mean for name, mean in means.items() if name != "f32"}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FOLDER", help="images for the ranges of values")
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="FOLDER", help="images to measure on")
    parser.add_argument("--model", action="append", metavar="NAME@SCALE", help="models (default: the bundled ones)")
    args = parser.parse_args()
    exe = engine.python()
    subprocess.run([exe, "-m", "pip", "install", "--quiet", "pillow"], check=True)
    engine.WORK.mkdir(parents=True, exist_ok=True)
    for name in args.model or MODELS:
        model, scale = name.rsplit("@", 1)
        onnx = engine.WORK / f"{Path(model).stem}-{scale}-loss.onnx"
        tool = engine.ROOT / "target" / "release" / "tadsr-train"
        subprocess.run([tool, "export", "--model", model, "--scale", scale, "--onnx", onnx], check=True,
                       stdout=subprocess.DEVNULL)
        row = engine.output([exe, "-c", MEASURE, onnx, scale, args.calibrate, *args.data], stderr=subprocess.DEVNULL)
        count = row.pop("images")
        print(f"{name}, {count} images, dB lost: " + ", ".join(f"{way} {loss:.3f}" for way, loss in row.items()), flush=True)


if __name__ == "__main__":
    main()
