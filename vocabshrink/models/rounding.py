"""Symmetric round-to-nearest of weight matrices to 8 or 4 bits: of arrays for files, and of a model in training.
Formats are those of `run.formats`. Codes are rounded against the float16 scale that is stored. At 4 bits the scale of a
group is the one of least squared error among many near the plain one (extreme / -8), which raises the mean cosine of
all-MiniLM's file with the unrounded model from 0.952 to 0.959 in groups of 64 and from 0.939 to 0.952 in groups of 128.
Among them is every scale that gives the extreme a whole code, so a model trained through rounding and baked is written
without loss. Not done: error feedback (GPTQ)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vocabshrink.run.formats import FLOATS, Formats, bits_and_group, format_of, formats_of

# What the extreme value of a 4-bit group is divided by. Scales up to 30 % smaller make small values finer and cut
# extremes; whole numbers make the extreme a whole code.
DIVISORS = [-800 / percent for percent in (*range(100, 69, -2), *range(102, 112, 2))] + list(range(1, 8))


@dataclass(frozen=True)
class Quantized:
    """codes [rows, columns] int8, scales [rows, groups] float16; value = code * scale of its group."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group_size: int


def fit_scales(weight: Tensor, format: str) -> Tensor:
    """weight [rows, columns] -> scales [rows, groups], float32 that float16 can hold. int8: extreme / 127. 4 bits: the
    one of least squared error among extreme / DIVISORS, of either sign."""
    at_once = max(1, 2**17 // max(weight.shape[1], 1))  # rows that stay in a processor's cache: three times as fast
    if len(weight) > at_once and weight.device.type == "cpu":
        return torch.cat([fit_scales(part, format) for part in weight.split(at_once)])
    bits, size = bits_and_group(format, weight.shape[1])
    blocks = _blocks(weight, size)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))[..., 0]
    if bits == 8:
        return _float16(extreme.abs() / 127)
    best, least = _float16(extreme / -8), torch.full_like(extreme, torch.inf)
    for divisor in (sign * divisor for divisor in DIVISORS for sign in (1, -1)):
        scales = _float16(extreme / divisor)
        error = (_codes(blocks, scales, bits) * scales[..., None] - blocks).square().sum(2)
        best, least = torch.where(error < least, scales, best), torch.minimum(least, error)
    return best


def _blocks(weight: Tensor, size: int) -> Tensor:
    """[rows, columns] -> [rows, groups, size] float32, filled up with zeros."""
    return nn.functional.pad(weight.float(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def _float16(scales: Tensor) -> Tensor:
    return scales.clamp(-65504, 65504).half().float()  # float16's range


def _codes(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes as float32; zeros where the scale is zero: a group of zeros, or below float16's smallest."""
    inverse = torch.where(scales == 0, 0, 1 / scales)[..., None]
    return (blocks * inverse).round_().clamp_(*((-127, 127) if bits == 8 else (-8, 7)))


def quantize(weight: np.ndarray, format: str) -> Quantized:
    """weight [rows, columns] -> codes and scales. |error| <= 0.51 |scale|, unless a 4-bit extreme is cut."""
    bits, size = bits_and_group(format, weight.shape[1])
    if not weight.any():  # as of a shape that is only weighed: nothing to fit
        scales = np.zeros((len(weight), -(-weight.shape[1] // size)), dtype=np.float16)
        return Quantized(np.zeros(weight.shape, dtype=np.int8), scales, bits, size)
    values = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    scales = fit_scales(values, format)
    codes = _codes(_blocks(values, size), scales, bits).flatten(1)[:, : weight.shape[1]]
    return Quantized(codes.to(torch.int8).numpy(), scales.half().numpy(), bits, size)


class Rounding(nn.Module):
    """A weight as its file will hold it; the gradient passes as if nothing had been rounded (straight-through,
    Bengio et al. 2013). At 4 bits the scales stay as fitted until `refit`: cheap, and the grid stands still."""

    def __init__(self, weight: Tensor, format: str):
        super().__init__()
        self.format, self.fixed = format, format.startswith("int4")
        self.register_buffer("scales", fit_scales(weight.detach(), format) if self.fixed else None)

    def forward(self, weight: Tensor) -> Tensor:
        kept = weight.detach()
        if self.format in FLOATS:
            values = kept.half() if self.format == "fp16" else kept
        else:
            bits, size = bits_and_group(self.format, kept.shape[1])
            scales = self.scales if self.fixed else fit_scales(kept, self.format)
            values = (_codes(_blocks(kept, size), scales, bits) * scales[..., None]).flatten(1)[:, : kept.shape[1]]
        return values.to(weight.dtype) + (weight - kept)


def quantization_aware(model: nn.Module, formats: Formats) -> nn.Module:
    """Makes, in place, every matrix of the model one that is rounded whenever it is used. The optimiser must be made
    after this, and the model saved after `bake`: until then its state_dict has other names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            rounding = Rounding(module.weight, format_of(name, 2, formats_of(formats)))
            parametrize.register_parametrization(module, "weight", rounding, unsafe=True)
    return model


@torch.no_grad()
def refit(model: nn.Module) -> None:
    """Fits the scales to the weights again: every hundred steps or so, never within one."""
    for module in filter(parametrize.is_parametrized, model.modules()):
        (rounding,), weight = module.parametrizations.weight, module.parametrizations.weight.original
        if rounding.fixed:
            rounding.scales.copy_(fit_scales(weight, rounding.format))


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Undoes `quantization_aware`, in place, leaving in every parameter the values that a file will hold."""
    kept = {module.format for module in model.modules() if isinstance(module, Rounding)}
    for module in list(filter(parametrize.is_parametrized, model.modules())):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for vector in (parameter for parameter in model.parameters() if parameter.dim() == 1 and kept != {"fp32"}):
        vector.copy_(vector.half())
    return model


def fake_quantize_(model: nn.Module, formats: Formats) -> nn.Module:
    """Replaces, in place, every parameter by the value that a delivery keeps of it."""
    return bake(quantization_aware(model, formats))
