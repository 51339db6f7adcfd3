"""Counts what a GPU would have to do, on a machine without one: its operations and the bytes that
they move. Read it if you want to know what `python -m support.bench count` counts.

    with pretended_gpu() as gpu:
        net = UNet().to('cuda')            # tensors there have shapes and types, but no numbers
        with gpu.counting() as counts:
            net(x, z)
    print(counts.bytes)

What is on the CPU is computed as ever. A number that it asks the GPU for is 1.
"""
import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Generator = torch.Generator  # which pretended_gpu() replaces

# Of an H100 (SXM). Products of float32 are made in TF32.
BYTES_PER_SECOND = 3.35e12
FLOPS_PER_SECOND = {torch.bfloat16: 990e12, torch.float32: 495e12, torch.float64: 67e12}
SECONDS_PER_LAUNCH = 5e-6


# ---------------------------------------------------------------- what is counted

@dataclasses.dataclass
class Counts:
    """What a GPU was asked to do."""
    flops: float = 0.0
    bytes: int = 0             # inputs and outputs of all operations; a view is none
    hidden_bytes: int = 0      # a part of them: copies in another order that kernels make of their
                               # inputs, and the biases of convolutions
    float32_bytes: int = 0     # a part of them: float32, but for products
    activation_casts: int = 0  # changes of type
    weight_casts: int = 0      # the same of parameters and of their gradients
    kernels: int = 0           # how many are launched, about
    copies: int = 0            # between the CPU and the GPU
    syncs: list = dataclasses.field(default_factory=list)  # where the CPU waits for the GPU
    busy: float = 0.0          # seconds, each operation bound by its bytes or by its FLOPs
    operations: dict = dataclasses.field(default_factory=dict)  # {name: (how many, bytes)}

    @property
    def seconds(self):
        """The least time on an H100, where the CPU launches kernels while the GPU works."""
        return max(self.busy, SECONDS_PER_LAUNCH * self.kernels)


NO_KERNEL = {'_unsafe_view', 'detach', 'lift_fresh', 'empty', 'empty_like', 'empty_strided',
             'new_empty', 'new_empty_strided', 'record_stream'}


