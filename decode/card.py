"""A decode step on a CUDA card: modules write it by `emit`, as they write the decode engine's program
(decode/engine.py), and each op here is one launch of a Triton kernel (kernels/triton_step.py). Norms,
activations, gates of two halves, residuals and the joining of attention's splits are parts of the products
next to them, so that a layer is five launches at most.

What a module asks for that is not written here raises NotWritten, and `forward` decodes.
"""
from collections import Counter
from typing import NamedTuple

import torch

import sparse_kernels as kernels
from decode.context import Cache
from decode.engine import ROWS, NotWritten

ACTS = "none", "relu2", "gelu", "gelu_tanh"
DTYPES = torch.float32, torch.bfloat16, torch.float16


class Matrix(NamedTuple):
    """weight (rows, width), one row after the other, and a bias or None; or codes and scales of whole numbers
    of 8 or 4 bits (kernels.quantize)."""
    weight: torch.Tensor
    bias: torch.Tensor | None
    width: int
    bits: int = 16
    scale: torch.Tensor | None = None


class Plain(NamedTuple):
    """What a product reads as it lies in memory, (rows, n)."""
    x: torch.Tensor
    kind: str = "plain"
    marks: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    eps: float = 0.0
    splits: int = 1
    width: int = 1
    edges: torch.Tensor | None = None            # a number counts as zero unless its size exceeds its own


