"""The passes of training: each with its reference, by the C of train_typed.c on a CPU, and its gradient.

What lies between the two products of an MLP is bound by memory: as single operators of torch a squared ReLU
and a mask are 4 passes over (tokens, units) forward and 5 backward. Here each op is one pass forward and one
backward, its activation included. Threads divide the tokens; no sum depends on how many threads there are.
"""
import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.build import NAMES, cpu_library

ACTS = {"relu2": lambda v: F.relu(v).square(), "gelu": F.gelu, "none": lambda v: v}     # numbered as in C
ACT_NUMBERS = {act: number for number, act in enumerate(ACTS)}
SLOPES = {"relu2": lambda grad, v: grad * 2 * F.relu(v), "gelu": torch.ops.aten.gelu_backward,
          "none": lambda grad, v: grad}


def has_kernel(*tensors):
    """Are the C kernels built, and are these contiguous and of one dtype that they take?"""
    dtype = tensors[0].dtype
    return (cpu_library()[0] is not None and dtype in NAMES
            and all(t.is_contiguous() and t.dtype == dtype for t in tensors))


def pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


# The one rule of which are largest, here and in C: exactly k; of equal ones the lowest places; NaN is larger
# than everything. torch.topk's choice among equal ones depends on the shape and the device.

def first_largest(scores, k):
    """scores (..., n) -> the places (..., k) of the k largest, the largest first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def among_largest(scores, k):
    """The same as bool (..., n), without sorting: for many rows of many units."""
    n = scores.size(-1)
    if not 0 < k < n:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    if not torch.compiler.is_compiling() and in_c(scores):
        won = as_new(scores, torch.bool)
        run_pass("winners", (scores.contiguous(), won), scores.numel() // n, n, k)
        return won
    return among_largest_reference(scores, k)


def among_largest_reference(scores, k):
    n = scores.size(-1)
    edge = scores.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, equal = scores > edge, scores == edge
    if_number, if_nan = edge == edge, scores != scores
    above, equal = above | if_nan & if_number, equal | if_nan & ~if_number
    return above | equal & (equal.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True))


class Pass:
    """A forward and a backward kernel as one differentiable function: an autograd.Function, or where a
    compiler is tracing two custom ops of its name, which cost an eager call more than a small kernel.

    forward(*inputs) -> a new tensor or several. back(*gradients of those that are floats, *kept, *options) ->
    gradients for the first inputs. kept: places in (*inputs, *outputs); options: places in inputs.
    fake, fake_back: the same without values.
    """

    def __init__(self, forward, fake, back, fake_back, kept, options=()):
        self.forward, self.back, self.kept, self.options = forward, back, kept, options
        names = (f"nanocortex::{function.__name__}" for function in (forward, back))
        self.op, self.back_op = (torch.library.custom_op(name, function, mutates_args=())
                                 for name, function in zip(names, (forward, back)))
        self.op.register_fake(fake)
        self.back_op.register_fake(fake_back)
        self.op.register_autograd(lambda ctx, *grads: self.slopes(self.back_op, ctx, grads),
                                  setup_context=self.save)

    def __call__(self, *inputs):
        return self.op(*inputs) if torch.compiler.is_compiling() else OnePass.apply(self, *inputs)

    def save(self, ctx, inputs, output):
        ctx.set_materialize_grads(False)         # no zeros for what has no gradient
        output = (output,) if isinstance(output, Tensor) else output
        every = *inputs, *output
        ctx.save_for_backward(*(every[i] for i in self.kept))
        ctx.options = [inputs[i] for i in self.options]
        ctx.others, ctx.floats = len(inputs), [i for i, t in enumerate(output) if t.is_floating_point()]

    def slopes(self, back, ctx, grads):
        found = back(*(grads[i] for i in ctx.floats), *ctx.saved_tensors, *ctx.options)
        found = (found,) if isinstance(found, Tensor) else found
        return *found, *[None] * (ctx.others - len(found))


class OnePass(torch.autograd.Function):
    """A Pass outside of a compiler."""

    @staticmethod
    def forward(ctx, one, *inputs):
        outputs, ctx.one = one.forward(*inputs), one
        one.save(ctx, inputs, outputs)
        if isinstance(outputs, tuple):
            ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, *ctx.one.slopes(ctx.one.back, ctx, grads)


def run_pass(name, tensors, *numbers, dtype=None):
    """Call a C kernel of training; tensors, which live until it is done: inputs first, then outputs, or None.
    dtype: by default that of the first."""
    kernel = getattr(cpu_library()[0], f"{name}_{NAMES[dtype or tensors[0].dtype]}")
    kernel(*map(pointer, tensors), *numbers, torch.get_num_threads())


def in_c(x):
    """Do the C passes take this?"""
    return (cpu_library()[0] is not None and x.dtype in NAMES and x.numel() > 0
            and x.untyped_storage().device.type == "cpu")            # a fake tensor has no memory


def without_gaps(*tensors):
    return [t.contiguous() for t in tensors]


def as_new(x, dtype=None):
    """An empty tensor of x's shape, without gaps."""
    return x.new_empty(x.shape, dtype=dtype)


