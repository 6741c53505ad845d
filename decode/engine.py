"""The decode engine: a model becomes a flat list of ops, which one C call runs for one token of every row.

Modules write their part of a Program themselves: `emit(p, x)` beside `forward(x, ctx)` appends ops and
returns where the result lies. What an op computes is said here, beside the method that appends it;
kernels/step.c runs it. Prompts run through `forward`, and leave keys and values in the Cache that the ops
read and write.
"""
import ctypes
import itertools
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch

import sparse_kernels as kernels
from decode.context import NO_CHOICES, Cache
from kernels.build import cpu_library
from sparse_kernels import MatrixC

ROWS, SUMS = 8, 16                               # of a batch; parts of a sum of rows: as in step.c
MANY = 64                                        # threads, as in step.c
CACHE = 2 << 20                                  # bytes of weights that second-level caches keep
KINDS = {torch.float32: 0, torch.bfloat16: 1}    # of a matrix; behind them 2:4 in the same types
KIND_NAMES = dict(enumerate(("float32", "bfloat16", "2:4 float32", "2:4 bfloat16", "int8", "int4",
                             "2:4 float32", "2:4 bfloat16", "2:4 int8")))
PICKED = {torch.float32: 6, torch.bfloat16: 7, torch.int8: 8}    # 2:4 as kernels/picked.py lays it
CODES = {name: code for code, name in enumerate((
    "embed", "norm", "linear", "rows_sum", "largest", "group_winners", "event", "swiglu", "add", "attend",
    "columns", "choose", "softcap", "best", "bounds", "screened", "above",
    "mix", "experts", "branches", "attend_open", "rows_of", "draw",
    "enter", "leave", "owe", "halt", "group", "spread", "join", "firing"))}
ACTS = {name: code for code, name in enumerate(("relu2", "gelu", "none", "gelu_tanh", "osc", "sigmoid",
                                                "silu"))}
NOTHING = torch.zeros(1, 1, 1)                   # what a cache holds of groups before its first token
LONG, FLOAT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class NotWritten(Exception):
    """A module that has no ops, or a call that ops are not written for: `forward` decodes it. Where a Program
    could stand it is false."""

    def __bool__(self):
        return False


def ops_of(module):
    """A module's `emit`, if it belongs to the same class as what it computes elsewhere, or a later one: a
    class, or an object, that changes the one and not the other has no ops."""
    for cls in type(module).__mro__ if "forward" not in vars(module) else ():
        if "emit" in vars(cls):
            return module.emit
        if vars(cls).keys() & {"forward", "many"}:
            break
    raise NotWritten(type(module).__name__)


class OpC(ctypes.Structure):
    _fields_ = [("code", LONG), ("meets", LONG), ("act", LONG), ("all", LONG), ("in", LONG), ("out", LONG),
                ("onto", LONG), ("list", LONG), ("by", LONG), ("n", LONG * 8), ("f", FLOAT * 4),
                ("p", POINTER * 10), ("w", MatrixC), ("read", LONG), ("used", LONG), ("ticks", LONG),
                ("runs", LONG), ("lanes", LONG)]


class ProgramC(ctypes.Structure):
    _fields_ = [("ops", POINTER), ("count", LONG), ("rows", LONG), ("threads", LONG), ("rounds", LONG),
                ("watched", LONG), ("shared", POINTER), ("own", POINTER), ("own_size", LONG),
                ("scratch", POINTER), ("scratch_size", LONG), ("ids", POINTER * ROWS),
                ("columns", LONG * ROWS), ("best", LONG * ROWS), ("cost", FLOAT * 2), ("spent", FLOAT),
                ("steps", LONG), ("far", LONG)]


class Value(NamedTuple):
    """A vector of `size` floats for each row: one of all threads, or each thread's own."""
    place: int
    size: int
    own: bool


class Matrix(NamedTuple):
    """Rows of weights as an op reads them, and the tensors that hold them. bytes, macs: of one row."""
    c: MatrixC
    bytes: int
    macs: int


class Listed(NamedTuple):
    """Units that a step has chosen: their numbers, at most `size`; a factor for each, or None. apart: so many
    in turn make products of their own, which are stored before they are added up; 0: all are one."""
    list: Value
    by: Value | None
    size: int
    apart: int = 0


class Owed(NamedTuple):
    """What tokens that leave early leave behind: their states (rows, length, C), and up to which column no
    token owes keys and values to a layer, (rows, layers). counts: the address of the count of layers run."""
    states: torch.Tensor
    paid: torch.Tensor
    counts: int

    def begin(self, columns, cache):
        """The tokens at `columns` are read next; those before them owe nothing: their forward paid."""
        self.paid.copy_(torch.tensor(columns)[:, None])


