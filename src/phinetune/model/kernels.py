"""The functions of `kernels.c` as operators of torch: normalization, the gated activation, what attention does around its products.

They are built when phinetune is installed where there is a C compiler. Where they are missing, and for tensors that they cannot read,
`usable` says no and callers take torch's own operators, the reference of each; `phinetune info` tells whether they are there. Every one
takes and gives bfloat16 or float32 and computes in float32. As operators they have a form for tensors without numbers, too, so that what
follows or times a step (the planner, torch's profiler, the count of operations) sees them like any other.

Not here: autograd (`norm.py`, `gated.py`, `rotary.py`), matrix products.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "rms_norm": (_P, _P, _P, _P, _P, _P, _N, _N, _F, _I),
    "rms_norm_backward": (_P, _P, _P, _P, _P, _P, _N, _N, _I),
    "silu_gate": (_P, _N, _P, _N, _P, _N, _N, _I),
    "silu_gate_backward": (_P, _P, _N, _P, _N, _P, _P, _N, _N, _N, _I),
    "gather_heads": (_P, _N, _P, _P, _N, _P, _P, _N, _N, _N, _N, _F, _I),
    "scatter_heads": (_P, _P, _P, _P, _P, _N, _P, _N, _N, _N, _N, _F, _I),
    "causal_softmax": (_P, _N, _N, _N, _N, _I),
    "softmax_backward": (_P, _P, _N, _N, _I),
}
WIDEST = 8192
"""Numbers in a row of a normalization, or in a head, at most."""
_DTYPES = (torch.bfloat16, torch.float32)
WITH_NUMBERS = (Tensor, torch.nn.Parameter)
_PLAIN = (*WITH_NUMBERS, torch._subclasses.FakeTensor)
_OPERATORS: Any = torch.library.Library("phinetune", "FRAGMENT")  # type: ignore[no-untyped-call]


def built(path: Path) -> Any:
    """The library built for this Python at `path`, without its ending; None where it was not built or cannot be loaded beside this torch."""
    names = (path.name + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    found = next((file for name in names if (file := path.with_name(name)).exists()), None)
    try:
        return (
            None if found is None else ctypes.CDLL(str(found))
        )  # its OpenMP calls are resolved by the library that torch has loaded
    except OSError:
        return None


VECTORS, TILES = 1, 2
"""What the products of `tiles.h` are computed in: `tiles_usable` and `tiles_use` of a library that has them give one of these, or 0."""


def built_for_tiles(path: Path, *names: str) -> Any:
    """`built`, with functions `names` that take a structure's address and give whether they failed; None too where the processor has neither
    matrix tiles (AMX) that the system lets us use nor vectors of bfloat16 (AVX-512)."""
    loaded = built(path)
    try:
        if loaded is None or not loaded.tiles_usable():
            return None
        loaded.tiles_use.argtypes, loaded.tiles_use.restype = (_I,), _I
        for name in names:
            function = getattr(loaded, name)
            function.argtypes, function.restype = (_P,), _I
    except (OSError, AttributeError):
        return None
    return loaded


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built or cannot be loaded beside this torch."""
    loaded = built(Path(__file__).with_name("_kernels"))
    try:
        for name, arguments in _ARGUMENTS.items() if loaded is not None else ():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
    except AttributeError:
        return None
    return loaded


def usable(*tensors: Tensor | None) -> bool:
    """True if the functions are there and can read these tensors."""
    return library() is not None and readable(*tensors)


def readable(*tensors: Tensor | None) -> bool:
    """True for plain tensors of one dtype that compiled functions know, in main memory, with nothing between that changes operators."""
    first = tensors[0]
    if first is None or first.dtype not in _DTYPES:
        return False
    return undisturbed() and all(t is None or (t.dtype is first.dtype and plain(t)) for t in tensors)


