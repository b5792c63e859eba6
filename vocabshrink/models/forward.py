"""A pass through a backbone, and the pooling of what it gives: pieces into units (words), pieces into a sentence.
Queries, keys and values are read by hooks on the layers that compute them, so that transformers' fast attention stays
in use, which never shows its scores. Whatever is compared is pooled into units first, in float32 under autocast too.
Sums over pieces are `index_add`s, whose order, and so whose last bit, a GPU does not fix from run to run."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Pieces
from vocabshrink.data.held_out import Embed
from vocabshrink.models.families import PARTS, layer_modules, positions_of
from vocabshrink.models.loading import refusing
from vocabshrink.run.recipe import POOLINGS


@dataclass
class Pass:
    """What a backbone's pass gave. hidden: all hidden states [B, T, D], embedding output first, or the last one only.
    queries, keys, values: of each layer [B, T, D], heads side by side, in the pass's dtype; None if not asked for."""

    hidden: tuple[Tensor, ...]
    queries: tuple[Tensor, ...] | None = None
    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None


@contextmanager
def hooked(modules: Iterable[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """A list that fills with each module's output, or its first input, as they run."""
    found: list[Tensor] = []
    with ExitStack() as handles:
        for module in modules:
            hook = module.register_forward_hook(lambda _, taken, given: found.append(taken[0] if inputs else given))
            handles.callback(hook.remove)
        yield found


def run_backbone(backbone: nn.Module, side: Pieces, *, embeddings=None, layers=False, qkv=False) -> Pass:
    """A pass over ids, or over embeddings [B, T, D_E] made outside: all hidden states (`layers`) or the last only."""
    projections = [[*dict.fromkeys(layer_modules(backbone, part))] for part in PARTS[:3] * qkv]
    inputs = {"input_ids": side.ids} if embeddings is None else {"inputs_embeds": embeddings}
    if side.token_types is not None and getattr(backbone.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = side.token_types
    inputs["attention_mask"] = side.attention_mask
    if getattr(backbone.config, "_attn_implementation", "") == "sdpa":
        # given as two dimensions, transformers asks the mask whether it hides anything, and waits
        full = bool((side.lengths == side.ids.shape[1]).all())
        inputs["attention_mask"] = None if full else side.attention_mask[:, None, None].bool()
    with ExitStack() as stack:
        found = [stack.enter_context(hooked(modules)) for modules in projections]
        output = backbone(**inputs, output_hidden_states=layers)
    return Pass(output.hidden_states if layers else (output.last_hidden_state,), *map(tuple, found))


def pool_sentence(hidden: Tensor, attention_mask: Tensor, pooling: str, normalize: bool) -> Tensor:
    """[B, T, D], [B, T] -> sentence embedding [B, D] in float32."""
    hidden = hidden.float()
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "cls":
        vector = hidden[:, 0]
    elif pooling == "max":
        vector = hidden.masked_fill(mask == 0, -torch.inf).amax(1)
    elif pooling == "last":
        places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        vector = hidden[torch.arange(len(hidden), device=hidden.device), (attention_mask * places).argmax(1)]
    else:
        counts = mask.sum(1).clamp_min(1)
        vector = (hidden * mask).sum(1) / (counts.sqrt() if pooling == "mean_sqrt" else counts)
    return F.normalize(vector, dim=-1) if normalize else vector


# {one of POOLINGS: its name in sentence-transformers' 1_Pooling/config.json}
MODES = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last": "lasttoken"}
MODES |= {"mean_sqrt": "mean_sqrt_len_tokens"}
DENSE_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")  # torch's names


@dataclass(frozen=True)
class ModuleSettings:
    """What a sentence-transformers folder says of itself; a folder without modules.json is pooled by the defaults.
    max_seq_length: in pieces. prompts: {name: what stands before each text}; default_prompt: the name of the one that
    is used unasked. dense: folders of the linear layers behind the pooling, which a student's do not have."""

    pooling: str = POOLINGS[0]
    normalize: bool = True
    max_seq_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    dense: tuple[Path, ...] = ()

    @property
    def prompt_shares(self) -> dict[str, float]:
        """{name of a prompt: share of text that stands behind it}: as much as behind any other, or behind none."""
        named = [name for name, text in self.prompts.items() if text]
        parts = len(named) + (len(named) < 2 or "" in self.prompts.values())  # where some text has no prompt
        return {name: round(1 / parts, 3) for name in named}

    def files(self, width: int, positions: int) -> dict:
        """{file: JSON content} beside a student of `width` dimensions that reads `positions` pieces."""
        paths = ["", "1_Pooling", "2_Normalize"][: 2 + self.normalize]
        kinds = [f"sentence_transformers.models.{path[2:] or 'Transformer'}" for path in paths]
        modules = enumerate(zip(paths, kinds, strict=True))
        return {
            "modules.json": [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in modules],
            "sentence_bert_config.json": {"max_seq_length": positions, "do_lower_case": False},
            "1_Pooling/config.json": {"word_embedding_dimension": width}
            | {f"pooling_mode_{mode}": self.pooling == name for name, mode in MODES.items()},
            "config_sentence_transformers.json": {"prompts": self.prompts, "default_prompt_name": self.default_prompt},
        }


def module_settings(folder: Path, pooling: str | None = None, normalize: bool | None = None) -> ModuleSettings:
    """Reads what a folder says beside its model; `pooling` and `normalize`, where given, win over it. Raises InputError
    for files of another form, other modules, poolings joined, a dense layer with a residual."""

    def read(name: str) -> dict | list:
        return read_json(folder / name) if (folder / name).is_file() else {}

    try:
        said, limits = read("config_sentence_transformers.json"), read("sentence_bert_config.json")
        prompts, default = dict(said.get("prompts") or {}), said.get("default_prompt_name")
        modules = [(part["path"], part["type"].rpartition(".")[2]) for part in read("modules.json")]
        kinds, options = [kind for _, kind in modules], [read(str(Path(path, "config.json"))) for path, _ in modules]
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{folder}: its sentence-transformers files are of an unknown form: save it again") from None
    if default is not None and default not in prompts:
        raise InputError(f"{folder}: default_prompt_name {default!r} is not one of its prompts, {list(prompts)}")
    form = re.fullmatch("Transformer Pooling( Dense)*( Normalize)?", " ".join(kinds))
    if modules and (not form or modules[0][0]):
        what = f"its modules are {', '.join(kinds)}"
        raise InputError(f"{folder}: {what}: known: only a Transformer beside modules.json, Pooling, Dense, Normalize")
    if any(part.get("use_residual") for part in options):
        raise InputError(f"{folder}: a Dense module with a residual cannot be learnt: take another model")
    if modules and pooling is None:  # its keys changed in sentence-transformers 5
        flags = [key.removeprefix("pooling_mode_") for key, on in options[1].items() if on and "pooling_mode_" in key]
        named = options[1].get("pooling_mode") or flags or [MODES["mean"]]
        named, bare = [named] if isinstance(named, str) else named, not options[1].get("include_prompt", True)
        known = {name: one for one, mode in MODES.items() for name in (mode, one)}
        if len(named) > 1 or named[0] not in known or bare:
            what = " and ".join(named) + " without the prompt" * bare
            remedy = f"give teacher.pooling, one of {', '.join(POOLINGS)}, or another model"
            raise InputError(f"{folder}: pooling by {what} cannot be learnt: {remedy}")
        pooling = known[named[0]]
    normalize = (not kinds or "Normalize" in kinds) if normalize is None else normalize
    dense = tuple(folder / path for path, kind in modules if kind == "Dense")
    prompts = {name: text or "" for name, text in prompts.items()}
    return ModuleSettings(pooling or POOLINGS[0], normalize, limits.get("max_seq_length"), prompts, default, dense)


def load_dense(folders: Sequence[Path], width: int) -> nn.Sequential:
    """What the Dense modules behind a pooling make of vectors [B, width]; of no folders the identity. Raises InputError
    for a module that is damaged, of another width, or of an activation that is not known."""
    layers = nn.Sequential()
    for folder in folders:
        options = {"activation_function": "Tanh", "bias": True} | read_json(folder / "config.json")
        if (name := options["activation_function"].rpartition(".")[2]) not in DENSE_ACTIVATIONS:
            known = ", ".join(DENSE_ACTIVATIONS)
            raise InputError(f"{folder}: activation_function {name} is unknown: take another model, with {known}")
        with refusing(folder):
            linear = nn.Linear(options["in_features"], options["out_features"], bias=options["bias"])
            tensors = load_file(folder / "model.safetensors")
            linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in tensors.items()})
        if linear.in_features != width:
            fault = f"its Dense module reads {linear.in_features} dimensions and is given {width}"
            raise InputError(f"{folder}: {fault}: it belongs to another model")
        layers.extend([linear, getattr(nn, name)()])
        width = linear.out_features
    return layers.requires_grad_(False)


def piece_reader(folder: Path, config: PreTrainedConfig, max_length: int) -> Callable[[list[str]], Pieces]:
    """Texts -> their pieces by a folder's tokenizer, cut at `max_length` or the model's positions."""
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(min(max_length, positions_of(config) or max_length))
    tokenizer.enable_padding(pad_id=config.pad_token_id or 0)

    def read(texts: list[str]) -> Pieces:
        encodings = tokenizer.encode_batch(texts)
        ids, mask = (torch.tensor([getattr(e, part) for e in encodings]) for part in ("ids", "attention_mask"))
        return Pieces(ids, mask, units=ids)

    return read


def torch_embedder(
    backbone, folder: Path, modules: ModuleSettings, *, max_length: int, batch_size=64, prompt=None
) -> Embed:
    """Texts -> [n, D] float32 by a model, cut at `max_length` pieces or the modules' own limit. prompt: put before each
    text. bfloat16's error is far below the differences between models."""
    config, most = backbone.config, min(max_length, modules.max_seq_length or max_length)
    read, dense = piece_reader(folder, config, most), load_dense(modules.dense, config.hidden_size)

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        device = next(backbone.parameters()).device
        order, vectors = np.argsort([len(text) for text in texts], kind="stable"), []
        for start in range(0, len(texts), batch_size):
            side = read([(prompt or "") + texts[i] for i in order[start : start + batch_size]])
            _ = side.lengths  # while they are on the host
            side = side.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = run_backbone(backbone, side).hidden[-1]
            pooled = dense(pool_sentence(hidden, side.attention_mask, modules.pooling, normalize=False).cpu())
            vectors.append((F.normalize(pooled, dim=-1) if modules.normalize else pooled).numpy())
        return np.concatenate(vectors)[np.argsort(order)]

    return embed


def pool_units(hidden: Tensor, units: Tensor, count: int, *, total: bool = False) -> Tensor:
    """Mean (`total`: sum) of each unit's pieces; zero where it has none.
    hidden [B, T, D], units [B, T] (-1 at padding), count U -> [B, U, D] float32."""
    size, _, width = hidden.shape
    slot = torch.where(units >= 0, units, count) + torch.arange(size, device=units.device).unsqueeze(1) * (count + 1)
    pooled = torch.zeros(size * (count + 1), width, device=hidden.device)
    pooled = pooled.index_add(0, slot.flatten(), hidden.float().flatten(0, 1))
    if not total:
        ones = torch.ones(slot.numel(), device=hidden.device)  # bincount would make a GPU wait
        pooled = pooled / pooled.new_zeros(len(pooled)).index_add(0, slot.flatten(), ones).clamp_min(1).unsqueeze(1)
    return pooled.view(size, count + 1, width)[:, :count]


def pool_attention(maps: Tensor, units: Tensor, count: int) -> Tensor:
    """Attention between pieces, maps [B, h, T, T], as attention between units [B, T] -> [B, h, U, U] float32.
    A unit attends with the mean over its pieces and to the sum over the target's, so that rows still sum to one."""
    for total in (False, True):  # [B, h, T, X] -> [B, h, X, U]
        pooled = pool_units(maps.transpose(1, 2).flatten(2), units, count, total=total)
        maps = pooled.unflatten(2, (maps.shape[1], -1)).permute(0, 2, 3, 1)
    return maps
