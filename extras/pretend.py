"""A pretend GPU, for tests on machines without one.

Tensors that were sent to "cuda" compute on the CPU, but are marked. What a GPU would refuse fails:
to mix them with tensors of the host, to draw for them from a generator of the host, to take them as
numpy arrays. And where Python would have to wait for the GPU is counted, by function and what was
asked. What it does not know: kernels, memory, speed.
"""

import collections
import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WAITS = {"item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__",
         "bincount", "unique", "masked_select", "multinomial", "equal", "allclose", "__format__"}
COPIES = {"copy_", "__setitem__"}
BETWEEN = COPIES | {"__set__data", "_has_compatible_shallow_copy_type", "view_as", "expand_as"}


class Generator(torch.Generator):
    """A torch.Generator that says where it would be."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


def on_gpu(x):
    return getattr(x, "on_gpu", False)


def tensors(*what):
    return [x for x in tree_leaves(what) if isinstance(x, torch.Tensor)]


def refused(text):
    raise AssertionError(f"on a GPU this fails: {text}")


class PretendGPU(TorchFunctionMode):
    """`with PretendGPU() as gpu:` gpu.waits counts {(function, what): times}."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def wait(self, what):
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.endswith("genie_mini.py"):
            if what == "to" and "torch" in frame.f_code.co_filename:
                return                                   # clipping: it sees through the pretence
            frame = frame.f_back
        if frame and "test_" not in frame.f_code.co_filename:
            self.waits[frame.f_code.co_name, what] += 1

    def send(self, x, place, args, kwargs):
        """x.to(place)."""
        if kwargs.pop("non_blocking", False) * hasattr(x, "pinned") == 0 and (
                (place == CUDA) != on_gpu(x)):
            self.wait("to")
        made = x.to(*args, **kwargs)
        made = made.clone() if made is x and (place == CUDA) != on_gpu(x) else made
        made.on_gpu = place == CUDA
        return made

    def look_up(self, name, index, value=None):
        """x[index], and x[index] = value."""
        for i in index if isinstance(index, tuple) else (index,):
            plain = name == "__setitem__" and not isinstance(value, torch.Tensor)
            if isinstance(i, list) or on_gpu(i) and (
                    i.dtype == torch.bool and not plain or i.dim() == 0):
                self.wait(name)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, given = dict(kwargs or {}), tensors(args, kwargs)
        name = func.__name__
        if name in ("__get__", "__set__"):               # of a property
            name += func.__self__.__name__
        places = {on_gpu(x) for x in given if x.dim()}
        here = any(map(on_gpu, given))
        if name == "__get__device":
            return CUDA if here else CPU
        if name == "to" or name == "as_tensor" and given:
            place = [torch.device(a) for a in (*args[1:], kwargs.pop("device", None))
                     if isinstance(a, (str, torch.device))] + [CUDA if here else CPU]
            rest = [a for a in args[1:] if isinstance(a, torch.dtype)]
            return self.send(args[0], place[0], rest, kwargs)
        if name == "cpu":
            return self.send(args[0], CPU, (), {})
        if name == "pin_memory":
            made = args[0].clone()
            made.pinned = True
            return made
        if here and name in ("numpy", "__array__"):
            refused("numpy() of a tensor there")
        if len(places) > 1 and name not in BETWEEN:
            refused(f"{name} of tensors here and there, {[tuple(x.shape) for x in given]}")
        if len(places) > 1 and name in COPIES or here and name in WAITS:
            self.wait(name)
        if here and name in ("__getitem__", "__setitem__"):
            self.look_up(name, *args[1:])
        if "device" in kwargs:
            here = kwargs["device"] is not None and torch.device(kwargs["device"]) == CUDA
            kwargs["device"] = "cpu"
            if here and name == "tensor":
                self.wait(name)
        generator = kwargs.get("generator")
        if generator is not None and (generator.device == CUDA) != here:
            refused(f"{name} with a generator of {generator.device}")
        made = func(*args, **kwargs)
        if name in ("__set__data", *COPIES):
            here, made = on_gpu(args[name == "__set__data"]), args[0]
        made = list(made) if name == "__iter__" else made
        for x in tensors(made) if here else ():
            x.on_gpu = True
        return iter(made) if name == "__iter__" else made


def pretend(monkeypatch):
    """A PretendGPU that PyTorch takes for a device of the machine."""
    for module, name, value in (
            (torch, "Generator", Generator), (torch, "set_float32_matmul_precision", str),
            (torch.cuda, "is_available", lambda: True), (torch.cuda, "synchronize", lambda: None),
            (torch.cuda, "get_device_capability", lambda: (8, 0)),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "mem_get_info", lambda: (2 ** 30, 2 ** 30)),
            (torch.cuda, "max_memory_allocated", lambda device=None: 2 ** 30)):
        monkeypatch.setattr(module, name, value)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _, *rest, **kw: autocast("cpu", *rest, **kw))
    return PretendGPU()
