"""The decode engine: a model becomes a flat list of ops, which one C call runs for one token of every row.

Modules write their part of a Program themselves: `emit(p, x)` beside `forward(x, ctx)` appends ops and
returns where the result lies. What an op computes is said here, beside the method that appends it;
kernels/step.c runs it. Prompts run through `forward`, and leave keys and values in the Cache that the ops
read and write.
"""
import ctypes
from typing import NamedTuple

import torch

import sparse_kernels as kernels
from kernels.build import cpu_library

ROWS = 8                                         # of a batch, as in step.c
KINDS = {torch.float32: 0, torch.bfloat16: 1}    # of a matrix; behind them 2:4 in the same types
CODES = {name: code for code, name in enumerate((
    "embed", "norm", "linear", "rows_sum", "largest", "group_winners", "event", "swiglu", "add", "attend",
    "columns", "choose", "softcap", "best", "bounds", "screened", "enter", "leave", "owe", "halt", "group",
    "spread", "join"))}
ACTS = {name: code for code, name in enumerate(("relu2", "gelu", "none", "gelu_tanh", "osc", "sigmoid"))}
LONG, FLOAT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class NotWritten(Exception):
    """A module that has no ops, or a call that ops are not written for: `forward` decodes it."""


class MatrixC(ctypes.Structure):
    _fields_ = [("kind", LONG), ("rows", LONG), ("width", LONG), ("stride", LONG), ("data", POINTER),
                ("scale", POINTER), ("scale_stride", LONG), ("bias", POINTER)]


class OpC(ctypes.Structure):
    _fields_ = [("code", LONG), ("meets", LONG), ("act", LONG), ("all", LONG), ("in", LONG), ("out", LONG),
                ("onto", LONG), ("list", LONG), ("by", LONG), ("n", LONG * 8), ("f", FLOAT * 4),
                ("p", POINTER * 10), ("w", MatrixC), ("read", LONG), ("ticks", LONG), ("runs", LONG),
                ("lanes", LONG)]


class ProgramC(ctypes.Structure):
    _fields_ = [("ops", POINTER), ("count", LONG), ("rows", LONG), ("threads", LONG), ("rounds", LONG),
                ("watched", LONG), ("shared", POINTER), ("own", POINTER), ("own_size", LONG),
                ("scratch", POINTER), ("scratch_size", LONG), ("ids", POINTER * ROWS),
                ("columns", LONG * ROWS), ("best", LONG * ROWS)]


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
    """Units that a step has chosen: their numbers, at most `size`; a factor for each, or None."""
    list: Value
    by: Value | None
    size: int


class Owed(NamedTuple):
    """What tokens that leave early leave behind: their states (rows, length, C), and up to which column no
    token owes keys and values to a layer, (rows, layers). counts: the address of the count of layers run."""
    states: torch.Tensor
    paid: torch.Tensor
    counts: int

    def begin(self, columns, cache):
        """The tokens at `columns` are read next; what those before them owe is in the cache."""
        self.paid.copy_(torch.tensor(columns)[:, None])
        for layer, owed in cache.deferred_kv.items():
            before = {column: x for column, x in owed.items() if column < columns[0]}
            for column, x in before.items():
                self.states[0, column] = x.flatten()
            self.paid[0, layer] = min([columns[0], *before])
        cache.deferred_kv.clear()


class Skip(NamedTuple):
    """An op that may go on further down, which n it says so in, and what had been written and looked at."""
    op: OpC
    n: int
    written: set
    looked_at: set


