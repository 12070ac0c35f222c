#!/usr/bin/env python3
"""Compares one step of the real-world ResShift model, 64x64 to 256x256 pixels, with PyTorch.

    benches/peers/resshift.py [--threads N] [--rounds N] [--side 64] [--device cuda] [--json OUT]

PyTorch runs the networks as plain modules, without compilation, in f32, or in f16 on a CUDA device,
in the faster of its two memory layouts. Weights are random and the same on both sides. PyTorch
writes them to a file under target/peers, with the inputs and its results in f32, with which ours are
compared. Both sides run in turn on the same cores, and each side's best time counts. Memory is the
peak of the process (VmHWM), measured only on the CPU.
"""

import json
import subprocess
import sys

import peers

TORCH = peers.TORCH + r"""
from torch import nn

mode, path, layout, SIDE = sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) / 1024

def act(): return nn.SiLU(inplace=True)

# The U-Net. Modules are nested so that parameters have the names of the published files.

class ResBlock(nn.Module):
    def __init__(self, ci, co, time):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, ci), act(), nn.Conv2d(ci, co, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * co))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, co), act(), nn.Identity(), nn.Conv2d(co, co, 3, padding=1))
        self.skip_connection = nn.Identity() if ci == co else nn.Conv2d(ci, co, 1)
    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)

class WindowAttention(nn.Module):
    def __init__(self, c, heads, window, shift, side):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        self.index = (y[:, None] - y[None] + window - 1) * (2 * window - 1) + x[:, None] - x[None] + window - 1
        mask = None
        if shift:
            # As in the authors' code: only in the lowest windows, and there by columns.
            region = torch.arange(window**2) % window + shift >= window
            mask = torch.zeros((side // window) ** 2, window**2, window**2)
            mask[-(side // window) :] = (region[:, None] != region[None]).float() * -100
        self.register_buffer("mask", mask, persistent=False)
    def cut(self, x):
        n, h, w, c = x.shape
        k = self.window
        return x.view(n, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, c)
    def forward(self, x):  # [n, h, w, c]
        n, h, w, c = x.shape
        k, l = self.window, self.window**2
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        q, k_, v = self.qkv(self.cut(x)).view(-1, l, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index.view(-1)].view(l, l, -1).permute(2, 0, 1)[None]
        if self.mask is not None:
            bias = (bias + self.mask[:, None]).repeat(n, 1, 1, 1)
        y = (q * (c // self.heads) ** -0.5 @ k_.transpose(-2, -1) + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, l, c))
        y = y.view(n, h // k, w // k, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y

class Mlp(nn.Module):
    def __init__(self, c, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, hidden, 1), nn.Conv2d(hidden, c, 1)
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class SwinBlock(nn.Module):
    def __init__(self, c, side, window, shift):
        super().__init__()
        if side <= window:
            window, shift = side, 0
        self.norm1, self.norm2 = nn.GroupNorm(32, c), nn.GroupNorm(32, c)
        # Windows are those of a latent of 64 x 64, the mask is that of this latent.
        self.attn, self.mlp = WindowAttention(c, c // 32, window, shift, side * SIDE // 64), Mlp(c, 4 * c)
    def forward(self, x):
        x = x + self.attn(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.mlp(self.norm2(x))

class Proj(nn.Module):
    def __init__(self, ci, co):
        super().__init__()
        self.proj = nn.Conv2d(ci, co, 1)
    def forward(self, x):
        return self.proj(x)

class Swin(nn.Module):
    def __init__(self, c, side, dim=192, window=8):
        super().__init__()
        self.patch_embed, self.patch_unembed = Proj(c, dim), Proj(dim, c)
        self.blocks = nn.ModuleList(SwinBlock(dim, side, window, i * window // 2) for i in range(2))
    def forward(self, x):
        x = self.patch_embed(x)
        for b in self.blocks:
            x = b(x)
        return self.patch_unembed(x)

class Down(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)
    def forward(self, x):
        return self.op(x)

class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)
    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

class Unet(nn.Module):
    def __init__(self, c=160, mult=(1, 2, 2, 4), side=64):
        super().__init__()
        self.c, t = c, 4 * c
        self.time_embed = nn.Sequential(nn.Linear(c, t), nn.SiLU(), nn.Linear(t, t))
        inputs, outputs, skips, ch = [nn.ModuleList([nn.Conv2d(6, c, 3, padding=1)])], [], [c], c
        for level, m in enumerate(mult):
            for i in range(2):
                block = [ResBlock(ch, m * c, t)]
                ch = m * c
                if i == 0:
                    block.append(Swin(ch, side >> level))
                inputs.append(nn.ModuleList(block))
                skips.append(ch)
            if level + 1 < len(mult):
                inputs.append(nn.ModuleList([Down(ch)]))
                skips.append(ch)
        self.input_blocks = nn.ModuleList(inputs)
        bottom = side >> (len(mult) - 1)
        self.middle_block = nn.ModuleList([ResBlock(ch, ch, t), Swin(ch, bottom), ResBlock(ch, ch, t)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(3):
                block = [ResBlock(ch + skips.pop(), m * c, t)]
                ch = m * c
                if i == 0:
                    block.append(Swin(ch, side >> level))
                if level and i == 2:
                    block.append(Up(ch))
                outputs.append(nn.ModuleList(block))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(nn.GroupNorm(32, ch), act(), nn.Conv2d(ch, 3, 3, padding=1))
    def run(self, block, x, emb):
        for layer in block:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
    def forward(self, x, t, lq):
        half = self.c // 2
        angles = t * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()])[None].to(x.dtype))
        h, skips = torch.cat([x, lq], 1), []
        for block in self.input_blocks:
            h = self.run(block, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)

# The autoencoder.

def norm(c): return nn.GroupNorm(32, c, eps=1e-6)

class Res(nn.Module):
    def __init__(self, ci, co):
        super().__init__()
        self.norm1, self.conv1 = norm(ci), nn.Conv2d(ci, co, 3, padding=1)
        self.norm2, self.conv2 = norm(co), nn.Conv2d(co, co, 3, padding=1)
        self.nin_shortcut = nn.Identity() if ci == co else nn.Conv2d(ci, co, 1)
    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h), inplace=True))

class Attn(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))
    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(y)

class Mid(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Res(c, c), Attn(c), Res(c, c)
    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))

class Level(nn.Module):
    pass

class Halve(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)
    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))

class Encoder(nn.Module):
    def __init__(self, c=128, mult=(1, 2, 4)):
        super().__init__()
        self.conv_in, ch, levels = nn.Conv2d(3, c, 3, padding=1), c, []
        for i, m in enumerate(mult):
            level = Level()
            level.block = nn.ModuleList([Res(ch, m * c), Res(m * c, m * c)])
            ch = m * c
            if i + 1 < len(mult):
                level.downsample = Halve(ch)
            levels.append(level)
        self.down, self.mid = nn.ModuleList(levels), Mid(ch)
        self.norm_out, self.conv_out = norm(ch), nn.Conv2d(ch, 3, 3, padding=1)
    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for b in level.block:
                x = b(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))

class Decoder(nn.Module):
    def __init__(self, c=128, mult=(1, 2, 4)):
        super().__init__()
        ch = c * mult[-1]
        self.conv_in, self.mid, levels = nn.Conv2d(3, ch, 3, padding=1), Mid(ch), {}
        for i, m in reversed(list(enumerate(mult))):
            level = Level()
            level.block = nn.ModuleList([Res(ch if j == 0 else m * c, m * c) for j in range(3)])
            ch = m * c
            if i:
                level.upsample = Up(ch)
            levels[i] = level
        self.up = nn.ModuleList(levels[i] for i in range(len(mult)))
        self.norm_out, self.conv_out = norm(ch), nn.Conv2d(ch, 3, 3, padding=1)
    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for b in level.block:
                x = b(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))

class Quantize(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8192, 3)
    def forward(self, z):
        flat, e = z.permute(0, 2, 3, 1).reshape(-1, 3), self.embedding.weight
        d = flat.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * flat @ e.t()
        n, c, h, w = z.shape
        return self.embedding(d.argmin(1)).view(n, h, w, c).permute(0, 3, 1, 2)

class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.quantize = Encoder(), Decoder(), Quantize()
        self.quant_conv, self.post_quant_conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

torch.manual_seed(1)
unet, ae = Unet().eval(), Autoencoder().eval()
lq, noise = torch.rand(1, 3, SIDE, SIDE) * 2 - 1, torch.randn(1, 3, SIDE, SIDE)
weights = sum(p.numel() for m in (unet, ae) for p in m.parameters()) * 4 / 2**20
# The reference results are in f32 throughout.
torch.backends.cudnn.allow_tf32 = False
if CUDA and mode == "run":
    unet, ae, lq, noise = (m.half() for m in (unet, ae, lq, noise))
if layout == "channels_last":
    unet, ae, lq, noise = (m.to(memory_format=torch.channels_last) for m in (unet, ae, lq, noise))

def step():
    stages = []
    def stage(name, f):
        t = time.perf_counter()
        y = f()
        finish()
        stages.append((name, (time.perf_counter() - t) * 1e3, y))
        return y
    image = stage("bicubic", lambda: F.interpolate(lq, scale_factor=4, mode="bicubic"))
    z_y = stage("encode", lambda: ae.quant_conv(ae.encoder(image)))
    sigma = 2.0 * 0.99  # kappa sqrt(eta) at the last of 15 times
    z0 = stage("unet", lambda: unet((z_y + sigma * noise) / (sigma**2 + 1) ** 0.5, 14, lq))
    quant = stage("quantize", lambda: ae.quantize(z0))
    stage("decode", lambda: ae.decoder(ae.post_quant_conv(quant)))
    return stages

def save(path, tensors):  # as safetensors
    header, at = {}, 0
    for name, t in tensors.items():
        size = t.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().numpy().tobytes())

with torch.inference_mode():
    if mode == "save":
        tensors = {"lq": lq, "noise": noise}
        for part, m in (("unet", unet), ("autoencoder", ae)):
            tensors.update({f"{part}.{k}": v for k, v in m.state_dict().items()})
        tensors.update({f"wanted.{name}": y for name, _, y in step()})
        save(path, tensors)
        print(json.dumps({"weights_mib": weights}))
    else:
        before, runs = status("VmRSS"), []
        for _ in range(20 if CUDA else 3):
            runs.append({name: ms for name, ms, _ in step()})
            runs[-1]["total"] = sum(runs[-1].values())
        ms = {name: min(r[name] for r in runs) for name in runs[0]}
        memory = {"before_mib": before, "peak_mib": status("VmHWM"), "weights_mib": weights}
        print(json.dumps({"version": torch.__version__, "ms": ms, "memory": memory}))
"""


