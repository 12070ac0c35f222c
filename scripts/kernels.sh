#!/usr/bin/env bash
# Compiles the CUDA kernels into prebuilt/cuda, which the library embeds. Run it after a change of a
# kernel's source.
#
# Usage: scripts/kernels.sh
#        scripts/kernels.sh SOURCE FOLDER CHIP..     compiles another source into FOLDER instead:
#                                                    PTX for ptx, machine code for others, as 90a
#
# The compiler is NVRTC 12.8 with CUDA's headers. They are installed once from PyPI (90 MB) into
# ~/.cache/tadsr-nvrtc; this needs python3 with pip. Kernels compiled by CUDA 12 run with every
# driver since 525, so a newer compiler is not used. nvdisasm, also from PyPI (5 MB), counts
# instructions. No GPU is needed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cache=$HOME/.cache/tadsr-nvrtc
if [[ ! -d $cache/site ]]; then
    mkdir -p "$cache/wheels"
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$cache/wheels" \
        nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-runtime-cu12==12.8.90
    for wheel in "$cache"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$cache/new"; done
    mv "$cache/new" "$cache/site"
fi
if [[ ! -d $cache/nvdisasm ]]; then
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$cache/wheels" nvidia-cuda-nvdisasm==13.5.37
    python3 -m zipfile -e "$cache"/wheels/nvidia_cuda_nvdisasm-*.whl "$cache/nvdisasm.new"
    chmod +x "$cache"/nvdisasm.new/nvidia/cu13/bin/nvdisasm
    mv "$cache/nvdisasm.new" "$cache/nvdisasm"
fi
cd "$root"
LD_LIBRARY_PATH=$cache/site/nvidia/cuda_nvrtc/lib python3 - "$cache" "$@" <<'PYTHON'
import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile

NVIDIA = pathlib.Path(sys.argv[1]) / "site/nvidia"
NVDISASM = pathlib.Path(sys.argv[1]) / "nvdisasm/nvidia/cu13/bin/nvdisasm"
SHARED = pathlib.Path("src/ops/cuda/kernels/warp.cuh")
PREBUILT = pathlib.Path("prebuilt/cuda")
nvrtc = ctypes.CDLL(str(NVIDIA / "cuda_nvrtc/lib/libnvrtc.so.12"))
nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p


def check(code):
    if code:
        sys.exit(nvrtc.nvrtcGetErrorString(code).decode())


def taken(program, size, get):
    """What one of NVRTC's pairs of functions gives."""
    length = ctypes.c_size_t()
    check(size(program, ctypes.byref(length)))
    buffer = ctypes.create_string_buffer(length.value)
    check(get(program, buffer))
    return buffer.raw


