"""Generation: prompts of different lengths in one batch, the sampling filters, self-speculation."""
import contextlib
import math
from functools import partial
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import sparse_kernels as kernels
from configurator import ConfigError, require
from decode import card, engine
from decode import draws as counted
from decode.context import Cache, CachedContext, take_tokens
from decode.quantized import is_quantized

COLDEST = 1e-6                                   # a colder temperature divides logits beyond fp32
STRONGEST = 1000.0                               # the largest repetition penalty, and one over the smallest


class Damaged(ConfigError):
    """A model whose logits are not numbers."""


def check_sampling(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0, draws="torch"):
    """ConfigError unless a Sampler can draw with these."""
    require(draws in ("engine", "torch"), f"draws='{draws}' must be engine or torch")
    require(temperature == 0 or COLDEST <= temperature < math.inf,
            f"temperature={temperature} must be 0 (greedy) or a number from {COLDEST} on: type 0, or 0.8 for "
            "example")
    require(top_k is None or (hasattr(top_k, "__index__") and top_k >= 0),
            f"top_k={top_k} must be a whole number, 0 (off) or more")
    require(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    require(0 <= min_p <= 1, f"min_p={min_p} must be in [0, 1]")
    require(1 / STRONGEST <= repetition_penalty <= STRONGEST,
            f"repetition_penalty={repetition_penalty} must be in {1 / STRONGEST}..{STRONGEST:.0f}; 1.0 is "
            "off")


class Sampler:
    """Chooses the next token of every row. Filters apply in this order:

    repetition_penalty: logits of tokens already in the row are divided by it where positive, multiplied where
    negative (CTRL, 1909.05858), before temperature; temperature: 0 is greedy; top_k: the k largest; top_p:
    the smallest set whose probability reaches top_p (1904.09751); min_p: at least min_p times the largest
    probability (2407.01082).
    vocab_size: ids from there on are never chosen (a padded vocabulary has rows that mean nothing).
    draws: torch draws as nanoGPT does, from torch's generator; engine by a counter (decode/draws.py), which
    costs the decode engine little.
    """

    at = None                                    # (key, columns) of what is drawn next: a stream says it

    def __init__(self, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                 vocab_size=None, draws="torch"):
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, draws)
        require(vocab_size is None or vocab_size >= 1, f"vocab_size={vocab_size} must be at least 1 id")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty, self.vocab_size, self.draws = repetition_penalty, vocab_size, draws

    def wants(self):
        """How many of the largest logits decide what is drawn; None: all of them may."""
        return None if self.repetition_penalty != 1.0 else 1 if self.greedy else self.top_k

    @property
    def looks_back(self):
        """Does it ask which ids are in the row?"""
        return self.repetition_penalty != 1.0 or type(self) is not Sampler

    @property
    def in_engine(self):
        """Does the decode engine choose the next ids itself?"""
        return (self.greedy or self.draws == "engine") and type(self) is Sampler

    @property
    def draws_in_engine(self):
        """Is that more than the largest logit's id?"""
        return self.in_engine and not (self.greedy and self.repetition_penalty == 1.0)

    @property
    def greedy(self):
        """Is the largest logit chosen, whatever is drawn? A draw from 50,000 ids costs a millisecond."""
        return self.temperature == 0 or self.top_k == 1

    def __call__(self, logits, seen):
        """logits (B, V) fp32, seen (B, V) bool: ids already in the row -> next ids (B, 1). Damaged where some
        row's largest logit is not finite."""
        if self.greedy:
            return finite(self.penalised(logits, seen)).argmax(-1, keepdim=True)
        if self.draws == "engine":
            (key, columns), self.at = self.at or (counted.new_key(), [0] * len(logits)), None
            ids = counted.draw(self, key, columns, logits, seen)
            return damaged() if ids is None else ids
        return torch.multinomial(self.probabilities(logits, seen), num_samples=1)

    def probabilities(self, logits, seen):
        """The distribution (B, V) that the next ids are drawn from."""
        logits = self.penalised(logits, seen)
        if self.greedy:
            return F.one_hot(finite(logits).argmax(-1), logits.size(-1)).float()
        return self.filtered(finite(logits / self.temperature)).softmax(-1)

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
            ordered, order = logits.softmax(-1).sort(descending=True, stable=True)      # of equals the first
            beyond = ordered.cumsum(-1) - ordered >= self.top_p          # the token that reaches top_p stays
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        if self.min_p > 0:
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities < self.min_p * probabilities.amax(-1, keepdim=True),
                                        -torch.inf)
        return logits


def finite(logits):
    """Logits (B, V) as they are; Damaged where a row's largest is NaN or infinite. Others may be -inf."""
    return logits if logits.amax(-1).isfinite().all() else damaged()


def damaged():
    raise Damaged("the model's logits are not finite: its weights are damaged, or its training has diverged; "
                  "take another checkpoint")


