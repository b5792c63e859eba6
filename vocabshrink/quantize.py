"""Symmetric round-to-nearest quantisation of weight matrices, and the same rounding inside a torch model.

One function rounds, and both the ONNX writer and `fake_quantize_` call it, so a quality measured in torch is
the quality of the file. What a format keeps in how many bits is decided once, in `bits_of`: matrices and the
piece table take the format's bits, the position and type tables int8 per row (4 bits there would save 25 KB
of all-MiniLM's 128 positions), vectors (biases, layer norms) float16. Scales are float16 too, and the codes
are rounded against the scale that is stored, not the one that was meant.

At 4 bits the scale of a group is the one of least squared error among 42 near the plain one (extreme / -8):
one second for all-MiniLM, and the file's mean cosine with the unrounded model rises from 0.952 to 0.959 in
groups of 64 and from 0.939 to 0.952 in groups of 128. Not done here: calibration on text, error feedback
(GPTQ), training through the rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

GROUP_SIZES = (32, 64, 128)
SCALE_FACTORS = [sign * percent / 100 for percent in range(100, 68, -2) for sign in (1, -1)]
SCALE_FACTORS += [sign * percent / 100 for percent in range(102, 112, 2) for sign in (1, -1)]
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Quantized:
    """codes [rows, columns] int8, scales [rows, groups] float16; value = code * scale of its group."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group_size: int


def quantize_int8(weight: np.ndarray) -> Quantized:
    """weight [rows, columns] -> codes in -127..127, one scale per row; |error| <= 0.51 scale."""
    return _quantize(weight, bits=8, group_size=max(weight.shape[-1], 1))


def quantize_int4(weight: np.ndarray, group_size: int) -> Quantized:
    """weight [rows, columns] -> codes in -8..7, one scale per `group_size` columns of a row.

    A scale may be negative: the value of largest magnitude is then -8, and all 16 levels are used. It is the
    one of least squared error among the plain one (that value at -8 or 8) and those up to 30 % smaller (small
    values finer, extremes cut) or 10 % larger. |error| <= |scale| / 2 but where a value is cut, and at most
    0.4 of the group's largest magnitude.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size}: use one of {GROUP_SIZES}")
    return _quantize(weight, bits=4, group_size=group_size)


def _quantize(weight: np.ndarray, bits: int, group_size: int) -> Quantized:
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, not shape {weight.shape}")
    if not np.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    padded = np.zeros((rows, groups * group_size), dtype=np.float32)
    padded[:, :columns] = weight
    blocks = padded.reshape(rows, groups, group_size)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    if bits == 8:
        scales = _float16(np.abs(extreme) / 127)
        codes = _round(blocks, scales, -127, 127)
    else:
        scales = _least_error_scales(blocks, extreme / -8)
        codes = _round(blocks, scales, -8, 7)
    return Quantized(codes.astype(np.int8).reshape(rows, -1)[:, :columns], scales, bits, group_size)


def _least_error_scales(blocks: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """blocks [rows, groups, group_size], plain [rows, groups] -> the best candidates, float16."""
    best, least = _float16(plain), np.full(plain.shape, np.inf, dtype=np.float32)
    for factor in SCALE_FACTORS:
        scales = _float16(plain * factor)
        error = _round(blocks, scales, -8, 7) * scales.astype(np.float32)[..., None] - blocks
        error = np.einsum("rgc,rgc->rg", error, error)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def _float16(scales: np.ndarray) -> np.ndarray:
    return np.clip(scales, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def _round(blocks: np.ndarray, scales: np.ndarray, low: int, high: int) -> np.ndarray:
    """Codes as float32; zeros where the scale is zero: a group of zeros, or below float16's smallest."""
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, 0, 1 / scales.astype(np.float32))[..., None]
    return np.clip(np.rint(blocks * inverse), low, high)


def dequantize(quantized: Quantized) -> np.ndarray:
    """-> [rows, columns] float32."""
    scales = np.repeat(quantized.scales.astype(np.float32), quantized.group_size, axis=1)
    return quantized.codes.astype(np.float32) * scales[:, : quantized.codes.shape[1]]


def bits_of(name: str, dimensions: int, bits: int) -> int:
    """Bits in which a delivery of `bits` (4 or 8) keeps the parameter `name`: 4, 8, or 16 for float16."""
    if dimensions != 2:
        return 16
    return 8 if "position_embeddings" in name or "token_type_embeddings" in name else bits


def round_trip(name: str, weight: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """The values that a delivery of `bits` keeps of the parameter `name`: float32, same shape."""
    kept = bits_of(name, weight.ndim, bits)
    if kept == 16:
        return weight.astype(np.float16).astype(np.float32)
    return dequantize(quantize_int4(weight, group_size) if kept == 4 else quantize_int8(weight))


@torch.no_grad()
def fake_quantize_(model: nn.Module, bits: int, group_size: int = 128) -> nn.Module:
    """Replace, in place, every parameter by the value that a delivery of `bits` (4 or 8) keeps of it."""
    if bits not in (4, 8):
        raise ValueError(f"bits {bits}: use 4 or 8")
    for name, parameter in model.named_parameters():
        values = round_trip(name, parameter.float().cpu().numpy(), bits, group_size)
        parameter.copy_(torch.from_numpy(values))
    return model
