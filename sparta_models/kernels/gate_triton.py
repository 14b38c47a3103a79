"""The gate and the smooth maximum on a GPU, in Triton: gate.cpp's operators with the same names, arguments and results.

Verified by Triton's interpreter on a CPU, and compiled for two generations of GPUs; not timed on one. A program takes
P positions (of all images, in the order of channels_last) times N channels; neighbours come through the cache.

    forward    y = x sigmoid(g), or with a sharpness the smooth maximum of x and g;
               g = b_c + K x K depthwise correlation of x with w_c, K = 3 or 5
    backward   h = dy dy/dg goes to memory once, then  dx = direct + transposed correlation of h with w
               dw = correlation of h with x,  bias: sum of h;  sharpness: a second map like h, where it is asked for
               partial sums, added up in a fixed order

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
def _load(tensor, p, inside, c, C, H, W, t, K: tl.constexpr):
    """Values (P, N) of a tensor (positions, C) at tap t of positions p; zero outside the image."""
    down, right = t // K - K // 2, t % K - K // 2
    row = p // W % H + down
    column = p % W + right
    there = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (p + down * W + right)[:, None] * C + c[None, :]
    return tl.load(tensor + at, mask=there[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _here(tensor, p, inside, c, C):
    """Values (P, N) of a tensor (positions, C) at positions p."""
    mask = inside[:, None] & (c < C)[None, :]
    return tl.load(tensor + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _of_channels(values, c, C):
    """Values (1, N) of a parameter (C,)."""
    return tl.load(values + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _correlation(tensor, w, p, inside, c, C, H, W, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The K x K correlation (P, N) with w (K K, C)."""
    total = tl.zeros((p.shape[0], c.shape[0]), tl.float32)
    for t in tl.static_range(K * K):
        weight = _of_channels(w + t * C, c, C)
        total += weight * _load(tensor, p, inside, c, C, H, W, K * K - 1 - t if TRANSPOSED else t, K)
    return total


@triton.jit
def _g(x, w, b, p, inside, c, C, H, W, K: tl.constexpr):
    """g, (P, N)."""
    g = _correlation(x, w, p, inside, c, C, H, W, K, False)
    if b is not None:
        g += _of_channels(b, c, C)
    return g


@triton.jit
def _store(tensor, value, p, inside, c, C):
    mask = inside[:, None] & (c < C)[None, :]
    tl.store(tensor + p[:, None] * C + c[None, :], value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _forward(x, w, sharpness, b, y, positions, C, H, W, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = p < positions
    value = _here(x, p, inside, c, C)
    g = _g(x, w, b, p, inside, c, C, H, W, K)
    if sharpness is None:
        value *= tl.sigmoid(g)
    else:
        d = value - g
        value = g + d * tl.sigmoid(_of_channels(sharpness, c, C) * d)
    _store(y, value, p, inside, c, C)


@triton.jit
def _terms(x, dy, w, sharpness, b, h, dx, bend, positions, C, H, W, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Write h, the direct term to dx, and to `bend`, where there is one, dy times y's derivative by the sharpness."""
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = p < positions
    value, dy = _here(x, p, inside, c, C), _here(dy, p, inside, c, C)
    g = _g(x, w, b, p, inside, c, C, H, W, K)
    if sharpness is None:
        s = tl.sigmoid(g)
        direct = dy * s
        term = direct * value * (1.0 - s)
    else:
        d, beta = value - g, _of_channels(sharpness, c, C)
        s = tl.sigmoid(beta * d)
        slope = d * s * (1.0 - s)
        direct = dy * (s + beta * slope)
        term = dy - direct
        if bend is not None:
            _store(bend, dy * d * slope, p, inside, c, C)
    _store(dx, direct, p, inside, c, C)
    _store(h, term, p, inside, c, C)


@triton.jit
def _add_transposed(h, w, dx, positions, C, H, W, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Add the transposed correlation of h with w to dx."""
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = p < positions
    value = _here(dx, p, inside, c, C) + _correlation(h, w, p, inside, c, C, H, W, K, True)
    _store(dx, value, p, inside, c, C)


@triton.jit
def _sums(h, x, bend, sums, positions, C, H, W, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Row t of a chunk's sums (K K + 2, C): the gradients of tap t, then of the bias, then of the sharpness."""
    chunk, t = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for block in range(chunk, tl.cdiv(positions, P), tl.num_programs(0)):
        p = tl.cast(block, tl.int64) * P + tl.arange(0, P)
        inside = p < positions
        term = _here(h, p, inside, c, C)
        if t < K * K:
            term *= _load(x, p, inside, c, C, H, W, t, K)
        if t == K * K + 1:
            term = _here(bend, p, inside, c, C)
        total += tl.sum(term, axis=0)
    tl.store(sums + (chunk * (K * K + 2) + t) * C + c, total, mask=c < C)


def gate_forward(x: Tensor, w: Tensor, sharpness: Tensor | None, b: Tensor | None) -> Tensor:
    """Return y like x (B, C, H, W), channels_last, float32 or bfloat16; w (K K, C), sharpness and b (C,) in float32."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward[_grid(x)](x, w, sharpness, b, y, *_sizes(x), **_blocks(w))
    return y


def gate_backward(
    dy: Tensor, x: Tensor, w: Tensor, sharpness: Tensor | None, b: Tensor | None, weights: bool
) -> tuple[Tensor, Tensor]:
    """Return dx, and where weights are asked for the partial sums (chunks, K K + 2, C): taps, bias, sharpness."""
    dx, h = torch.empty_like(x), torch.empty_like(x)
    bend = torch.empty_like(x) if weights and sharpness is not None else None
    blocks, groups = _grid(x)
    chunks = min(blocks, _CHUNKS) if weights else 0
    sums = torch.zeros(chunks, len(w) + 2, x.shape[1], device=x.device)
    with torch.cuda.device_of(x):
        _terms[blocks, groups](x, dy, w, sharpness, b, h, dx, bend, *_sizes(x), **_blocks(w))
        _add_transposed[blocks, groups](h, w, dx, *_sizes(x), **_blocks(w))
        if weights:
            rows = len(w) + (1 if bend is None else 2)
            _sums[chunks, groups, rows](h, x, bend if bend is not None else h, sums, *_sizes(x), **_blocks(w))
    return dx, sums


def _blocks(w: Tensor) -> dict[str, int]:
    return {"K": 3 if len(w) == 9 else 5, "P": _POSITIONS, "N": _CHANNELS}


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.numel() // x.shape[1], x.shape[1], x.shape[2], x.shape[3]


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(_sizes(x)[0], _POSITIONS), triton.cdiv(x.shape[1], _CHANNELS)
