"""A decode step on a CUDA card: modules write it by `emit`, as they write the decode engine's program
(decode/engine.py), and each op here is one launch of a Triton kernel (kernels/triton_step.py). Norms,
activations, gates of two halves, residuals and the joining of attention's splits are parts of the products
next to them. So is the choice of units: products of chosen units leave the others' rows unread, and what
takes all scores - columns, experts, the largest units - is done by the program that stores the last of them.
A layer is five launches at most; six where a predictor picks its units. Where tokens part ways - exits,
ponder, hierarchy - a tensor on the card says which rows go on, and the kernels between look at it.

What a module asks for that is not written here raises NotWritten, and `forward` decodes.
"""
from collections import Counter
from typing import NamedTuple

import torch

import sparse_kernels as kernels
from decode.engine import NOTHING, ROWS, NotWritten

ACTS = "none", "relu2", "gelu", "gelu_tanh", "silu", "osc"
DTYPES = torch.float32, torch.bfloat16, torch.float16


class Matrix(NamedTuple):
    """weight (rows, width), one row after the other, and a bias or None; or codes and scales of whole numbers
    of 8 or 4 bits (kernels.quantize), bits 5: 4 with offsets (on_levels). places: of 2:4 weights, floats or
    of 8 bits, of which the values that are kept lie here (kernels.pack_24)."""
    weight: torch.Tensor
    bias: torch.Tensor | None
    width: int
    bits: int = 16
    scale: torch.Tensor | None = None
    across: torch.Tensor | None = None
    places: torch.Tensor | None = None


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
    winners: tuple = ()                          # of so many neighbours so many count, the largest


class Units(NamedTuple):
    """Which of `size` outputs of a product a step computes. gates: (R, size / width), zero where a group of
    `width` is left out; by: their factors, which the outputs are multiplied by, or None; gates=None: those
    whose score by `copy` of the product's weights is above `edge`. apart: see engine.Listed."""
    size: int
    gates: torch.Tensor | None = None
    by: torch.Tensor | Plain | None = None
    width: int = 1
    apart: int = 0
    copy: Matrix | None = None
    edge: float = 0.0


