"""Batched matrix products with biases and GELU, by cuBLASLt.

PyTorch asks cuBLASLt for single products with a bias and GELU in their kernel, and cuBLAS for
batches without them. A batch with both takes cuBLASLt's own interface, which is called here through
ctypes; the library is the one that PyTorch has loaded. Values and structures are of cublasLt.h, the
same in CUDA 12 and 13.
"""

import ctypes
import os
import warnings
from functools import cache

import torch
import torch.nn.functional as F

BF16, FLOAT32 = 14, 0  # cudaDataType
SUMS_FLOAT32 = 68  # cublasComputeType_t
TRANSPOSED = 1  # cublasOperation_t
TRANSPOSE_FIRST, EPILOGUE, BIAS, BIAS_STRIDE = 3, 7, 8, 10  # attributes of a product
PLUS_BIAS, PLUS_BIAS_GELU = 4, 36  # its epilogues
BATCH, STRIDE = 5, 6  # attributes of a matrix
WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # attributes of a search
WORKSPACE_BYTES = 32 * 2**20
IN_FLOAT32 = 2  # reductions of the parts of a sum
ALIGNMENT = 16  # bytes, of every matrix

CANDIDATES = 8  # ways to compute a product that are asked for
TOLERANCE = 1e-2  # of a way's result, by the norm


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Way(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: one way to compute a product."""

    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool = False
) -> torch.Tensor:
    """x weight^T + bias for each member of a batch, or the tanh form of GELU of that.

    The first call with new shapes takes the first of the ways that cuBLASLt recommends which works
    and is right; while a CUDA graph is being captured the first one, unchecked. If none works
    PyTorch computes it, and a warning says so. Shapes are kept for the life of the process; not for
    several threads.

    Args:
        x: [G,M,K], weight: [G,N,K], bias: [G,N]; bf16 on one GPU, K and N multiples of 8.

    Returns:
        [G,M,N]

    Raises:
        RuntimeError: other types or widths, shapes that do not fit, or cuBLASLt fails.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    if weight.shape != (len(x), bias.shape[-1], x.shape[-1]) or bias.shape != weight.shape[:2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise RuntimeError(f"takes [G,M,K], [G,N,K] and [G,N], not {shapes}")
    for t in (x, weight, bias):
        if t.dtype != torch.bfloat16 or t.shape[-1] % 8 or t.data_ptr() % ALIGNMENT:
            raise RuntimeError("takes bf16 in widths of multiples of 8, at multiples of 16 bytes")
    out = x.new_empty((*x.shape[:2], weight.shape[1]))
    product = _product(x.device, *x.shape, weight.shape[1], gelu)
    new = not product.settled and not torch.cuda.is_current_stream_capturing()
    if new and not product.settle(x.device):
        warnings.warn(f"cuBLASLt has no product of {product.shapes}: PyTorch's", stacklevel=2)
    if not product.ways:
        return by_pytorch(x, weight, bias, gelu)
    product.run(product.ways[0], x, weight, bias, out)
    return out


def refusal(device: torch.device) -> str:
    """Why `linear` does not run on a device, or ""; on others than CUDA PyTorch stands for it."""
    if device.type != "cuda":
        return ""
    try:
        works = all(_product(device, 2, 96, 64, 128, gelu).settle(device) for gelu in (False, True))
    except (OSError, AttributeError, RuntimeError) as failure:  # no such library, or another
        return f"do not run here: {failure}".splitlines()[0]
    return "" if works else "disagree with PyTorch's"


def by_pytorch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool
) -> torch.Tensor:
    """The same in PyTorch, of any type on any device."""
    y = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
    return F.gelu(y, approximate="tanh") if gelu else y


class _Product:
    """A product of some shapes: how it is described to cuBLASLt, and the ways to compute it.

    cuBLAS stores matrices by columns: what is x weight^T by rows is weight x^T to it.
    """

    def __init__(self, groups: int, rows: int, depth: int, width: int, gelu: bool):
        self.shapes = (groups, rows, depth), (groups, width, depth), (groups, width)
        self.gelu = gelu
        self.ways: list[_Way] = []  # the one to use first
        self.settled = False  # whether that is known to work
        self.description = _made("cublasLtMatmulDescCreate", SUMS_FLOAT32, FLOAT32)
        self._set(TRANSPOSE_FIRST, ctypes.c_int32(TRANSPOSED))
        self._set(EPILOGUE, ctypes.c_int32(PLUS_BIAS_GELU if gelu else PLUS_BIAS))
        self._set(BIAS_STRIDE, ctypes.c_int64(width))
        self.matrices = [
            _matrix(groups, *shape) for shape in ((depth, width), (depth, rows), (width, rows))
        ]

    def _set(self, attribute: int, value) -> None:
        _set("cublasLtMatmulDescSetAttribute", self.description, attribute, value)

    def search(self, bias: torch.Tensor) -> None:
        """Asks for ways to compute it, the most promising first."""
        self._set(BIAS, _address(bias))
        search = _made("cublasLtMatmulPreferenceCreate")
        settings = [(WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))]
        settings.append((REDUCTIONS, ctypes.c_uint32(IN_FLOAT32)))
        settings += [(attribute, ctypes.c_uint32(ALIGNMENT)) for attribute in ALIGNMENTS]
        for attribute, value in settings:
            _set("cublasLtMatmulPreferenceSetAttribute", search, attribute, value)
        room, count = (_Way * CANDIDATES)(), ctypes.c_int()
        weight, x, out = self.matrices
        _call(
            "cublasLtMatmulAlgoGetHeuristic", _handle(bias.device), self.description,
            weight, x, out, out, search, CANDIDATES, room, ctypes.byref(count),
        )  # fmt: skip
        _call("cublasLtMatmulPreferenceDestroy", search)
        self.ways = [way for way in room[: count.value] if way.state == 0]

    def run(self, way: _Way, x, weight, bias, out) -> None:
        """On the current stream."""
        self._set(BIAS, _address(bias))
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        room = torch.empty(max(way.workspace, 1), dtype=torch.uint8, device=x.device)
        of_weight, of_x, of_out = self.matrices
        _call(
            "cublasLtMatmul", _handle(x.device), self.description,
            ctypes.byref(one), _address(weight), of_weight, _address(x), of_x,
            ctypes.byref(zero), _address(out), of_out, _address(out), of_out,
            ctypes.byref(way.algorithm), _address(room), ctypes.c_size_t(way.workspace),
            ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )  # fmt: skip

    def settle(self, device: torch.device) -> bool:
        """Keeps the first way that is right with random numbers -> whether there is one."""
        generator = torch.Generator(device).manual_seed(0)
        x, weight, bias = (
            torch.randn(shape, device=device, generator=generator).bfloat16()
            for shape in self.shapes
        )
        with torch.autocast(device.type, enabled=False):
            expected = by_pytorch(x.float(), weight.float(), bias.float(), self.gelu)
        out = torch.empty_like(expected, dtype=torch.bfloat16)
        found, self.ways, self.settled = self.ways, [], True
        for way in found:
            try:
                self.run(way, x, weight, bias, out)
            except RuntimeError:  # what is recommended need not be supported
                continue
            if (out.float() - expected).norm() <= TOLERANCE * expected.norm():
                self.ways = [way]
                return True
        return False