@torch.inference_mode()
def stream(model, idx, max_new_tokens, sampler, lengths=None, overflow="exact", choices=None):
    """Yield the next token ids (B, 1), max_new_tokens times.

    overflow decides what happens to a row past block_size. "exact": nanoGPT's meaning, every token sees the
    last block_size tokens at positions 0..block_size-1, so the window is recomputed for each one. "slide":
    keep the last half of the window and go on with the cache, one recomputation every block_size/2 tokens:
    cheap, not identical. choices: see context.Choices; None: the model's, as they are when it begins.
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
    cache = Cache(model, B, min(block, T + max_new_tokens), choices)
    ids, made = min(V, sampler.vocab_size or V), 0
    key = counted.new_key() if getattr(sampler, "draws", "torch") == "engine" else None
    looks_back = getattr(sampler, "looks_back", True)
    how = counted.settings(sampler, key or 0, seen) if getattr(sampler, "in_engine", False) else None
    step = recorded_step(model, cache, history, ids, *((how and (how, seen)) or ()))
    program = engine.program_of(model, cache, ids, sampler.wants(), idx.device,
                                how if getattr(sampler, "draws_in_engine", False) else None)
    firsts, cached = [0] * B, False                        # each row's window begins at firsts[row]
    while made < max_new_tokens:
        for row, (first, end) in enumerate(zip(firsts, ends)):
            if end - first > block:
                firsts[row], cached = end - keep, False
        if program and cached:
            steps = min(max_new_tokens - made, *(first + block - end + 1 for first, end in zip(firsts, ends)))
            yield from run(program, history, firsts, ends, steps, sampler, seen, key)
            ends, made = [end + steps for end in ends], made + steps
            continue
        replayed = step and cached and not any(firsts)
        if replayed and step.draws:
            steps = min(max_new_tokens - made, BEHIND, *(block - end + 1 for end in ends))
            yield from step.advance(ends, steps).split(1, dim=1)
            ends, made = [end + steps for end in ends], made + steps
            continue
        states = step(ends) if replayed else read(model, cache, history, firsts, ends, cached)
        logits = (states if replayed and step.card
                  else model.head(states)[:, :ids])
        cached, made = True, made + 1
        if key is not None:
            sampler.at = key, ends
        token = sampler(logits, seen[:, :ids])
        history[rows, column(ends, idx.device)] = token
        if looks_back:
            seen.scatter_(1, token, True)
        ends = [end + 1 for end in ends]
        yield token


def run(program, history, firsts, ends, steps, sampler, seen, key=None):
    """Yield the next `steps` ids (B, 1) by the decode engine, see stream; no row's window overflows."""
    program.begin(history, firsts, ends)
    at, alike, first = torch.tensor(ends)[:, None], len(set(ends)) == 1, ends[0]
    if getattr(sampler, "in_engine", False):
        new = history[:, first:first + steps].split(1, dim=1)          # views: an id shows once it is written
        for made in range(steps):
            program.advance() or damaged()
            yield new[made] if alike else history.gather(1, at + made)
        return
    rows, looks_back = torch.arange(len(ends))[:, None], getattr(sampler, "looks_back", True)
    for made in range(steps):
        logits = program.step().clone()
        if key is not None:
            sampler.at = key, [end + made for end in ends]
        token = sampler(logits, seen[:, :program.ids])
        history[rows, at + made] = token
        if looks_back:
            seen.scatter_(1, token, True)
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


HOST_DECIDES = ("hierarchy", "exits", "ponder", "experts")     # flags whose forward depends on the host


BEHIND = 8                                       # ids that a card draws before the host reads them


def recorded_step(model, cache, history, ids, *draws):
    """The Step that a GPU records and replays; None elsewhere, and where the host decides what forward runs
    and no card's kernels do."""
    step = Step(model, cache, history, ids, *draws) if history.is_cuda else None
    waits = any(getattr(model.config, flag) for flag in HOST_DECIDES)
    return step if step and (step.card or not waits) else None


def gathers(model, rows, device):
    """Does a step of so many rows on this device read chosen rows of weights alone? Where a weight is not
    finite, rows that stay unread would not show it."""
    return (device.type == "cuda" and kernels.triton_kernels() is not None and rows <= kernels.FEW
            and not is_quantized(model)
            and all(module.sound() for module in model.modules() if hasattr(module, "sound")))


