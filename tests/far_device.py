"""A second device without a second device: tensors that say they are on `meta`, hold their values all the same, and
refuse what a GPU refuses. What a GPU would have to be waited for is counted.

`meta` because torch takes its name everywhere without looking for a driver.
"""

import contextlib
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
# The size or the value of what these give is known only once the device has computed it
READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "_unique2", "unique_dim"}
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Far(torch.Tensor):
    """A tensor on the second device; near: its values on the CPU."""

    @staticmethod
    def __new__(cls, near):
        options = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **options)
        made.near = near
        return made

    def __repr__(self, **_):
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise RuntimeError(f"{function}: a tensor of the device was touched by a thread that has no business with it")


def near(value):
    return value.near if isinstance(value, Far) else value


class FarDevice(TorchDispatchMode):
    """While it is entered, `.to("meta")` keeps values. Raises RuntimeError for operations on tensors of two devices."""

    def __init__(self):
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        name, target = function._schema.name.removeprefix("aten::"), keywords.get("device")
        tensors = [t for t in tree_flatten((arguments, keywords))[0] if isinstance(t, torch.Tensor)]
        far = [t for t in tensors if isinstance(t, Far)]
        if far and name not in ("copy_", "_to_copy"):
            strays = [t for t in tensors if not isinstance(t, Far) and t.ndim]  # a number may be anywhere
            if strays:
                shapes = [tuple(t.shape) for t in strays]
                raise RuntimeError(f"{name}: tensors on the device and, of shapes {shapes}, not on it")
            indices = [t for t in tree_flatten(arguments[1])[0] if t is not None] if name in INDEXED else []
            if name in READS or any(t.dtype == torch.bool for t in indices):
                self.reads.append(name)
        if target is not None:
            keywords["device"] = torch.device("cpu")
            if far and torch.device(target) != DEVICE:
                self.reads.append(f"{name} to {target}")
        if name == "copy_" and far and not isinstance(arguments[0], Far):
            self.reads.append("copy_ to the host")
        found = function(*tree_map(near, arguments), **tree_map(near, keywords))
        if name.endswith("_") and arguments and isinstance(arguments[0], torch.Tensor):
            return arguments[0]  # changed in place
        lands = torch.device(target) == DEVICE if target is not None else bool(far)
        if name == "copy_" or not lands:
            return found
        return tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, found)


class FarAccelerator:
    """What the loop needs of an Accelerator of one process, on the second device."""

    device, num_processes, process_index, is_main_process, sync_gradients = DEVICE, 1, 0, True, True
    scaler, ddp_handler, trackers = None, SimpleNamespace(), ()
    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)

    def __init__(self, settings, _run):
        self.gradient_accumulation_steps = settings.gradient_accumulation

    def prepare(self, task, optimizer):
        self.task, optimizer.optimizer = task, optimizer
        return task.to(DEVICE), optimizer

    def accumulate(self, _):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()
        if self.task.reads_all:  # then no process may be left without a gradient
            unread = [name for name, p in self.task.named_parameters() if p.requires_grad and p.grad is None]
            assert not unread, unread

    def reduce(self, value, _how):
        return value

    def unwrap_model(self, model, **_):
        return model

    def init_trackers(self, *_, **__):
        pass

    log = wait_for_everyone = init_trackers


def install(monkeypatch) -> None:
    """Makes the package train, measure and augment on the second device, with the GPU's attention."""
    import transformers
    from accelerate import PartialState

    from vocabshrink.models import loading, teacher
    from vocabshrink.stages import tasks, training
    from vocabshrink.training import loop

    class WithGPU:
        cuda = SimpleNamespace(is_available=lambda: True)

        def __getattr__(self, name):
            return getattr(torch, name)

    autocast, save = torch.autocast, transformers.PreTrainedModel.save_pretrained

    def save_near(model, *arguments, **options):  # safetensors reads memory, which there is none of
        device = model.device
        save(model.cpu(), *arguments, **options)
        model.to(device)

    monkeypatch.setattr(loading, "torch", WithGPU())
    monkeypatch.setattr(training, "make_accelerator", FarAccelerator)
    monkeypatch.setattr(tasks, "make_accelerator", FarAccelerator)
    # neither knows this device: torch's fused optimizer, and inference mode, which does without what `Far` is made with
    monkeypatch.setitem(loop.OPTIMIZERS, "adamw", partial(torch.optim.AdamW, foreach=True))
    monkeypatch.setattr(tasks, "predict", torch.no_grad()(teacher.predict.__wrapped__))
    monkeypatch.setattr(PartialState, "device", property(lambda self: DEVICE, lambda self, value: None), raising=False)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_near)
