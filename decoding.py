"""Generation: a static cache, prompts of different lengths in one batch, the sampling filters.

Every row begins at column 0 of the cache, and where rows stand at different lengths each writes a column of
its own: a row's output does not depend on its neighbours.
"""
import copy

import torch
from torch.nn import functional as F

from configurator import require


class Cache:
    """What decoding keeps of the tokens it has read.

    layers: keys and values of each layer, (2, B, H, S, D), views of one tensor. S is `length`, or for a layer
    with a window no more than that: column c then lies in place c % S. A layer that runs on groups of tokens
    has a column for each group; behind the layers come the later runs of a block that ponders. states: what
    else a module keeps, by name. owed: states whose keys and values a layer has yet to compute, by layer.
    """

    def __init__(self, model, batch_size, length):
        c, weight = model.config, model.lm_head.weight
        self.depth, self.runs = c.n_layer, max(1, c.ponder)
        of_layers = [*range(c.n_layer), *[c.pondering_layer()] * (self.runs - 1)]
        windows, columns = [block.attn.window for block in model.transformer.h], c.columns_of_layers(length)
        self.windows = [windows[layer] for layer in of_layers]
        sizes = [min(columns[layer], windows[layer] or columns[layer]) for layer in of_layers]
        heads, D = c.heads()
        flat = torch.zeros(2 * batch_size * heads * D * sum(sizes), device=weight.device,
                           dtype=model.compute_dtype or weight.dtype)      # 0 times what is masked must be 0
        parts = flat.split([2 * batch_size * heads * D * size for size in sizes])
        self.layers = [part.view(2, batch_size, heads, size, D) for part, size in zip(parts, sizes)]
        self.states, self.owed = {}, {}

    def rings(self):
        """The layers whose columns are written over once the window has passed them."""
        return [kept for kept, window in zip(self.layers, self.windows) if window]

    def nbytes(self):
        return sum(layer.nbytes for layer in self.layers)


class CachedContext:
    """model.Context with a cache behind it: T new columns, the first at column `start`.

    start: an int, or (B,) int64 where rows stand at different columns. ends: columns of each row that hold
    tokens after this call, an int or (B,); less than start + T where a row's prompt is shorter than the
    batch's. ids: (B, start + T or more) token ids of the columns, for modules that look back at them.
    """

    def __init__(self, cache, start, T, ids=None, ends=None):
        self.cache, self.start, self.T, self.ids = cache, start, T, ids
        self.ends = start + T if ends is None else ends
        self.even = isinstance(start, int)
        self.positions = slice(start, start + T) if self.even else self.columns()
        self.masks = {}
        if self.even and start == 0:
            cache.owed.clear()                   # the rows are read anew

    turn = staticmethod(lambda positions: None)

    def columns(self):
        """(B, T) or (T,): the column of each new token."""
        device = self.cache.layers[0].device
        return torch.as_tensor(self.start, device=device)[..., None] + torch.arange(self.T, device=device)

    def add_loss(self, make):
        """Decoding wants no loss."""

    def leave(self, x):
        """Nor states at early exits."""

    def of_rows(self, rows):
        """The same call for some rows (n,)."""
        return SomeRows(self, rows)

    def alone(self, x):
        """Is x (B, T, C) one token of one row?"""
        return self.even and x.size(0) == x.size(1) == 1

    def owe(self, layers, x):
        """Put off the keys and values of a state (1, 1, C) in layers that its token does not reach."""
        for layer in layers:
            self.cache.owed.setdefault(layer, []).append(x)

    def settle(self, layer, block):
        """Let a block remember what the tokens just before this one owe it."""
        owed = self.cache.owed.pop(layer, ())
        if owed:
            block.remember(torch.cat(owed, dim=1), self.like(self.start - len(owed), len(owed)))

    def like(self, start, T, ends=None):
        """A call on other columns of the same cache."""
        ctx = CachedContext(self.cache, start, T, self.ids, ends)
        ctx.turn, ctx.rotation = self.turn, self.turn(ctx.positions)
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

    def hand_on(self, layer, rows):
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
        self.rows, self.run, self.rotation = rows, ctx.run, ctx.turn(self.positions)

    def extend(self, layer, k, v):
        kept = self.cache.layers[self.place(layer)]
        part = kept[:, self.rows]
        found = self.keep(layer, part, (k, v))
        kept[:, self.rows] = part
        return found


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