class Program:
    """The ops of a model's decode step over a Cache, for `rows` rows at columns of their own."""

    def __init__(self, model, cache, ids, wants, threads=None):
        """ids: how many of the vocabulary's ids logits are computed for; wants: see Sampler.wants. NotWritten
        where the model has a module that has no ops."""
        self.cache, self.choices = cache, cache.choices
        self.rows, self.dtype = cache.layers[0].size(1), cache.layers[0].dtype
        self.ids, self.wants = ids, wants
        if self.rows > ROWS or self.dtype not in KINDS:
            raise NotWritten(f"{self.rows} rows in {self.dtype}")
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
        step, or of each row of the matrix that it turns out to read (a string says so)."""
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

    def embed(self, table, positions=None, ngrams=None, order=0):
        """The token's row of `table` (V, C), plus its column's of `positions`, plus those of its n-grams."""
        matrix = self.matrix(table)
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

    def linear(self, x, matrix, act="none", params=(), onto=None, units=None, own=False, blocks=0):
        """act(matrix . x + bias), times the units' factors, plus `onto` (in whose place it is written).
        units: a Listed; of its rows alone. blocks: so many rows of the matrix in turn meet a part of x
        each. params: addresses of an osc's w, phi and b."""
        most = units.size if units else matrix.c.rows
        y = onto or self.value(most, own)
        by = units and units.by
        rows, K = self.rows, matrix.c.width
        wide = K * (matrix.c.rows // blocks) if blocks else K
        each = matrix.macs, matrix.bytes
        counts = ("read", *each) if units else (self.rows * matrix.c.rows * matrix.macs,
                                                matrix.c.rows * matrix.bytes)
        scratch = rows * (4 * wide + 64 * (wide // K) + 4 * most) + 64
        self.add("linear", (x, onto, units and units.list, by), (y,), scratch,
                 (most, blocks, wide if blocks else 0), (), params, matrix, counts, act=ACTS[act],
                 list=units and units.list, by=by, onto=onto, **{"in": x, "out": y})
        return y

    def rows_sum(self, a, matrix, onto=None, units=None, all=False):
        """The sum of the matrix's rows (one a unit) of those units whose a is not zero, times a; plus bias
        and onto. all: rows of zeros are read too, which shows what is not finite in them."""
        y = onto or self.value(matrix.c.width)
        most = units.size if units else matrix.c.rows
        self.add("rows_sum", (a, onto, units and units.list), (y,),
                 12 * most + 4 * matrix.c.width + 256, (most,), (), (), matrix,
                 ("read", matrix.macs, matrix.bytes), all=all, list=units and units.list, onto=onto,
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
        """Attention of queries, keys and values (3, heads, width) over the cache of a layer, to which it adds
        keys and values. eps: of the norm of queries and keys, or None; rotation: tables of cosines and sines,
        or None; gain: of each head, or None. alone: they are keys and values (2, heads, width), to be added
        and no more."""
        kept, y = self.kv(layer), None if alone else self.value(heads * width)
        size = kept.size(3)
        cos, sin = rotation or (None, None)
        self.add("attend", (qkv,), (y,), 4 * (3 * width + size + 64), (heads, width, size, alone,
                 self.dtype == torch.bfloat16), (-1.0 if eps is None else eps,),
                 (kept.data_ptr(), self.vector(cos), self.vector(sin), self.vector(gain)),
                 **{"in": qkv, "out": y})
        return y

    def columns(self, scores, count, k, width, inhibits, balance):
        """The k of `count` columns that win under lateral inhibition -> Listed units, `width` a column."""
        chosen = self.listed(k * width)
        self.add("columns", (scores,), (), 8 * count, (count, k, width), (),
                 (self.floats(inhibits), self.floats(balance)), list=chosen.list, by=chosen.by,
                 **{"in": scores})
        return chosen

    def choose(self, scores, count, k):
        """The k of `count` units with the largest scores -> Listed."""
        chosen = Listed(self.value(k + 1, own=True), None, k)
        self.add("choose", (scores,), (), 8 * count, (count, k), list=chosen.list, **{"in": scores})
        return chosen

    def kv(self, layer, run=None):
        """The cache of a layer, or of a run of its block."""
        run = self.again if run is None else run
        return self.cache.layers[self.cache.depth + run - 1 if run else layer]

    def listed(self, most):
        """Room for a list of units and their factors."""
        return Listed(self.value(most + 1, own=True), self.value(most, own=True), most)

    def logits(self, x, matrix, cap, copy=None):
        """The head: logits of `ids` ids, bounded by cap (0: not); behind it the largest one's id. copy: the
        head in 8 bits (kernels.copy_in_8_bits), of which a step looks at the rows that can win."""
        if copy is None:
            y = self.linear(x, matrix)
        else:
            y, bounds = self.value(self.ids), self.value(2 * self.ids)
            q, scale, error = copy
            K = matrix.c.width
            self.add("bounds", (x,), (bounds,), 0, (), (kernels.ROUND[self.dtype],),
                     (self.keep(q), self.keep(scale), self.keep(error)), matrix,
                     (self.rows * self.ids * K, self.rows * self.ids * K), by=bounds, **{"in": x})
            self.add("screened", (x, bounds), (y,), 4 * K + 64 + 4 * self.ids, (self.wants,), (), (), matrix,
                     ("read", matrix.macs, matrix.bytes), by=bounds, **{"in": x, "out": y})
        if cap:
            self.add("softcap", (), (y,), 0, (self.ids,), (cap,), out=y)
        self.add("best", (y,), (), 0, (self.ids,), **{"in": y})
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
        self.begins.append(lambda columns, cache: states.copy_(cache.states["group"]))
        self.add("group", (x,), (g, same), 0, (size, 0, s), (), (self.keep(states), self.vector(pool)), out=g,
                 onto=same, **{"in": x})
        return g, same, self.skip()

    def spread(self, g, before, x, factors):
        """x plus what the last complete group of its row was given by the middle layers, g - before, times
        the factors (s, C) of its phase."""
        s, size = factors.shape
        told = torch.zeros(self.rows, size)
        self.begins.append(lambda columns, cache: told.copy_(cache.states["said"][:, 0]))
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
        shared, own, scratch = ((t.data_ptr() + 63) // 64 * 64 for t in memory)
        self.c.shared, self.c.own, self.c.scratch = shared, own, scratch
        self.c.own_size, self.c.scratch_size = self.own, self.scratch
        start = (shared - memory[0].data_ptr()) // 4 + self.answer.place
        flat = memory[0][start:start + self.rows * self.answer.size]
        self.out = flat.view(self.rows, self.answer.size)[:, :self.ids]
        self.address = ctypes.addressof(self.c)
        self.run, self.write = cpu_library()[0].step, cpu_library()[0].follow

    def begin(self, history, firsts, ends):
        """The next step reads the ids at columns ends - 1 of history (B, N) int64, whose windows begin at
        `firsts`; those behind it read the columns that follow."""
        start, length = history.data_ptr(), 8 * history.size(1)
        for row, (first, end) in enumerate(zip(firsts, ends)):
            self.c.ids[row] = start + row * length + 8 * first
            self.c.columns[row] = end - 1 - first
        for take_over in self.begins:
            take_over([end - 1 - first for first, end in zip(firsts, ends)], self.cache)

    def step(self):
        """Read the next id of every row -> logits (B, ids) in fp32, valid until the next step."""
        if kernels.tally is None:
            self.run(self.address)
        else:
            self.count(kernels.tally)
        for module, name, number in self.counters:
            setattr(module, name, getattr(module, name) + number.value)
            number.value = 0
        return self.out

    def follow(self):
        """Let the next step read the ids with the largest logits of this one, written behind those that were
        read -> are they all finite?"""
        return self.write(self.address)

    def count(self, tally):
        """Run a step and add what it has executed to a kernels.Tally."""
        before = [(op.read, op.runs, op.lanes) for op in self.table]
        self.run(self.address)
        for op, (read, runs, lanes), ((macs, *size), rows) in zip(self.table, before, self.work):
            if macs == "read":
                tally.macs += (op.read - read) * size[0]
                tally.bytes += (op.read - read) * size[1]
            else:
                tally.macs += macs * (op.lanes - lanes) // rows
                tally.bytes += size[0] * (op.runs - runs)


WAITING = "compartments", "experts", "dendrites", "adapters"


def place(value):
    return 2 * value.place + value.own


def program_of(model, cache, ids, wants, device):
    """A model's Program over a cache, or None where `forward` decodes: another device, no C kernels, or a
    module without ops."""
    if (device.type != "cpu" or cpu_library()[0] is None
            or any(getattr(model.config, flag) for flag in WAITING)):
        return None
    try:
        return Program(model, cache, ids, wants)
    except NotWritten:
        return None
