#!/usr/bin/env python3
"""Compares the terms of distillation at equal PSNR-Y.

    benches/ablation.py --data DIR.. --test DIR.. --begin MODEL --teacher DIR --lpips FILE --out DIR

Each row trains the dial `detail` of the faithful model MODEL, which has none, for the same number
of steps with the same data and seed, and measures it at values of the dial from 0 to 1. LPIPS at a
given loss of PSNR-Y is interpolated between these measurements. `--teacher` is the folder of a
trained teacher (`RUN/teacher`). Each `--teacher` after the first repeats a few rows. Rows that are
in the folder of the output are not trained again.
"""

import argparse
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIAL = [0, 0.15, 0.3, 0.5, 0.75, 1]
LOSSES = [0.1, 0.2, 0.4]

UNPERTURBED = "time_aware = false"
ROWS = {
    "discriminator on images": "pixels = true",
    "on images, with regression": "pixels = true\nregression = 0.3",
    "discriminator on features": UNPERTURBED,
    "two lowest noise levels": "judge_times = 2",
    "all noise levels": "judge_times = 0",
    "with regression": f"{UNPERTURBED}\nregression = 0.3",
    "with score distillation": f"{UNPERTURBED}\nscore = 0.3",
    "with both, two lowest levels": "judge_times = 2\nregression = 0.3\nscore = 0.3",
    "features of the teacher": f"{UNPERTURBED}\nadversarial = 0.0\nfeatures = 0.6",
    "features and pattern": f"{UNPERTURBED}\nadversarial = 0.0\nfeatures = 0.6\npattern = 0.3",
    "features, pattern and discriminator": f"{UNPERTURBED}\nfeatures = 0.6\npattern = 0.3",
    "regression and score alone": "adversarial = 0.0\nregression = 0.3\nscore = 0.3",
}

# Rows of each further teacher.
REPEATED = ["features and pattern", "features, pattern and discriminator"]


def recipe(args, terms, teacher):
    # Both discriminators then have about as many multiplications.
    width = 32 if "pixels" in terms else 64
    return f"""name = "ablation"
size = "{args.size}"
scale = 4.0
conditioning = {{ denoise = true, detail = true }}

[data]
preset = "streaming"

{teacher}
[student]
steps = {args.steps}
batch = 8
patch = 128
learning_rate = 1e-3
muon_rate = 0.0

[student.distillation]
after = 0.0
width = {width}
{terms}
"""


def train(args, name, terms, teacher):
    out = args.out / name.replace(" ", "-").replace(",", "")
    if (out / "model.safetensors").exists() and not (out / "unfinished").exists():
        return out / "model.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    (out / "unfinished").touch()
    path = out / "ablation.toml"
    command = [args.tool, "run", path, "--data", *args.data, "--out", out, "--begin", args.begin]
    command += ["--threads", str(args.threads), "--save-every", "1000000"]
    options = ""
    if terms != ROWS["discriminator on images"]:
        options = "[teacher]\n" + section((teacher.parent / "recipe.toml").read_text(), "teacher")
        command += ["--teacher", teacher]
    path.write_text(recipe(args, terms, options))
    subprocess.run(command, check=True)
    (out / "unfinished").unlink()
    return out / "model.safetensors"


def section(text, name):
    """Returns the keys of a table of a TOML file, with those of its tables."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("["):
            inside = line == f"[{name}]" or line.startswith(f"[{name}.")
            if not inside or line == f"[{name}]":
                continue
        if inside:
            lines.append(line)
    return "\n".join(lines)


def measure(args, model):
    """Returns PSNR-Y and LPIPS of each condition at each value of the dial."""
    path = model.with_name("measured.json")
    if not path.exists():
        names = [f"{model}@detail={d},precision=f32" for d in DIAL]
        command = [args.tool, "eval", "--data", *args.test, "--scale", "4", "--lpips", args.lpips]
        command += ["--condition", "clean,jpeg60", "--interpolation", "catmull-rom"]
        command += [f"--model={name}" for name in names] + ["--json", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    means = json.loads(path.read_text())["means"]
    curves = {}
    for mean in means:
        if "@detail=" in mean["method"]:
            point = (mean["psnr_y"], mean["lpips"])
            curves.setdefault(mean["condition"], []).append(point)
    return curves


def at_loss(curve, loss):
    """Returns LPIPS where PSNR-Y is `loss` below the first point of the curve."""
    goal = curve[0][0] - loss
    for (before, a), (after, b) in zip(curve, curve[1:]):
        if after <= goal <= before:
            share = (before - goal) / (before - after)
            return a + share * (b - a)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="photos and videos to train on")
    parser.add_argument("--test", nargs="+", required=True, help="images to measure on")
    parser.add_argument("--begin", required=True, help="faithful model without the dial")
    parser.add_argument("--size", default="small", help="its size")
    parser.add_argument("--teacher", type=Path, action="append", required=True)
    parser.add_argument("--lpips", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tool", default=ROOT / "target/release/tadsr-train")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [(name, terms, args.teacher[0]) for name, terms in ROWS.items()]
    for number, teacher in enumerate(args.teacher[1:], 2):
        rows += [(f"{name}, teacher {number}", ROWS[name], teacher) for name in REPEATED]
    conditions = ("clean", "jpeg60")
    header = "".join(f" {condition} {loss} |" for condition in conditions for loss in LOSSES)
    table = [f"| LPIPS at a loss in dB of |{header} at 1, clean | at 1, jpeg60 |"]
    table.append("|---" * (len(LOSSES) * 2 + 3) + "|")
    for name, terms, teacher in rows:
        curves = measure(args, train(args, name, terms, teacher))
        cells = []
        for condition in conditions:
            for loss in LOSSES:
                found = at_loss(curves[condition], loss)
                cells.append("-" if found is None else f"{found:.4f}")
        ends = [f"{curves[c][-1][0]:.2f} / {curves[c][-1][1]:.4f}" for c in conditions]
        table.append(f"| {name} | " + " | ".join(cells + ends) + " |")
        print("\n".join(table), flush=True)
    start = {c: curve[0] for c, curve in curves.items()}
    print("at 0:", {c: f"{psnr:.2f} / {lpips:.4f}" for c, (psnr, lpips) in start.items()})


if __name__ == "__main__":
    main()