class Sampler:
    """Chooses the next token of every row. Filters apply in this order:

    repetition_penalty: logits of tokens already in the row are divided by it where positive, multiplied where
    negative (CTRL, 1909.05858), before temperature; temperature: 0 is greedy; top_k: the k largest; top_p:
    the smallest set whose probability reaches top_p (1904.09751); min_p: at least min_p times the largest
    probability (2407.01082).
    vocab_size: ids from there on are never chosen (a padded vocabulary has rows that mean nothing).
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                 vocab_size=None):
        require(temperature >= 0, f"temperature={temperature} must be 0 (greedy) or more")
        require(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
        require(0 <= min_p <= 1, f"min_p={min_p} must be in [0, 1]")
        require(repetition_penalty > 0,
                f"repetition_penalty={repetition_penalty} must be above 0; 1.0 is off")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty, self.vocab_size = repetition_penalty, vocab_size

    def __call__(self, logits, seen):
        """logits (B, V) fp32, seen (B, V) bool: ids already in the row -> next ids (B, 1)."""
        if self.temperature == 0:
            return self.penalised(logits, seen).argmax(-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits, seen), num_samples=1)

    def probabilities(self, logits, seen):
        """The distribution (B, V) that the next ids are drawn from."""
        logits = self.penalised(logits, seen)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
        return self.filtered(logits / self.temperature).softmax(-1)

    def penalised(self, logits, seen):
        logits, seen = logits[:, :self.vocab_size], seen[:, :self.vocab_size]
        if self.repetition_penalty != 1.0:
            r = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
        return logits

    def filtered(self, logits):
        """Logits with what top_k, top_p and min_p exclude at -inf."""
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.size(-1))).values[:, [-1]]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p          # the token that reaches top_p stays
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        if self.min_p > 0:
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities < self.min_p * probabilities.amax(-1, keepdim=True),
                                        -torch.inf)
        return logits


@torch.inference_mode()
def stream(model, idx, max_new_tokens, sampler, lengths=None, overflow="exact"):
    """Yield the next token ids (B, 1), max_new_tokens times.

    overflow decides what happens to a row past block_size. "exact": nanoGPT's meaning, every token sees the
    last block_size tokens at positions 0..block_size-1, so the window is recomputed for each one. "slide":
    keep the last half of the window and go on with the cache, one recomputation every block_size/2 tokens:
    cheap, not identical.
    """
    block, V = model.config.block_size, model.config.vocab_size
    keep = {"exact": block, "slide": max(1, block // 2)}.get(overflow)
    require(keep is not None, f"overflow='{overflow}' must be exact or slide")
    require(idx.size(1) > 0, "the prompt is empty: give at least one token, for example a newline")
    B, T = idx.shape
    ends = [T] * B if lengths is None else [int(n) for n in lengths]
    require(len(ends) == B and all(1 <= n <= T for n in ends),
            f"lengths={ends} must be {B} numbers in 1..{T}")
    rows = torch.arange(B, device=idx.device)[:, None]
    history = torch.full((B, T + max_new_tokens), -1, device=idx.device)
    history[:, :T] = idx.masked_fill(torch.arange(T, device=idx.device) >= column(ends, idx.device), -1)
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=idx.device)
    seen.scatter_(1, history[:, :T] % (V + 1), True)       # -1, an empty column, is counted in the last place
    cache = Cache(model, B, min(block, T + max_new_tokens))
    firsts, cached = [0] * B, False                        # each row's window begins at firsts[row]
    for _ in range(max_new_tokens):
        for row, (first, end) in enumerate(zip(firsts, ends)):
            if end - first > block:
                firsts[row], cached = end - keep, False
        states = read(model, cache, history, firsts, ends, cached)
        cached = True
        token = sampler(model.head(states), seen[:, :V])
        history[rows, column(ends, idx.device)] = token
        seen.scatter_(1, token, True)
        ends = [end + 1 for end in ends]
        yield token


def read(model, cache, history, firsts, ends, cached):
    """States (B, C) of the last tokens of history's windows firsts .. ends; all but these may be cached."""
    sizes = [end - first for first, end in zip(firsts, ends)]
    alike, device = len(set(sizes)) == 1, history.device
    window = history
    if any(firsts):
        columns = column(firsts, device) + torch.arange(max(sizes), device=device)
        window = history.gather(1, columns.clamp(max=history.size(1) - 1))
    if cached:
        start = sizes[0] - 1 if alike else column(sizes, device)[:, 0] - 1
        last = window[:, start:start + 1] if alike else window.gather(1, start[:, None])
        return model.trunk(last, CachedContext(cache, start, 1, window))[:, 0]
    T = max(sizes)
    ctx = CachedContext(cache, 0, T, window, T if alike else column(sizes, device)[:, 0])
    states = model.trunk(window[:, :T].clamp(min=0), ctx)
    return states[:, -1] if alike else take_tokens(states, column(sizes, device) - 1)[:, 0]


