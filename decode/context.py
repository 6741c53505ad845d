"""What one call of a model carries past its blocks, with a KV cache behind it or without.

Every row begins at column 0 of the cache, and where rows stand at different lengths each writes a column of
its own: a row's output does not depend on its neighbours.
"""
import copy
from typing import NamedTuple

import torch
from torch.nn import functional as F

from kernels.arena import zeros


class Choices(NamedTuple):
    """What calls of a model do that its weights do not decide (GPT.choose). A call keeps those that it began
    with, and so does a cache.

    predict: are units predicted? leave_at: how sure an exit's probe must be for a token to leave; None: none
    leaves. adapters: the number of the adapter of all rows, or of each row's. forward: why the modules' own
    forward decodes and not the engine; empty: nothing says so. threads: of the engine; 0: as many as torch
    has. watch: an engine.Watch that is shown the programs, or None. loss_alone: with loss_chunks in eval mode
    too the loss comes without logits.
    """
    predict: bool = False
    leave_at: float | None = None
    adapters: tuple = (0,)
    forward: str = ""
    threads: int = 0
    watch: object = None
    loss_alone: bool = False

    def of_rows(self, rows):
        """The same for some rows (n,) of the batch."""
        if len(self.adapters) == 1:
            return self
        return self._replace(adapters=tuple(self.adapters[row] for row in rows.tolist()))


NO_CHOICES = Choices()


def has_policy(config):
    """Has a model of this GPTConfig anything that GPT.use_policy switches on?"""
    return bool(config.mlp_predict or config.mlp_screen or config.exits)


class Context:
    """What one call carries past the blocks: positions, the attention mask, auxiliary losses, choices.

    positions: a slice or a (B, T) tensor of indices into the position table.
    CachedContext is the same with a KV cache behind it.
    """
    rotation_of = staticmethod(lambda positions: None)     # positions -> cosines and sines, where pos is rope

    def __init__(self, positions, training=False, choices=NO_CHOICES):
        self.positions, self.losses = positions, [] if training else None
        self.exit_states, self.executed = [], []
        self.choices = choices

    def add_loss(self, totals, of):
        """Add of(means) to the training loss, totals() being the sums that these are the means of, as `total`
        gives them; where no loss is wanted, they are not computed."""
        if self.losses is not None:
            self.losses.append(of(*(found / count for found, count in totals())))

    def total(self, values, kept=0):
        """Values (B, T, ...) of this call's tokens -> (their sum, how many they are); with kept=1 a sum for
        each place of the last dimension."""
        return add_up(values, kept)

    def of_tokens(self, order):
        """The same call for those of its B * T tokens that `order` (n,) names."""
        return self

    def add_executed(self, make):
        """Note make(), the multiply-adds that gates have let through and those that they could have."""
        if self.losses is not None:
            self.executed.append(make())

    def keep_exit_state(self, x):
        """States (B, T, C) at an early exit: kept for the training loss."""
        if self.losses is not None:
            self.exit_states.append(x)

    def copy_of(self, owner, make):
        """make(), what a module `owner` computes from its weights for decoding: see Cache. Here nothing is
        kept."""
        return make()

    def of_rows(self, rows):
        """The same call for some rows (n,)."""
        ctx = copy.copy(self)
        ctx.choices = self.choices.of_rows(rows)
        return ctx

    def extend(self, layer, k, v):
        """Keys and values (B, H, T, D) of this call -> all that the queries may look at (B, H, S, D), and the
        mask that they need, (B or 1, 1, T, S) bool; None: each sees up to itself."""
        return k, v, None

    def again(self, run):
        """The same call for one more run of a block."""
        return self

    def ponder(self, halting, x, attn, run):
        """Every token from the first on."""
        return halting.several(x, self, attn, run)

    def with_past(self, idx, count):
        """(B, count + T) ids that end with idx (B, T); -1 where there is no earlier token."""
        return F.pad(idx, (count, 0), value=-1)

    def coarse(self, hourglass, x, run):
        """What the middle layers tell each token, (B, T, C): run (states (B, n, C), context) on the n
        completed groups of x (B, T, C)."""
        groups = x.size(1) // hourglass.every
        inner = Context(slice(0, groups), choices=self.choices)
        inner.losses, inner.executed = self.losses, self.executed
        inner.rotation_of, inner.rotation = self.rotation_of, self.rotation_of(inner.positions)
        said = run(hourglass.pool_groups(x), inner) if groups else x[:, :0]
        return hourglass.spread_groups(said, x.size(1))


