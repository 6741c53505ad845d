"""Sparse operations: each with the bytes it moves, its reference, its fast path, and what is said without it.

CPU kernels are C (kernels/cpu.c, compiled at first use by kernels/build.py) and called through ctypes: a call
costs 2 us, where a library's matrix product costs 20. They share PyTorch's OpenMP threads.
"""
import contextlib
import ctypes
import functools
import itertools
import time
import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.build import NAMES, cpu_library, triton_kernels
from kernels.passes import (  # noqa: F401  the part of this face that stands in a file of its own
    ACT_NUMBERS,
    ACTS,
    SLOPES,
    among_largest,
    event,
    event_pass,
    event_reference,
    fire,
    fire_back,
    fire_forward,
    first_largest,
    has_kernel,
    in_c,
    missed,
    missed_pass,
    missed_reference,
    osc,
    osc_reference,
    pointer,
    scaled,
    scaled_pass,
    scaled_reference,
)
from kernels.whole import (  # noqa: F401  likewise
    DIGIT,
    FINEST,
    dequantize,
    has_offsets,
    in_whole_numbers,
    on_levels,
    q4_0,
    q8_0,
    quantize,
    scales_of,
    whole_product_reference,
    whole_rows_sum_reference,
)


def triton_for(*tensors):
    """The Triton kernels, where these tensors are of one type and layout that they read; else None."""
    gpu, dtype = triton_kernels(), tensors[0].dtype
    fits = gpu and dtype in gpu.FLOATS and all(t.dtype == dtype and t.is_contiguous() for t in tensors)
    return gpu if fits else None


def path_taken(device):
    """The sentence that a script prints at its start: which kernels a decode step on this device runs on."""
    if device.type == "cuda":
        return "Triton kernels" if triton_kernels() else "PyTorch's kernels: no Triton here"
    return cpu_library()[1] if device.type == "cpu" else "PyTorch's kernels"


# ------------------------------------------------ matrix products ----------------------------------------

# Does the CPU multiply bf16 itself?
NATIVE_BF16 = any(getattr(torch.cpu, flag, bool)() for flag in ("_is_avx512_bf16_supported",
                                                                "_is_amx_tile_supported"))


def emulated(x):
    """Are products of x bf16 on a CPU that does not multiply it? PyTorch's own take five to forty times as
    long there as those of fp32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not NATIVE_BF16


def in_fp32(product, x, *others):
    """product(x, *others) of tensors of one dtype; what would be emulated is computed in fp32 and rounded
    once, which is what it stands for."""
    if not emulated(x):
        return product(x, *others)
    return product(*(t if t is None else t.float() for t in (x, *others))).bfloat16()


FEW = 8                                          # most tokens of a decode step


def inferring():
    """No gradient can be asked for, and no compiler is tracing."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


# ------------------------------------------------ a head that looks twice ---------------------------------
#
# The k largest of w x, exactly, for the bytes of an 8-bit copy of w (half of bf16's) and of the rows that can
# be among them: a row's 8-bit result is off by no more than |w - its copy| |x| (Cauchy-Schwarz) and rounding,
# so that a row whose highest possible result is below the k-th largest lowest possible one need not be read.

ROUND = {torch.float32: 1e-6, torch.bfloat16: 2.0 ** -8}       # of a result, when it is stored


def copy_in_8_bits(weight):
    """As the reference in one pass, at the memory's speed: every stream makes the copy anew."""
    if not (weight.is_cpu and has_kernel(weight)):
        return copy_in_8_bits_reference(weight)
    (N, K), q = weight.shape, torch.empty_like(weight, dtype=torch.int8)
    scale, error = (torch.empty(N) for _ in range(2))
    kernel = getattr(cpu_library()[0], "copy8_" + NAMES[weight.dtype])
    kernel(*map(pointer, (weight, q, scale, error)), N, K, torch.get_num_threads())
    return q, scale, error