class Skip(NamedTuple):
    """An op that may go on further down, which n it says so in, and what had been written and looked at."""
    op: OpC
    n: int
    written: set
    looked_at: set


class Program:
    """The ops of a model's decode step over a Cache, for `rows` rows at columns of their own."""
    packs_whole = False                          # 2:4 in 8 bits has a layout of its own: see picked

    def __init__(self, model, cache, ids, wants, threads=None, draws=None):
        """ids: how many of the vocabulary's ids logits are computed for; wants: see Sampler.wants. draws: see
        draws.settings; None: the largest logit's id is chosen. NotWritten where the model has a module that
        has no ops."""
        self.draws = draws
        self.cache, self.choices = cache, cache.choices
        self.rows, self.dtype = cache.layers[0].size(1), cache.layers[0].dtype
        self.ids, self.wants = ids, wants
        if self.rows > ROWS or self.dtype not in KINDS:
            raise NotWritten(f"{self.rows} rows in {str(self.dtype).removeprefix('torch.')} have no ops")
        self.kept, self.ops, self.work, self.names = [], [], [], []
        self.shared = self.own = 0
        self.scratch = 1024
        self.written, self.looked_at = set(), set()
        self.again = 0                           # which run of a block that is run several times
        self.counters, self.begins = [], []      # of modules; what takes over from the cache
        self.module = ""
        self.threads = threads or torch.get_num_threads()
        self.c = ProgramC(rows=self.rows, threads=self.threads, rounds=self.dtype == torch.bfloat16)
        model.emit(self)
        self.finish()

    # ------------------------------------------------ values, vectors, matrices

    def value(self, size, own=False):
        """Room for `size` floats of each row."""
        size, place = -(-size // 16) * 16 if self.rows == 1 else size, self.own if own else self.shared
        floats = -(-size * self.rows // 16) * 16
        if own:
            self.own += floats
        else:
            self.shared += floats
        return Value(place, size, own)

    def keep(self, tensor):
        """A tensor that lives as long as the program -> its address."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def vector(self, tensor):
        """A parameter as floats, rounded as the stream's dtype stores it -> its address; None stays None."""
        if tensor is None:
            return None
        return self.keep(tensor.detach().to(self.dtype).float().contiguous())

    def floats(self, tensor):
        """A tensor as floats -> its address."""
        return self.keep(tensor.detach().float().contiguous())

    def matrix(self, weight, bias=None):
        """weight (rows, width) -> Matrix; what is neither contiguous nor of the stream's dtype is copied."""
        weight = weight.detach().to(self.dtype).contiguous()
        rows, width = weight.shape
        size = width * weight.element_size()
        c = MatrixC(kind=KINDS[self.dtype], rows=rows, width=width, stride=size, data=self.keep(weight),
                    bias=self.vector(bias))
        return Matrix(c, size, width)

    def packed(self, values, meta, bias, width):
        """2:4 weights as pack_24 gives them -> Matrix."""
        values = values.detach().to(self.dtype).contiguous()
        c = MatrixC(kind=2 + KINDS[self.dtype], rows=len(values), width=width, stride=values[0].nbytes,
                    data=self.keep(values), scale=self.keep(meta.contiguous()), scale_stride=meta[0].nbytes,
                    bias=self.vector(bias))
        return Matrix(c, values[0].nbytes + meta[0].nbytes, width // 2)

    def picked(self, laid, dtype, width, bias, scale=None):
        """2:4 weights as kernels/picked.py lays those of a dtype; scale: of whole numbers, as `whole` has it
        -> Matrix."""
        c = MatrixC(kind=PICKED[dtype], rows=len(laid), width=width, stride=laid.size(1),
                    data=self.keep(laid), scale=None if scale is None else self.keep(scale),
                    bias=self.vector(bias))
        return Matrix(c, laid.size(1) + 8 * (scale is not None), width // 2)

    def whole(self, codes, scale, width, bias, across=None):
        """Weights (rows, width) of kernels.quantize -> Matrix. across: what sums of rows are times."""
        self.kept += codes, scale
        c = kernels.whole_matrix(codes, scale, width)
        c.bias, c.across = self.vector(bias), None if across is None else self.floats(across)
        return Matrix(c, codes.size(1) + 8 * bool(len(scale)), width)

    def without_first(self, matrix, columns):
        """A matrix of one row for each unit, without its first columns."""
        c, size = matrix.c, matrix.bytes // matrix.c.width
        part = MatrixC(kind=c.kind, rows=c.rows, width=c.width - columns, stride=c.stride,
                       data=c.data + columns * size, bias=c.bias and c.bias + 4 * columns)
        return Matrix(part, part.width * size, part.width)

    # ------------------------------------------------ ops

    def add(self, code, reads=(), writes=(), scratch=0, n=(), f=(), p=(), matrix=None, counts=None, **fields):
        """Append an op. reads, writes: values. Threads meet before it where it reads what another has
        written since they met, or writes what another may still read. counts: (multiply-adds, bytes) of a
        step, or of each row of the matrix that it turns out to read (a string says so): once for all lanes
        that want it."""
        reads, writes = ({v for v in some if v is not None and not v.own} for some in (reads, writes))
        meets = bool(reads & self.written or writes & (self.written | self.looked_at))
        if meets:
            self.written, self.looked_at = set(), set()
        self.written |= writes
        self.looked_at |= reads
        op = OpC(code=CODES[code], meets=meets, n=(*n,), f=(*f,), p=(*p,),
                 **{"act": ACTS["none"], "in": -1, "out": -1, "onto": -1, "list": -1, "by": -1} | {
                     key: place(v) if isinstance(v, Value) else v for key, v in fields.items()
                     if v is not None})
        if matrix is not None:
            op.w = matrix.c
        self.ops.append(op)
        self.work.append((counts or (0, 0), self.rows))
        self.names.append(f"{code} {self.module}".strip())
        self.scratch = max(self.scratch, scratch)

    def embed(self, matrix, positions=None, ngrams=None, order=0):
        """The token's row of a matrix, plus its column's of `positions`, plus those of its n-grams."""
        C = matrix.c.width
        tables = [None if t is None else self.keep(t.detach().to(self.dtype).contiguous())
                  for t in (positions, ngrams)]
        x = self.value(C)
        self.add("embed", (), (x,), 4 * C, (self.dtype == torch.bfloat16,
                 0 if ngrams is None else len(ngrams), order), (), tables, matrix, out=x)
        return x

    def norm(self, x, size, gain=None, bias=None, eps=1e-5, by_root=False):
        """x by its mean and deviation, or by its root mean square; times gain, plus bias."""
        y = self.value(size, own=True)
        self.add("norm", (x,), (y,), 0, (size, by_root), (eps,), (self.vector(gain), self.vector(bias)),
                 **{"in": x, "out": y})
        return y

    def linear(self, x, matrix, act="none", params=(), onto=None, units=None, own=False, blocks=0,
               stored=False):
        """act(matrix . x + bias), times the units' factors, plus `onto` (in whose place it is written).
        units: a Listed; of its rows alone. blocks: so many rows of the matrix in turn meet a part of x
        each. params: addresses of an osc's w, phi and b. stored: the product is rounded before it gets its
        bias."""
        most = units.size if units else matrix.c.rows
        y = onto or self.value(most, own)
        by = units and units.by
        rows, K = self.rows, matrix.c.width
        wide = K * (matrix.c.rows // blocks) if blocks else K
        each = matrix.macs, matrix.bytes
        counts = ("read", *each) if units else (self.rows * matrix.c.rows * matrix.macs,
                                                matrix.c.rows * matrix.bytes)
        scratch = rows * (4 * wide + 320 * (wide // K) + 4 * most) + 64      # room_of in step.c
        scratch += 36 * min(matrix.c.rows, rows * most) if units else 0
        self.add("linear", (x, onto, units and units.list, by), (y,), scratch,
                 (most, blocks, wide if blocks else 0, stored), (), params, matrix, counts, act=ACTS[act],
                 list=units and units.list, by=by, onto=onto, **{"in": x, "out": y})
        return y

    def rows_sum(self, a, matrix, onto=None, units=None, all=False):
        """The sum of the matrix's rows (one a unit) of those units whose a is not zero, times a; plus bias
        and onto. all: rows of zeros are read too, which shows what is not finite in them."""
        y = onto or self.value(matrix.c.width)
        most, apart = units.size if units else matrix.c.rows, units.apart if units else 0
        parts = max(SUMS, most // apart) if apart else SUMS
        self.add("rows_sum", (a, onto, units and units.list), (y,),
                 (self.rows + 1) * 16 * (most + 8) + matrix.c.rows + 13 * matrix.c.width + 1280,
                 (most, apart, parts), (), (), matrix,
                 ("read", matrix.macs, matrix.bytes), all=all, list=units and units.list, onto=onto,
                 by=self.value(parts * matrix.c.width),
                 **{"in": a, "out": y})
        return y

    def largest(self, x, size, k):
        """x with all but the k largest |x| at zero, of equal ones the first."""
        if k >= size:
            return x
        y = self.value(size, own=True)
        self.add("largest", (x,), (y,), 4 * size, (size, k), **{"in": x, "out": y})
        return y

    def group_winners(self, x, size, group, k):
        """x with all but the k largest |x| of every `group` neighbours at zero."""
        y = self.value(size, own=True)
        self.add("group_winners", (x,), (y,), 0, (size, group, k), **{"in": x, "out": y})
        return y

    def event(self, x, size, thresholds, units=None):
        """x where |x| exceeds its unit's threshold, else zero."""
        y = self.value(size, own=True)
        self.add("event", (x, units and units.list), (y,), 0, (size,), (), (self.floats(thresholds),),
                 list=units and units.list, **{"in": x, "out": y})
        return y

    def swiglu(self, x, size):
        """silu(first half) * second half of x."""
        y = self.value(size)
        self.add("swiglu", (x,), (y,), 0, (size,), **{"in": x, "out": y})
        return y

    def attend(self, qkv, layer, heads, width, eps, rotation, gain, alone=False):
        """Attention of queries (heads, width), keys and values (2, G, width) over the cache of a layer, to
        which it adds keys and values of its G heads, each for heads / G neighbours. eps: of the norm of
        queries and keys, or None; rotation: tables of cosines and sines, or None; gain: of each head, or
        None. alone: they are keys and values, to be added and no more."""
        kept, y = self.kv(layer), None if alone else self.value(heads * width)
        size = kept.size(3)
        cos, sin = rotation or (None, None)
        self.add("attend", (qkv,), (y,), 4 * (3 * width + size + 64), (heads, width, size, alone,
                 self.dtype == torch.bfloat16, 0, 0, kept.size(2)), (-1.0 if eps is None else eps,),
                 (kept.data_ptr(), self.vector(cos), self.vector(sin), self.vector(gain)),
                 **{"in": qkv, "out": y})
        return y

    def columns(self, scores, count, k, width, inhibits, balance):
        """The k of `count` columns that win under lateral inhibition -> Listed units, `width` a column."""
        chosen = self.listed(k * width)
        self.add("columns", (scores,), (chosen.list, chosen.by), 8 * count, (count, k, width), (),
                 (self.floats(inhibits), self.floats(balance)), None,
                 (self.rows * count * count, 4 * count * count), list=chosen.list, by=chosen.by,
                 **{"in": scores})
        return chosen

    def experts(self, scores, count, k, width):
        """The k of `count` experts with the largest softmax of the scores, their shares made to sum to 1
        -> Listed units, `width` an expert."""
        chosen = self.listed(k * width)._replace(apart=width)
        self.add("experts", (scores,), (chosen.list, chosen.by), 8 * count, (count, k, width),
                 list=chosen.list, by=chosen.by, **{"in": scores})
        return chosen

    def branches(self, scores, count, k, width):
        """Of `count` branches the k with the largest gates sigmoid(scores), if a half or more; the largest
        always -> Listed units, `width` a branch."""
        chosen = self.listed(count * width)      # a gate that is not a number opens its branch beside the k
        self.add("branches", (scores,), (chosen.list, chosen.by), 4 * count, (count, k, width),
                 list=chosen.list, by=chosen.by, **{"in": scores})
        return chosen

    def attend_open(self, q, kv, units, branch, layer, heads, width, eps, rotation, gain):
        """gelu of the attention of the queries q of Listed units alone, times their factors. kv: keys and
        values (2, G, width) of all heads, which the cache gets. branch: units of one that is open or not.
        The rest: see attend."""
        kept, y = self.kv(layer), self.value(units.size)
        size = kept.size(3)
        cos, sin = rotation or (None, None)
        self.add("attend_open", (q, kv, units.list, units.by), (y,), 4 * (3 * width + size + 64),
                 (heads, width, size, 0, self.dtype == torch.bfloat16, branch, units.size,
                  kept.size(2)),
                 (-1.0 if eps is None else eps,),
                 (kept.data_ptr(), self.vector(cos), self.vector(sin), self.vector(gain)),
                 onto=kv, list=units.list, by=units.by, **{"in": q, "out": y})
        return y

    def mix(self, x, size, by, act="none", params=()):
        """act(by . x): the K x K matrix `by` times x as (K, size / K). params: see linear."""
        K, y = len(by), self.value(size)
        by = by.detach().to(self.dtype)
        self.add("mix", (x,), (y,), 0, (size, K), (), (*params, None, None, None)[:3] + (self.vector(by),),
                 None, (self.rows * size * K, by.nbytes), act=ACTS[act], **{"in": x, "out": y})
        return y

    def rows_of(self, firsts, count):
        """For each row of the batch `count` rows of a matrix, from its number in `firsts` on -> Listed."""
        chosen = Listed(self.value(count + 1, own=True), None, count)
        self.add("rows_of", (), (chosen.list,), 0, (count,), (), (self.keep(torch.tensor(firsts)),),
                 list=chosen.list)
        return chosen

    def choose(self, scores, count, k):
        """The k of `count` units with the largest scores -> Listed."""
        chosen = Listed(self.value(k + 1, own=True), None, k)
        self.add("choose", (scores,), (), 8 * count, (count, k), list=chosen.list, **{"in": scores})
        return chosen

    def above(self, scores, count, edge):
        """The units whose score is above `edge`, and those whose is not a number -> Listed."""
        chosen = Listed(self.value(count + 1, own=True), None, count)
        self.add("above", (scores,), (), 0, (count,), (edge,), list=chosen.list, **{"in": scores})
        return chosen

    def firing(self, x, count):
        """The units of `count` whose x is not zero -> Listed, with x for factors."""
        chosen = self.listed(count)
        self.add("firing", (x,), (), 0, (count,), list=chosen.list, by=chosen.by, **{"in": x})
        return chosen

    def kv(self, layer, run=None):
        """The cache of a layer, or of a run of its block."""
        run = self.again if run is None else run
        return self.cache.layers[self.cache.depth + run - 1 if run else layer]

    def listed(self, most):
        """Room for a list of units and their factors."""
        return Listed(self.value(most + 1, own=True), self.value(most, own=True), most)

    def logits(self, x, matrix, cap, copy=None):
        """The head: logits of `ids` ids, bounded by cap (0: not); behind it the id that is chosen. copy: the
        head in 8 bits (kernels.copy_in_8_bits), of which a step looks at the rows that can win."""
        if copy is None:
            y = self.linear(x, matrix)
        else:
            y, bounds = self.value(self.ids), self.value(2 * self.ids)
            q, scale, error = copy
            K = matrix.c.width
            scale, *sizes = kernels.rows_of_copy(q, scale) if K % 64 == 0 else (scale,)      # x in 8 bits too
            self.add("bounds", (x,), (bounds,), self.rows * (4 * K + 320), (), (kernels.ROUND[self.dtype],),
                     [self.keep(t) for t in (q, scale, error, *sizes)], matrix,
                     (self.rows * self.ids * K, self.ids * K), by=bounds, **{"in": x})
            self.add("screened", (x, bounds), (y,), self.rows * (4 * K + 320) + 4 * self.ids,
                     (self.wants,), (), (), matrix,
                     ("read", matrix.macs, matrix.bytes), by=bounds, **{"in": x, "out": y})
        if cap:
            self.add("softcap", (), (y,), 0, (self.ids,), (cap,), out=y)
        if self.draws is None:
            self.add("best", (y,), (), 0, (self.ids,), **{"in": y})
        else:
            self.add("draw", (y,), (), 17 * self.ids + 1024, (self.ids,), (), (ctypes.addressof(self.draws),),
                     **{"in": y})
        self.answer = y
        return y

    # ------------------------------------------------ ops that choose which lanes the next ones compute

    def skip(self, n=1):
        """The op that was appended last may go on where `land` will say, in its n[n]."""
        return Skip(self.ops[-1], n, set(self.written), set(self.looked_at))

    def land(self, *skips):
        """These go on at the op that is appended next."""
        for skip in skips:
            skip.op.n[skip.n] = len(self.ops)
            self.written |= skip.written
            self.looked_at |= skip.looked_at

    def counter(self, module, name):
        """The address of a number that a step adds to an attribute of a module."""
        self.counters.append((module, name, LONG()))
        return ctypes.addressof(self.counters[-1][2])

    def enter(self, counts, size=0):
        """From here on lanes may drop out; counts: the address of how many have entered. With a size: zeros
        of all lanes -> where they lie."""
        y = self.value(size) if size else None
        self.add("enter", (), (y,), 0, (size,), (), (counts,), out=y)
        return y

    def join(self, x=None, size=0, out=None, layers=0, owed=None):
        """From here on all lanes that there were before `enter`; those that have not left write x to out."""
        about = (owed.paid.data_ptr(), owed.counts) if owed else ()
        self.add("join", (x,), (out,), 0, (size, -1, 0, layers, layers), (), about, **{"in": x, "out": out})
        return out

    def owed(self, layers, size, counts):
        """Room for what tokens that leave early owe -> Owed."""
        owed = Owed(torch.zeros(self.rows, self.cache.length, size),
                    torch.zeros(self.rows, layers, dtype=torch.int64), counts)
        self.kept += owed.states, owed.paid
        self.begins.append(owed.begin)
        return owed

    def leave(self, x, size, probe, threshold, out, depth, owed):
        """Lanes leave whose probe is sure, behind so many layers: with x as out -> Skip where none stays."""
        states, paid = owed.states, owed.paid
        self.add("leave", (x, probe), (), 0, (size, 0, states.size(1), depth, paid.size(1)), (threshold,),
                 (paid.data_ptr(), owed.counts, states.data_ptr()), out=out, by=probe, **{"in": x})
        return self.skip()

    def pay(self, owed, layer, emit_kv):
        """Before a layer is run: what its lanes' earlier tokens owe it, up to ROWS of them at a time."""
        states, paid, size = owed.states, owed.paid, owed.states.size(2)
        rows, self.rows = self.rows, ROWS
        x, here = self.value(size, own=True), len(self.ops)
        self.add("owe", (), (x,), 0, (size, 0, states.size(1), layer, paid.size(1), self.kv(layer).size(3)),
                 (), (paid.data_ptr(), None, states.data_ptr()), out=x)
        skip = self.skip()
        emit_kv(self, x)
        self.rows = rows
        self.join()
        self.ops[-1].n[1] = here
        self.land(skip)

    def halt(self, x, size, probe, total, layer, runs, epsilon, counts):
        """Behind a run of a block: total gets its share of x, lanes halt -> Skip where none goes on."""
        kept, run, last = self.kv(layer), self.again, self.again + 1 == runs
        self.add("halt", (x, probe), (), 0, (size, kept.size(2), kept.size(4) * kept.element_size(),
                 kept.size(3), runs - 1 - run, kept.nbytes, last), (epsilon,),
                 (kept.data_ptr(), None if last else self.kv(layer, run + 1).data_ptr(), counts), out=total,
                 by=probe, **{"in": x})
        return self.skip(7)

    def group(self, x, pool):
        """The tokens of groups of len(pool), kept as they come; those of complete groups, pooled -> their
        states twice (one is changed), and Skip where none is complete."""
        s, size = pool.shape
        states, g, same = torch.zeros(self.rows, s, size), self.value(size), self.value(size)
        self.begins.append(lambda columns, cache: states.copy_(cache.states.get("group", NOTHING)))
        self.add("group", (x,), (g, same), 0, (size, 0, s), (), (self.keep(states), self.vector(pool)), out=g,
                 onto=same, **{"in": x})
        return g, same, self.skip()

    def spread(self, g, before, x, factors):
        """x plus what the last complete group of its row was given by the middle layers, g - before, times
        the factors (s, C) of its phase."""
        s, size = factors.shape
        told = torch.zeros(self.rows, size)
        self.begins.append(lambda columns, cache: told.copy_(cache.states.get("said", NOTHING)[:, 0]))
        self.add("spread", (g, before, x), (x,), 0, (size, 0, s), (), (self.keep(told), self.vector(factors)),
                 out=x, by=before, **{"in": g})
        return x

    # ------------------------------------------------ running

    def finish(self):
        """Give values their memory."""
        self.table = (OpC * len(self.ops))(*self.ops)
        self.scratch = -(-self.scratch // 64) * 64
        memory = [torch.zeros(size // 4 + 32) for size in (4 * self.shared, 4 * self.own * self.threads,
                                                           self.scratch * self.threads)]
        self.kept += memory
        self.c.ops, self.c.count = ctypes.addressof(self.table), len(self.ops)
        self.c.far = sum(op.w.rows * op.w.stride for op in self.ops) > CACHE
        shared, own, scratch = ((t.data_ptr() + 63) // 64 * 64 for t in memory)
        self.c.shared, self.c.own, self.c.scratch = shared, own, scratch
        self.c.own_size, self.c.scratch_size = self.own, self.scratch
        self.flat = [t[(start - t.data_ptr()) // 4:] for t, start in zip(memory, (shared, own))]
        self.out = self.found(self.answer)[:, :self.ids]
        self.address = ctypes.addressof(self.c)
        self.run, self.write = cpu_library()[0].step, cpu_library()[0].follow
        self.run_and_write = cpu_library()[0].step_and_follow

    def found(self, value):
        """What the last step has left of a value, (rows, size) in fp32; of an own one the first thread's."""
        place, size = value.place, value.size
        return self.flat[value.own][place:place + self.rows * size].view(self.rows, size)

    def begin(self, history, firsts, ends):
        """The next step reads the ids at columns ends - 1 of history (B, N) int64, whose windows begin at
        `firsts`; those behind it read the columns that follow."""
        start, length = history.data_ptr(), 8 * history.size(1)
        for row, (first, end) in enumerate(zip(firsts, ends)):
            self.c.ids[row] = start + row * length + 8 * first
            self.c.columns[row] = end - 1 - first
            if self.draws is not None:
                self.draws.firsts[row] = first
        for take_over in self.begins:
            take_over([end - 1 - first for first, end in zip(firsts, ends)], self.cache)

    def step(self):
        """Read the next id of every row -> logits (B, ids) in fp32, valid until the next step."""
        if kernels.tally is None:
            self.run(self.address)
        else:
            self.count(kernels.tally)
        self.tell()
        return self.out

    def tell(self):
        """Add what steps have counted to the modules that count it."""
        for module, name, number in self.counters:
            setattr(module, name, getattr(module, name) + number.value)
            number.value = 0

    def advance(self):
        """A step; the ids that it chooses stand in the history behind those that it has read, for the next
        step to read -> are all rows' largest logits finite?"""
        if kernels.tally is None:
            fine = self.run_and_write(self.address)
        else:
            self.count(kernels.tally)
            fine = self.write(self.address)
        self.tell()
        return fine

    def done(self):
        """What all steps so far have executed -> {part of the model: (multiply-adds, bytes of weights)}."""
        found = {}
        for op, ((macs, *size), rows), name in zip(self.table, self.work, self.names):
            if macs == "read":
                more = op.used * size[0], op.read * size[1]
            else:
                more = macs * op.lanes // rows, size[0] * op.runs
            part = name.partition(" ")[2]
            found[part] = tuple(map(sum, zip(found.get(part, (0, 0)), more)))
        return found

    def counted(self):
        """Run a step -> what it has executed, as `done`."""
        before = self.done()
        self.run(self.address)
        return {part: (macs - before[part][0], size - before[part][1])
                for part, (macs, size) in self.done().items()}

    def count(self, tally):
        """Run a step and add what it has executed to a kernels.Tally."""
        for macs, size in self.counted().values():
            tally.macs += macs
            tally.bytes += size

    def listed_by(self, n):
        """The units that op number n has listed for the first row in the last step."""
        place, own = divmod(self.table[n].list, 2)
        at = (self.c.own if own else self.c.shared) + 4 * place
        return list((ctypes.c_int32 * ctypes.c_int32.from_address(at).value).from_address(at + 4))


class Alone:
    """A Program of some ops by themselves, of the vectors x (rows, K): emit(p, x) appends them -> where their
    result lies. Called, it computes it, (rows, size). kept: what a layer's cache holds, where ops ask for it,
    and the column that the vectors stand at in it."""

    def __init__(self, emit, x, size, choices=NO_CHOICES, kept=None, column=0, threads=None, wants=None):
        cache = SimpleNamespace(layers=[x[None] if kept is None else kept], depth=1, length=column + 1,
                                choices=choices, copy_of=lambda owner, make: make())
        self.x, self.append = x, emit
        self.history = torch.arange(len(x))[:, None].repeat(1, column + 2)
        self.places = [0] * len(x), [column + 1] * len(x)
        self.program = Program(self, cache, size, wants, threads)

    def emit(self, p):
        p.answer = self.append(p, p.embed(p.matrix(self.x)))

    def __call__(self):
        self.program.begin(self.history, *self.places)
        return self.program.step()

    def counted(self):
        """Run it -> (multiply-adds, bytes of weights) that it has executed."""
        self.program.begin(self.history, *self.places)
        return tuple(map(sum, zip(*self.program.counted().values())))


WAITING = ()                                     # flags whose modules have no ops


def place(value):
    return 2 * value.place + value.own


def program_of(model, cache, ids, wants, device, draws=None):
    """A model's Program over a cache, or a NotWritten, which is false and says why `forward` decodes."""
    try:
        check(model, cache, device)
        program = Program(model, cache, ids, wants, cache.choices.threads, draws)
    except NotWritten as reason:
        return reason.with_traceback(None)
    if cache.choices.watch is not None:
        cache.choices.watch.show(program)
    return program


def check(model, cache, device):
    """NotWritten where `forward` decodes whatever a model's modules are."""
    waits = [flag for flag in WAITING if getattr(model.config, flag)]
    for reason in (cache.choices.forward, device.type != "cpu" and "the decode engine runs on a CPU",
                   cpu_library()[0] is None and cpu_library()[1],
                   waits and f"{waits[0]} has no ops yet"):
        if reason:
            raise NotWritten(reason)


# ------------------------------------------------ how many threads, and what each op took

COUNTS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64
TRIAL = 0.05                                     # seconds for each number of threads


def trial(model, device, threads):
    """A Program of one row for trying out, on up to `threads` threads; or a NotWritten."""
    choices = model.chosen(1)._replace(threads=threads, watch=None)
    cache = Cache(model, 1, min(model.config.block_size, 64), choices)
    return program_of(model, cache, model.config.vocab_size, 1, device)


def time_threads(program):
    """{number of threads: seconds of the fastest step}, for numbers up to the program's."""
    room = program.cache.layers[0].size(3)
    history = torch.zeros(1, room + 1, dtype=torch.long)
    most, took = program.threads, {}
    for threads in sorted({*(n for n in COUNTS if n < most), most}):
        program.c.threads, began = threads, time.perf_counter()
        while time.perf_counter() - began < TRIAL:
            program.begin(history, [0], [1])
            for _ in range(room):
                at = time.perf_counter()
                program.step()
                now = time.perf_counter()
                took[threads] = min(now - at, took.get(threads, now))
                if now - began > TRIAL:
                    break
    program.c.threads = most
    return took


def fewest(took, slack=1.03):
    """Of what time_threads gives, the smallest number that is as good as the best."""
    return min(n for n, seconds in took.items() if seconds <= slack * min(took.values()))


class Watch:
    """What the ops of a run's programs did, which are all of one model and one way to sample."""

    def __init__(self):
        self.program, self.steps, self.ticks, self.read = None, 0, [], []
        self.used, self.runs, self.lanes = [], [], []

    def show(self, program):
        """From now on this program is watched; the one before is done."""
        self.take()
        program.c.watched, self.program = 1, program
        self.names, self.work = program.names, program.work
        self.ops = [(op.meets, op.act, MatrixC.from_buffer_copy(op.w)) for op in program.table]

    def take(self):
        """Add what the program has counted, which may go."""
        if self.program is not None:
            self.steps += self.program.c.steps
            for kept, field in ((self.ticks, "ticks"), (self.read, "read"), (self.used, "used"),
                                (self.runs, "runs"), (self.lanes, "lanes")):
                found = [getattr(op, field) for op in self.program.table]
                kept[:] = [a + b for a, b in itertools.zip_longest(kept, found, fillvalue=0)]
        self.program = None

    def rows(self):
        """Of each op of a mean step: (number, op, where, act, rows x width, weights, bytes, multiply-adds, do
        threads meet before it, microseconds)."""
        self.take()
        for n, (name, work, (meets, act, w)) in enumerate(zip(self.names, self.work, self.ops)):
            code, _, where = name.partition(" ")
            (macs, *sizes), rows = work
            if macs == "read":
                macs, size = self.used[n] / self.steps * sizes[0], self.read[n] / self.steps * sizes[1]
            else:
                macs, size = macs * self.lanes[n] / rows / self.steps, sizes[0] * self.runs[n] / self.steps
            shape = f"{w.rows} x {w.width}" if w.rows else ""
            kind = KIND_NAMES.get(w.kind, f"kind {w.kind}") if w.rows else ""
            act = "" if act == ACTS["none"] else next(key for key, code in ACTS.items() if code == act)
            yield (n, code, where, act, shape, kind, round(size), round(macs), "meet" if meets else "",
                   self.ticks[n] / self.steps / 1000)

    def __str__(self):
        """A table; times are those of the first thread, its waiting for the others included."""
        if not (self.program and self.program.c.steps) and not self.steps:
            return "no decode program ran a step"
        rows = list(self.rows())
        size, macs, took = (sum(row[place] for row in rows) for place in (6, 7, 9))
        heads = "", "op", "where", "act", "rows x width", "weights", "bytes", "multiply-adds", "threads", "us"
        total = ("", "all", "", "", "", "", size, macs, f"{sum(row[8] == 'meet' for row in rows)} meet", took)
        cells = [heads, *([*map(str, row[:6]), *(f"{count:,}" if count else "" for count in row[6:8]), row[8],
                           f"{row[9]:,.1f}"] for row in (*rows, total))]
        widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
        right = 0, 6, 7, 9
        lines = ["  ".join(cell.rjust(width) if n in right else cell.ljust(width)
                           for n, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
        return "\n".join((*lines, f"{self.steps} steps, {size / max(took, 1e-9) / 1000:.2f} GB/s of weights"))