def fire_shapes(v, group, k, act):
    return as_new(v), as_new(v, torch.bool)


def fire_reference(v: Tensor, group: int, k: int, act: str) -> tuple[Tensor, Tensor]:
    """v (..., n) -> a = ACTS[act](v) with all but the k largest |a| of every `group` neighbours at zero, and
    which those are, bool (..., n)."""
    a = ACTS[act](v)
    won = among_largest(a.abs().unflatten(-1, (-1, group)), k).flatten(-2)
    return torch.where(won, a, 0), won


def fire_forward(v: Tensor, group: int, k: int, act: str) -> tuple[Tensor, Tensor]:
    if not in_c(v):
        return fire_reference(v, group, k, act)
    kept, won = fire_shapes(v, group, k, act)
    n = v.size(-1)
    run_pass("fire", (v.contiguous(), kept, won), v.numel() // n, n, group, k, ACT_NUMBERS[act])
    return kept, won


def fire_back(grad: Tensor, v: Tensor, won: Tensor, act: str) -> Tensor:
    if not in_c(v):
        return SLOPES[act](torch.where(won, grad, 0), v).contiguous()
    dv, n = as_new(v), v.size(-1)
    run_pass("fire_back", (*without_gaps(grad, v, won), dv), v.numel() // n, n, ACT_NUMBERS[act])
    return dv


fire = Pass(fire_forward, fire_shapes, fire_back, lambda grad, v, won, act: as_new(v), kept=(0, 5),
            options=(3,))


class Opened(torch.autograd.Function):
    """1 where size > exp(edge), else 0; for the slope with respect to edge the step counts as a sigmoid."""

    @staticmethod
    def forward(ctx, size, edge):
        ctx.save_for_backward(size, edge)
        return (size > edge.exp()).float()

    @staticmethod
    def backward(ctx, grad):
        size, edge = ctx.saved_tensors
        return None, -(grad * step_slope(size, edge)).sum_to_size(edge.shape)


def step_slope(size, edge):
    soft = torch.sigmoid(size.log() - edge)
    return soft * (1 - soft)


def event_reference(v, edge, act="none"):
    """v (..., n), edge (n) or of v's shape -> a * 1[|a| > exp(edge)] of a = ACTS[act](v), and how many of a
    token's gates are open, (..., 1) in fp32."""
    a = ACTS[act](v)
    gate = Opened.apply(a.detach().abs().float(), edge)
    return a * gate.to(a.dtype), gate.sum(-1, keepdim=True)


def event(v, edge, act="none"):
    """As the reference; on a CPU in one pass, forward and backward, where a unit has one edge."""
    if v.is_cpu and edge.dim() == 1 and edge.dtype == torch.float32:
        return event_pass(v, edge, act)
    return event_reference(v, edge, act)


def event_shapes(v, edge, act):
    return as_new(v), v.new_empty(*v.shape[:-1], 1, dtype=torch.float32)


def event_forward(v: Tensor, edge: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if not in_c(v):
        return event_reference(v, edge, act)
    (kept, count), n = event_shapes(v, edge, act), v.size(-1)
    run_pass("event", (v.contiguous(), edge.exp(), kept, count), v.numel() // n, n, ACT_NUMBERS[act])
    return kept, count


def event_back(grad: Tensor | None, of_count: Tensor | None, v: Tensor, edge: Tensor,
               act: str) -> tuple[Tensor, Tensor]:
    n = v.size(-1)
    grad = torch.zeros_like(v) if grad is None else grad
    of_count = torch.zeros(*v.shape[:-1], 1) if of_count is None else of_count
    if not in_c(v):
        a = ACTS[act](v)
        size = a.abs().float()
        slope = ((grad * a).float() + of_count) * step_slope(size, edge)
        return SLOPES[act](grad * (size > edge.exp()).to(a.dtype), v), -slope.sum_to_size(edge.shape)
    dv, d_edge = as_new(v), as_new(edge)
    run_pass("event_back", (*without_gaps(grad, of_count, v, edge.exp()), dv, d_edge), v.numel() // n, n,
             ACT_NUMBERS[act])
    return dv, d_edge


event_pass = Pass(event_forward, event_shapes, event_back,
                  lambda grad, of_count, v, edge, act: (as_new(v), as_new(edge)), kept=(0, 1), options=(2,))


def scaled_reference(a, gates):
    """a (..., width), gates (..., 1) -> a * gates, and 0 where a gate is shut, whatever a is there: no decode
    step has computed it."""
    return torch.where(gates == 0, 0, a * gates)


def scaled(v, gates, act="none"):
    """v (..., N, width), gates (..., N) -> act(v), then as the reference; on a CPU in one pass, forward and
    backward."""
    if v.is_cpu and v.dtype == gates.dtype and v.shape[:-1] == gates.shape:
        return scaled_pass(v, gates, act)
    return scaled_reference(ACTS[act](v), gates.unsqueeze(-1))


def scale(v: Tensor, gates: Tensor, act: str) -> Tensor:
    if not in_c(v):
        return scaled_reference(ACTS[act](v), gates.unsqueeze(-1)).contiguous()
    y, (N, width) = as_new(v), v.shape[-2:]
    run_pass("scale", (*without_gaps(v, gates), y), v.numel() // (N * width), N, width, ACT_NUMBERS[act])
    return y


def scale_back(grad: Tensor, v: Tensor, gates: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if not in_c(v):
        open_grad = torch.where(gates.unsqueeze(-1) == 0, 0, grad)
        dv = SLOPES[act](open_grad * gates.unsqueeze(-1), v)
        return dv.contiguous(), (open_grad * ACTS[act](v)).sum(-1)
    dv, d_gates, (N, width) = as_new(v), as_new(gates), v.shape[-2:]
    run_pass("scale_back", (*without_gaps(grad, v, gates), dv, d_gates), v.numel() // (N * width), N, width,
             ACT_NUMBERS[act])
    return dv, d_gates


scaled_pass = Pass(scale, lambda v, gates, act: as_new(v), scale_back,
                   lambda grad, v, gates, act: (as_new(v), as_new(gates)), kept=(0, 1), options=(2,))


def missed_reference(z, a):
    """Guesses z (..., n), as logits, that units a (..., n) are not zero -> their cross-entropies summed,
    (..., 1) in fp32."""
    won = (a.detach() != 0).float()
    return F.binary_cross_entropy_with_logits(z.float(), won, reduction="none").sum(-1, keepdim=True)


def missed(z, a):
    """As the reference; on a CPU in one pass, forward and backward."""
    if z.is_cpu and z.dtype == a.dtype and z.shape == a.shape:
        return missed_pass(z, a.detach())[0]
    return missed_reference(z, a)


def miss_shapes(z, a):
    return z.new_empty(*z.shape[:-1], 1, dtype=torch.float32), as_new(z)


def miss(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropies, and their slope in z, which costs next to nothing more."""
    if not in_c(z):
        return missed_reference(z, a), (z.float().sigmoid() - (a != 0).float()).to(z.dtype).contiguous()
    (loss, slope), n = miss_shapes(z, a), z.size(-1)
    run_pass("miss", (*without_gaps(z, a), loss, slope), z.numel() // n, n)
    return loss, slope


def miss_back(grad: Tensor, of_slope: Tensor | None, slope: Tensor) -> Tensor:
    if not in_c(slope):
        return (grad * slope.float()).to(slope.dtype).contiguous()
    dz, n = as_new(slope), slope.size(-1)
    run_pass("miss_back", (*without_gaps(grad, slope), dz), slope.numel() // n, n, dtype=slope.dtype)
    return dz


missed_pass = Pass(miss, miss_shapes, miss_back, lambda grad, of_slope, slope: as_new(slope), kept=(3,))


# ------------------------------------------------ oscillating units ---------------------------------------
#
# sin(w x + phi) tanh(x) + b: eight passes over memory as single operators, forward and backward 24; here one
# and one. w, phi, b (N,) in fp32, x (..., N).

def osc_reference(x, w, phi, b):
    return torch.sin(w * x + phi) * torch.tanh(x) + b


def osc(x, w, phi, b):
    """As the reference, computed in fp32 and stored in x's dtype; sine and tanh to 1e-6 where |w x| < 1e4."""
    if (x.device.type != "cpu" or torch.compiler.is_compiling() or w.dim() > 1 or not has_kernel(x)
            or not in_c(x)):
        return osc_reference(x, *(t.to(x.dtype) for t in (w, phi, b)))
    return Osc.apply(x, w.float(), phi.float(), b.float())


class Osc(torch.autograd.Function):
    """osc by the C kernels, differentiable once."""

    @staticmethod
    def forward(ctx, x, w, phi, b):
        ctx.save_for_backward(x, w, phi)
        y = torch.empty_like(x)
        osc_kernel("osc", x.dtype)(*map(pointer, (x, w, phi, b, y)), x.numel() // len(w), len(w),
                                   torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w, phi = ctx.saved_tensors
        dx, (dw, dphi, db) = torch.empty_like(x), torch.zeros(3, len(w))
        grad = grad.contiguous()                 # it lives until the kernel is done
        osc_kernel("osc_back", x.dtype)(*map(pointer, (x, w, phi, grad, dx, dw, dphi, db)),
                                        x.numel() // len(w), len(w), torch.get_num_threads())
        return dx, dw, dphi, db


@functools.cache
def osc_kernel(name, dtype):
    return getattr(cpu_library()[0], f"{name}_{NAMES[dtype]}")


# ------------------------------------------------ squared ReLU, norms, rotations, column gates ------------
#
# As operators of torch a squared ReLU is two passes over memory and four for its gradient, an RMSNorm's
# gradient ten, in fp32, a rotation three and six, and a column gate six and a sort.

def relu2(v):
    """As ACTS["relu2"]; on a CPU in one pass, forward and backward."""
    if not v.is_cpu or torch.compiler.is_compiling() or not in_c(v):
        return ACTS["relu2"](v)
    return ReLU2.apply(v)


class ReLU2(torch.autograd.Function):
    """relu2 by the C kernels, differentiable once."""

    @staticmethod
    def forward(ctx, v):
        v, y = v.contiguous(), as_new(v)
        run_pass("relu2", (v, y), v.numel())
        ctx.save_for_backward(v)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        v, = ctx.saved_tensors
        dv = as_new(v)
        run_pass("relu2_back", (grad.contiguous(), v, dv), v.numel())
        return dv


def rms_norm_reference(x, eps, weight=None):
    """x (..., n) over its root mean square, times weight (n) if there is one; statistics in fp32."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm(x, eps, weight=None):
    """As the reference; on a CPU in one pass forward, two backward."""
    if not x.is_cpu or torch.compiler.is_compiling() or not in_c(x):
        return rms_norm_reference(x, eps, weight)
    return RMS.apply(x, weight, eps)


def rows_of(x):
    """x (..., H, n) -> (it, M, H, n, stride): M rows of H times n that lie `stride` apart; a copy where they
    cannot be seen so."""
    n = x.size(-1)
    if not x.is_contiguous() and x.dim() > 2:
        rows = x.flatten(0, -3)
        if rows.stride()[1:] == (n, 1):
            return rows, len(rows), rows.size(1), n, rows.stride(0)
    return x.contiguous(), x.numel() // n, 1, n, n


class RMS(torch.autograd.Function):
    """rms_norm by the C kernels, differentiable once."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows, *sizes = rows_of(x) if weight is None else rows_of(x.contiguous())
        y, by = as_new(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        run_pass("norm", (rows, weight, y, by), *sizes, eps)
        ctx.save_for_backward(x, weight, by)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, by = ctx.saved_tensors
        rows, *sizes = rows_of(x) if weight is None else rows_of(x.contiguous())
        dx = as_new(x)
        dw = None if weight is None else as_new(weight, torch.float32)
        run_pass("norm_back", (grad.contiguous(), rows, weight, by, dx, dw), *sizes)
        return dx, dw if dw is None else dw.to(weight.dtype), None


def rotated_reference(x, cos, sin):
    """x (B, T, H, n) with its halves (a, b) turned to (a cos + b sin, b cos - a sin); tables (T, 1, n) or
    (B, T, 1, n), sin with its second half negative."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def rotated(x, cos, sin):
    """As the reference; on a CPU in one pass, forward and backward, where all rows share the tables."""
    shared = x.dim() == 4 and x.stride(-1) == 1 and cos.shape == (x.size(1), 1, x.size(3))
    if not (x.is_cpu and shared) or torch.compiler.is_compiling() or not in_c(x):
        return rotated_reference(x, cos, sin)
    return Rotated.apply(x, cos, sin)


class Rotated(torch.autograd.Function):
    """rotated by the C kernels, differentiable once."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = without_gaps(cos, sin)
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return turned(grad, *ctx.saved_tensors, True), None, None


def turned(x, cos, sin, back):
    y = as_new(x)
    run_pass("rotate", (x, cos, sin, y), *x.shape, *x.stride()[:3], back)
    return y


def column_gates_reference(s, inhibits, balance, k, dtype):
    """Scores s (..., N) -> gates in `dtype`: of s_c less what the active columns d inhibit it by,
    inhibits[c][d] relu(s_d), the k largest win, their choice alone seeing `balance` (N), and answer with a
    sigmoid of it."""
    z = s - F.relu(s) @ inhibits.t()
    winners = first_largest(z + balance, k)
    return torch.zeros_like(z).scatter(-1, winners, z.sigmoid().gather(-1, winners)).to(dtype)


def column_gates(s, inhibits, balance, k, dtype):
    """As the reference; on a CPU in one pass, forward and backward, and without a sort."""
    if (not s.is_cpu or torch.compiler.is_compiling() or s.dtype != torch.float32 or dtype not in NAMES
            or not in_c(s)):
        return column_gates_reference(s, inhibits, balance, k, dtype)
    return ColumnGates.apply(s, inhibits, balance, k, dtype)


class ColumnGates(torch.autograd.Function):
    """column_gates by the C kernels, differentiable once."""

    @staticmethod
    def forward(ctx, s, inhibits, balance, k, dtype):
        s, balance = s.contiguous(), balance.float()            # a model in bf16 has it in bf16
        gates, slope, N = as_new(s, dtype), as_new(s), s.size(-1)
        run_pass("gates", (s, inhibits.t().contiguous(), balance, gates, slope), s.numel() // N, N, k,
                 dtype=dtype)
        ctx.save_for_backward(s, inhibits, slope)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        s, inhibits, slope = ctx.saved_tensors
        ds, d_inhibits, N = as_new(s), as_new(inhibits), s.size(-1)
        run_pass("gates_back", (grad.contiguous(), slope, s, inhibits.contiguous(), ds, d_inhibits),
                 s.numel() // N, N)
        return ds, d_inhibits, None, None, None
