"""The depthwise gate on a GPU, in Triton: the operators of gate.cpp with the same names, arguments and results.

Verified by Triton's interpreter on a CPU, and compiled for two generations of GPUs; not timed on one. A program takes
P positions (of all images, in the order of channels_last) times N channels; neighbours come through the cache.

    forward    y = x s,  s = sigmoid(g),  g = b_c + 3 x 3 depthwise correlation of x with w_c
    backward   h = dy x s (1 - s) goes to memory once, then  dx = dy s + transposed correlation of h with w
               dw = correlation of h with x,  db = sum of h: partial sums, added up in a fixed order

Arithmetic is float32 whatever the storage.
"""

# Triton carries no types, and the arguments of its kernels are positional.
# ruff: noqa: PLR0917
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_POSITIONS, _CHANNELS, _CHUNKS = 32, 64, 128


@triton.jit
def _load(tensor, p, inside, c, C, H, W, t):
    """Values (P, N) of a tensor (positions, C) at tap t of positions p; zero outside the image."""
    row = p // W % H + t // 3 - 1
    column = p % W + t % 3 - 1
    there = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (p + (t // 3 - 1) * W + t % 3 - 1)[:, None] * C + c[None, :]
    return tl.load(tensor + at, mask=there[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _correlation(tensor, w, p, inside, c, C, H, W, TRANSPOSED: tl.constexpr):
    """The 3 x 3 correlation (P, N) with w (9, C)."""
    total = tl.zeros((p.shape[0], c.shape[0]), tl.float32)
    for t in tl.static_range(9):
        weight = tl.load(w + t * C + c, mask=c < C, other=0.0)
        total += weight[None, :] * _load(tensor, p, inside, c, C, H, W, 8 - t if TRANSPOSED else t)
    return total


@triton.jit
def _gate(x, w, b, p, inside, c, C, H, W):
    """sigmoid(g), (P, N)."""
    g = _correlation(x, w, p, inside, c, C, H, W, False)
    if b is not None:
        g += tl.load(b + c, mask=c < C, other=0.0)[None, :]
    return tl.sigmoid(g)


@triton.jit
def _forward(x, w, b, y, positions, C, H, W, P: tl.constexpr, N: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = p < positions
    value = _load(x, p, inside, c, C, H, W, 4) * _gate(x, w, b, p, inside, c, C, H, W)
    mask = inside[:, None] & (c < C)[None, :]
    tl.store(y + p[:, None] * C + c[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _terms(x, dy, w, b, h, dx, positions, C, H, W, P: tl.constexpr, N: tl.constexpr):
    """Write h, and dy s to dx."""
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = p < positions
    s = _gate(x, w, b, p, inside, c, C, H, W)
    through = _load(dy, p, inside, c, C, H, W, 4) * s
    term = through * _load(x, p, inside, c, C, H, W, 4) * (1.0 - s)
    mask = inside[:, None] & (c < C)[None, :]
    at = p[:, None] * C + c[None, :]
    tl.store(dx + at, through.to(dx.dtype.element_ty), mask=mask)
    tl.store(h + at, term.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _add_transposed(h, w, dx, positions, C, H, W, P: tl.constexpr, N: tl.constexpr):
    """Add the transposed correlation of h with w to dx."""
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = p < positions
    value = _load(dx, p, inside, c, C, H, W, 4) + _correlation(h, w, p, inside, c, C, H, W, True)
    mask = inside[:, None] & (c < C)[None, :]
    tl.store(dx + p[:, None] * C + c[None, :], value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _sums(h, x, sums, positions, C, H, W, P: tl.constexpr, N: tl.constexpr):
    """Row t of a chunk's sums (10, C): the gradient of tap t; of the bias for t = 9."""
    chunk, t = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for block in range(chunk, tl.cdiv(positions, P), tl.num_programs(0)):
        p = tl.cast(block, tl.int64) * P + tl.arange(0, P)
        inside = p < positions
        term = _load(h, p, inside, c, C, H, W, 4)
        if t < 9:
            term *= _load(x, p, inside, c, C, H, W, t)
        total += tl.sum(term, axis=0)
    tl.store(sums + (chunk * 10 + t) * C + c, total, mask=c < C)


def gate_forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return y like x (B, C, H, W), channels_last, float32 or bfloat16; w (9, C) and b (C,) in float32."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward[_grid(x)](x, w, b, y, *_sizes(x), P=_POSITIONS, N=_CHANNELS)
    return y


def gate_backward(dy: Tensor, x: Tensor, w: Tensor, b: Tensor | None, weights: bool) -> tuple[Tensor, Tensor]:
    """Return dx, and where weights are asked for their partial sums (chunks, 10, C): nine taps and the bias."""
    dx, h = torch.empty_like(x), torch.empty_like(x)
    blocks, groups = _grid(x)
    chunks = min(blocks, _CHUNKS) if weights else 0
    sums = torch.empty(chunks, 10, x.shape[1], device=x.device)
    with torch.cuda.device_of(x):
        _terms[blocks, groups](x, dy, w, b, h, dx, *_sizes(x), P=_POSITIONS, N=_CHANNELS)
        _add_transposed[blocks, groups](h, w, dx, *_sizes(x), P=_POSITIONS, N=_CHANNELS)
        if weights:
            _sums[chunks, groups, 10](h, x, sums, *_sizes(x), P=_POSITIONS, N=_CHANNELS)
    return dx, sums


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.numel() // x.shape[1], x.shape[1], x.shape[2], x.shape[3]


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(_sizes(x)[0], _POSITIONS), triton.cdiv(x.shape[1], _CHANNELS)