def copy_in_8_bits_reference(weight):
    """(N, K) -> q (N, K) int8, scale (N,), error (N,) fp32: |w - scale q| of each row, and what sums in fp32
    may add to it."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=1e-30) / 127
    q = (wide / scale[:, None]).round().to(torch.int8)
    error = torch.addcmul(wide, q.float(), -scale[:, None]).norm(dim=1) * 1.001
    return q, scale, error + 2e-7 * weight.size(1) * wide.norm(dim=1) + 1e-16        # squares may underflow


def rows_of_copy(q, scale):
    """Of copy_in_8_bits -> scale and sum of each row as C reads them (N, 2), and its size |scale q| (N,), by
    which an input that is rounded to 8 bits as well has certain bounds."""
    of, size = torch.empty(len(q), 2, dtype=torch.int32), torch.empty(len(q))
    cpu_library()[0].rows_of_copy(*map(pointer, (q, scale, of, size)), *q.shape, torch.get_num_threads())
    return of, size


# ------------------------------------------------ counting ----------------------------------------------

tally = None                                     # a Tally while `counting`


class Tally:
    """Multiply-adds and bytes of weights that have really been executed and read: those of forward's products
    from the shapes that they ran on, those of a decode step as its program counts them."""

    def __init__(self):
        self.macs = self.bytes = 0

    def add(self, tokens, rows, width, weight):
        self.macs += tokens * rows * width
        self.bytes += rows * width * weight.element_size()


def note_rows(rows, weight):
    """While `counting`: so many rows of a matrix are read, each for one token."""
    if tally is not None:
        tally.add(1, int(rows), weight.size(1), weight)


def note(tokens, weight, parts=1):
    """While `counting`: so many tokens meet a whole matrix, in an operator that does not count itself; or all
    of it is read, and each token meets one of so many parts."""
    if tally is not None:
        tally.macs += tokens * weight.numel() // parts
        tally.bytes += weight.numel() * weight.element_size()


@contextlib.contextmanager
def counting():
    """Count what products of weights execute inside the block -> a Tally."""
    global tally
    outer, tally = tally, Tally()
    try:
        yield tally
    finally:
        tally = outer


in_step = False                                  # does a step of a GPU run, while `step_of_card`?


@contextlib.contextmanager
def step_of_card():
    """Inside the block runs a GPU's decode step of few tokens (B, 1, C), made of kernels that choose what
    they read without asking the host. decode/sampling.py decides once a stream."""
    global in_step
    outer, in_step = in_step, True
    try:
        yield
    finally:
        in_step = outer


def few_tokens(x):
    """Are these (..., K) no more tokens than a step has, on a CPU with C kernels, without gradients?"""
    return x.is_cpu and 0 < x.numel() <= FEW * x.size(-1) and inferring() and cpu_library()[0] is not None


def all_finite(tensor):
    """Is no element NaN or infinite? In one pass."""
    tensor = tensor.detach()
    tensor = tensor if tensor.is_contiguous() else tensor.transpose(0, -1)           # aminmax copies others
    return all(end.isfinite().item() for end in torch.aminmax(tensor))


# ------------------------------------------------ the largest -------------------------------------------

def places_of_largest(scores, k):
    """The same places in any order."""
    return largest(scores, k, False, first_largest)


def largest(scores, k, keep, reference):
    """reference(scores, k); in a GPU's step by the Triton kernel that keeps them, or finds their places."""
    gpu = triton_for(scores) if in_step else None
    if gpu and 0 < k < scores.size(-1) <= gpu.MOST_UNITS:
        return gpu.largest(scores, k, keep)
    return reference(scores, k)


def keep_largest_reference(a, k):
    """a (..., n) -> the same with all but the k largest |a| of each token at zero."""
    return torch.where(among_largest(a.detach().abs(), k), a, 0)


def keep_largest(a, k, act="none"):
    """act (none or relu2) and then as the reference; on a CPU in one pass, forward and backward."""
    if a.is_cpu:
        return fire(a, a.size(-1), k, act)[0]
    return largest(ACTS[act](a), k, True, keep_largest_reference)


def group_winners_reference(a, group, k):
    """a (..., n) -> the same with all but the k largest |a| of every `group` neighbours at zero."""
    if (group, k) == (4, 2):
        return torch.where(two_of_four(a.detach().abs()), a, 0)
    return keep_largest_reference(a.unflatten(-1, (-1, group)), k).flatten(-2)


def group_winners(a, group, k, act="none"):
    """act (none or relu2) and then as the reference; on a CPU in one pass, forward and backward."""
    return fire(a, group, k, act)[0] if a.is_cpu else group_winners_reference(ACTS[act](a), group, k)


# ------------------------------------------------ weights of whole numbers --------------------------------