def main():
    parser = peers.parser(__doc__, threads=2, devices=True)
    parser.add_argument("--side", type=int, default=64, help="of the small picture, a multiple of 64 (default 64)")
    args = parser.parse_args()
    exe, threads = peers.python(), str(args.threads)
    peers.ENVIRONMENT.mkdir(parents=True, exist_ok=True)
    file = peers.ENVIRONMENT / "resshift.safetensors"

    def run(side):
        out = subprocess.run(side, cwd=peers.ROOT, env=peers.environment(args), check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(out.stdout)

    def torch(mode, layout):
        return run([exe, "-c", TORCH, threads, mode, file, layout, str(args.side)])

    bench = peers.bench("resshift", args.device) + ["--json", "--threads", threads, "--weights", file]
    if args.device != "cpu":
        bench += ["--steps", "20"]
    torch("save", "contiguous")
    ours, theirs, memory, peer_memory, off = {}, {}, {}, {}, {}
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds} ...", file=sys.stderr)
        for layout in ("channels_last", "contiguous"):
            mine = run(bench)
            peers.least(ours, dict(mine["ms"]))
            memory, off = mine["memory"], mine["off"]
            peer = torch("run", layout)
            version = peer["version"]
            if peer["ms"]["total"] < theirs.get("total", float("inf")):
                theirs, best_layout, peer_memory = peer["ms"], layout, peer["memory"]
    file.unlink()
    print(f"{threads} thread(s), PyTorch {version}, {best_layout}; ratio: our time over PyTorch's, below 1 we are faster")
    print(f"{'':10} {'ours':>11} {'PyTorch':>11} {'ratio':>6}  difference")
    for name, ms in ours.items():
        difference = f"{off[name]:.1e}" if name in off else ""
        print(f"{name:10} {ms:8.1f} ms {theirs[name]:8.1f} ms {ms / theirs[name]:6.2f}  {difference}")
    weights = peer_memory["weights_mib"]
    activations = peer_memory["peak_mib"] - peer_memory["before_mib"]
    limit = weights + activations
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "pytorch": version, "layout": best_layout, "ours": ours,
                                         "theirs": theirs, "off": off, "memory": memory, "peer_memory": peer_memory}, indent=1))
    if args.device != "cpu":
        return
    print(f"memory: ours {memory['peak_mib']:.0f} MiB at the peak; weights {weights:.0f} MiB and PyTorch's activations "
          f"{activations:.0f} MiB are {limit:.0f} MiB: {memory['peak_mib'] / limit:.2f} of that")
    print(f"(PyTorch's process: {peer_memory['peak_mib']:.0f} MiB)")


if __name__ == "__main__":
    main()