def compiled(path, chip, ptx=False, more=""):
    """The machine code or PTX of a source, with more text after it, for a chip, and what ptxas said."""
    options = [f"--gpu-architecture={'compute' if ptx else 'sm'}_{chip}", "--std=c++17", "--ptxas-options=-v",
               f"--include-path={path.parent}", f"--include-path={SHARED.parent}",
               f"--include-path={NVIDIA / 'cuda_runtime/include'}"]
    program = ctypes.c_void_p()
    source = path.read_bytes() + more.encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, path.name.encode(), 0, None, None))
    arguments = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    log = taken(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
    if failed:
        sys.exit(log)
    if ptx:
        return taken(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX), log
    return taken(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log


def resources(log, chip):
    """What a chip's kernels take, by ptxas."""
    kernel = spills = None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for", line):
            kernel = found.group(1).removeprefix("tadsr_")
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = found.groups()
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            yield kernel, chip, found.group(1), shared.group(1) if shared else "0", *spills


def instructions(image):
    """The instructions outside and inside of loops of each kernel in machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(image)
        cubin.flush()
        text = subprocess.run([NVDISASM, "-c", cubin.name], check=True, capture_output=True, text=True).stdout
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        labels, code = {}, []
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label.group(1)] = len(code)
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                code.append(found.group(1))
        looped = set()
        for at, text in enumerate(code):
            target = labels.get((re.search(r"BRA.*?(\.L_x_\d+)", text) or [None, None])[1], at)
            looped |= set(range(target, at + 1)) if target < at else set()
        # The end is padded, after a branch to itself.
        once = [text for at, text in enumerate(code) if at not in looped and not text.startswith("NOP")][:-1]
        yield re.match(r"\w+", section)[0], once, [code[at] for at in sorted(looped)]


# Instances of the kernels in tiles: type of the words, components, side of a cell.
TILES = [(words, *shape) for words in ("uint8_t", "uint16_t") for shape in ((1, 2), (1, 4), (2, 2))]


def tiles(chip):
    """Instructions for a sample of the kernels in tiles, for frames of 2 and 4 times the size."""
    names = {f"{kernel}_{words}_{components}_{r}": (kernel, words, components, r)
             for kernel in ("unpack", "pack") for words, components, r in TILES}
    more = "".join(
        f"extern \"C\" __global__ void __launch_bounds__(TILE_THREADS) {name}(const __grid_constant__ Frame f) {{"
        f" __shared__ __align__(16) float lines[TILE_ROWS * LINE];"
        f" {kernel}_tile<{words}, {components}, {r}>(f, f.{'sources' if kernel == 'unpack' else 'components'}"
        f"[blockIdx.z], lines); }}\n" for name, (kernel, words, components, r) in names.items())
    image, _ = compiled(pathlib.Path("src/engine/lite/cuda/kernels/student.cu"), chip, more=more)
    for name, once, looped in instructions(image):
        if name in names:
            kernel, words, components, r = names[name]
            # A tile of 256 x 16 samples has so many groups of eight source samples in a row.
            per_sample = [len(once) / 16 + len(looped) * groups / 256 for groups in (18, 10)]
            yield kernel, 8 if words == "uint8_t" else 16, components, r, chip, *map(round, per_sample)


def candidates(chip):
    """Registers, bytes and instructions of the candidates for kernels."""
    image, log = compiled(pathlib.Path("benches/gpu/candidates.cu"), chip)
    rows = {kernel: row for kernel, *row in resources(log, chip)}
    for name, once, looped in instructions(image):
        # Without predicates.
        names = [re.sub(r"^@!?\w+\s+", "", text) for text in looped]
        products, loads = (sum(n.startswith(kind) for n in names) for kind in (("HMMA", "HGMMA"), "LDSM"))
        yield name, *rows[name], len(once), len(looped), products, loads


def fnv(*contents):
    """FNV-1a, 64 bits, of one after the other."""
    value = 0xCBF29CE484222325
    for byte in b"".join(contents):
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def portable(ptx):
    """PTX for drivers older than the compiler, which refuse its version of PTX. The code does not need
    that version, so it is set to 8.0, the version of CUDA 12.0. The pragmas are newer hints."""
    ptx = re.sub(rb"\.version \d+\.\d+", b".version 8.0", ptx, count=1)
    return re.sub(rb"[ \t]*\.pragma \"used_bytes_mask[^\n]*\n", b"", ptx)


if len(sys.argv) > 2:
    source, folder, *chips = sys.argv[2:]
    target = pathlib.Path(folder) / pathlib.Path(source).name
    for chip in chips:
        if chip == "ptx":
            target.with_suffix(".ptx").write_bytes(portable(compiled(pathlib.Path(source), 80, ptx=True)[0]))
        else:
            target.with_suffix(f".sm_{chip}.cubin").write_bytes(compiled(pathlib.Path(source), chip)[0])
    sys.exit()

# Machine code for each generation, if embedded, and PTX for newer GPUs.
rows = []
for source, chips, embedded in [("src/engine/lite/cuda/kernels/student", [75, 80, 86, 89, 90, 100, 120], True),
                                ("src/ops/cuda/kernels/layers", [80, 86, 89, 90, 100, 120], False)]:
    source = pathlib.Path(f"{source}.cu")
    target = PREBUILT / source.name
    images = []
    for chip in chips:
        image, log = compiled(source, chip)
        rows += resources(log, chip)
        if embedded:
            target.with_suffix(f".sm_{chip}.cubin").write_bytes(image)
            images.append(image)
    image = portable(compiled(source, 80, ptx=True)[0])
    # The text ends with a zero byte, which candle adds itself.
    if not embedded:
        image = image.rstrip(b"\0")
    target.with_suffix(".ptx").write_bytes(image)
    sources = fnv(source.read_bytes(), SHARED.read_bytes())
    target.with_suffix(".hash").write_text(f"{sources} {fnv(*images, image)}\n")
if not rows:
    sys.exit("ptxas said nothing of registers")
with open("docs/cuda-kernels.md", "w") as out:
    out.write("# Resources of the CUDA kernels\n\n"
              "`scripts/kernels.sh` writes this table from the report of ptxas for\n"
              "`src/engine/lite/cuda/kernels` and `src/ops/cuda/kernels`. All columns but registers are in bytes.\n\n"
              "| kernel | chip | registers | shared memory | stack | spill stores | spill loads |\n"
              "|---|---|---|---|---|---|---|\n")
    for kernel, chip, *rest in sorted(rows):
        out.write(f"| {kernel} | sm_{chip} | {' | '.join(rest)} |\n")
    out.write("\n## Instructions of the kernels in tiles\n\n"
              "Instructions of a thread divided by the 16 samples that it computes, rounded, for frames of 2\n"
              "and 4 times the size. They are counted in the machine code, not measured: those outside of the\n"
              "loop that resamples vertically once, with both sides of every branch, those of the loop as\n"
              "often as it runs on average in a tile within the frame. `cell` is the side of a cell in samples.\n\n"
              "| kernel | bits of a word | components | cell | chip | 2x | 4x |\n"
              "|---|---|---|---|---|---|---|\n")
    for row in sorted(row for chip in (75, 86, 90) for row in tiles(chip)):
        kernel, bits, components, r, chip, *counts = map(str, row)
        out.write(f"| {kernel} | {bits} | {components} | {r} | sm_{chip} | {' | '.join(counts)} |\n")
    out.write("\n## Candidates\n\n"
              "`benches/gpu/candidates.cu` has kernels that may replace some of these. `row16` and `row32`\n"
              "compute a layer of 16 or 32 channels and read each row once, `fused16` two layers of 16 channels,\n"
              "and `group64` a layer of 64 channels with wgmma (compute capability 9.0). None is in the product\n"
              "or has run on a GPU: `benches/gpu.sh` checks and times them. Tests execute their source on the\n"
              "CPU and emulate wgmma by its specification, except for its fences.\n\n"
              "Instructions are counted in the machine code, outside and inside of loops, and of the latter\n"
              "products (mma or wgmma) and loads of matrices. The main loop of `group64` computes two rows,\n"
              "that of the others three. Spilled are the bytes of stores and loads of spilled registers.\n\n"
              "| kernel | chip | registers | shared memory | spilled | outside | inside | products | loads |\n"
              "|---|---|---|---|---|---|---|---|---|\n")
    for name, chip, registers, shared, _, stores, loads, *counts in sorted(
            row for chip in ("80", "86", "89", "90a") for row in candidates(chip) if row[0] != "direct"):
        out.write(f"| {name} | sm_{chip} | {registers} | {shared} | {stores} + {loads} | "
                  f"{' | '.join(map(str, counts))} |\n")
PYTHON
