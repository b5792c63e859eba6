"""Loading: the one way from a folder to a config, a model or its tensors.
Teachers are strangers' files. So every model is read from safetensors alone (unpickling can run code), no folder's own
code is run, and whatever transformers stumbles over becomes one sentence. Weights are float32 whatever files hold."""

import copy
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_MODELS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_MODELS
from transformers.utils import logging as transformers_logging

from tokenizer_build.errors import InputError
from tokenizer_build.files import parse_json, stamp, write_text
from tokenizer_build.tokenizer import shared_tokenizer

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
SAFE = {"trust_remote_code": False, "local_files_only": True}  # no folder's code is run, and nothing is downloaded


def resolve_model(model: str, revision: str | None = None, *, key: str = "model") -> Path:
    """The folder of a model: a local folder, `package:NAME/SUBFOLDER`, or a hub name, for which `revision` may name a
    branch, tag or commit. key: where it is asked for. Raises InputError where there is no such model."""
    folder = Path(model).expanduser()
    if model.startswith("package:"):
        name, _, inner = model.removeprefix("package:").partition("/")
        try:
            (place,) = importlib.util.find_spec(name).submodule_search_locations
        except (ModuleNotFoundError, ValueError, AttributeError, TypeError):  # not there, or no name, or no package
            missing = f"package {name} is not installed: pip install {name.replace('_', '-')}"
            raise InputError(f"{key} {model}: {missing}") from None
        folder = Path(place, inner)
    if folder.is_dir():
        if revision:
            key = f"{key.removesuffix('model')}revision"
            raise InputError(f"{key}: {model} is a local folder, which has no revisions: leave the key out")
        return folder
    if model.startswith((".", "/", "~", "package:")) or model.count("/") > 1:
        raise InputError(f"{key} {model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        kept = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=kept))
    except (OSError, ValueError) as error:  # all that huggingface_hub raises: no such name, no network, no access
        failure = f"neither a local folder nor to be had from the hub: {str(error).splitlines()[0]}"
        raise InputError(f"{key} {model}{f' at {revision}' * bool(revision)}: {failure}") from None


@contextmanager
def refusing(place: Path, remedy: str = "download it again, or save it with save_pretrained") -> Iterator[None]:
    """Turns whatever a file or folder makes transformers stumble over into an InputError of one sentence."""
    try:
        yield
    except Exception as error:  # of any kind: OSError, KeyError, TypeError, SafetensorError, StrictDataclassError ...
        said = shorten(str(error).replace(str(place), place.name), 200, placeholder=" ...")
        raise InputError(f"{place}: cannot be loaded: {type(error).__name__}: {said}: {remedy}") from error


def load_config(folder: Path):
    """A model folder's config. Raises InputError for what is no config, or not an encoder's."""
    with refusing(folder):
        config = AutoConfig.from_pretrained(folder, **SAFE)
    if not getattr(config, "num_hidden_layers", 1) > 0:
        raise InputError(f"{folder}/config.json: num_hidden_layers is {config.num_hidden_layers}: it has no layers")
    if not (getattr(config, "vocab_size", None) or config.is_encoder_decoder):
        raise InputError(f"{folder}: {config.model_type} reads no text: only encoders of text can be teachers")
    only_writes = config.model_type in CAUSAL_MODELS.keys() - MASKED_MODELS.keys()  # BERT's line can be built as either
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or only_writes:
        raise InputError(f"{folder}: {config.model_type} has a decoder: only encoders can be teachers")
    if getattr(config, "transformers_weights", None):
        raise InputError(f"{folder}/config.json: transformers_weights names other weights: call them model.safetensors")
    return config


def load_model(folder: Path, loader=AutoModel, **options):
    """`loader.from_pretrained` of a folder, in eval mode. Raises InputError for weights strange, damaged, or missing,
    unless of a head or the pooler, which then start at random."""
    weight_files(folder)
    # eager trains 1.6 times as fast on a CPU in bf16; on a GPU transformers chooses sdpa for those that have it
    options |= {"attn_implementation": None if torch.cuda.is_available() else "eager", "dtype": torch.float32}
    with refusing(folder):
        model, found = loader.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **SAFE, **options)
    body = "" if loader is AutoModel else f"{model.base_model_prefix}."
    if missing := sorted(n for n in found["missing_keys"] if n.startswith(body) and "pooler" not in n):
        fault = f"the weights lack {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise InputError(f"{folder}: {fault}: config.json is another model's, or download them again")
    if not get_total_norm(model.parameters()).isfinite():
        raise InputError(f"{folder}: the weights are not finite: download them again")
    return model