def add_up(values, kept, real=None):
    """Context.total of the tokens that are `real`, bool of values' leading dimensions; None: all are."""
    count = values.numel() // values.size(-1) if kept else values.numel()
    if real is not None:
        values = torch.where(real.view(*real.shape, *[1] * (values.dim() - real.dim())), values, 0)
        count = real.sum() * (count // real.numel())
    return (values.flatten(0, -2).sum(dim=0) if kept else values.sum()), count


class Cache:
    """What decoding keeps of the tokens it has read.

    layers: keys and values of each layer, (2, B, G, S, D) of G heads, views of one tensor. S is `length`, or
    for a layer with a window no more than that: column c then lies in place c % S. A layer that runs on
    groups of tokens has a column for each group; behind the layers come the later runs of a block that
    ponders. states: what else a module keeps, by name. choices: of the calls that read and write it; None:
    the model's as they are.
    copies: what modules have computed from their weights, by module. They live as long as the keys and values
    that the same weights have made, a stream long: nothing that changes weights between two streams, in place
    or not, noticed by torch or not, can leave one behind.
    """

    def __init__(self, model, batch_size, length, choices=None):
        c, weight = model.config, model.transformer.ln_f.weight                  # a head may be quantised
        self.depth, self.runs, self.length = c.n_layer, max(1, c.ponder), length
        of_layers = [*range(c.n_layer), *[c.pondering_layer()] * (self.runs - 1)]
        windows, columns = [block.attn.window for block in model.transformer.h], c.columns_of_layers(length)
        self.windows = [windows[layer] for layer in of_layers]
        sizes = [min(columns[layer], windows[layer] or columns[layer]) for layer in of_layers]
        heads, D = c.kv_heads(), c.heads()[1]
        flat = zeros(2 * batch_size * heads * D * sum(sizes), weight.device,
                     model.compute_dtype or weight.dtype)                  # 0 times what is masked must be 0
        parts = flat.split([2 * batch_size * heads * D * size for size in sizes])
        self.layers = [part.view(2, batch_size, heads, size, D) for part, size in zip(parts, sizes)]
        self.states, self.copies = {}, {}
        self.choices = choices or model.chosen(batch_size)

    def copy_of(self, owner, make):
        """make() of a module's weights, computed once."""
        if owner not in self.copies:
            self.copies[owner] = make()
        return self.copies[owner]

    def rings(self):
        """The layers whose columns are written over once the window has passed them."""
        return [kept for kept, window in zip(self.layers, self.windows) if window]

    def nbytes(self):
        return sum(layer.nbytes for layer in self.layers)


class CachedContext:
    """A Context with a cache behind it: T new columns, the first at column `start`.

    start: an int, or (B,) int64 where rows stand at different columns. ends: columns of each row that hold
    tokens after this call, an int or (B,); less than start + T where a row's prompt is shorter than the
    batch's. ids: (B, start + T or more) token ids of the columns, for modules that look back at them.
    """

    def __init__(self, cache, start, T, ids=None, ends=None):
        self.cache, self.start, self.T, self.ids = cache, start, T, ids
        self.ends = start + T if ends is None else ends
        self.even = isinstance(start, int)
        self.positions = slice(start, start + T) if self.even else self.columns()
        self.masks, self.choices = {}, cache.choices

    rotation_of = staticmethod(lambda positions: None)
    losses = None

    def columns(self):
        """(B, T) or (T,): the column of each new token."""
        device = self.cache.layers[0].device
        return torch.as_tensor(self.start, device=device)[..., None] + torch.arange(self.T, device=device)

    def add_loss(self, totals, of):
        """Decoding wants no loss."""

    def add_executed(self, make):
        """Nor a budget: what it executes is counted."""

    def keep_exit_state(self, x):
        """Nor states at early exits."""

    def copy_of(self, owner, make):
        return self.cache.copy_of(owner, make)

    def of_tokens(self, order):
        """See Context."""
        return self

    def of_rows(self, rows):
        """The same call for some rows (n,)."""
        return SomeRows(self, rows)

    def like(self, start, T, ends=None):
        """A call on other columns of the same cache."""
        ctx = CachedContext(self.cache, start, T, self.ids, ends)
        ctx.rotation_of, ctx.rotation = self.rotation_of, self.rotation_of(ctx.positions)
        return ctx

    def with_past(self, idx, count):
        """(B, count + T) ids that end with this call's; -1 where there is no earlier token."""
        if self.even:
            return F.pad(self.ids, (count, 0), value=-1)[:, self.start:self.start + count + self.T]
        columns = self.columns()
        before = columns[:, :1] - count + torch.arange(count, device=idx.device)
        columns = torch.cat((before, columns), dim=1)
        return self.ids.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)

    def extend(self, layer, k, v):
        """Write the new keys and values (B, H, T, D) -> what the queries may look at (B, H, S, D), and the
        mask that they need, (B or 1, 1, T, S) bool; None: they are the last T of S, each sees up to itself.
        """
        return self.keep(layer, self.cache.layers[self.place(layer)], (k, v))

    run = 0                                      # of a block that is run several times

    def place(self, layer):
        """Where the cache holds a layer's keys and values."""
        return self.cache.depth + self.run - 1 if self.run else layer

    def again(self, run):
        """The same call for one more run of a block: it has a cache of its own."""
        ctx = copy.copy(self)
        ctx.run = run
        return ctx

    def ponder(self, halting, x, attn, run):
        """Prompts together; tokens behind them one by one."""
        if self.even and self.start == 0:
            return halting.several(x, self, attn, run)
        calls = [self] if self.T == 1 else [self.like(self.start + i, 1) for i in range(self.T)]
        return torch.cat([halting.one(t, ctx, attn, run) for t, ctx in zip(x.split(1, dim=1), calls)], dim=1)

    def copy_kv_to_later_runs(self, layer, rows):
        """What this run has written for rows (n,) of one new token is what later runs would write."""
        kept = self.cache.layers[self.place(layer)]
        rows = rows if self.even else rows[(self.ends > self.start)[rows]]
        at = self.start % kept.size(3)
        at = at if self.even else at[rows]
        for run in range(self.run + 1, self.cache.runs):
            self.cache.layers[self.again(run).place(layer)][:, rows, :, at] = kept[:, rows, :, at]

    def keep(self, layer, kept, new):
        """Write to kept (2, B, H, S, D)."""
        window = self.cache.windows[layer]
        return self.keep_ring(kept, new, window) if window else self.keep_all(kept, new)

    def keep_all(self, kept, new):
        if self.even:
            end = self.start + self.T
            torch.stack(new, out=kept.narrow(3, self.start, self.T))
            return *kept.narrow(3, 0, end).unbind(0), None
        write_rows(kept, torch.stack(new), self.columns())
        return *kept.unbind(0), self.mask(kept.size(3))

    def mask(self, end):
        """Column j is visible to a token at column i if j <= i."""
        if end not in self.masks:
            columns = torch.arange(end, device=self.cache.layers[0].device)
            self.masks[end] = (columns <= self.columns()[..., None]).view(-1, 1, self.T, end)
        return self.masks[end]

    def keep_ring(self, kept, new, window):
        size = kept.size(3)
        if self.even and self.T == 1:
            torch.stack(new, out=kept.narrow(3, self.start % size, 1))
            return *kept.narrow(3, 0, min(self.start + 1, size)).unbind(0), None
        if self.even and self.start == 0:
            write_ring(kept, torch.stack(new), 0, self.ends)
            return *new, None
        new = torch.stack(new)
        at = self.columns().view(-1, self.T)                          # (B or 1, T)
        past = at[:, :1] - size + torch.arange(size, device=at.device)          # the columns before them
        old = take(kept, past % size)
        write_ring(kept, new, self.start, self.ends)
        columns = torch.cat((past, at), dim=1)[:, None]
        seen = (columns <= at[..., None]) & (columns > at[..., None] - window) & (columns >= 0)
        return *torch.cat((old, new), dim=3).unbind(0), seen[:, None]

    def coarse(self, hourglass, x, run):
        """The middle layers' part of a step, (B, T, C): run (states (B, n, C), a context of groups) for every
        group of `every` tokens that this call completes. Between two of those nothing of them is computed.
        """
        if self.even and self.start == 0:
            return self.read_groups(hourglass, x, run)
        parts = [self.read_one(hourglass, x[:, i:i + 1], self.start + i, run) for i in range(self.T)]
        return torch.cat(parts, dim=1)

    def read_groups(self, hourglass, x, run):
        """The first tokens of every row; what they leave is kept: the last group's states as far as they go,
        and what the middle layers said of the group before it."""
        s, B, states = hourglass.every, len(x), self.cache.states
        ends = torch.as_tensor(self.ends, device=x.device).expand(B)
        begun = ends // s
        groups = self.like(0, self.T // s, begun)
        said = run(hourglass.pool_groups(x), groups) if groups.T else x[:, :0]
        latest = take_tokens(said, begun[:, None] - 1) if groups.T else x.new_zeros(B, 1, x.size(2))
        states["said"] = latest * (begun > 0)[:, None, None]
        states["group"] = take_tokens(x, (begun * s)[:, None] + torch.arange(s, device=x.device))
        return hourglass.spread_groups(said, self.T)

    def read_one(self, hourglass, x, start, run):
        s, states = hourglass.every, self.cache.states
        group, phase, done = states["group"], (start + 1) % s, (start + 1) // s
        if isinstance(start, int):
            group[:, start % s] = x[:, 0]
            if phase == 0:
                states["said"] = run(hourglass.pool_groups(group), self.like(done - 1, 1, done))
        else:
            group[torch.arange(len(x), device=x.device), start % s] = x[:, 0]
            if (phase == 0).any():               # all rows run, each in its next column; it counts if done
                said = run(hourglass.pool_groups(group), self.like(start // s, 1, done))
                states["said"] = torch.where((phase == 0)[:, None, None], said, states["said"])
        return hourglass.spread_one(states["said"], phase)



class SomeRows(CachedContext):
    """A CachedContext for some rows (n,) of its batch; others keep what they have."""

    def __init__(self, ctx, rows):
        of_rows = lambda columns: columns if isinstance(columns, int) else columns[rows]
        super().__init__(ctx.cache, of_rows(ctx.start), ctx.T, ends=of_rows(ctx.ends))
        self.rows, self.run, self.rotation = rows, ctx.run, ctx.rotation_of(self.positions)
        self.choices = ctx.choices.of_rows(rows)

    def extend(self, layer, k, v):
        kept = self.cache.layers[self.place(layer)]
        part = kept[:, self.rows]
        found = self.keep(layer, part, (k, v))
        kept[:, self.rows] = part
        return found


def readable(x):
    """Has this tensor values that may decide what runs next?"""
    return not (torch.compiler.is_compiling() or x.is_meta)


class Thoughts:
    """The context of a block that is run again and again for tokens that begin at column 0, for fewer of them
    every time."""

    def __init__(self, ctx, window):
        self.ctx, self.window, self.kept, self.columns = ctx, window, None, None
        self.add_executed, self.copy_of = ctx.add_executed, ctx.copy_of
        self.choices, self.found = ctx.choices, []

    def choose(self, thinking, step):
        """Begin run `step` of the tokens (B, T) that are still thinking -> which of those that it computes
        they are, (B, R) bool: R of the row that has most of them, in front. A compiler knows no such R: there
        all tokens stay in their places."""
        self.valid, self.step = thinking, step
        self.found.append([])
        if readable(thinking):
            R = int(thinking.sum(1).max())
            self.columns = (~thinking).to(torch.int8).argsort(dim=1, stable=True)[:, :R]
            self.valid = thinking.gather(1, self.columns)
        self.rotation = self.ctx.rotation_of(self.ctx.positions if self.columns is None else self.columns)
        return self.valid

    def at(self, t, dim=1):
        """The columns as an index into t, whose dimension `dim` are the tokens."""
        return self.columns.view(len(t), *[1] * (dim - 1), -1, *[1] * (t.dim() - dim - 1)).expand(
            *t.shape[:dim], -1, *t.shape[dim + 1:])

    def take(self, t, dim=1):
        """Of t, whose dimension `dim` are all tokens, those that this run computes."""
        return t if self.columns is None else t.gather(dim, self.at(t, dim))

    def put(self, t, old, new, dim=1):
        """t, of which this run computes `old`, with `new` for those tokens that are still thinking."""
        valid = self.valid.view(len(t), *[1] * (dim - 1), -1, *[1] * (t.dim() - dim - 1))
        new = torch.where(valid, new, old)
        return new if self.columns is None else t.scatter(dim, self.at(t, dim), new)

    def add(self, t, more):
        """t (B, T, ...) and `more` of those that this run computes."""
        return t + more if self.columns is None else t.scatter_add(1, self.at(t), more)

    def total(self, values, kept=0):
        """As Context.total, of the tokens that are still thinking."""
        return add_up(values, kept, self.valid)

    def of_tokens(self, order):
        """As Context.of_tokens."""
        ctx = copy.copy(self)
        ctx.valid = self.valid.flatten()[order]
        return ctx

    def add_loss(self, totals, of):
        """As Context.add_loss, but the means are of all runs together: see tell."""
        if self.ctx.losses is not None:
            self.found[-1].append((totals(), of))

    def tell(self):
        """Add one loss for each mechanism of the block, of what it found in all runs."""
        for runs in zip(*filter(None, self.found)):
            (_, of), parts = runs[0], zip(*(totals for totals, _ in runs))
            totals = [tuple(map(sum, zip(*part))) for part in parts]
            self.ctx.add_loss(lambda totals=totals: totals, of)

    def copy_kv_to_later_runs(self, layer, runs):
        """Later runs would write what the last one has written."""
        for run in runs:
            self.ctx.again(run).extend(layer, *self.kept)

    def extend(self, layer, k, v):
        """As Context.extend: keys and values of all tokens, after as many runs as each has had."""
        if self.kept is not None:
            k, v = (self.put(t, self.take(t, 2), new, 2) for t, new in zip(self.kept, (k, v)))
        self.kept = k, v
        self.ctx.again(self.step).extend(layer, k, v)
        if self.columns is None:
            return k, v, None
        columns, at = torch.arange(k.size(2), device=k.device), self.columns[..., None]
        seen = (columns <= at) & (columns > at - (self.window or k.size(2)))
        return k, v, seen[:, None] if self.step else None


def take(kept, columns):
    """kept (2, B, H, S, D), columns (B or 1, n) -> (2, B, H, n, D)."""
    columns = columns[:, None, :, None].expand(kept.size(1), kept.size(2), -1, kept.size(4))
    return kept.gather(3, columns[None].expand(2, -1, -1, -1, -1))


def take_tokens(x, columns):
    """x (B, T, C), columns (B, n) -> (B, n, C); a column outside x gives its nearest."""
    return x.gather(1, columns.clamp(0, x.size(1) - 1)[..., None].expand(-1, -1, x.size(2)))


def write_rows(kept, new, columns):
    """Put new (2, B, H, T, D) at columns (B, T) of kept; those that kept does not have are dropped."""
    columns = columns.clamp(max=kept.size(3) - 1)
    kept.scatter_(3, columns[None, :, None, :, None].expand_as(new), new)


def write_ring(kept, new, start, ends):
    """Put new (2, B, H, T, D), the columns from `start` on, into a ring: place p takes the last column below
    `ends` with column % S == p, if it is among the new."""
    places = torch.arange(kept.size(3), device=kept.device)
    start, ends = (torch.as_tensor(t, device=kept.device).view(-1, 1) for t in (start, ends))
    columns = ends - 1 - (ends - 1 - places) % kept.size(3)                     # (B or 1, S)
    fresh = (columns >= start).view(1, -1, 1, len(places), 1)
    found = take(new, (columns - start).clamp(0, new.size(3) - 1))
    kept.copy_(torch.where(fresh, found, kept))