class Step:
    """One decode step of a whole batch as a function of tensors alone, each row at its own column: a GPU
    records it as a CUDA graph and replays it without the host. A cache of fixed size serves: keys of columns
    that are not written yet are masked. card: the step as a few Triton kernels, which leave logits, or why
    the model's own forward makes it, which leaves states (decode/card.py). draws: does the card draw the next
    ids?"""
    EAGER = 3                                    # steps that warm kernels up before one is recorded

    def __init__(self, model, cache, history, ids, *draws):
        """draws: see card.Card."""
        self.model, self.cache, self.history = model, cache, history
        self.start = torch.zeros(len(history), dtype=torch.long, device=history.device)
        self.card = card.card_of(model, cache, history, self.start, ids, *draws)
        self.draws = bool(self.card and draws)
        self.gathers = gathers(model, len(history), history.device)
        self.run, self.calls = self.card.step if self.card else self.states, 0

    def __call__(self, ends):
        """Of the tokens at columns ends - 1 of history: logits (B, ids) if the card makes them, else states
        (B, C)."""
        self.start.copy_(torch.tensor(ends) - 1)
        answer = self.replay()
        if self.card and self.card.counters:
            self.card.tell()
        return answer

    def advance(self, ends, steps):
        """So many steps, the first of the tokens at columns ends - 1, each of the ids that the one before has
        drawn: the host launches them all and waits once -> the ids, (B, steps). Damaged where a row's largest
        logit was not finite."""
        self.start.copy_(torch.tensor(ends) - 1)
        for _ in range(steps):
            self.replay()
        self.card.fine.item() or damaged()
        self.card.tell()
        columns = column(ends, self.start.device) + torch.arange(steps, device=self.start.device)
        return self.history.gather(1, columns)

    def replay(self):
        if not self.calls and self.card:
            self.card.begin()
        self.calls += 1
        if self.calls == self.EAGER and self.start.is_cuda:
            self.record()
        return self.run()

    def states(self):
        ids = self.history.gather(1, self.start[:, None])
        with kernels.step_of_card() if self.gathers else contextlib.nullcontext():
            return self.model.trunk(ids, CachedContext(self.cache, self.start, 1, self.history))[:, 0]

    def record(self):
        graph, run = torch.cuda.CUDAGraph(), self.run
        with torch.cuda.graph(graph):
            made = run()
        self.run = lambda: (graph.replay(), made)[1]


class Speculation:
    """Self-speculation: the layers below the first exit draft tokens one by one (on a CPU as a program of
    their own), the layers above read all of them at once. What is accepted is distributed as if every layer
    had drawn it, one token after the other; greedy, it is the same tokens (LayerSkip, 2404.16710; the rule:
    2211.17192).

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
        all_layers = self.model.chosen(1)._replace(leave_at=None)
        cache = Cache(self.model, 1, max(1, room), all_layers)
        lower = SimpleNamespace(config=self.model.config, emit=partial(self.model.emit, blocks=self.lower))
        program = engine.program_of(lower, cache, self.model.config.vocab_size, None, idx.device)
        drafts = min([self.drafts, *(kept.size(3) for kept in cache.rings())])
        history = F.pad(idx, (0, max_new_tokens), value=-1)
        seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=idx.device)
        seen.scatter_(1, idx, True)
        if 1 < end <= room:
            self.model.trunk(idx[:, :-1], CachedContext(cache, 0, end - 1, history))
        while end < last and end <= room:
            count = min(drafts, last - end, room - end + 1)
            places = Places(cache, end - 1, count)
            states, chances = self.draft(program, cache, history, end, count, sampler, seen)
            tokens = self.verify(cache, history, end, states, chances, sampler, seen)
            places.restore(len(tokens))
            for token in tokens:
                history[:, end] = token
                end += 1
                yield token.view(1, 1)
        yield from stream(self.model, history[:, :end], last - end, sampler, None, overflow, all_layers)

    def guess(self, program, cache, history, at):
        """What the lower layers make of the token at a column, by their program or, where none is written, by
        forward -> its state (1, 1, C) and its logits (1, V)."""
        if program:
            program.begin(history, [0], [at + 1])
            logits, like = program.step(), cache.layers[0]
            x = program.found(program.states)[:, None, :self.model.config.n_embd]
            return x.to(like.dtype, copy=True), logits
        ctx = CachedContext(cache, at, 1, history)
        x = self.model.embed(history[:, at:at + 1], ctx)
        for block in self.lower:
            x = block(x, ctx)
        return x, self.model.logits_of(x)[:, 0]

    def draft(self, program, cache, history, end, count, sampler, seen):
        """Write `count` guesses behind the tokens 0 .. end - 1 -> the states that made them (1, count, C),
        and the distributions that they were drawn from."""
        states, chances, seen = [], [], seen.clone()
        for at in range(end - 1, end - 1 + count):
            x, logits = self.guess(program, cache, history, at)
            states.append(x)
            chances.append(sampler.probabilities(logits, seen))
            history[:, at + 1] = token = draw(chances[-1])
            seen.scatter_(1, token[:, None], True)
        return torch.cat(states, dim=1), chances

    def verify(self, cache, history, end, x, chances, sampler, seen):
        """The tokens, one or more, that all layers let stand or put in a guess's place; noted in `seen`."""
        ctx = CachedContext(cache, end - 1, x.size(1), history)
        self.model.transformer.wpe.note(ctx)
        for block in self.upper:
            x = block(x, ctx)
        logits, tokens = self.model.logits_of(x), []
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