_products: dict[tuple, _Product] = {}


def _product(
    device: torch.device, groups: int, rows: int, depth: int, width: int, gelu: bool
) -> _Product:
    key = device, groups, rows, depth, width, gelu
    if key not in _products:
        product = _Product(groups, rows, depth, width, gelu)
        product.search(torch.empty(groups, width, dtype=torch.bfloat16, device=device))
        _products[key] = product
    return _products[key]


def _matrix(groups: int, rows: int, columns: int) -> ctypes.c_void_p:
    """A batch of matrices that lie one after the other, each by columns."""
    matrix = _made("cublasLtMatrixLayoutCreate", BF16, ctypes.c_uint64(rows),
                   ctypes.c_uint64(columns), ctypes.c_int64(rows))  # fmt: skip
    _set("cublasLtMatrixLayoutSetAttribute", matrix, BATCH, ctypes.c_int32(groups))
    _set("cublasLtMatrixLayoutSetAttribute", matrix, STRIDE, ctypes.c_int64(rows * columns))
    return matrix


def _made(function: str, *arguments) -> ctypes.c_void_p:
    """What a function of cuBLASLt creates."""
    made = ctypes.c_void_p()
    _call(function, ctypes.byref(made), *arguments)
    return made


def _set(function: str, of: ctypes.c_void_p, attribute: int, value) -> None:
    _call(function, of, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def _call(function: str, *arguments) -> None:
    status = getattr(_library(), function)(*arguments)
    if status:
        raise RuntimeError(f"{function} of cuBLASLt ends with status {status}")


@cache
def _library() -> ctypes.CDLL:
    name = f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}"
    return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)


@cache
def _handle(device: torch.device) -> ctypes.c_void_p:
    """cuBLAS's own, which cuBLASLt takes too."""
    with torch.cuda.device(device):
        return ctypes.c_void_p(torch.cuda.current_blas_handle())


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