class Speculation:
    """Self-speculation: the layers below the first exit draft tokens one by one, the layers above read all of
    them at once. What is accepted is distributed as if every layer had drawn it, one token after the other;
    greedy, it is the same tokens (LayerSkip, 2404.16710; the rule: 2211.17192).

    drafts: tokens that are guessed at a time. depth: the exit that guesses; None: the first. proposed,
    accepted: what became of them so far; rounds: how often all layers were asked.
    """

    def __init__(self, model, drafts, depth=None):
        require(drafts >= 1, f"speculate={drafts} must be at least 1 drafted token")
        require(model.config.exits, f"speculate={drafts} needs a model with early exits, which draft: train "
                f"one with --exits={max(1, model.config.n_layer // 2)}, for example")
        exits = model.config.exit_layers()
        depth = exits[0] if depth is None else depth
        require(depth in exits, f"depth={depth} must be an exit of the model: {model.config.exits}")
        self.model, self.drafts = model, drafts
        self.lower, self.upper = model.transformer.h[:depth], model.transformer.h[depth:]
        self.proposed = self.accepted = self.rounds = 0

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, sampler, overflow="exact"):
        """As decoding.stream, for one row; past block_size it goes on without drafts."""
        require(len(idx) == 1, f"speculation decodes one row at a time, there are {len(idx)}")
        require(idx.size(1) > 0, "the prompt is empty: give at least one token, for example a newline")
        end, last = idx.size(1), idx.size(1) + max_new_tokens
        room = min(last, self.model.config.block_size)
        cache = Cache(self.model, 1, max(1, room))
        drafts = min([self.drafts, *(kept.size(3) for kept in cache.rings())])
        history = F.pad(idx, (0, max_new_tokens), value=-1)
        seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=idx.device)
        seen.scatter_(1, idx, True)
        if 1 < end <= room:
            self.model.trunk(idx[:, :-1], CachedContext(cache, 0, end - 1, history))
        while end < last and end <= room:
            count = min(drafts, last - end, room - end + 1)
            places = Places(cache, end - 1, count)
            states, chances = self.draft(cache, history, end, count, sampler, seen)
            tokens = self.verify(cache, history, end, states, chances, sampler, seen)
            places.restore(len(tokens))
            for token in tokens:
                history[:, end] = token
                end += 1
                yield token.view(1, 1)
        yield from stream(self.model, history[:, :end], last - end, sampler, overflow=overflow)

    def draft(self, cache, history, end, count, sampler, seen):
        """Write `count` guesses behind the tokens 0 .. end - 1 -> the states that made them (1, count, C),
        and the distributions that they were drawn from."""
        states, chances, seen = [], [], seen.clone()
        for at in range(end - 1, end - 1 + count):
            ctx = CachedContext(cache, at, 1, history)
            x = self.model.embed(history[:, at:at + 1], ctx)
            for block in self.lower:
                x = block(x, ctx)
            states.append(x)
            chances.append(sampler.probabilities(self.model.speak(x)[:, 0], seen))
            history[:, at + 1] = token = draw(chances[-1])
            seen.scatter_(1, token[:, None], True)
        return torch.cat(states, dim=1), chances

    def verify(self, cache, history, end, x, chances, sampler, seen):
        """The tokens, one or more, that all layers let stand or put in a guess's place; noted in `seen`."""
        ctx = CachedContext(cache, end - 1, x.size(1), history)
        self.model.transformer.wpe.note(ctx)
        for block in self.upper:
            x = block(x, ctx)
        logits, tokens = self.model.speak(x), []
        self.rounds, self.proposed = self.rounds + 1, self.proposed + len(chances)
        for i, guessed in enumerate(chances):
            wanted, guess = sampler.probabilities(logits[:, i], seen), history[0, end + i]
            stands = torch.rand((), device=x.device) * guessed[0, guess] < wanted[0, guess]
            tokens.append(guess.clone() if stands else draw(beyond(wanted, guessed))[0])
            seen[:, tokens[-1]] = True
            self.accepted += int(stands)
            if not stands:
                break
        return tokens


def beyond(wanted, guessed):
    """Where the wanted chances exceed the guessed ones; rounding may leave nothing else than `wanted`."""
    return (wanted - guessed).clamp(min=0) + 1e-9 * wanted


def draw(chances):
    """Chances (1, V), their sum need not be 1 -> one id (1,)."""
    return torch.multinomial(chances, num_samples=1)[:, 0]


class Places:
    """What the rings of a cache hold where `count` columns from `start` on will be written, to be put back
    for those that turn out not to be."""

    def __init__(self, cache, start, count):
        self.old = []
        for kept in cache.rings():
            places = torch.arange(start, start + count, device=kept.device) % kept.size(3)
            self.old.append((kept, places, kept[:, :, :, places]))

    def restore(self, written):
        """All but the first `written` columns."""
        for kept, places, old in self.old:
            kept[:, :, :, places[written:]] = old[:, :, :, written:]


def column(numbers, device):
    """(B, 1) int64."""
    return torch.tensor(numbers, device=device)[:, None]


def join(idx, new, lengths):
    """Prompts (B, T), their new tokens (B, N) -> (B, T + N), new tokens right behind each row's prompt."""
    if lengths is None:
        return torch.cat((idx, new), dim=1)
    out = torch.zeros(len(idx), idx.size(1) + new.size(1), dtype=idx.dtype, device=idx.device)
    for row, n in enumerate(int(n) for n in lengths):
        out[row, :n + new.size(1)] = torch.cat((idx[row, :n], new[row]))
    return out