def tensors_in(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def size_of(*tensors):
    """Their bytes. What expand() repeats counts once."""
    size = 0
    for t in tensors:
        held = [n for n, stride in zip(t.shape, t.stride()) if stride]
        size += t.element_size() * math.prod(held)
    return size


def in_other_order(t, memory_format):
    return t.dim() == 4 and not t.is_contiguous(memory_format=memory_format)


def hidden(name, inputs, out):
    """(bytes, kernels) of a CUDA operation beside its inputs, its outputs, and one kernel, as in
    PyTorch's C++: group norms want the channels first, and convolutions all in one order."""
    size = 0
    kernels = 0
    copied = []
    if name in ('native_group_norm', 'native_group_norm_backward'):
        is_backward = name.endswith('backward')
        images = inputs[:2] if is_backward else inputs[:1]
        copied = [t for t in images if in_other_order(t, torch.contiguous_format)]
        kernels = 4 if is_backward else 2
    elif name == 'convolution':
        x, weight, bias = inputs[:3]
        copied = to_common_order(x, weight)
        if bias is not None:  # added to the output by a kernel of its own
            size = 2 * size_of(out)
            kernels = 1
    elif name == 'convolution_backward':
        copied = to_common_order(*inputs[:3])
        gradients = sum(inputs[-1])
        size = size_of(inputs[0]) * (gradients - 1)  # each of them reads that of the output
        kernels = gradients - 1
    elif name.startswith(('_foreach', '_fused_adam')):
        kernels = len(inputs[0]) // 36  # the arguments of a kernel hold about so many tensors
    return size + 2 * size_of(*copied), kernels + len(copied)


def to_common_order(*tensors):
    """Those of the tensors (B, C, H, W) that a convolution copies first. If one has its channels
    last, all get theirs last."""
    last = any(in_other_order(t, torch.contiguous_format) for t in tensors)
    wanted = torch.channels_last if last else torch.contiguous_format
    return [t for t in tensors if in_other_order(t, wanted)]


def place():
    """The line of this project that is running, such as 'train.py:431'."""
    root = Path(__file__).parents[1]
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if root in path.parents and path != Path(__file__):
            return f'{path.relative_to(root)}:{frame.f_lineno}'
        frame = frame.f_back
    return 'elsewhere'


# ---------------------------------------------------------------- a GPU without numbers

def is_cuda(device):
    return device is not None and torch.device(device).type == 'cuda'


def on_gpu(t):
    return isinstance(t, FakeTensor) and is_cuda(t.fake_device)


class PretendedGPU(TorchDispatchMode):
    """Inside, tensors on 'cuda' are PyTorch's fake ones, and those on the CPU are real."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts = Counts()
        self.cast_shapes = set()  # of parameters that were cast, as their gradients will be
        self.pinned = []          # storages in pinned memory, held so that none takes their place

    @contextlib.contextmanager
    def counting(self):
        """Yields the Counts of what is done inside."""
        before = self.counts
        self.counts = Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def is_pinned(self, t):
        return any(t.untyped_storage().data_ptr() == storage.data_ptr() for storage in self.pinned)

    def pin(self, t):
        self.pinned.append(t.untyped_storage())
        return t

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        if function is torch.ops.prim.device.default:  # asked for most often
            return inputs[0].device
        options = dict(options or {})
        pins = options.pop('pin_memory', False)
        tensors = tensors_in(inputs, options)
        if not any(map(on_gpu, tensors)) and not is_cuda(options.get('device')):
            with unset_fake_temporarily():
                out = function(*inputs, **options)
            return self.pin(out) if pins else out
        if function is aten._local_scalar_dense.default:
            self.note_wait(function)
            with unset_fake_temporarily():
                return torch.ones((), dtype=inputs[0].dtype).item()
        if function is aten.copy_.default and not on_gpu(inputs[0]):
            self.note_copy(function, inputs, options)
            with unset_fake_temporarily():
                return inputs[0].fill_(1)
        fake_inputs, fake_options = tree_map(self.faked, (inputs, options))
        out = function(*fake_inputs, **fake_options)
        if function is aten.native_group_norm_backward.default and out[0] is not None:
            out = (out[0].contiguous(), *out[1:])  # as it is on a GPU
        self.note(function, inputs, options, out)
        if function is aten._to_copy.default and not on_gpu(out):
            with unset_fake_temporarily():
                return torch.ones(out.shape, dtype=out.dtype)
        return out

    def faked(self, leaf):
        """leaf, of the inputs of an operation, as PyTorch's fake operations take it."""
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.fake.from_tensor(leaf)
        if isinstance(leaf, Generator):  # ours are of the CPU
            return None
        return leaf

    # ------------------------------------------------------------ notes of what was done

    def note_wait(self, function):
        self.counts.syncs.append(f'{function} at {place()}')

    def note_copy(self, function, inputs, options):
        """Note a copy between CPU and GPU. The CPU waits for it, unless its own end is pinned and
        it was told not to wait. What .to('cpu') makes is never pinned."""
        self.counts.copies += 1
        may_go_on = options.get('non_blocking', False) or True in inputs[2:]
        on_cpu = [t for t in tensors_in(inputs) if not on_gpu(t)]
        if not (may_go_on and on_cpu and self.is_pinned(on_cpu[0])):
            self.note_wait(function)

    def note(self, function, inputs, options, out):
        """Note an operation on the GPU, or a copy to or from it."""
        counts = self.counts
        tensors = tensors_in(inputs, options)
        results = tensors_in(out)
        is_copy = function in (aten._to_copy.default, aten.copy_.default)
        if is_copy and not all(map(on_gpu, tensors + results)):
            self.note_copy(function, inputs, options)
            return
        for t in tensors:
            if not on_gpu(t) and t.dim() > 0:  # such as an index, which PyTorch copies itself
                counts.copies += 1
                self.note_wait(function)
        name = function._schema.name.removeprefix('aten::')
        if function.is_view or name in NO_KERNEL:
            return

        more, kernels = hidden(name, inputs, out)
        size = size_of(*tensors, *results) + more
        flops = 0
        if function.overloadpacket in flop_registry:
            flops = flop_registry[function.overloadpacket](*inputs, **options, out_val=out)
        else:
            wide = [t for t in tensors + results if t.dtype == torch.float32]
            counts.float32_bytes += size_of(*wide)
        counts.flops += flops
        counts.bytes += size
        counts.hidden_bytes += more
        counts.kernels += 1 + kernels
        last = (tensors + results)[-1]
        rate = FLOPS_PER_SECOND.get(last.dtype, FLOPS_PER_SECOND[torch.float32])
        counts.busy += max(size / BYTES_PER_SECOND, flops / rate)
        times, total = counts.operations.get(name, (0, 0))
        counts.operations[name] = (times + 1, total + size)
        if is_copy and tensors[-1].dtype != results[0].dtype:
            self.note_cast(tensors[-1], results[0])

    def note_cast(self, t, out):
        if isinstance(t, torch.nn.Parameter):
            self.cast_shapes.add(t.shape)
            self.counts.weight_casts += 1
        elif t.shape in self.cast_shapes and out.dtype == torch.float32:  # of a gradient
            self.counts.weight_casts += 1
        else:
            self.counts.activation_casts += 1


# ---------------------------------------------------------------- what a GPU without a driver lacks

class Functions(TorchFunctionMode):
    """Functions that ask for the driver, replaced by what they do on a GPU."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, inputs=(), options=None):
        options = options or {}
        if function is torch.Tensor.pin_memory:
            with torch.no_grad():
                return self.gpu.pin(inputs[0].clone())
        if function is torch.Tensor.is_pinned:
            return self.gpu.is_pinned(inputs[0])
        if function is torch.Tensor.backward and on_gpu(inputs[0]):
            return backward(inputs[0])
        if function is F.scaled_dot_product_attention and on_gpu(inputs[0]):
            if inputs[0].dtype == torch.bfloat16:
                return aten._scaled_dot_product_flash_attention(*inputs)[0]
            return aten._scaled_dot_product_efficient_attention(*inputs, None, True)[0]
        return function(*inputs, **options)


@torch.no_grad()
def backward(loss):
    """loss.backward(). PyTorch's own asks the driver for the GPU's streams."""
    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}  # {node: {number of an output: its own}}
    for node in in_order(loss.grad_fn):
        mine = gradients.pop(node, {})
        if not mine:
            continue
        if hasattr(node, 'variable'):
            p = node.variable
            p.grad = mine[0] if p.grad is None else p.grad.add_(mine[0])
            continue
        results = node(*[mine.get(k) for k in range(len(node._input_metadata))])
        if isinstance(results, torch.Tensor):
            results = (results,)
        for (other, number), gradient in zip(node.next_functions, results):
            if other is None or gradient is None:
                continue
            wanted = other._input_metadata[number]
            gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
            theirs = gradients.setdefault(other, {})
            theirs[number] = theirs[number] + gradient if number in theirs else gradient


def in_order(root):
    """All nodes of a graph of gradients, each before those that it hands gradients to."""
    order = []
    seen = {root}
    path = [(root, iter(root.next_functions))]
    while path:
        node, others = path[-1]
        for other, _ in others:
            if other is not None and other not in seen:
                seen.add(other)
                path.append((other, iter(other.next_functions)))
                break
        else:
            order.append(node)
            path.pop()
    return order[::-1]


@contextlib.contextmanager
def pretended_gpu():
    """Inside, this machine has one CUDA device, which computes no numbers -> its PretendedGPU."""
    gpu = PretendedGPU()
    precision = torch.get_float32_matmul_precision()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()

    def generator(device='cpu'):
        return Generator()

    def nothing(*values):
        return None

    replaced = dict(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1,
        current_device=lambda: 0, is_bf16_supported=lambda including_emulation=True: True,
        get_device_name=lambda device=None: 'pretended', max_memory_allocated=lambda device=None: 0,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        mem_get_info=lambda device=None: (80 * 2 ** 30, 80 * 2 ** 30),
        _lazy_init=nothing, set_device=nothing, synchronize=nothing, manual_seed=nothing,
        manual_seed_all=nothing, set_rng_state=nothing, empty_cache=nothing,
        reset_peak_memory_stats=nothing)
    with (gpu.fake, patch.multiple(torch.cuda, **replaced), gpu, Functions(gpu),
          patch.object(torch, 'Generator', generator),
          # PyTorch clips all gradients by one operation where they are of these types.
          patch.object(_foreach_utils, '_foreach_supported_types',
                       [*_foreach_utils._foreach_supported_types, FakeTensor])):
        # A module that moves there gets new parameters, since fake memory cannot replace real one.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            torch.set_float32_matmul_precision(precision)