class Card:
    """The launches of a model's decode step over a Cache: for the rows of `history` (B, length) it reads the
    ids at the columns `start` (B,), which lie on the card, and leaves their logits (B, ids) in `answer`.

    launches: the kernel and the part of the model of each, in their order. ran: how many of each kernel have
    been launched since it was made. A CUDA graph may record `step`: nothing in it depends on the host.
    """
    wants = draws = None                         # every logit is exact, and the sampler draws as elsewhere

    def __init__(self, model, cache, history, start, ids):
        """NotWritten where the model has a part that is not written here."""
        self.cache, self.choices = cache, cache.choices
        self.rows, self.dtype, self.ids = len(history), cache.layers[0].dtype, ids
        self.history, self.start = history, start
        if self.rows > ROWS:
            raise NotWritten(f"{self.rows} rows at once, {ROWS} is the most")
        if self.dtype not in DTYPES:
            raise NotWritten(f"a stream in {self.dtype}")
        from kernels import triton_step  # a machine without Triton reads this file too
        self.k, self.tall = triton_step, 1 << (self.rows - 1).bit_length()
        self.processors = kernels.triton_kernels().processors(history.device)
        self.calls, self.launches, self.ran, self.module = [], [], Counter(), ""
        model.emit(self)

    def __getattr__(self, name):
        raise NotWritten(f"the op '{name}' is not written for a card")

    def step(self):
        """Launch all -> logits (B, ids) in fp32, of the tokens at the columns `start`."""
        for kernel, grid, arguments, options in self.calls:
            kernel[grid](*arguments, **options)
        self.ran.update(name for name, _ in self.launches)
        return self.answer

    # ------------------------------------------------ values, vectors, matrices

    def empty(self, *shape, dtype=None):
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.start.device)

    def vector(self, tensor):
        """A parameter in the stream's dtype, or None."""
        return None if tensor is None else tensor.detach().to(self.dtype).contiguous()

    def matrix(self, weight, bias=None):
        """weight (rows, width); NotWritten where a step would read a copy of it."""
        if weight.dtype != self.dtype:
            raise NotWritten(f"weights in {weight.dtype} under a stream in {self.dtype}")
        if not weight.is_contiguous():
            raise NotWritten("weights whose rows do not lie in turn")
        return Matrix(weight.detach(), self.vector(bias), weight.size(1))

    def whole(self, codes, scale, width, bias):
        """See Program.whole."""
        if len(scale):
            return Matrix(codes.view(torch.int8), self.vector(bias), width, 8, scale.view(torch.float32))
        return Matrix(codes, self.vector(bias), width, 4, codes.view(torch.int16))

    def add(self, kernel, grid, arguments, options):
        """Append a launch."""
        self.calls.append((kernel, grid, arguments, options))
        self.launches.append((kernel.fn.__name__, self.module))

    # ------------------------------------------------ ops

    def embed(self, matrix, positions=None, ngrams=None, order=0):
        """See Program.embed."""
        if ngrams is not None:
            raise NotWritten("n-grams")
        C = matrix.width
        x, table = self.empty(self.rows, C), self.vector(positions)
        self.add(self.k.embed_kernel, (self.rows, -(-C // 1024)), (self.history, self.start, matrix.weight,
                 matrix.scale, table, x, self.history.stride(0), C, matrix.weight.stride(0)),
                 dict(BITS=matrix.bits, BC=1024, num_warps=4))
        return Plain(x)

    def norm(self, x, size, gain=None, bias=None, eps=1e-5, by_root=False):
        """The products that read it compute it themselves."""
        if gain is None:
            raise NotWritten("a norm without gains")
        return Plain(x.x, "rmsnorm" if by_root else "layernorm", None, self.vector(gain), self.vector(bias),
                     eps)

    def linear(self, x, matrix, act="none", params=(), onto=None, **options):
        """act(matrix . x + bias) + onto, in onto's place."""
        if act not in ACTS or options:
            raise NotWritten(f"the activation {act}" if act not in ACTS else "a product of chosen units")
        return self.product(x, matrix, act, onto, False, self.dtype)

    def product(self, x, matrix, act, onto, gated, dtype, cap=None):
        if x.edges is not None:
            raise NotWritten("a product of gated units that are read by output")
        N, K = len(matrix.weight) // (1 + gated), matrix.width
        out = onto.x if onto else self.empty(self.rows, N, dtype=dtype)
        tile = self.k.product_tile(self.tall, N, K, gated, x.kind == "join", self.processors)
        self.add(self.k.product_kernel, (-(-N // tile["BN"]),), (x.x, x.marks, x.gain, x.shift, matrix.weight,
                 matrix.scale, matrix.bias, onto and onto.x, out, self.rows, N, K, matrix.weight.stride(0),
                 x.splits, x.eps, cap),
                 dict(INPUT=x.kind, ACT=act, GATED=gated, D=x.width, BITS=matrix.bits, **tile))
        self.last = x, matrix
        return onto or Plain(out)

    def swiglu(self, x, size):
        """The product that made x ends with it."""
        self.calls.pop(), self.launches.pop()
        return self.product(*self.last, "silu", None, True, self.dtype)

    def event(self, x, size, thresholds, units=None):
        """The sum of rows that reads it opens its gates."""
        if units is not None:
            raise NotWritten("gates of chosen units")
        return x._replace(edges=thresholds.detach().float().contiguous())

    def rows_sum(self, a, matrix, onto=None, units=None, all=False):
        """See Program.rows_sum."""
        if units is not None:
            raise NotWritten("rows of chosen units")
        N, C, rows = len(matrix.weight), matrix.width, self.rows
        tile, columns, shares, share = self.k.down_tile(self.tall, N, C, self.processors)
        out = onto.x if onto else self.empty(rows, C)
        parts = self.empty(shares, rows, C, dtype=torch.float32)
        arrived = torch.zeros(columns, dtype=torch.int32, device=out.device)
        self.add(self.k.down_kernel, (columns, shares), (a.x, a.edges, matrix.weight, matrix.scale,
                 matrix.bias, onto and onto.x, out, parts, arrived, rows, N, C,
                 matrix.weight.stride(0), share), dict(ALL=all, BITS=matrix.bits, **tile))
        return onto or Plain(out)

    def attend(self, qkv, layer, heads, width, eps, rotation, gain, alone=False):
        """See Program.attend; the product that reads it joins the splits."""
        if alone:
            raise NotWritten("keys and values alone")
        kept, tile = self.cache.layers[layer], self.k.attend_tile(width)
        if kept.size(2) != heads:
            raise NotWritten("queries that share keys and values")
        size = kept.size(3)
        splits = max(1, min(self.k.MOST_SPLITS, -(-size // self.k.SPLIT),
                            2 * self.processors // (self.rows * heads)))
        parts = self.empty(splits, self.rows, heads * width, dtype=torch.float32)
        marks = self.empty(2, splits, self.rows, heads, dtype=torch.float32)
        cos, sin = map(self.vector, rotation or (None, None))
        self.add(self.k.attend_kernel, (self.rows * heads, splits), (qkv.x, cos, sin, self.vector(gain), kept,
                 self.start, parts, marks, self.rows, heads, size, eps or 0.0, width ** -0.5),
                 dict(NORM=eps is not None, **tile))
        return Plain(parts, "join", marks, splits=splits, width=width)

    def logits(self, x, matrix, cap, copy=None):
        """The head in fp32, bounded by cap (0: not)."""
        self.answer = self.product(x, matrix, "none", None, False, torch.float32, cap or None).x
        return self.answer


def card_of(model, cache, history, start, ids):
    """A model's Card, or a NotWritten, which is false and says in a sentence why `forward` decodes."""
    if cache.choices.forward or not history.is_cuda:
        return NotWritten(cache.choices.forward or "these kernels run on a CUDA card")
    if kernels.triton_kernels() is None:
        return NotWritten("there is no Triton here")
    try:
        return Card(model, cache, history, start, ids)
    except NotWritten as reason:
        return reason.with_traceback(None)


def trial(model, device):
    """card_of for one row, to ask whether it covers the model."""
    cache, zeros = Cache(model, 1, 1), torch.zeros(1, 1, dtype=torch.long, device=device)
    return card_of(model, cache, zeros, zeros[0], model.config.vocab_size)
