"""Packed weights: codes of 3, 4 or 8 bits with their scales in one safetensors file, read back as transformers' model.

No ONNX kernel reads 3 bits, and a graph cannot be trained further, so this is the smallest file that gives a torch
model. The price is that only this library reads it, and unpacks it to float32.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing, write_json
from vocabshrink.models.loading import load_config
from vocabshrink.models.rounding import Quantized, dequantize, pack, quantize, unpack
from vocabshrink.run.formats import Formats, bits_and_group, format_of, formats_of, is_float
from vocabshrink.runtime.kinds import KINDS

ARCHITECTURES = tuple(kind.architecture for kind in KINDS.values())


def small_config(model: nn.Module) -> dict:
    """The part of config.json that any loader needs."""
    config = model.config
    kept = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    kept += ["max_position_embeddings", "hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id"]
    if "Classification" in type(model).__name__:
        kept += ["id2label", "label2id", "problem_type"]
    values = {name: getattr(config, name) for name in kept if getattr(config, name, None) is not None}
    return {"architectures": [type(model).__name__], "model_type": config.model_type, **values}


def save_compact(model: nn.Module, folder: str | Path, formats: Formats) -> Path:
    """Write folder/compact.safetensors, and a config.json where there is none; returns its path.

    By parameter name: codes as packed bytes (`pack`, rows one after the other) beside `name.scales` [rows, groups]
    float16, or values in float16 or float32. The metadata's "formats" says which; shapes follow from config.json.
    """
    formats, folder = formats_of(formats), Path(folder)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied table comes once
        values, format = parameter.detach().float().cpu(), format_of(name, parameter.dim(), formats)
        if is_float(format):
            tensors[name] = values.half() if format == "fp16" else values
            continue
        quantized = quantize(values.numpy(), format)
        tensors[name] = torch.from_numpy(pack(quantized.codes.reshape(-1), quantized.bits))
        tensors[name + ".scales"] = torch.from_numpy(quantized.scales)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", small_config(model))
    path = folder / "compact.safetensors"
    with replacing(path) as temporary:
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, temporary, {"formats": json.dumps(formats)})
    return path


@torch.no_grad()
def load_compact(folder: str | Path) -> nn.Module:
    """The model of compact.safetensors and config.json: transformers' own class, float32, in eval mode.

    Raises InputError for an architecture outside ARCHITECTURES and for a file that is damaged or another model's.
    """
    path = Path(folder) / "compact.safetensors"
    for needed in (path, path.with_name("config.json")):
        if not needed.is_file():
            raise InputError(f"{needed} is missing: give a folder that save_compact wrote")
    config = load_config(Path(folder))
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise InputError(f"{folder}/config.json: architecture {architecture} is not one of {ARCHITECTURES}")
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            formats = formats_of(json.loads((file.metadata() or {})["formats"]))
        pooler = {} if architecture != "BertModel" else {"add_pooling_layer": "pooler.dense.weight" in tensors}
        model = getattr(transformers, architecture)(config, **pooler).eval()
        for name, parameter in model.named_parameters():
            values, format = tensors.pop(name), format_of(name, parameter.dim(), formats)
            if not is_float(format):
                bits, size = bits_and_group(format, parameter.shape[1])
                scales, groups = tensors.pop(name + ".scales"), -(-parameter.shape[1] // size)
                if (values.size, *scales.shape) != (-(-parameter.numel() * bits // 8), len(parameter), groups):
                    raise ValueError(f"{name} has another shape")
                codes = unpack(values, bits, parameter.numel())
                values = dequantize(Quantized(codes.reshape(parameter.shape), scales, bits, size))
            if values.shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
            parameter.copy_(torch.from_numpy(values))
        if tensors:
            raise ValueError(f"{sorted(tensors)[0]} is no part of the model")
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is damaged or does not belong to its config.json ({error}): copy both again"
        ) from error
    return model
