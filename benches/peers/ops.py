#!/usr/bin/env python3
"""Compares our group norm, attention, upsampling and GELU with PyTorch's, on the same cores.

    benches/peers/ops.py [--threads N] [--rounds N] [--json OUT]

As conv.py. PyTorch uses the faster of its two memory layouts, and of fused and plain attention.
"""

import json

import peers

TORCH = peers.TORCH + r"""
def timed(shapes, train, variants):
    times = []
    for f in variants:
        inputs = [torch.randn(s, requires_grad=train) for s in shapes]
        # Maps are [n, h, w, c]; each variant converts them to a layout of PyTorch.
        def step():
            for i in inputs:
                i.grad = None
            y = f(*inputs)
            if train:
                y.sum().backward()
        with torch.inference_mode(not train):
            times.append(best(step))
    return min(times)

def last(f):  # channels last: a view
    return lambda x, *rest: f(x.permute(0, 3, 1, 2), *rest)

def first(f):  # channels first: the same numbers read as [n, c, h, w]
    return lambda x, *rest: f(x.view(x.shape[0], x.shape[3], x.shape[1], x.shape[2]), *rest)

def norm(x, w, b):
    return F.silu(F.group_norm(x, 32, w, b, 1e-6), inplace=not x.requires_grad)

def upsample(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")

def mask(side, window, shift):
    if shift == 0:
        return None
    band = torch.zeros(side)
    band[side - window : side - shift] = 1
    band[side - shift :] = 2
    region = (3 * band[:, None] + band[None, :]).view(side // window, window, side // window, window)
    region = region.permute(0, 2, 1, 3).reshape(-1, window * window)
    return (region[:, None, :] != region[:, :, None]).float() * -100

def windows(shift, fused):
    m = mask(64, 8, shift)
    def f(qkv, bias):
        n, heads, d, l = qkv.shape[0], 6, 32, 64
        if shift:
            qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
        parts = qkv.view(n, 8, 8, 8, 8, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, n * 64, heads, l, d)
        q, k, v = parts.unbind(0)
        table = bias if m is None else (m.view(1, 64, 1, l, l) + bias).expand(n, 64, heads, l, l).reshape(n * 64, heads, l, l)
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=table.expand(n * 64, heads, l, l))
        else:
            y = (q * d**-0.5 @ k.transpose(-2, -1) + table).softmax(-1) @ v
        y = y.view(n, 8, 8, heads, 8, 8, d).permute(0, 1, 4, 2, 5, 3, 6).reshape(n, 64, 64, heads * d)
        return torch.roll(y, (shift, shift), (1, 2)) if shift else y
    return f

def whole(fused):
    def f(qkv):
        q, k, v = qkv.view(1, 1, 4096, 3, 512).unbind(3)
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q * 512**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return f

rows = {}
suffix = lambda train: ", with gradients" if train else ""
for n, side, c, train in [(1, 256, 128, False), (1, 64, 512, False), (8, 64, 160, True)]:
    name = f"group norm + SiLU {n}x{side}x{side}x{c}{suffix(train)}"
    rows[name] = timed([(n, side, side, c), (c,), (c,)], train, [last(norm), first(norm)])
for n, shift, train in [(1, 0, False), (1, 4, False), (8, 4, True)]:
    name = f"attention {n}x64x64, 6 heads of 32, window 8, shift {shift}{suffix(train)}"
    rows[name] = timed([(n, 64, 64, 576), (6, 64, 64)], train, [windows(shift, True), windows(shift, False)])
for train in [False, True]:
    name = f"attention 1x64x64, 1 head of 512, whole map{suffix(train)}"
    rows[name] = timed([(1, 64, 64, 1536)], train, [whole(True), whole(False)])
for n, side, c, train in [(1, 128, 256, False), (8, 32, 320, True)]:
    name = f"upsample 2x {n}x{side}x{side}x{c}{suffix(train)}"
    rows[name] = timed([(n, side, side, c)], train, [last(upsample), first(upsample)])
for n, c, train in [(1, 768, False), (8, 768, True)]:
    rows[f"GELU {n}x64x64x{c}{suffix(train)}"] = timed([(n, 64, 64, c)], train, [F.gelu])
print(json.dumps({"version": torch.__version__, "rows": rows}))
"""


def main():
    args = peers.parser(__doc__).parse_args()
    ours, theirs, version = {}, {}, ""
    for mine, peer in peers.turns("ops", TORCH, args):
        peers.least(ours, {row["name"]: row["ms"] for row in mine["rows"]})
        peers.least(theirs, peer["rows"])
        version = peer["version"]
    print(f"{args.threads} thread(s), PyTorch {version}; ratio: PyTorch's time over ours")
    print(f"{'':72} {'ours':>9} {'PyTorch':>9} {'ratio':>6}")
    for name, ms in ours.items():
        print(f"{name:72} {ms:6.2f} ms {theirs[name]:6.2f} ms {theirs[name] / ms:6.2f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "pytorch": version, "ours": ours, "theirs": theirs}, indent=1))


if __name__ == "__main__":
    main()
