#!/usr/bin/env python3
"""Compares our training steps of students, teacher and distillation with PyTorch's.

    benches/peers/train.py [--threads N] [--rounds N] [--device cuda] [--json OUT]

A step is forward, backward, AdamW and the moving average of the weights, with batch 16 on a grid of
48x48 in f32. On a CUDA device it is in bf16, in PyTorch by its automatic mixed precision. PyTorch
uses the faster of its two memory layouts, fused AdamW and a batched average. Its spectral norms need
three power iterations in a step of distillation, ours two. Both sides run in turn for some rounds on
the same cores. Each side's best time counts, because the noise of a machine only adds time.
"""

import json

import peers

TORCH = peers.TORCH + r"""
from torch import nn
import copy

BATCH, GRID = 16, 48

FEATURES = torch.tensor([[-0.11], [0.0121]])

def mixed():
    return torch.autocast("cuda", torch.bfloat16) if CUDA else contextlib.nullcontext()

def frequencies(half):
    return torch.exp(-math.log(10000.0) * torch.arange(half) / half)

class Conv(nn.Module):
    # 3x3 convolution. The kernel may be a product, the bias a function of the scale.
    def __init__(self, ci, co, expand=None):
        super().__init__()
        self.expand = expand
        if expand:
            self.wide, self.squeeze = nn.Parameter(torch.randn(expand, ci, 3, 3) * 0.05), nn.Parameter(torch.randn(co, expand) * 0.05)
        else:
            self.weight = nn.Parameter(torch.randn(co, ci, 3, 3) * 0.05)
        self.bias, self.scale = nn.Parameter(torch.zeros(co)), nn.Parameter(torch.zeros(co, 2))
    def forward(self, x, features):
        weight = (self.squeeze @ self.wide.flatten(1)).view(-1, *self.wide.shape[1:]) if self.expand else self.weight
        return F.conv2d(x, weight, self.bias + (self.scale @ features)[:, 0], padding=1)

class Student(nn.Module):
    def __init__(self, z, c, depth, pairs=False, expand=None):
        super().__init__()
        self.pairs = pairs
        self.head, self.tail = Conv(z, c, expand), Conv(c, z, expand)
        self.body = nn.ModuleList(Conv(c, c, expand) for _ in range(2 * depth if pairs else depth))
    def forward(self, x):
        act = lambda x: F.leaky_relu(x, 0.1, inplace=True)
        x = act(self.head(x, FEATURES))
        if self.pairs:
            for a, b in zip(self.body[::2], self.body[1::2]):
                x = x + b(act(a(x, FEATURES)), FEATURES)
        else:
            for layer in self.body:
                x = act(layer(x, FEATURES))
        return self.tail(x, FEATURES)

class Block(nn.Module):
    def __init__(self, ci, co, e):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(ci // 16, ci), nn.Conv2d(ci, co, 3, padding=1)
        self.modulation = nn.Linear(e, 2 * co)
        self.norm2, self.conv2 = nn.GroupNorm(co // 16, co), nn.Conv2d(co, co, 3, padding=1)
        self.skip = nn.Conv2d(ci, co, 1) if ci != co else nn.Identity()
    def forward(self, x, e):
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, 1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift, inplace=True))
        return self.skip(x) + y

class Teacher(nn.Module):
    def __init__(self, z, widths=(16, 32, 48), blocks=2):
        super().__init__()
        first, e = widths[0], 4 * widths[0]
        self.embedding = nn.Sequential(nn.Linear(first + 2, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.head = nn.Conv2d(3 * z, first, 3, padding=1)
        self.details = torch.randn(z, z, 1, 1) * 0.1
        self.down = nn.ModuleList(nn.ModuleList(Block(w, w, e) for _ in range(blocks)) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], e) for _ in range(2))
        self.up = nn.ModuleList(nn.ModuleList(Block(2 * w, w, e) for _ in range(blocks)) for w in widths)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norm, self.tail = nn.GroupNorm(first // 16, first), nn.Conv2d(first, z, 3, padding=1)
        self.first = first
    def encode(self, noisy, base, t):
        # Embedding, middle, outputs of all blocks of the encoder, and of the end of each level.
        half = self.first // 2
        angles = t[:, None] * frequencies(half)
        e = self.embedding(torch.cat([angles.cos(), angles.sin(), FEATURES.T.expand(len(t), 2)], 1))
        x, kept, levels = self.head(torch.cat([noisy, base, F.conv2d(base, self.details)], 1)), [], []
        for i, level in enumerate(self.down):
            for block in level:
                x = block(x, e)
                kept.append(x)
            levels.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
        for block in self.middle:
            x = block(x, e)
        return e, x, kept, levels
    def features(self, noisy, base, t):
        _, x, _, levels = self.encode(noisy, base, t)
        return levels + [x]
    def forward(self, noisy, base, t):
        e, x, kept, _ = self.encode(noisy, base, t)
        for i in reversed(range(len(self.up))):
            for block in self.up[i]:
                x = block(torch.cat([x, kept.pop()], 1), e)
            if i:
                x = self.grow[i - 1](F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.tail(F.silu(self.norm(x), inplace=True))

class Head(nn.Module):
    def __init__(self, c, width, e):
        super().__init__()
        spectral = nn.utils.parametrizations.spectral_norm
        self.norm, self.time = nn.GroupNorm(c // 16, c), nn.Linear(e, 2 * c)
        self.convs = nn.Sequential(
            spectral(nn.Conv2d(c, width, 3, padding=1)), nn.LeakyReLU(0.2, inplace=True),
            spectral(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2, inplace=True),
            spectral(nn.Conv2d(width, 1, 1)))
    def forward(self, x, e):
        scale, shift = self.time(e)[:, :, None, None].chunk(2, 1)
        return self.convs(F.silu(self.norm(x) * (1 + scale) + shift, inplace=True))

class Discriminator(nn.Module):
    def __init__(self, channels, width, e):
        super().__init__()
        self.heads, self.e = nn.ModuleList(Head(c, width, e) for c in channels), e
    def forward(self, features, t):
        half = self.e // 2
        angles = t[:, None] * frequencies(half)
        e = F.silu(torch.cat([angles.cos(), angles.sin()], 1))
        return [head(f, e) for head, f in zip(self.heads, features)]

def averaged(parameters):
    averages = [p.detach().clone() for p in parameters]
    return lambda: torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.001)

def adamw(parameters, betas):
    return torch.optim.AdamW(parameters, 1e-4, betas, weight_decay=0.0, fused=True)

def distillation(z):
    times = []
    for layout in (torch.channels_last, torch.contiguous_format):
        student = Student(z, 32, 4, expand=64).to(memory_format=layout)
        teacher = Teacher(z, (32, 48, 64), 1).to(memory_format=layout).requires_grad_(False)
        judge = Discriminator((32, 48, 64, 64), 64, 32).to(memory_format=layout)
        base, truth, noise = [torch.randn(BATCH, z, GRID, GRID).to(memory_format=layout) for _ in range(3)]
        adam, adam_judge = adamw(list(student.parameters()), (0.9, 0.99)), adamw(list(judge.parameters()), (0.9, 0.999))
        average = averaged(list(student.parameters()))
        t = torch.arange(BATCH) % 2
        features = lambda r: teacher.features(r * 0.9 + noise * 0.2, base, t)
        over_heads = lambda heads, f: torch.stack([f(h) for h in heads]).mean()
        def step():
            adam_judge.zero_grad(set_to_none=True)
            with torch.no_grad(), mixed():
                real, fake = features(truth), features(student(base))
            with mixed():
                loss = over_heads(judge(real, t), lambda h: F.relu(1 - h).mean()) + over_heads(judge(fake, t), lambda h: F.relu(1 + h).mean())
            loss.backward()
            assert loss.item() == loss.item()
            adam_judge.step()

            adam.zero_grad(set_to_none=True)
            judge.requires_grad_(False)
            with mixed():
                result = student(base)
            at = result.detach().float().requires_grad_()
            real, = torch.autograd.grad(((at - truth).square() + 4e-4).sqrt().mean(), at)
            with mixed():
                loss = over_heads(judge(features(at), t), lambda h: -h.mean())
            adversarial, = torch.autograd.grad(loss, at)
            judge.requires_grad_(True)
            gradient = real + adversarial * (0.6 * (real.norm() / adversarial.norm()).item())
            result.backward(gradient.to(result.dtype))
            assert all(p.grad is not None for p in student.parameters())
            adam.step()
            average()
        times.append(best(step, 2.5))
    return min(times)

def timed(net, z, loss):
    times = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model = copy.deepcopy(net).to(memory_format=layout)
        parameters = list(model.parameters())
        average = averaged(parameters)
        adam = adamw(parameters, (0.9, 0.99))
        inputs = [torch.randn(BATCH, z, GRID, GRID).to(memory_format=layout) for _ in range(3)]
        def step():
            adam.zero_grad(set_to_none=True)
            with mixed():
                value = loss(model, *inputs)
            value.backward()
            assert value.item() == value.item()
            adam.step()
            average()
        times.append(best(step, 2.5))
    return min(times)

def charbonnier(model, base, truth, _):
    return ((model(base) - truth).square() + 4e-4).sqrt().mean()

def denoising(model, base, noisy, truth):
    return (model(noisy, base, torch.arange(BATCH) % 8) - truth).square().mean()

rows = {
    "tiny, r = 4": timed(Student(16, 32, 4), 16, charbonnier),
    "tiny, r = 4, expanded to 64": timed(Student(16, 32, 4, expand=64), 16, charbonnier),
    "small": timed(Student(24, 64, 4, pairs=True), 24, charbonnier),
    "micro teacher, r = 4": timed(Teacher(16), 16, denoising),
    "distillation of tiny, r = 4": distillation(16),
}
print(json.dumps({"version": torch.__version__, "rows": rows}))
"""


def main():
    args = peers.parser(__doc__, devices=True).parse_args()
    ours, theirs, version = {}, {}, ""
    for mine, peer in peers.turns("train", TORCH, args):
        peers.least(ours, {row["name"]: row["ms"] for row in mine["rows"]})
        peers.least(theirs, peer["rows"])
        version = peer["version"]
    print(f"{args.threads} thread(s), PyTorch {version}; ratio: PyTorch's time over ours, above 1 we are faster")
    print(f"{'':32} {'ours':>10} {'PyTorch':>10} {'ratio':>6}")
    for name, ms in ours.items():
        print(f"{name:32} {ms:7.2f} ms {theirs[name]:7.2f} ms {theirs[name] / ms:6.2f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "pytorch": version, "ours": ours, "theirs": theirs}, indent=1))


if __name__ == "__main__":
    main()