def whole_product(x, codes, scale):
    """As the reference; in inference on a CPU few tokens by the arithmetic of kernels/step.c. Many tokens: 8
    bits as products of whole numbers, exactly; 4 bits in a bf16 model as a product of bf16, to which the
    weights are rounded; both where the processor does that fast, else by step.c where it has vectors."""
    if tally is not None:
        tally.macs += x.numel() * len(codes)
        tally.bytes += codes.nbytes + scale.nbytes
    if not few_tokens(x):
        if len(scale) and many(x) and multiplies_whole_numbers():
            return product_of_whole_numbers(x, codes, scale)
        if not len(scale) and multiplies_bf16(x):
            return F.linear(x, in_bf16(codes, scale, x.size(-1))).float()
        if not (many(x) and prompts_in_whole_numbers()):
            return whole_product_reference(x, codes, scale)
    y = torch.empty(*x.shape[:-1], len(codes))
    matrix = whole_matrix(codes, scale, x.size(-1))
    wide = x.float().contiguous()
    cpu_library()[0].whole_products(ctypes.addressof(matrix), wide.data_ptr(), y.data_ptr(),
                                    wide.numel() // x.size(-1), torch.get_num_threads())
    return y


def whole_rows_sum(a, codes, scale, C, all=False):
    """As the reference, by the same arithmetic: rows where a is zero are not read, unless `all` are."""
    if tally is not None:
        live = a.flatten(0, -2) != 0
        tally.macs += int(live.sum()) * C
        tally.bytes += int(live.any(dim=0).sum()) * (codes.size(1) + 8 * bool(len(scale)))
    if not few_tokens(a):
        if multiplies_bf16(a):
            return (a @ in_bf16(codes, scale, C)).float()
        return whole_rows_sum_reference(a, codes, scale, C)
    y = torch.empty(*a.shape[:-1], C)
    matrix = whole_matrix(codes, scale, C)
    wide = a.float().contiguous()
    cpu_library()[0].whole_rows_sum(ctypes.addressof(matrix), wide.data_ptr(), y.data_ptr(),
                                    wide.numel() // len(codes), all)
    return y


def product_of_whole_numbers(x, codes, scale):
    """x (..., K) rounded to 15 bits times weights (N, K) of 8 bits, on a CPU -> (..., N) fp32."""
    high, low, by = tokens_in_digits(x)
    weights = codes.view(torch.int8)[:, :x.size(-1)].t()
    sums, more = torch._int_mm(high, weights), torch._int_mm(low, weights)
    cpu_library()[0].scale_sums(*map(pointer, (sums, more, by, scale)), *sums.shape, torch.get_num_threads())
    return sums.view(torch.float32).view(*x.shape[:-1], len(codes))


def tokens_in_digits(x):
    """As in_whole_numbers(x, FINEST), in C: x (..., K) on a CPU -> int8 (tokens, K) twice, of which the first
    times DIGIT plus the second are the numbers, and scales (tokens)."""
    x = x.float().contiguous()
    high, low = (torch.empty(x.numel() // x.size(-1), x.size(-1), dtype=torch.int8) for _ in range(2))
    by = torch.empty(len(high))
    cpu_library()[0].in_digits(*map(pointer, (x, high, low, by)), *high.shape, torch.get_num_threads())
    return high, low, by


@functools.cache
def multiplies_whole_numbers():
    """Does PyTorch multiply 8 bits fast here, and exactly? Without VNNI its sums of pairs are cut off at 16
    bits (oneDNN), and ONEDNN_MAX_CPU_ISA can take VNNI away: a product that would be cut off tells. Or it
    multiplies them one by one, which takes 30 times as long as fp32: a product that is timed tells."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported() and cpu_library()[0]):
        return False
    q = torch.full((128, 128), 127, dtype=torch.int8)
    exact = bool((torch._int_mm(q, -q) == -128 * 127 * 127).all())
    wide = q.float()
    return exact and least_seconds(torch._int_mm, q, q) < 8 * least_seconds(torch.mm, wide, wide)


def least_seconds(op, *given):
    """Of five calls, by one thread: on a busy machine two wait for each other, whatever they compute."""
    def once():
        began = time.perf_counter()
        op(*given)
        return time.perf_counter() - began
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(once() for _ in range(5))
    finally:
        torch.set_num_threads(threads)


def multiplies_bf16(x):
    """Is this a prompt in bf16 on a CPU that multiplies bf16 itself?"""
    return many(x) and x.dtype == torch.bfloat16 and NATIVE_BF16 and cpu_library()[0] is not None


def in_bf16(codes, scale, K):
    """What quantised weights (N, K) stand for, rounded to bf16, on a CPU."""
    rows = torch.empty(len(codes), K, dtype=torch.bfloat16)
    matrix = whole_matrix(codes, scale, K)
    cpu_library()[0].whole_to_bf16(ctypes.addressof(matrix), rows.data_ptr(), torch.get_num_threads())
    return rows


def many(x):
    """Is this a prompt on a CPU?"""
    return x.is_cpu and x.numel() > 0 and inferring()


def prompts_in_whole_numbers():
    return cpu_library()[0] is not None and bool(cpu_library()[0].many_whole_products())


class MatrixC(ctypes.Structure):
    """`struct matrix` of kernels/step.c."""
    _fields_ = [("kind", ctypes.c_int64), ("rows", ctypes.c_int64), ("width", ctypes.c_int64),
                ("stride", ctypes.c_int64), ("data", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                ("scale_stride", ctypes.c_int64), ("bias", ctypes.c_void_p), ("across", ctypes.c_void_p)]


I8, I4 = 4, 5                                    # kinds of a matrix, numbered as in step.c
KEPT = {torch.float32: 2, torch.bfloat16: 3}     # 2:4 as pack_24 gives it


def whole_matrix(codes, scale, K):
    """Quantised weights (N, K) as C reads them; codes and scale must live as long."""
    return MatrixC(kind=I8 if len(scale) else I4, rows=len(codes), width=K, stride=codes.size(1),
                   data=codes.data_ptr(), scale=scale.data_ptr(),
                   scale_stride=36 * -(-K // 64) * has_offsets(scale))


# ------------------------------------------------ 2:4 weights --------------------------------------------
#
# y = act(W x + bias) + onto, where of every four consecutive weights in a row of W (N, K) two are kept. A
# packed row holds them in order and a place of 2 bits for each, so a bf16 row is 9/16 of its dense bytes (an
# fp32 row 17/32): 1.78x is the most that a decode step can gain. One pass over the packed bytes, each read
# once; sums in fp32; the epilogue saves a launch and a trip of y through memory.
# Pruning and training: 2104.08378, 2102.04010.

def two_of_four(sizes):
    """sizes (..., 4 * n) -> bool of that shape: the two largest of every four (the rule of first_largest)."""
    require_fours(sizes.size(-1))
    part = sizes.unflatten(-1, (-1, 4)).unbind(-1)
    first, kept = {}, []
    for i, j in itertools.combinations(range(4), 2):
        first[i, j] = (part[i] >= part[j]) | (part[i] != part[i])
        first[j, i] = ~first[i, j]
    for i in range(4):                           # those that come before two others or all three
        a, b, c = (first[i, j] for j in range(4) if j != i)
        kept.append(a & b | (a | b) & c)
    return torch.stack(kept, dim=-1).flatten(-2)


def require_fours(K):
    if K % 4:
        raise ValueError(f"2:4 keeps two of every four consecutive weights: {K} is not a multiple of 4")


def prune_24(weight):
    """(..., K) -> the same with the smaller two of every four consecutive weights at zero; on a CPU in one
    pass."""
    require_fours(weight.size(-1))
    if not torch.compiler.is_compiling() and in_c(weight):
        return fire_forward(weight, 4, 2, "none")[0]
    return torch.where(two_of_four(weight.abs()), weight, 0)


def pack_24(weight):
    """(N, K) with at most two of every four weights not zero -> values (N, P/2), meta (N, P/32) int32.

    P is K rounded up to 32. values: what is kept, in order. meta: for every four weights the places 0..3 of
    the two that are kept, 2 bits each, the first in the lower bits; eight fours in a word, the first lowest.
    """
    K, kept = weight.size(1), two_of_four(weight.abs())
    if ((weight != 0) & ~kept).any():
        raise ValueError("pack_24: some four weights hold more than two that are not zero: prune_24 first")
    w, k = (t.unflatten(-1, (-1, 4)).unbind(-1) for t in (weight, kept))
    # the first that is kept is one of the first three, the second one of the last three
    values = torch.stack((torch.where(k[0], w[0], torch.where(k[1], w[1], w[2])),
                          torch.where(k[3], w[3], torch.where(k[2], w[2], w[1]))), dim=-1).flatten(-2)
    at = 2 - k[0].byte() - (k[0] | k[1]).byte(), 1 + k[3].byte() + (k[2] | k[3]).byte()
    code = F.pad(at[0] | at[1] << 2, (0, -K // 4 % 8), value=0b0100)
    words = (code[:, ::2] | code[:, 1::2] << 4).contiguous().view(torch.int32)
    return F.pad(values, (0, -K // 2 % 16)).contiguous(), words


def unpack_24(values, meta, K):
    """What pack_24 packed, (N, K)."""
    code = meta[..., None] >> torch.arange(0, 32, 4, device=meta.device, dtype=torch.int32)
    at = torch.stack((code & 3, code >> 2 & 3), dim=-1).flatten(1, 2).long()              # (N, P/4, 2)
    dense = values.new_zeros(*at.shape[:2], 4).scatter(-1, at, values.unflatten(-1, (-1, 2)))
    return dense.flatten(1)[:, :K]


def linear_24_reference(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, onto: Tensor | None,
                        act: str) -> Tensor:
    """x (..., K), a packed W (N, K), bias (N,), onto (..., N) -> act(W x + bias) + onto, (..., N). act: a key
    of ACTS."""
    return after(F.linear(x, unpack_24(values, meta, x.size(-1)), bias), onto, act)


def after(y, onto, act):
    """A product's epilogue."""
    return ACTS[act](y) if onto is None else ACTS[act](y) + onto


def picks_24():
    """Do the C kernels gain anything on this processor? They need AVX2, or AVX-512 VBMI and BF16."""
    return cpu_library()[0] is not None and bool(cpu_library()[0].picks())


def packing_pays(device):
    """-> (does a decode step on this device gain from packed 2:4 weights, the sentence that says so)."""
    pays = picks_24() if device.type == "cpu" else device.type == "cuda" and triton_kernels() is not None
    return pays, ("2:4 weights packed" if pays else "2:4 weights pruned, not packed: packed ones gain on a "
                  "CPU with AVX2 and a C compiler, or on a GPU with Triton")


def linear_24(x, values, meta, bias=None, onto=None, act="none"):
    """As the reference, reading the packed bytes once; differentiable in x, bias and onto. Many tokens on a
    CPU, or where that cannot pick by places, unpack the weights once for all; on a GPU see
    triton_kernels.py."""
    if tally is not None:
        tally.macs += x.numel() * len(values) // 2
        tally.bytes += values.nbytes + meta.nbytes
    if inferring() and x.is_cpu:                 # a custom op costs a small product, and imports the compiler
        return linear_24_cpu(x, values, meta, bias, onto, act)
    return linear_24_op(x, values, meta, bias, onto, act)


SHORT = {torch.float32: 64, torch.bfloat16: 16}  # tokens that packed rows meet faster as they are


def linear_24_cpu(x, values, meta, bias, onto, act):
    if not has_kernel(values):
        return linear_24_reference(x, values, meta, bias, onto, act)
    (N, words), K = meta.shape, x.size(-1)
    library, tokens = cpu_library()[0], x.numel() // K
    if library.picks() == 2 and tokens <= SHORT[x.dtype] and (tokens == 0 or all_finite(x)):
        y, wide = torch.empty(*x.shape[:-1], N), x.float().contiguous()
        matrix = MatrixC(kind=KEPT[x.dtype], rows=N, width=K, stride=values[0].nbytes, data=values.data_ptr(),
                         scale=meta.data_ptr(), scale_stride=meta[0].nbytes)
        library.whole_products(ctypes.addressof(matrix), wide.data_ptr(), y.data_ptr(), tokens,
                               torch.get_num_threads())
        return after((y if bias is None else y + bias.float()).to(x.dtype), onto, act)
    dense = values.new_empty(N, K)               # zeros times what is not finite show here
    getattr(library, "unpack24_" + NAMES[values.dtype])(
        values.data_ptr(), meta.data_ptr(), dense.data_ptr(), N, K, words, torch.get_num_threads())
    return after(in_fp32(F.linear, x, dense, bias), onto, act)


def linear_24_cuda(x, values, meta, bias, onto, act):
    """Up to 64 tokens: our kernels. More are bound by arithmetic: the card's own sparse products, where it
    has them (sm_80 and later), on a second packing that is kept."""
    gpu = triton_for(values)
    if gpu and x.dtype == values.dtype in gpu.HALVES and 0 < x.numel() <= gpu.MOST_ROWS * x.size(-1):
        return gpu.linear_24(x, values, meta, bias, onto, act)
    if not has_sparse_products(x, len(values)):
        return linear_24_reference(x, values, meta, bias, onto, act)
    return after(F.linear(x, semi_structured(values, meta, x.size(-1)), bias), onto, act)


def has_sparse_products(x, N):
    """Does torch multiply 2:4 weights (N, K) on x's card by its sparse units?"""
    return (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) and N % 32 == 0
            and x.size(-1) % 64 == 0 and x.dtype in (torch.float16, torch.bfloat16))


second_packings = {}                             # id of the values of pack_24: torch's packing


def semi_structured(values, meta, K):
    """Torch's packing of the same weights; kept for as long as these are. Whoever writes to them in place
    calls forget_24: a Packed does when it loads a state dict, and nothing else here writes to one."""
    key = id(values)
    if key not in second_packings:
        second_packings[key] = torch.sparse.to_sparse_semi_structured(unpack_24(values, meta, K))
        weakref.finalize(values, second_packings.pop, key, None)
    return second_packings[key]


def forget_24(values):
    """What was made of these packed weights is not theirs any more."""
    second_packings.pop(id(values), None)


def linear_24_backward(ctx, grad):
    x, values, meta, bias = ctx.saved_tensors
    weight = unpack_24(values, meta, x.size(-1))
    inner = SLOPES[ctx.act](grad, F.linear(x, weight, bias))
    return (inner @ weight, None, None, None if bias is None else inner.flatten(0, -2).sum(0),
            grad if ctx.onto else None, None)


def save_linear_24(ctx, inputs, output):
    x, values, meta, bias, onto, ctx.act = inputs
    ctx.onto = onto is not None
    ctx.save_for_backward(x, values, meta, bias)


linear_24_op = torch.library.custom_op("nanocortex::linear_24", linear_24_reference, mutates_args=())
linear_24_op.register_kernel("cpu", linear_24_cpu)
linear_24_op.register_kernel("cuda", linear_24_cuda)
linear_24_op.register_fake(lambda x, values, meta, bias, onto, act:
                           x.new_empty(*x.shape[:-1], len(values)))
linear_24_op.register_autograd(linear_24_backward, setup_context=save_linear_24)


# ------------------------------------------------ 2:4 activations ----------------------------------------
#
# y = a W^T where of every four neighbours in a row of a (M, H) at most two are not zero: a training step's
# down projection, whose multiply-adds a card with sparse units (sm_80 and later) halves. The gradients are
# dense products. What it can gain is 2x of a third of the MLP's arithmetic, less the packing of a.


def winners_product_reference(a: Tensor, weight: Tensor) -> Tensor:
    """a (M, H), weight (C, H) -> (M, C)."""
    return a @ weight.t()


def winners_product_cuda(a, weight):
    if not has_sparse_products(a, len(a)):
        return winners_product_reference(a, weight)
    return torch.mm(torch.sparse.to_sparse_semi_structured(a.contiguous()), weight.t())


def winners_product_backward(ctx, grad):
    a, weight = ctx.saved_tensors
    return grad @ weight, grad.t() @ a


winners_product = torch.library.custom_op("nanocortex::winners_product", winners_product_reference,
                                          mutates_args=())
winners_product.register_kernel("cuda", winners_product_cuda)
winners_product.register_fake(lambda a, weight: a.new_empty(len(a), len(weight)))
winners_product.register_autograd(winners_product_backward,
                                  setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def winners_path(device):
    """The sentence that train.py prints where a model's activations are 2 of 4."""
    sparse = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "2-of-4 activations: " + ("sparse tensor cores multiply them in training" if sparse else
                                     "dense products in training, this device has no sparse ones")


# ------------------------------------------------ units that each token chooses ---------------------------
#
# The two halves of an MLP whose units are chosen per token, for a GPU: up, down (H, C) hold one unit a row,
# groups (B, k) int64 name each token's groups of `width` neighbouring units. Bytes: 2 k width C weights a
# token, plus nothing for the others: no sort, no count on the host, so that a CUDA graph can hold both.
# gathered_down without groups reads the rows where `a` is not zero out of all: top k, squared ReLU, and
# inputs that a threshold has silenced (2408.14690). B tokens that choose a share p each on their own touch
# 1 - (1 - p)^B of the rows.


def units_chosen(groups, width):
    """(B, k) groups -> (B, k * width) units."""
    return (groups[..., None] * width + torch.arange(width, device=groups.device)).flatten(1)


def gathered_up_reference(x: Tensor, up: Tensor, bias: Tensor | None, groups: Tensor, scale: Tensor | None,
                          width: int, act: str) -> Tensor:
    """x (B, C), up (H, C), bias (H,), groups, scale (B, k) -> act(up x + bias) * scale of the chosen units,
    (B, k * width)."""
    rows = units_chosen(groups, width)
    z = torch.einsum("bnc,bc->bn", up[rows], x)
    a = ACTS[act](z if bias is None else z + bias[rows])
    return a if scale is None else a * scale.repeat_interleave(width, dim=1)


def gathered_down_reference(a: Tensor, down: Tensor, bias: Tensor | None, groups: Tensor | None,
                            width: int) -> Tensor:
    """a (B, k * width), down (H, C), bias (C,), groups (B, k); or a (B, H) of all units -> (B, C), the sums
    of the units' rows of down, times a, plus bias."""
    y = a @ down if groups is None else torch.einsum("bn,bnc->bc", a, down[units_chosen(groups, width)])
    return y if bias is None else y + bias


def live_down(a, down, bias):
    """gathered_down of all units of tokens a (..., H), those that are not zero, counted -> (..., C)."""
    if tally is not None:
        note_rows(a.count_nonzero(), down)
    return gathered_down(a.flatten(0, -2), down, bias, None, 1).unflatten(0, a.shape[:-1])


def gathered_up_cuda(x, up, bias, groups, scale, width, act):
    gpu = triton_for(up)
    if not gpu or x.dtype != up.dtype:
        return gathered_up_reference(x, up, bias, groups, scale, width, act)
    return gpu.gathered_up(x, up, bias, groups, scale, width, act)


def gathered_down_cuda(a, down, bias, groups, width):
    gpu = triton_for(down)
    if not gpu or a.dtype != down.dtype:
        return gathered_down_reference(a, down, bias, groups, width)
    return gpu.gathered_down(a, down, bias, groups, width)


def gathered_up_backward(ctx, grad):
    x, up, bias, groups, scale = ctx.saved_tensors
    rows = units_chosen(groups, ctx.width)
    z = torch.einsum("bnc,bc->bn", up[rows], x)
    z = z if bias is None else z + bias[rows]
    grad_scale = None
    if scale is not None:
        grad_scale = (grad * ACTS[ctx.act](z)).unflatten(1, (-1, ctx.width)).sum(-1)
        grad = grad * scale.repeat_interleave(ctx.width, dim=1)
    inner, flat = SLOPES[ctx.act](grad, z), rows.flatten()
    grad_up = torch.zeros_like(up).index_add(0, flat, (inner[..., None] * x[:, None]).flatten(0, 1))
    grad_bias = None if bias is None else torch.zeros_like(bias).index_add(0, flat, inner.flatten())
    return torch.einsum("bn,bnc->bc", inner, up[rows]), grad_up, grad_bias, None, grad_scale, None, None


def save_gathered_up(ctx, inputs, output):
    *tensors, ctx.width, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def gathered_down_backward(ctx, grad):
    a, down, bias, groups = ctx.saved_tensors
    grad_bias = None if bias is None else grad.sum(0)
    if groups is None:
        return grad @ down.t(), a.t() @ grad, grad_bias, None, None
    rows = units_chosen(groups, ctx.width)
    grad_down = torch.zeros_like(down).index_add(0, rows.flatten(),
                                                 (a[..., None] * grad[:, None]).flatten(0, 1))
    return torch.einsum("bc,bnc->bn", grad, down[rows]), grad_down, grad_bias, None, None


def save_gathered_down(ctx, inputs, output):
    *tensors, ctx.width = inputs
    ctx.save_for_backward(*tensors)


gathered_up = torch.library.custom_op("nanocortex::gathered_up", gathered_up_reference, mutates_args=())
gathered_up.register_kernel("cuda", gathered_up_cuda)
gathered_up.register_fake(lambda x, up, bias, groups, scale, width, act:
                          x.new_empty(len(x), groups.size(1) * width))
gathered_up.register_autograd(gathered_up_backward, setup_context=save_gathered_up)
gathered_down = torch.library.custom_op("nanocortex::gathered_down", gathered_down_reference, mutates_args=())
gathered_down.register_kernel("cuda", gathered_down_cuda)
gathered_down.register_fake(lambda a, down, bias, groups, width: a.new_empty(len(a), down.size(1)))
gathered_down.register_autograd(gathered_down_backward, setup_context=save_gathered_down)


# ------------------------------------------------ products by group --------------------------------------
#
# y = a_g W_g for rows that are sorted by group: every row meets its own group's matrix alone, 2 n K N
# operations. torch's grouped_mm does it in one call. It takes rows of whole multiples of 16 bytes, so others
# get zeros behind them; before torch 2.15 it traces in bf16 alone, so a compiler sees an op of ours. On a CPU
# oneDNN compiles a bf16 product anew for every number of rows, which takes ten times as long as the product:
# there groups are filled up with rows of zeros to whole multiples of STEP.

STEP = 16


def grouped_product_reference(a: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """a (n, K), weights (E, K, N), ends (E,) int32, where each group's rows of a end -> (n, N)."""
    parts = a.tensor_split(ends[:-1].cpu().long())
    return torch.cat([part @ weight for part, weight in zip(parts, weights)])


def grouped_outer_reference(a: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """a (n, K), grad (n, N), ends as above -> (E, K, N), a^T grad of each group's rows."""
    at = ends[:-1].cpu().long()
    return torch.stack([part.t() @ of for part, of in zip(a.tensor_split(at), grad.tensor_split(at))])


def grouped_mm(a, weights, ends):
    """grouped_product_reference by torch's kernel, which has a backward of its own."""
    K, N = (-size % (16 // a.element_size()) for size in weights.shape[1:])
    wide = F.pad(weights, (0, N, 0, K)) if K or N else weights
    a, places, ends = filled_up(F.pad(a, (0, K)) if K else a, ends)
    y = F.grouped_mm(a, wide, offs=ends)[:, :weights.size(2)]
    return y if places is None else y.index_select(0, places)


def filled_up(a, ends):
    """Rows a (n, K) whose groups end at `ends` (E,) -> (rows, places, ends): on a CPU in 16 bits each group
    has zeros behind it up to a multiple of STEP rows, and row i is at places[i]; elsewhere a, None and ends.
    """
    if a.device.type != "cpu" or a.element_size() != 2:
        return a, None, ends
    counts = ends.diff(prepend=ends.new_zeros(1))
    filled = (counts + (STEP - 1)) // STEP * STEP
    behind = filled.cumsum(0, dtype=ends.dtype)
    moved = (behind - filled) - (ends - counts)
    places = torch.arange(len(a)) + moved.repeat_interleave(counts)
    return a.new_zeros(int(behind[-1]), a.size(1)).index_copy(0, places, a), places, behind


def grouped_mm_outer(a, grad, ends):
    """grouped_outer_reference by torch's kernel."""
    (a, _, _), (grad, _, ends) = filled_up(a, ends), filled_up(grad, ends)
    a_wide, grad_wide = (F.pad(t, (0, -t.size(1) % (16 // t.element_size()))) for t in (a, grad))
    return F.grouped_mm(a_wide.t(), grad_wide, offs=ends)[:, :a.size(1), :grad.size(1)].contiguous()


def grouped_product(a, weights, ends):
    """As the reference, differentiable in a and weights."""
    return (grouped_product_op if torch.compiler.is_compiling() else grouped_mm)(a, weights, ends)


def grouped_product_backward(ctx, grad):
    a, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_product_op(grad, weights.mT, ends), grouped_outer_op(a, grad, ends), None


grouped_product_op = torch.library.custom_op("nanocortex::grouped_product", grouped_product_reference,
                                             mutates_args=())
grouped_outer_op = torch.library.custom_op("nanocortex::grouped_outer", grouped_outer_reference,
                                           mutates_args=())
for device in ("cpu", "cuda"):
    grouped_product_op.register_kernel(device, lambda *three: grouped_mm(*three).contiguous())
    grouped_outer_op.register_kernel(device, grouped_mm_outer)
grouped_product_op.register_fake(lambda a, weights, ends: a.new_empty(len(a), weights.size(2)))
grouped_outer_op.register_fake(lambda a, grad, ends: a.new_empty(len(ends), a.size(1), grad.size(1)))
grouped_product_op.register_autograd(
    grouped_product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