def check_folder(folder: Path, sha256: str | None = None):
    """The config of a model's folder, judged without its weights (unless for `sha256`), once while its files stay as
    they are; tokenizer.json is made if need be. Raises InputError for missing parts, another hash, other sizes."""
    if not (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file():
        convert_tokenizer(folder)
    return copy.deepcopy(_checked(folder, sha256, stamp(folder)))


@lru_cache(8)
def _checked(folder: Path, sha256: str | None, files: tuple):
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not a model folder: {name} is missing: save model and tokenizer there")
    config, tensors = load_config(folder), tensors_in(folder)
    if sha256 and (found := weights_sha256(folder)) != sha256:
        raise InputError(f"{folder}: the weights' sha256 is {found}, the recipe's is {sha256}: not the same weights")
    if (layers := getattr(config, "num_hidden_layers", 0)) > len(tensors):  # which would take hours to lay out
        raise InputError(f"{folder}: config.json says {layers} layers, the weights have {len(tensors)} tensors")
    with refusing(folder), torch.device("meta"):  # nothing is allocated
        model = AutoModel.from_config(config)
    stored = {name.removeprefix(f"{model.base_model_prefix}."): shape for name, (_, shape) in tensors.items()}
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    other = [name for name, shape in shapes.items() if stored.get(name, shape) != shape]
    wrong = [f"config.json gives {name} the shape {shapes[name]}, the weights have {stored[name]}" for name in other]
    pieces = shared_tokenizer(folder).get_vocab_size()
    if pieces > (rows := getattr(config, "vocab_size", pieces)):
        wrong.append(f"the tokenizer has {pieces} pieces, the model's table only {rows} rows")
    if wrong:
        raise InputError(f"{folder}: {wrong[0]}: one of the two belongs to another model")
    if any("pooler" not in name for name in shapes.keys() - stored.keys()):
        load_model(folder)  # which knows weights by their older names, and refuses those that are not there
    return config


def convert_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json of a tokenizer's older files, as transformers reads them; nothing where there are none."""
    kinds = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model", "merges.txt", "vocab.txt")
    for old in [name for name in kinds if (folder / name).is_file()][:1]:
        with refusing(folder / old, "pip install sentencepiece protobuf, or put a tokenizer.json beside it"):
            content = AutoTokenizer.from_pretrained(folder, **SAFE).backend_tokenizer.to_str()
        print(f"{folder}: tokenizer.json made of {old}", file=sys.stderr)
        write_text(folder / "tokenizer.json", content)


def weight_files(folder: Path) -> list[Path]:
    """What transformers loads: model.safetensors, or the shards that its index names, in order of name. Raises
    InputError where there is neither, and for shards that are missing or outside the folder."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "pytorch_model.bin").is_file():
            raise InputError(f"{folder}: no model.safetensors: convert the weights with save_pretrained")
        loader = (load_config(folder).architectures or ["AutoModel"])[0]
        line = f"import transformers as t; t.{loader}.from_pretrained('{folder}').save_pretrained('{folder}')"
        fault = "unpickling pytorch_model.bin can run code, so it is not read"
        raise InputError(f'{folder}: {fault}: if you trust it, convert it: python -c "{line}"')
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of shards: save the model again with save_pretrained") from None
    if wrong:  # a snapshot's files may be links, so names decide what is outside
        raise InputError(f"{index}: shard {wrong[0]} is missing or outside the folder: put it beside its index")
    return [folder / name for name in names]


def weights_sha256(folder: Path) -> str:
    """The hash of all weights that would be loaded, shard by shard."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def tensors_in(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """{tensor: (its file, its shape)}, from the headers of a folder's weights. Raises InputError for a damaged file."""
    found = {}
    for path in weight_files(folder):
        with refusing(path), safe_open(path, framework="pt") as file:
            found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return found


def read_tensors(folder: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """{key: tensor in float32} of {key: the tensor's name in a folder's weights}."""
    files, found = tensors_in(folder), {}
    for key, name in names.items():
        with safe_open(files[name][0], framework="pt") as file:
            found[key] = file.get_tensor(name).float()
    return found
