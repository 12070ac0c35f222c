#!/usr/bin/env bash
# Compiles the CUDA kernels into the file that the library embeds. Only who changes a kernel needs this.
#
# Usage: scripts/kernels.sh
#
# Takes the compiler from NVCC, or else from ~/.cache/tadsr-cuda13 (CUDA_TK for another folder), where it puts nvcc 13.0
# from PyPI when it is not there yet (105 MB, needs python3 with pip). 13.0 and nothing newer: a driver refuses PTX of a
# toolkit newer than itself. No GPU is needed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

tk=${CUDA_TK:-$HOME/.cache/tadsr-cuda13}
nvcc=${NVCC:-$tk/site/nvidia/cu13/bin/nvcc}
if [[ -z ${NVCC-} && ! -x $nvcc ]]; then
    mkdir -p "$tk/whl"
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$tk/whl" nvidia-cuda-nvcc==13.0.88 \
        nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    for wheel in "$tk"/whl/*.whl; do python3 -m zipfile -e "$wheel" "$tk/site"; done
    chmod -R u+x "$tk/site/nvidia/cu13/bin" "$tk/site/nvidia/cu13/nvvm/bin"
fi

cd "$root/src/engine/cuda/kernels"
# Machine code for each generation, and PTX that newer chips compile when they load it.
chips=(75 80 86 89 90a)
codes=()
for chip in "${chips[@]}"; do codes+=(-gencode "arch=compute_$chip,code=sm_$chip"); done
codes+=(-gencode arch=compute_80,code=compute_80)
report=$(mktemp)
trap 'rm -f "$report"' EXIT
"$nvcc" -O3 -std=c++17 -Xptxas -v -Xfatbin -compress-all --fatbin "${codes[@]}" -o student.fatbin student.cu 2>"$report" || {
    cat "$report" >&2
    exit 1
}
python3 - "$report" "$root/docs/cuda-kernels.md" <<'PYTHON'
"""Writes the table of registers and spills, and the hashes by which a test knows that source and binary belong together."""
import re
import sys

rows, chip, kernel, spills = [], "", "", ""
for line in open(sys.argv[1]):
    if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
        kernel, chip = found.groups()
    elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
        spills = found.groups()
    elif found := re.search(r"Used (\d+) registers", line):
        shared = re.search(r"(\d+) bytes smem", line)
        shared = shared.group(1) if shared else "0"
        rows.append((kernel.removeprefix("tadsr_"), chip, found.group(1), shared, *spills))
if not rows:
    sys.exit("nvcc said nothing of registers")
with open(sys.argv[2], "w") as out:
    out.write("# What the CUDA kernels take of a chip\n\n"
              "Written by `scripts/kernels.sh`, from what ptxas says of `src/engine/cuda/kernels`. Bytes, but for registers.\n\n"
              "| kernel | chip | registers | shared memory | stack | spill stores | spill loads |\n"
              "|---|---|---|---|---|---|---|\n")
    for row in sorted(rows):
        kernel, chip, *rest = row
        out.write(f"| {kernel} | sm_{chip} | {' | '.join(rest)} |\n")


def fnv(path):
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in open(path, "rb").read():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


with open("student.hash", "w") as out:
    out.write(f"{fnv('student.cu')} {fnv('student.fatbin')}\n")
PYTHON
ls -l student.fatbin