class Card:
    """The launches of a model's decode step over a Cache: for the rows of `history` (B, length) it reads the
    ids at the columns `start` (B,), which lie on the card, and leaves their logits (B, ids) in `answer`.

    launches: the kernel and the part of the model of each, in their order. ran: how many of each kernel have
    been launched since it was made. A CUDA graph may record `step`: nothing in it depends on the host.
    """
    wants, packs_whole = None, True              # every logit is exact; 2:4 is read in 8 bits too
    live, left, again = None, False, 0           # the rows that go on, if not all; whether those that do not
    #                                              have left early; the run of a block that ponders

    def __init__(self, model, cache, history, start, ids, draws=None, seen=None):
        """draws, seen: a Sampler's filters (draws.settings) and the ids that are in each row, (B, ...) bool:
        then a step draws the next id too, writes it behind the one that it has read, and moves `start` on;
        None: a sampler draws from the logits. NotWritten where the model has a part that is not written here.
        """
        self.draws, self.seen = draws, seen
        self.cache, self.choices = cache, cache.choices
        self.rows, self.dtype, self.ids = len(history), cache.layers[0].dtype, ids
        self.history, self.start = history, start
        if self.rows > ROWS:
            raise NotWritten(f"{self.rows} rows at once, {ROWS} is the most")
        if self.dtype not in DTYPES:
            raise NotWritten(f"a stream in {self.dtype}")
        from kernels import triton_depth, triton_draw, triton_step  # a machine without Triton reads this too
        self.k, self.depth, self.ids_of = triton_step, triton_depth, triton_draw
        self.tall = 1 << (self.rows - 1).bit_length()
        self.processors = kernels.triton_kernels().processors(history.device)
        self.calls, self.launches, self.ran, self.module = [], [], Counter(), ""
        self.last = self.last_sum = None         # what a product or a sum of rows appended last was made of
        self.counters, self.begins = [], []      # of modules; what takes over from the cache
        model.emit(self)

    def __getattr__(self, name):
        raise NotWritten(f"the op '{name}' is not written for a card")

    def step(self):
        """Launch all -> logits (B, ids) in fp32, of the tokens at the columns `start`."""
        for kernel, grid, arguments, options in self.calls:
            kernel[grid](*arguments, **options)
        self.ran.update(name for name, _ in self.launches)
        return self.answer

    def begin(self):
        """Before the first step: take over what the prompt has left in the cache beside keys and values."""
        for take_over in self.begins:
            take_over(self.cache.states)

    def tell(self):
        """Add what steps have counted to the modules that count it; the host waits for it."""
        for module, name, number in self.counters:
            setattr(module, name, getattr(module, name) + int(number.sum()))
            number.zero_()

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

    def packed(self, values, meta, bias, width, scale=None):
        """See Program.packed; scale: of values of 8 bits, as `whole` has it."""
        matrix = self.matrix(values, bias) if scale is None else Matrix(
            values.view(torch.int8), self.vector(bias), width, 8, scale.contiguous().view(torch.float32))
        return matrix._replace(width=width, places=meta.contiguous())

    def whole(self, codes, scale, width, bias, across=None):
        """See Program.whole."""
        bits, of = (8, scale.view(torch.float32)) if len(scale) else (
            4 + kernels.has_offsets(scale), codes.view(torch.int16))
        codes = codes.view(torch.int8) if bits == 8 else codes
        return Matrix(codes, self.vector(bias), width, bits, of, across)

    def add(self, kernel, grid, arguments, options):
        """Append a launch."""
        self.last = self.last_sum = None
        self.calls.append((kernel, grid, arguments, options))
        self.launches.append((kernel.fn.__name__, self.module))

    # ------------------------------------------------ ops

    def embed(self, matrix, positions=None, ngrams=None, order=0):
        """See Program.embed."""
        C, buckets = matrix.width, 1 if ngrams is None else len(ngrams)
        x = self.empty(self.rows, C)
        self.add(self.k.embed_kernel, (self.rows, -(-C // 1024)), (self.history, self.start, matrix.weight,
                 matrix.scale, self.vector(positions), self.vector(ngrams), x, self.history.stride(0), C,
                 matrix.weight.stride(0), buckets), dict(BITS=matrix.bits, ORDER=order, BC=1024, num_warps=4))
        return Plain(x)

    def norm(self, x, size, gain=None, bias=None, eps=1e-5, by_root=False):
        """The products that read it compute it themselves."""
        return Plain(x.x, "rmsnorm" if by_root else "layernorm", None, self.vector(gain), self.vector(bias),
                     eps)

    def linear(self, x, matrix, act="none", params=(), onto=None, units=None, own=False, blocks=0,
               stored=False):
        """act(matrix . x + bias) + onto, in onto's place; units: of Units alone, the others are zero. own:
        it is small; the last program of the product behind whose norm it stands computes it, if it can.
        stored: see Program.linear; here a product and its bias are always added in fp32."""
        if act not in ACTS:
            raise NotWritten(f"the activation {act}")
        if blocks:
            size = matrix.width * len(matrix.weight) // blocks
            return self.product(self.input(x, size), matrix, act, fold=(blocks, size))
        if own and act == "none" and self.routes(x, matrix):
            scores = self.empty(self.rows, len(matrix.weight))
            self.product(**self.retaken() | dict(norm=x, router=matrix, scores=scores))
            return Plain(scores)
        waves = torch.stack(params).contiguous() if act == "osc" else None
        return self.product(x, matrix, "none" if act == "osc" else act, onto, units=units, waves=waves)

    def routes(self, x, matrix):
        """May the last program of the product appended last compute matrix . x too?"""
        size = self.rows * matrix.weight.numel()
        return (bool(self.last) and self.last["out"] is x.x and self.last["x"].kind == "join"
                and x.kind in ("layernorm", "rmsnorm") and matrix.bits == 16
                and matrix.places is None and matrix.bias is None and size <= self.k.MOST_ROUTED)

    def retaken(self):
        """Take the product that was appended last back -> what it was made of."""
        self.calls.pop(), self.launches.pop()
        made, self.last = self.last, None
        return made

    def product(self, x, matrix, act="none", onto=None, gated=False, dtype=None, cap=None, units=None,
                out=None, norm=None, router=None, scores=None, choice="", best=0, picked=None,
                among=(None, None), waves=None, edges=None, always=None, fold=(None, None)):
        """Append a launch of product_kernel, to `out` if that is there. norm, router, scores: of out, what
        its last program makes besides; choice, best, picked: what it chooses then. among: inhibition and
        balance of columns. waves: w, phi and b of an osc. edges: an output is zero unless its size exceeds
        its own. always: outputs from there on are those of rows that do not go on too. fold: so many
        outputs in turn meet a part of x each, which is so long."""
        if x.edges is not None or x.winners:
            raise NotWritten("a product of gated units that are read by output")
        N, K = len(matrix.weight) // (1 + gated), matrix.width
        out = onto.x if onto else self.empty(self.rows, N, dtype=dtype) if out is None else out
        by, copy = norm or x, units and units.copy
        gates = units and (units.gates if units.by is None else getattr(units.by, "x", units.by))
        M = scores.size(1) if scores is not None else N
        ends = scores is not None or choice
        halved = x.kind == "join" or bool(units or choice)
        tile = self.k.product_tile(self.tall, N, K, gated or choice == "largest", halved,
                                   self.processors)
        while fold[0] and fold[0] % tile["BN"]:
            tile["BN"] //= 2
        more = self.k.choice_tile(self.tall, N, M if choice else 0) if ends else dict(BM=1, BT=1, BLOCK=1)
        self.add(self.k.product_kernel, (-(-N // tile["BN"]),), (
            x.x, x.marks, by.gain, by.shift, matrix.weight, matrix.scale, matrix.places, matrix.bias,
            onto and onto.x, out, gates, copy and copy.weight, copy and copy.scale,
            torch.zeros(1, dtype=torch.int32, device=out.device) if ends else None, router and router.weight,
            out if scores is None else scores, picked, *among, waves, edges, self.rows, N, K,
            matrix.weight.stride(0), x.splits, by.eps, cap, units and units.width,
            copy and copy.weight.stride(0), units and units.edge, M, best, self.live,
            N if always is None else always, *fold),
            dict(INPUT=x.kind, ACT=act, GATED=gated, D=x.width, BITS=matrix.bits,
                 COPY=copy.bits if copy else 0, ROUTE=norm.kind if norm else "", CHOICE=choice,
                 ALIKE=bool(units) and units.by is None, **tile, **more))
        self.last = dict(x=x, matrix=matrix, act=act, onto=onto, gated=gated, dtype=dtype, cap=cap,
                         units=units, norm=norm, router=router, scores=scores, out=out, waves=waves,
                         edges=edges)
        return onto or Plain(out)

    def swiglu(self, x, size):
        """The product that made x ends with it."""
        return self.product(**self.retaken() | dict(act="silu", gated=True, out=None))

    def chosen(self, scores, choice, k, width, apart=0, among=(None, None)):
        """The last program of the product that made `scores` chooses k of them -> Units, `width` each."""
        count = scores.x.size(1)
        if choice != "choose" and count > self.k.MOST_GROUPS:
            raise NotWritten(f"a choice among {count} groups, {self.k.MOST_GROUPS} is the most")
        self.made(scores)
        gates = self.empty(self.rows, count, dtype=torch.float32)
        self.product(**self.retaken() | dict(choice=choice, best=k, picked=gates, among=among))
        return Units(count * width, gates, gates, width, apart)

    def made(self, x):
        """NotWritten unless the product that was appended last has made x."""
        if x.kind != "plain" or not self.last or x.x is not (
                self.last["out"] if self.last["scores"] is None else self.last["scores"]):
            raise NotWritten("a choice among what no product has made")

    def columns(self, scores, count, k, width, inhibits, balance):
        """See Program.columns."""
        return self.chosen(scores, "columns", k, width, among=(inhibits.contiguous(), balance.detach()))

    def experts(self, scores, count, k, width):
        """See Program.experts."""
        return self.chosen(scores, "experts", k, width, apart=width)

    def branches(self, scores, count, k, width):
        """See Program.branches."""
        return self.chosen(scores, "branches", k, width)

    def choose(self, scores, count, k):
        """See Program.choose."""
        return self.chosen(scores, "choose", k, 1)

    def above(self, scores, count, edge):
        """See Program.above: the product of these units computes the scores itself."""
        self.made(scores)
        return Units(count, copy=self.retaken()["matrix"], edge=edge)

    def largest(self, x, size, k):
        """See Program.largest: the last program of the product that made x keeps them."""
        if k >= size:
            return x
        if x.kind != "plain" or not self.last or self.last["out"] is not x.x:
            return self.input(x, size, best=k)
        return self.product(**self.retaken() | dict(choice="largest", best=k))

    def input(self, x, size, act="none", units=None, best=0):
        """What a product of x would multiply, alone: of Units, or its `best` largest."""
        y = self.empty(self.rows, size)
        self.add(self.k.input_kernel, (self.rows,), (
            x.x, x.marks, x.gain, x.shift, units and units.gates, y, self.rows, size, x.splits, x.eps,
            units and units.width, best), dict(INPUT=x.kind, ACT=act, KEEP=best > 0, D=x.width,
                                               **self.k.input_tile(size)))
        return Plain(y)

    def mix(self, x, size, by, act="none", params=()):
        """See Program.mix."""
        if act not in ACTS:
            raise NotWritten(f"the activation {act}")
        waves = torch.stack(params).contiguous() if act == "osc" else None
        y, width = self.empty(self.rows, size), size // len(by)
        tile = dict(BC=min(1024, max(32, 1 << (width - 1).bit_length())), num_warps=4)
        self.add(self.k.mix_kernel, (self.rows, -(-width // tile["BC"])), (
            x.x, self.vector(by), waves, y, size),
            dict(EACH=len(by), ACT="none" if waves is not None else act, **tile))
        return Plain(y)

    def group_winners(self, x, size, group, k):
        """See Program.group_winners: the sum of rows that reads it finds them."""
        return x._replace(winners=(group, k))

    def event(self, x, size, thresholds, units=None):
        """The sum of rows that reads it opens its gates."""
        return x._replace(edges=thresholds.detach().float().contiguous())

    def firing(self, x, size):
        """See Program.firing: those that the product which made x has not left at zero."""
        if x.winners:
            raise NotWritten("winners of groups that choose what is computed next")
        if x.edges is not None:
            self.made(x._replace(edges=None))
            x = self.product(**self.retaken() | dict(edges=x.edges))
        return Units(size, x.x, x.x)

    def rows_sum(self, a, matrix, onto=None, units=None, all=False, out=None, always=None):
        """See Program.rows_sum; out, always: see product."""
        if a.kind != "plain":
            raise NotWritten("rows that are chosen by what no product has made")
        N, C, rows = len(matrix.weight), matrix.width, self.rows
        tile, columns, shares, share = self.k.down_tile(self.tall, N, C, self.processors)
        out = onto.x if onto else self.empty(rows, C) if out is None else out
        parts = self.empty(shares, rows, C, dtype=torch.float32)
        arrived = torch.zeros(columns, dtype=torch.int32, device=out.device)
        group, winners = a.winners or (0, 0)
        self.add(self.k.down_kernel, (columns, shares), (a.x, a.edges, matrix.weight, matrix.scale,
                 matrix.bias, matrix.across, onto and onto.x, out, parts, arrived, rows, N, C,
                 matrix.weight.stride(0), share, winners, self.live, C if always is None else always),
                 dict(ALL=all, BITS=matrix.bits, GROUP=group, **tile))
        self.last_sum = dict(a=a, matrix=matrix, onto=onto, units=units, all=all, out=out)
        return onto or Plain(out)

    def attend(self, qkv, layer, heads, width, eps, rotation, gain, alone=False):
        """See Program.attend; the product that reads it joins the splits."""
        if alone:
            raise NotWritten("keys and values alone")
        self.for_the_left(qkv, heads * width)
        return self.attended(qkv.x, qkv.x[:, heads * width:], layer, heads, width, eps, rotation, gain)

    def attend_open(self, q, kv, units, branch, layer, heads, width, eps, rotation, gain):
        """See Program.attend_open."""
        self.for_the_left(kv, 0)
        y = self.attended(q.x, kv.x, layer, heads, width, eps, rotation, gain, units)
        return self.input(y, heads * width, "gelu", units)

    def for_the_left(self, x, first):
        """Rows that have left get the outputs from `first` on too, keys and values, of the product that was
        appended last."""
        if self.left:
            made, again = (self.last, self.product) if self.last else (self.last_sum, self.rows_sum)
            if not made or made["out"] is not x.x:
                raise NotWritten("keys and values that the last launch has not made")
            self.calls.pop(), self.launches.pop()
            again(**made | dict(always=first))

    def attended(self, q, kv, layer, heads, width, eps, rotation, gain, units=None):
        """Attention of queries and new keys and values (rows, ...), of heads of Units alone."""
        kept, tile = self.kv(layer), self.k.attend_tile(width)
        groups, size = kept.shape[2:4]
        splits = max(1, min(self.k.MOST_SPLITS, -(-size // self.k.SPLIT),
                            2 * self.processors // (self.rows * heads)))
        parts = self.empty(splits, self.rows, heads * width, dtype=torch.float32)
        marks = self.empty(2, splits, self.rows, heads, dtype=torch.float32)
        cos, sin = map(self.vector, rotation or (None, None))
        self.add(self.k.attend_kernel, (self.rows * heads, splits), (
                 q, kv, cos, sin, self.vector(gain), kept, self.start, parts, marks, units and units.gates,
                 self.rows, heads, groups, size, q.stride(0), kv.stride(0), units and units.width, eps or 0.0,
                 width ** -0.5, self.live), dict(NORM=eps is not None, LEFT=self.left, **tile))
        return Plain(parts, "join", marks, splits=splits, width=width)

    def kv(self, layer, run=None):
        """See Program.kv."""
        run = self.again if run is None else run
        return self.cache.layers[self.cache.depth + run - 1 if run else layer]

    # ------------------------------------------------ rows part ways

    def counter(self, module, name):
        """A number of each row that a step adds to an attribute of a module."""
        self.counters.append((module, name, self.empty(self.rows, dtype=torch.int64).zero_()))
        return self.counters[-1][2]

    def value(self, size):
        """None: what rows leave with stays where they have it."""

    def enter(self, counts, size=0):
        """See Program.enter."""
        self.entered, self.going, self.outer = counts, self.empty(self.rows, dtype=torch.int32), self.live
        return Plain(self.empty(self.rows, size)) if size else None

    def owed(self, layers, size, counts):
        """Nothing: rows that have left get their keys and values at once -> where layers are counted."""
        return layers, counts

    def pay(self, owed, layer, emit_kv):
        """From here on rows that have left get nothing but their keys and values."""
        self.left = True

    def probed(self, probe):
        """Take the product of a probe back, which the kernel that asks it computes -> its arguments there."""
        self.made(probe)
        made = self.retaken()
        x, matrix = made["x"], made["matrix"]
        if x.kind != "rmsnorm" or x.gain is not None or matrix.bits != 16 or matrix.weight.size(0) != 1:
            raise NotWritten("a probe that is not one row of floats behind a norm without gains")
        tile = dict(BC=min(self.depth.WIDE, max(32, 1 << (matrix.width - 1).bit_length())), num_warps=4)
        return (x.x, matrix.weight, matrix.bias), (matrix.width, x.eps), tile

    def leave(self, x, size, probe, threshold, out, depth, owed):
        """See Program.leave."""
        (probe, about, tile), (layers, counts) = self.probed(probe), owed
        self.add(self.depth.leave_kernel, (self.rows,), (*probe, self.going, self.entered, counts, *about,
                 threshold, depth, layers), dict(FIRST=self.live is None, **tile))
        self.live = self.going

    def halt(self, x, size, probe, total, layer, runs, epsilon, counts):
        """See Program.halt."""
        (probe, about, tile), kept, run = self.probed(probe), self.kv(layer), self.again
        last, (_, rows, groups, length, width) = run + 1 == runs, kept.shape
        if not run:
            self.rest = self.empty(self.rows, dtype=torch.float32)
        later = kept if last else self.kv(layer, run + 1)
        self.add(self.depth.halt_kernel, (self.rows,), (
            *probe, total.x, self.rest, self.outer, self.going, self.entered, counts, kept, later, self.start,
            rows, *about, epsilon, 2 * groups, length, width, runs - 1 - run),
            dict(FIRST=not run, LAST=last, BD=max(16, 1 << (width - 1).bit_length()), **tile))
        self.live = self.going

    def land(self, *skips):
        """Nothing is skipped: launches in between find no row that goes on."""

    def join(self, x=None, size=0, out=None, layers=0, owed=None):
        """From here on all rows go on that there were before `enter` -> where they lie."""
        self.live, self.left = self.outer, False
        return x or out

    def group(self, x, pool):
        """See Program.group. The kernels up to `spread` stand at groups' numbers and run for rows whose
        group is complete."""
        s, C = pool.shape
        states, groups, before = (self.empty(self.rows, *shape, C) for shape in ((s,), (), ()))
        self.begins.append(lambda kept: states.copy_(kept.get("group", NOTHING)))
        live, ends = self.empty(self.rows, dtype=torch.int32), torch.zeros_like(self.start)
        tile = dict(EVERY=s, BC=min(self.depth.WIDE, max(32, 1 << (C - 1).bit_length())), num_warps=4)
        self.add(self.depth.group_kernel, (self.rows,), (x.x, states, self.vector(pool), self.start, groups,
                 before, live, ends, C), tile)
        self.live, self.tokens, self.start = live, self.start, ends
        return Plain(groups), before, None

    def spread(self, groups, before, x, factors):
        """See Program.spread."""
        s, C = factors.shape
        told = self.empty(self.rows, C)
        self.begins.append(lambda kept: told.copy_(kept.get("said", NOTHING)[:, 0]))
        tile = dict(EVERY=s, BC=min(self.depth.WIDE, max(32, 1 << (C - 1).bit_length())), num_warps=4)
        self.add(self.depth.spread_kernel, (self.rows,), (groups.x, before, x.x, told, self.vector(factors),
                 self.tokens, self.live, C), tile)
        self.live, self.start = None, self.tokens
        return x

    def logits(self, x, matrix, cap, copy=None):
        """The head in fp32, bounded by cap (0: not)."""
        self.answer = self.product(x, matrix, dtype=torch.float32, cap=cap or None).x
        if self.draws is not None:
            self.draw()
        return self.answer

    def draw(self):
        """The next ids, as `draw` of the decode engine's program; fine: are all largest logits finite?"""
        d, (R, V), tiles = self.draws, self.answer.shape, self.ids_of.draw_tiles(self.answer.size(1))
        greedy, device = d.temperature == 0 or d.top_k == 1, self.start.device
        top_k = 0 < d.top_k < V and not greedy
        self.fine = torch.ones(1, dtype=torch.int32, device=device)
        row = self.history, self.start, self.seen.view(torch.uint8) if d.penalty != 1 else None
        room, some = (self.empty(R, V, dtype=torch.float32) for _ in range(2))
        ids, about = (self.empty(R, n, dtype=torch.int32) for n in (V, 2))
        most, tops = (self.empty(R, n, dtype=torch.float32) for n in (1, -(-V // tiles[0]["CHUNK"])))
        sizes = V, self.history.stride(0), self.seen.stride(0)
        self.add(self.ids_of.sift_kernel, (R,), (
                 self.answer, *row, self.fine, room, some, ids, tops, most, about, *sizes,
                 float(d.temperature), d.top_k, float(d.penalty)),
                 dict(GREEDY=greedy, TOP_K=top_k, **tiles[0]))
        if not greedy:
            self.add(self.ids_of.draw_kernel, (R,), (*row, some if top_k else room, ids, most, about,
                     torch.tensor([d.key], device=device), *sizes, float(d.top_p), float(d.min_p)),
                     dict(TOP_K=top_k, TOP_P=d.top_p < 1, **tiles[1]))


def card_of(model, cache, history, start, ids, *draws):
    """A model's Card, which with `draws` (settings, seen) draws the next ids; or a NotWritten, which is false
    and says in a sentence why `forward` decodes."""
    if cache.choices.forward or not history.is_cuda:
        return NotWritten(cache.choices.forward or "these kernels run on a CUDA card")
    if kernels.triton_kernels() is None:
        return NotWritten("there is no Triton here")
    try:
        return Card(model, cache, history, start, ids, *draws)
    except NotWritten as reason:
        return reason.with_traceback(None)