def undisturbed() -> bool:
    """True if nothing stands between here and the numbers that would change operators: no transform of torch.func, no autocast."""
    return not (torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu"))


def plain(tensor: Tensor) -> bool:
    """True for a tensor in main memory, with numbers or standing for one, that is of no kind of its own."""
    return type(tensor) in _PLAIN and tensor.device.type == "cpu"


def operator(schema: str, without_numbers: Callable[..., Any]) -> Callable[[Any], Any]:
    """Register a function as torch's operator `schema`; `without_numbers` gives its results for tensors that have only shapes.

    The way through torch's dispatcher into Python costs more than most of these functions, so it is taken only where somebody is on it.
    """
    name = schema.partition("(")[0]

    def register(function: Any) -> Any:
        _OPERATORS.define(schema)
        _OPERATORS.impl(name, function, "CPU")
        _OPERATORS.impl(name, without_numbers, "Meta")
        operator = getattr(torch.ops.phinetune, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            watched = type(args[0]) not in WITH_NUMBERS or torch._C._len_torch_dispatch_stack()
            return operator(*args) if watched else function(*args)

        return call

    return register


def _nothing(*args: Any) -> None:
    """What an operator gives that only writes into what it is given."""


def _wide(x: Tensor) -> int:
    return int(x.dtype is torch.float32)


def _norm_results(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


def _sum_results(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_norm_results(x, weight, eps)


@operator("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _norm_results)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (N, h), contiguous, weight (h) -> (y (N, h), 1 / rms (N) float32). The reference is `norm.rms_norm_reference`."""
    y, inverse = _norm_results(x, weight, eps)
    pointers = x.data_ptr(), None, weight.data_ptr(), None, y.data_ptr(), inverse.data_ptr()
    library().rms_norm(*pointers, *x.shape, eps, _wide(x))
    return y, inverse


@operator("add_rms_norm(Tensor x, Tensor added, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", _sum_results)
def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x and added (N, h), contiguous, weight (h) -> (x + added, then what `rms_norm` gives for it), in one pass."""
    total, y, inverse = _sum_results(x, added, weight, eps)
    pointers = x.data_ptr(), added.data_ptr(), weight.data_ptr(), total.data_ptr(), y.data_ptr(), inverse.data_ptr()
    library().rms_norm(*pointers, *x.shape, eps, _wide(x))
    return total, y, inverse


@operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor? also) -> Tensor",
    lambda g, x, w, i, a: torch.empty_like(x),
)
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, also: Tensor | None) -> Tensor:
    """dL/dx (N, h) for grad = dL/dy (N, h), contiguous, and what `rms_norm` took and gave; plus `also` (N, h), contiguous, if there is one."""
    dx = torch.empty_like(x)
    pointers = grad.data_ptr(), x.data_ptr(), weight.data_ptr(), inverse.data_ptr()
    library().rms_norm_backward(*pointers, None if also is None else also.data_ptr(), dx.data_ptr(), *x.shape, _wide(x))
    return dx


@operator("silu_gate(Tensor gate, Tensor up) -> Tensor", lambda gate, up: gate.new_empty(gate.shape))
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up for (N, h) each, rows contiguous -> (N, h). The reference is `gated.silu_gate_reference`."""
    y = gate.new_empty(gate.shape)
    operands = gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0)
    library().silu_gate(*operands, y.data_ptr(), *gate.shape, _wide(gate))
    return y


@operator(
    "silu_gate_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) of_gate, Tensor(b!) of_up) -> ()", _nothing
)
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor) -> None:
    """Writes dL/dgate and dL/dup (N, h), rows contiguous and as far apart in both, for grad = dL/dy (N, h), contiguous."""
    operands = grad.data_ptr(), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0)
    results = of_gate.data_ptr(), of_up.data_ptr(), of_gate.stride(0)
    library().silu_gate_backward(*operands, *results, *gate.shape, _wide(gate))


@operator(
    "gather_heads(Tensor source, Tensor index, Tensor(a!) out, Tensor? cos, Tensor? sin, float scale) -> ()", _nothing
)
def gather_heads(
    source: Tensor, index: Tensor, out: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float
) -> None:
    """out (n, heads, S, D), contiguous: tokens `index` (n · S) of source (T, heads · D), turned and scaled; zeros for a negative index.

    cos, sin (T, width), contiguous: of the angles that the first `width` numbers of a head are turned by; None: they are not turned.
    """
    n, heads, S, D = out.shape
    operands = source.data_ptr(), source.stride(0), *_angles(cos, sin), index.data_ptr(), out.data_ptr()
    library().gather_heads(*operands, n, S, heads, D, scale, _wide(out))


@operator(
    "scatter_heads(Tensor source, Tensor starts, Tensor places, Tensor(a!) out, int heads, Tensor? cos, Tensor? sin, float scale) -> ()",
    _nothing,
)  # fmt: skip
def scatter_heads(
    source: Tensor, starts: Tensor, places: Tensor, out: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, scale: float
) -> None:  # fmt: skip
    """The reverse of `gather_heads`, turned back: out (T, heads · D), each token the sum of its places in `source`, zeros without one.

    source: blocks (n, heads, S, D) one after another. starts (T + 1): where each token's places begin. places (m, 3): the rows of all
    blocks and entries before the place's own, its block's S, its row in the entry.
    """
    operands = (
        source.data_ptr(),
        starts.data_ptr(),
        places.data_ptr(),
        *_angles(cos, sin),
        out.data_ptr(),
        out.stride(0),
    )
    library().scatter_heads(*operands, len(out), heads, out.shape[1] // heads, scale, _wide(out))


@operator("causal_softmax(Tensor(a!) scores, int block, int first) -> ()", _nothing)
def causal_softmax(scores: Tensor, block: int, first: int) -> None:
    """Softmax over scores (..., width), contiguous, in place: of each `block` rows the first sees `first` keys, each later one one more."""
    width = scores.shape[-1]
    library().causal_softmax(scores.data_ptr(), scores.numel() // width, block, first, width, _wide(scores))


@operator("softmax_backward(Tensor P, Tensor(a!) dP) -> ()", _nothing)
def softmax_backward(P: Tensor, dP: Tensor) -> None:
    """dP (..., width) becomes the gradient of the scores, P · (dP - sum of P · dP); both contiguous."""
    width = P.shape[-1]
    library().softmax_backward(P.data_ptr(), dP.data_ptr(), P.numel() // width, width, _wide(P))


def _angles(cos: Tensor | None, sin: Tensor | None) -> tuple[int | None, int | None, int]:
    return (None, None, 0) if cos is None or sin is None else (cos.data_ptr(), sin.data_ptr(), cos.shape[-1])
