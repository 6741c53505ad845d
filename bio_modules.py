"""Brain-inspired blocks: one class each, chosen by a flag of GPTConfig through the slot dicts here and in
model.py.

An MLP is c_fc, an activation (ACTS), a selector that may silence units (SELECTORS), c_proj. `rows` names the
units of each token where they are not all: those of its expert.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

import sparse_kernels as kernels
from configurator import require
from decode import engine
from decode.context import Thoughts, readable
from decode.engine import NotWritten
from decode.quantized import QuantizedByUnit, dense_weight
from kernels.passes import column_gates
from layers import (
    EPS,
    GELU,
    Attention,
    Linear,
    NeuronMajor,
    Packed,
    ReLU2,
    TanhGELU,
    Winners,
    as_is,
    belong,
    cast,
    cross_entropy,
    drop_rows,
    dropout,
    linear,
    plus,
    residual_std,
    rms,
    rotate,
)
from training import energy, retrofit

EVERY = slice(None)

# ------------------------------------------------------------------------------------------------------------
# activations


class Oscillating(nn.Module):
    """An activation whose units oscillate: sin(w*x + phi) * tanh(x) + b, with w, phi and b learned per unit.

    (..., units) -> (..., units). w and phi begin as BEGIN says, b = 0; vectors, so no weight decay.
    One such neuron can separate XOR (2108.12943; so can one GELU, tests/model/test_switches.py shows both).
    """
    name = "osc"
    BEGIN = {"w": (1.0, 0.1), "phi": (0.0, 0.1)}              # mean and deviation of the normal distribution

    def __init__(self, units):
        super().__init__()
        self.w, self.phi, self.b = (nn.Parameter(torch.empty(units)) for _ in range(3))

    def init_weights(self, normal_):
        for name, (mean, deviation) in self.BEGIN.items():
            normal_(getattr(self, name), deviation)
            getattr(self, name).add_(mean)
        nn.init.zeros_(self.b)

    def forward(self, x, rows=EVERY):
        return kernels.osc(x, *(p[rows] for p in (self.w, self.phi, self.b)))


ACTS = {"gelu": lambda units: GELU(), "relu2": lambda units: ReLU2(), "osc": Oscillating,
        "gelu_tanh": lambda units: TanhGELU()}

# ------------------------------------------------------------------------------------------------------------
# selectors: (..., units) -> the same with the losers at exactly zero; act: the activation before it, none or
# relu2, which a kernel computes in the same pass


class Narrowing(nn.Module):
    """Something of which `goal` of `total` parts are active, self.k in this mode.

    In training k may fall from all of them to the goal (GPT.anneal): parts that never win get no gradient,
    and a gentle start leaves fewer of them (k-winners with a schedule: 1903.11257).
    """

    def __init__(self, total, goal):
        super().__init__()
        self.total, self.goal, self.progress = total, goal, 1.0
        self.train(self.training)

    def anneal(self, progress):
        """progress in [0, 1], taken in six steps so that a compiled model is compiled at most six times."""
        self.progress = int(5 * progress) / 5
        self.train(self.training)

    def train(self, mode=True):
        self.k = round(self.total - (self.total - self.goal) * self.progress) if mode else self.goal
        return super().train(mode)


class TopK(Narrowing):
    """Of each token's units the share mlp_topk with the largest |a| keep firing (1312.5663); no rescaling."""
    squares = True                               # its pass takes squared ReLU in

    @staticmethod
    def check(c):
        require(0 < c.mlp_topk <= 1,
                f"mlp_topk={c.mlp_topk} must be in (0, 1]: the share of units left firing")

    def __init__(self, config, units):
        super().__init__(units, max(1, round(config.mlp_topk * units)))

    def forward(self, a, ctx, rows=EVERY, act="none"):
        return kernels.keep_largest(a, min(self.k, a.size(-1)), act)

    def emit(self, p, a, size, units=None):
        return p.largest(a, size, min(self.k, size))


class GroupWinners(nn.Module):
    """Lateral inhibition in small columns: of every mlp_topk_group neighbours the share mlp_topk with the
    largest |a| fire. 4 and 0.5 make 2:4 activations (2408.14690 for the general idea)."""
    squares = True                               # its pass takes squared ReLU in

    @staticmethod
    def check(c):
        g, winners = c.mlp_topk_group, c.mlp_topk * c.mlp_topk_group
        require(g >= 0 and (not g or c.mlp_topk < 1),
                f"mlp_topk_group={g} needs mlp_topk below 1: type --mlp_topk=0.5")
        units = (c.experts * c.expert_width or c.units()) // (c.columns or c.experts or 1)
        whole = 1 <= round(winners) < g and abs(winners - round(winners)) < 1e-6
        require(not g or (whole and units % g == 0),
                f"mlp_topk_group={g} with mlp_topk={c.mlp_topk}: the group must divide the {units} units and "
                "hold a whole number of winners, for example --mlp_topk_group=4 --mlp_topk=0.5")

    def __init__(self, config, units):
        super().__init__()
        self.group = config.mlp_topk_group
        self.k = round(config.mlp_topk * self.group)

    def forward(self, a, ctx, rows=EVERY, act="none"):
        return kernels.group_winners(a, self.group, self.k, act)

    def emit(self, p, a, size, units=None):
        return p.group_winners(a, size, self.group, self.k)


def fours(select):
    """Does a selector leave two of every four units?"""
    return isinstance(select, GroupWinners) and (select.group, select.k) == (4, 2)


class EventGate(nn.Module):
    """A unit fires only when |a| exceeds its own learned threshold: a * 1[|a| > theta].

    Thresholds learn through a kernel around theta (the JumpReLU estimator, 2407.14435; straight-through:
    1308.3432), here in log space, so that it fits any scale of a, and with tails: a rectangle leaves gates
    that start far too open or too shut without a gradient for ever. The loss holds event_cost times how far
    the share of open gates is from event_rate.
    """
    squares = True
    GAIN = 10.0                                  # Adam moves a parameter p by its rate: log theta = GAIN * p

    @staticmethod
    def check(c):
        belong(c, "event_gate", "event_rate", "event_cost")
        winners = f"mlp_predict={c.mlp_predict}" if c.mlp_predict else f"mlp_topk={c.mlp_topk}"
        require(not (c.event_gate and (c.mlp_topk < 1 or c.mlp_predict)),
                f"event_gate=True and {winners} both choose which units fire: leave one of them out")
        require(0 < c.event_rate < 1 and c.event_cost >= 0,
                f"event_rate={c.event_rate} must be in (0, 1) and event_cost={c.event_cost} not negative")

    def __init__(self, config, units):
        super().__init__()
        self.target = energy.target(config, config.event_rate, config.event_cost, macs=config.n_embd)
        self.rate = config.event_rate
        self.threshold = nn.Parameter(torch.empty(units))

    def init_weights(self, normal_):
        normal_(self.threshold, 0.02)
        self.threshold.sub_(0.4)                 # theta about 0.02

    def start_from(self, a):
        """One threshold, which leaves the share event_rate of all activations a (n, units) open: the largest.
        Where fewer are not zero, all of those stay open. Equal shares of each unit would cost many times the
        loss."""
        sizes = a.abs().flatten()
        edge = sizes.kthvalue(max(1, round((1 - self.rate) * len(sizes)))).values
        least = 0.01 * sizes.sum() / (sizes > 0).sum().clamp(min=1)
        self.threshold.fill_(max(edge.item(), least.item(), 1e-6)).log_().div_(self.GAIN)

    def forward(self, a, ctx, rows=EVERY, act="none"):
        kept, count = kernels.event(a, self.GAIN * self.threshold[rows], act)
        share = count / a.size(-1)
        self.target(ctx, share, share, each=a.size(-1))
        return kept

    def emit(self, p, a, size, units=None):
        return p.event(a, size, (self.GAIN * self.threshold.float()).exp(), units)


SELECTORS = {"mlp_topk_group": GroupWinners, "event_gate": EventGate, "mlp_topk": TopK}


def selector(config, units):
    """The selector that the config's flags ask for: the first of SELECTORS that is on."""
    on = (config.mlp_topk_group, config.event_gate, config.mlp_topk < 1)
    return next((make(config, units) for make, wanted in zip(SELECTORS.values(), on) if wanted), as_is)


# ------------------------------------------------------------------------------------------------------------
# MLPs


class MLP(nn.Module):
    """Two projections with an activation between them, four times as wide as the stream.

    Where an activation or a selector leaves exact zeros, W_down is stored by unit and a decode step reads the
    rows of the live units alone.
    """

    @staticmethod
    def check(c):
        kinds = [f"{flag}={getattr(c, flag)}" for flag in MLPS if getattr(c, flag)]
        kinds += ["act='swiglu'"] * (c.act == "swiglu" and not c.mlp_screen)
        require(len(kinds) <= 1, f"{' and '.join(kinds[:2])} are different MLPs: choose one of them")
        require(c.mlp_units >= 0, f"mlp_units={c.mlp_units} must not be negative; 0 is four times n_embd")

    def __init__(self, config, layer, units=None):
        super().__init__()
        units = units or config.units()
        up = Linear if self.gathers else linear(config)
        self.c_fc = up(config.n_embd, units, config.bias)
        self.act = ACTS[config.act](units)
        self.select = selector(config, units)
        by_unit = config.act == "relu2" or self.select is not as_is or self.gathers
        down = (NeuronMajor if by_unit else linear(config)) if not fours(self.select) else Winners
        self.c_proj = down(units, config.n_embd, config.bias, std=residual_std(config))
        self.dropout = dropout(config)
        simple = isinstance(self.select, TopK) or self.select is as_is
        self.plain = config.act if simple and config.act in kernels.ACTS else None
        self.at_once = config.act == "relu2" and getattr(self.select, "squares", False)

    gathers = False                              # does a decode step choose units before it computes them?

    def forward(self, x, ctx):
        """A GPU's step may depend on nothing that the host would have to know."""
        return (self.on_card if kernels.in_step else self.many)(x, ctx)

    def on_card(self, x, ctx):
        return self.many(x, ctx)

    def sound(self):
        """Are the weights finite that a step may leave unread?"""
        return not isinstance(self.c_proj, (NeuronMajor, QuantizedByUnit)) or self.c_proj.sound()

    def many(self, x, ctx):
        return self.dropout(self.c_proj(self.fire(self.c_fc(x), ctx)))

    def fire(self, v, ctx):
        """The activation of v and what the selector leaves of it: one pass where both are written so."""
        return self.select(v, ctx, act="relu2") if self.at_once else self.select(self.act(v), ctx)

    def activations(self, x):
        """What the units are before a selector, (n, C) -> (n, units)."""
        return self.act(self.c_fc(x))

    def start_from_dense(self, dense, x):
        """Begin as the MLP `dense`, whose inputs are x (n, C)."""
        if dense.c_proj.weight.shape != self.c_proj.weight.shape:
            count, units = self.c_proj.in_features, dense.c_proj.in_features
            order = dense.strongest(x, count).sort().values
            self.take_units(dense, F.pad(order, (0, max(0, count - units)), value=-1))
        start_selector(self.select, self.activations(x))

    def strongest(self, x, count):
        """The numbers of the `count` units that write most into the stream, given inputs x (n, C)."""
        writes = self.activations(x).square().mean(0) * self.c_proj.weight.square().sum(0)
        return writes.topk(min(count, len(writes))).indices

    def take_units(self, dense, order):
        """Unit i becomes unit order[i] of `dense`, or where that is -1 a new one, which writes nothing."""
        taken, old = order >= 0, order.clamp(min=0)
        for part in ("c_fc", "act"):
            theirs = dict(getattr(dense, part).named_parameters())
            for name, p in getattr(self, part).named_parameters():
                p[taken] = theirs[name][old][taken] if name in theirs else p[taken]
        self.c_proj.weight.copy_(dense.c_proj.weight[:, old] * taken)

    def emit(self, p, x, onto):
        """Append the MLP of x to a decode program -> `onto`, to which it is added."""
        a = self.c_fc.emit(p, x, **self.activation(p))
        return self.c_proj.emit(p, self.emit_select(p, a, self.c_proj.in_features), onto=onto)

    def activation(self, p):
        """Which activation a product ends with, for Program.linear."""
        name = "none" if isinstance(self.act, nn.Identity) else getattr(self.act, "name", "")
        if name not in engine.ACTS:
            raise NotWritten(f"the activation {type(self.act).__name__}")
        params = [p.vector(t) for t in (self.act.w, self.act.phi, self.act.b)] if name == "osc" else ()
        return dict(act=name, params=params)

    def emit_select(self, p, a, size, units=None):
        """Append the selector."""
        return a if self.select is as_is else engine.ops_of(self.select)(p, a, size, units)

    def emit_units(self, p, x, onto, units):
        """Append the MLP of x through Listed units alone."""
        if not self.sound():
            raise NotWritten("weights that are not finite")
        up, down = self.c_fc.emit_matrix(p), self.c_proj.emit_matrix(p)
        if units.apart:                          # products of groups read whole numbers as weights
            up, down = (p.matrix(*of) for of in ((self.c_fc.weight, self.c_fc.bias),
                                                 (self.c_proj.weight.t(), self.c_proj.bias)))
        a = p.linear(x, up, units=units, stored=units.apart > 0, **self.activation(p))
        return p.rows_sum(self.emit_select(p, a, units.size, units), down, onto, units)

    def fuse(self):
        """Packed weights end with the activation, where a kernel knows it."""
        if isinstance(self.c_fc, Packed) and self.plain:
            self.c_fc.act, self.act, self.at_once = self.plain, nn.Identity(), False

    def chosen_groups(self, x, ctx, groups, scale, width):
        """Tokens (B, 1, C) through their own groups (B, k) of `width` units, scaled by (B, k) or not at all,
        by kernels that ask the host nothing."""
        if not self.plain:
            return self.many(x, ctx)
        up, up_bias, down, down_bias = (cast(w, x.dtype) for w in (
            self.c_fc.weight, self.c_fc.bias, self.c_proj.weight.t(), self.c_proj.bias))
        for weight in (up, down):
            kernels.note_rows(groups.numel() * width, weight)
        a = kernels.gathered_up(x.flatten(0, 1), up, up_bias, groups, scale, width, self.plain)
        y = kernels.gathered_down(self.select(a, ctx), down, down_bias, groups, width)
        return self.dropout(y.view_as(x))


def start_selector(select, a):
    """Give a selector that has one its start from activations a (n, units)."""
    getattr(select, "start_from", as_is)(a)


class SwiGLU(nn.Module):
    """A gated MLP with a dense one's parameters: two thirds as many units, three matrices (2002.05202)."""
    by_unit = False                              # is W_down stored by unit, without a selector too?

    @staticmethod
    def check(c):
        require(not c.gate_first or c.act == "swiglu", f"gate_first=True chooses units by their gates, which "
                f"act='{c.act}' has none of: type --act=swiglu too, or leave gate_first out")
        require(not c.gate_first or c.mlp_topk < 1 or c.event_gate, "gate_first=True chooses no units by "
                "itself: type --mlp_topk=0.5 or --event_gate=True too, or leave gate_first out")

    def __init__(self, config, layer):
        super().__init__()
        hidden = config.units()
        self.c_fc = linear(config)(config.n_embd, 2 * hidden, config.bias)
        self.select = selector(config, hidden)
        down = NeuronMajor if self.by_unit or self.select is not as_is else linear(config)
        self.c_proj = down(hidden, config.n_embd, config.bias, std=residual_std(config))
        self.dropout = dropout(config)

    def forward(self, x, ctx):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.select(F.silu(gate) * up, ctx)))

    def start_from_dense(self, dense, x):
        """See training/retrofit.py."""
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        start_selector(self.select, F.silu(gate) * up)

    def emit(self, p, x, onto):
        units = self.c_proj.in_features
        a = p.swiglu(self.c_fc.emit(p, x), units)
        return self.c_proj.emit(p, a if self.select is as_is else self.select.emit(p, a, units), onto=onto)

    def emit_gate(self, p, x, units=None):
        """Append silu of the gates of x, or of those of Listed units."""
        rows = slice(self.c_proj.in_features)
        return p.linear(x, self.c_fc.emit_matrix(p, rows), act="silu", units=units)

    def emit_chosen(self, p, x, onto, units):
        """Append the up projection of x for Listed units, times their factors, and what they write."""
        rows = slice(self.c_proj.in_features, None)
        a = p.linear(x, self.c_fc.emit_matrix(p, rows), units=units)
        return p.rows_sum(a, self.c_proj.emit_matrix(p), onto, units)


class GateFirst(SwiGLU):
    """A SwiGLU whose selector sees the gates alone: |silu(gate)| decides before the up projection which units
    count (CATS has a threshold for this, 2404.08763). A decode step reads W_gate whole, and of W_up and
    W_down the rows of those units."""

    def forward(self, x, ctx):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.select(F.silu(gate), ctx) * up))

    def start_from_dense(self, dense, x):
        start_selector(self.select, F.silu(self.c_fc(x).chunk(2, dim=-1)[0]))

    def emit(self, p, x, onto):
        if not (self.c_fc.sound() and self.c_proj.sound()):
            raise NotWritten("weights that are not finite")
        units = self.c_proj.in_features
        kept = engine.ops_of(self.select)(p, self.emit_gate(p, x), units)
        return self.emit_chosen(p, x, onto, p.firing(kept, units))


class ColumnGate(Narrowing):
    """Which columns answer a token: (..., C) -> (..., N) gates, zero for all but the winners.

    Column c gets r_c.x, less what the other active columns inhibit it by: s_c - sum_d S_cd relu(s_d), S >= 0
    with a zero diagonal (Carandini & Heeger 2012; local competition: Srivastava et al. 2013). The k largest
    win and answer with sigmoid(s). Their choice alone also sees a bias that the load moves: its gradient is
    the column's load above the mean, so an idle column's bias rises until it wins (2408.15664).
    """
    BALANCE = 0.01                               # leaves the gradient's norm alone; Adam sets the bias's pace

    def __init__(self, config):
        N = config.columns
        super().__init__(N, config.columns_active)
        self.router = Linear(config.n_embd, N, bias=False)
        self.inhibition = nn.Parameter(torch.empty(N * N))
        self.balance = nn.Parameter(torch.zeros(N))
        others = 1 - torch.eye(N, device="cpu")  # where tensors have no memory, eye imports torch's compiler
        self.register_buffer("others", others.to(torch.empty(0).device), persistent=False)

    def init_weights(self, normal_):
        nn.init.constant_(self.inhibition, -4.0)

    def level(self):
        """The gate of a column that wins, where a model starts from a dense one."""
        return 0.5

    def start_from(self, x, energies):
        """Scores from the groups' energies (n, N) for inputs x (n, C); zero, where all columns answer."""
        weight, offset = retrofit.small_router(x, energies, self.goal == self.total)
        self.router.weight.copy_(weight)
        self.balance.copy_(offset - offset.mean())

    def forward(self, x, ctx):
        s, S = self.scores(x)
        gates = column_gates(s, S, self.balance, self.k, x.dtype)
        ctx.add_loss(lambda: [ctx.total((gates > 0).float(), kept=1)], self.uneven)
        return gates

    def uneven(self, load):
        """Each column's share of the tokens (N,) -> a loss whose gradient moves the bias against it."""
        return self.BALANCE * (self.balance * (load - load.mean())).sum()

    def scores(self, x):
        """x (..., C) -> (..., N), and what the columns inhibit each other by, (N, N), in fp32."""
        s, S = self.router(x).float(), self.inhibits()
        kernels.note(s.numel() // self.total, S)
        return s, S

    def winners(self, x):
        """x (..., C) -> the columns that answer (..., k), and their gates in fp32."""
        s, S = self.scores(x)
        s = s - F.relu(s) @ S.t()
        winners = kernels.places_of_largest(s + self.balance, self.k)
        return winners, s.sigmoid().gather(-1, winners)

    def chosen(self, x):
        """The same of tokens (B, 1, C), (B, k) each, the gates in the tokens' dtype."""
        winners, scale = self.winners(x.flatten(0, 1))
        return winners, scale.to(x.dtype)

    def inhibits(self):
        """S (N, N) in fp32: what the activity of column d takes from column c."""
        return F.softplus(self.inhibition.float()).view_as(self.others) * self.others

    def emit(self, p, x, width):
        """Append the choice -> Listed units, `width` of each column that wins."""
        scores = self.router.emit(p, x, own=True)
        return p.columns(scores, self.total, self.k, width, self.inhibits(), self.balance)


class Gathered(MLP):
    """An MLP of equal groups of units of which a gate opens a few per token, before the up projection: a
    decode step reads those groups' rows of both projections and no others."""
    gathers = True

    @staticmethod
    def check_groups(c, flag):
        """The number of groups and of those that answer a token."""
        count, active, units = getattr(c, flag), getattr(c, flag + "_active"), c.units()
        require(count >= 0 and (not count or 1 <= active <= count),
                f"{flag}={count} needs {flag}_active in 1..{count}, it is {active}: type --{flag}_active=1, "
                "for example")
        require(not count or units % count == 0, f"{flag}={count} must divide the {units} units of the MLP "
                                                 f"(mlp_units, or 4 * n_embd={c.n_embd})")

    def __init__(self, config, layer, groups, width):
        super().__init__(config, layer, groups * width)
        self.groups, self.width = groups, width

    def start_from_dense(self, dense, x):
        """Units of the MLP `dense` that fire together become a group. The router learns by least squares
        where in x (n, C) a group's activations are large; its scores begin small, so that all gates are
        alike, and W_down makes up for them."""
        if not isinstance(dense, type(self)):
            a, order = dense.activations(x), dense.strongest(x, self.c_proj.in_features).sort().values
            groups = retrofit.clusters(a[:, order], self.groups, self.width)
            order = F.pad(order, (0, 1), value=-1)[groups.flatten()]
            self.take_units(dense, order)
            self.c_proj.weight.div_(self.gate.level())
            self.gate.start_from(x, self.energies(x))
        start_selector(self.select, self.activations(x) * self.gate.level())

    def energies(self, x):
        """The size of what each group writes for inputs x (n, C), (n, groups)."""
        writes = self.activations(x).square() * self.c_proj.weight.square().sum(0)
        return writes.unflatten(-1, (self.groups, -1)).sum(-1).sqrt()

    def on_card(self, x, ctx):
        return self.chosen_groups(x, ctx, *self.gate.chosen(x), self.width)


class Columns(Gathered):
    """Cortical columns: the hidden units in `columns` groups, of which columns_active answer each token. The
    training forward computes all of them and multiplies by the gates; only decoding saves."""

    @staticmethod
    def check(c):
        belong(c, "columns", "columns_active")
        Gathered.check_groups(c, "columns")

    def __init__(self, config, layer):
        super().__init__(config, layer, config.columns, config.units() // config.columns)
        self.gate = ColumnGate(config)
        self.relu2 = config.act == "relu2"       # the gates' pass computes it

    def emit(self, p, x, onto):
        return self.emit_units(p, x, onto, self.gate.emit(p, x, self.width))

    def many(self, x, ctx):
        v, act = (self.c_fc(x), "relu2") if self.relu2 else (self.act(self.c_fc(x)), "none")
        a = kernels.scaled(v.unflatten(-1, (self.groups, -1)), self.gate(x, ctx), act)
        return self.dropout(self.c_proj(self.select(a.flatten(-2), ctx)))


class ExpertGate(nn.Module):
    """Routing of tokens to experts: softmax, the k largest renormalised to sum 1 (1701.06538) -> (..., E).

    The loss holds a term that evens the load (2101.03961) and one that keeps the router's logits small
    (z-loss, 2202.08906).
    """
    BALANCE, Z = 0.01, 0.001

    def __init__(self, config):
        super().__init__()
        self.k = config.experts_active
        self.router = Linear(config.n_embd, config.experts, bias=False, hidden=False)

    def forward(self, x, ctx):
        logits = self.router(x).float()
        shares = logits.softmax(dim=-1)
        experts, shared = self.largest(shares)
        gates = torch.zeros_like(shares).scatter(-1, experts, shared)
        ctx.add_loss(lambda: [ctx.total((gates > 0).float(), kept=1), ctx.total(shares, kept=1),
                              ctx.total(logits.logsumexp(dim=-1).square())], self.uneven)
        return gates.to(x.dtype)

    def uneven(self, load, share, size):
        """The means of what experts are sent and of their probabilities (E,), and of the logits' size."""
        return self.BALANCE * imbalance(load[None], share[None]) / self.k + self.Z * size

    def level(self):
        """The gate of an expert that is chosen, where a model starts from a dense one."""
        return 1 / self.k

    def start_from(self, x, energies):
        """As ColumnGate's."""
        self.router.weight.copy_(retrofit.small_router(x, energies, self.k == self.router.out_features)[0])

    def largest(self, shares):
        experts = kernels.places_of_largest(shares, self.k)
        top = shares.gather(-1, experts)
        return experts, top / top.sum(-1, keepdim=True)

    def chosen(self, x):
        """Tokens (B, 1, C) -> their experts and what each counts, (B, k)."""
        experts, shared = self.largest(self.router(x.flatten(0, 1)).float().softmax(dim=-1))
        return experts, shared.to(x.dtype)

    def emit(self, p, x, width):
        """Append the choice -> Listed units, `width` of each expert."""
        return p.experts(self.router.emit(p, x, own=True), self.router.out_features, self.k, width)


def imbalance(sent, shares):
    """E * sum of (share of tokens sent to an expert) * (mean probability of that expert). sent: (..., E), 1
    where a token is sent; shares: (..., E)."""
    load, mean = (t.flatten(0, -2).mean(dim=0) for t in (sent, shares))
    return shares.size(-1) * (load * mean).sum()


class Experts(Gathered):
    """Routed experts: tokens are sorted by expert and each expert multiplies its own alone, in training too;
    no token is dropped. expert_width=0 splits a dense MLP's units (equal parameters)."""

    @staticmethod
    def check(c):
        belong(c, "experts", "experts_active", "expert_width")
        require(not (c.experts and c.mlp_topk < 1 and not c.mlp_topk_group),
                f"experts={c.experts} and mlp_topk={c.mlp_topk}: an expert sees its own units alone, so "
                "there is no top k of all; choose one of them, or winners in groups (mlp_topk_group)")
        Gathered.check_groups(c, "experts")
        require(c.expert_width >= 0,
                f"expert_width={c.expert_width} must not be negative; 0 splits the units")

    def __init__(self, config, layer):
        super().__init__(config, layer, config.experts,
                         config.expert_width or config.units() // config.experts)
        self.gate = ExpertGate(config)

    def emit(self, p, x, onto):
        return self.emit_units(p, x, onto, self.gate.emit(p, x, self.width))

    def many(self, x, ctx):
        gates, k = self.gate(x, ctx).flatten(0, -2), self.gate.k
        chosen = kernels.places_of_largest(gates, k).flatten()
        for weight in (self.c_fc.weight, self.c_proj.weight):
            kernels.note(len(chosen), weight, parts=self.groups)
        if x.is_meta:                            # where the product of groups knows the shapes of bf16 alone
            return x
        order = chosen.argsort(stable=True)                      # (tokens * k,), grouped by expert
        token, expert = order // k, chosen[order]
        ends = F.one_hot(chosen, self.groups).sum(dim=0).cumsum(dim=0).int()
        rows = expert[:, None] * self.width + torch.arange(self.width, device=x.device)
        up = self.c_fc.weight.to(x.dtype).unflatten(0, (self.groups, -1)).mT
        down = self.c_proj.weight.to(x.dtype).t().unflatten(0, (self.groups, -1))
        a = kernels.grouped_product(x.flatten(0, -2)[token], up, ends)
        a = plus(a, self.c_fc.bias, rows)
        a = self.select(self.act(a, rows) * gates[token, expert, None], ctx.of_tokens(token), rows)
        y = kernels.grouped_product(a, down, ends).index_select(0, order.argsort())
        y = y.unflatten(0, (-1, k)).sum(dim=1)
        return self.dropout(plus(y, self.c_proj.bias).view_as(x))


class Dendritic(MLP):
    """Dendritic neurons: K branches that each see a K-th of the stream and pass a nonlinearity of their own
    (GELU), a K x K mix of branches, the soma's activation, then the down projection (Poirazi & Mel 2001).
    W_up is block-diagonal, a K-th of a dense one."""

    @staticmethod
    def check(c):
        K, C, units = c.compartments, c.n_embd, c.units()
        require(K >= 0 and (not K or C % K == 0),
                f"n_embd={C} is not divisible by compartments={K}: each branch sees an equal part")
        require(not K or units % K == 0,
                f"the {units} units of the MLP are not divisible by compartments={K}")

    def __init__(self, config, layer):
        super().__init__(config, layer)
        K, units = config.compartments, config.units()
        self.c_fc = Linear(config.n_embd // K, units, config.bias)           # unit u: branch u // (units/K)
        self.mix = nn.Parameter(torch.empty(K, K))

    def init_weights(self, normal_):
        normal_(self.mix, 0.1)
        self.mix.diagonal().add_(1.0)

    def many(self, x, ctx):
        return self.dropout(self.c_proj(self.select(self.activations(x), ctx)))

    def activations(self, x):
        K = len(self.mix)
        tokens = x.numel() // x.size(-1)
        kernels.note(tokens, self.c_fc.weight)
        kernels.note(tokens * len(self.c_fc.weight) // K, self.mix)
        up = self.c_fc.weight.to(x.dtype).unflatten(0, (K, -1))              # (K, units/K, C/K)
        branches = torch.einsum("...kc,kuc->...ku", x.unflatten(-1, (K, -1)), up)
        branches = plus(branches.flatten(-2), self.c_fc.bias).unflatten(-1, (K, -1))
        soma = torch.einsum("jk,...ku->...ju", self.mix.to(x.dtype), F.gelu(branches)).flatten(-2)
        return self.act(soma)

    def emit(self, p, x, onto):
        units = self.c_proj.in_features
        up = p.matrix(self.c_fc.weight, self.c_fc.bias)            # as `many` reads them, whole numbers too
        a = p.linear(x, up, act="gelu", blocks=units // len(self.mix), stored=True)
        a = p.mix(a, units, self.mix, **self.activation(p))
        return self.c_proj.emit(p, self.emit_select(p, a, units), onto=onto)


class Predictive(MLP):
    """A predictive sparse MLP: trained with exact top-k winners; beside it, on inputs cut off from the graph,
    a low-rank predictor (C -> mlp_predict -> units) learns by cross-entropy which units will win. It never
    touches the other weights' training. In a call that predicts (GPT.use_policy) it picks the share
    mlp_active of the units: only their rows of W_up are read, and of W_down those of the winners among them
    (Deja Vu, 2310.17157; predictive coding: Rao & Ballard 1999)."""
    gathers = True

    @staticmethod
    def check(c):
        belong(c, "mlp_predict", "mlp_active")
        require(c.mlp_predict >= 0 and 0 < c.mlp_active <= 1, f"mlp_predict={c.mlp_predict} must be a rank, "
                f"0 or more, and mlp_active={c.mlp_active} in (0, 1]")
        require(not c.mlp_predict or (c.mlp_topk < 1 and not c.mlp_topk_group),
                f"mlp_predict={c.mlp_predict} learns the winners of mlp_topk below 1 without groups, it is "
                f"{c.mlp_topk} with mlp_topk_group={c.mlp_topk_group}: type --mlp_topk=0.1")

    def __init__(self, config, layer):
        super().__init__(config, layer)
        units = config.units()
        self.active = max(1, round(config.mlp_active * units))
        self.sense = Linear(config.n_embd, config.mlp_predict, bias=False, aside=True)
        self.guess = Linear(config.mlp_predict, units, bias=True, aside=True)

    def start_from_dense(self, dense, x):
        """The predictor begins as the best one of its rank by least squares on who wins."""
        super().start_from_dense(dense, x)
        a = self.activations(x)
        won = (kernels.keep_largest(a, self.select.k) != 0).float()
        weight, offset, root = retrofit.least_squares(x, won)
        guess, sense = retrofit.low_rank(6 * weight, root, self.sense.out_features)
        self.guess.weight.copy_(guess)
        self.sense.weight.copy_(sense)
        self.guess.bias.copy_(6 * (won.mean(0) - 0.5) - (x.mean(0) @ sense.t()) @ guess.t())

    def many(self, x, ctx):
        return self.ways[ctx.choices.predict](self, x, ctx)

    def exact(self, x, ctx):
        a = self.fire(self.c_fc(x), ctx)
        ctx.add_loss(lambda: [ctx.total(self.miss(x.detach(), a.detach()))], as_is)
        return self.dropout(self.c_proj(a))

    def miss(self, x, a):
        """The mean cross-entropy of each token's guesses which of its units a are not zero, (..., 1)."""
        return kernels.missed(self.guess(self.sense(x)), a) / a.size(-1)

    def predicted(self, x, ctx):
        a = kernels.scaled_reference(self.act(self.c_fc(x)), self.chosen(self.guess(self.sense(x))))
        return self.dropout(self.c_proj(self.select(a, ctx)))

    ways = {False: exact, True: predicted}

    def emit(self, p, x, onto):
        if not p.choices.predict:
            return super().emit(p, x, onto)
        scores = self.guess.emit(p, self.sense.emit(p, x, own=True))
        return self.emit_units(p, x, onto, p.choose(scores, self.guess.out_features, self.active))

    def on_card(self, x, ctx):
        if not ctx.choices.predict:
            return self.many(x, ctx)
        units = kernels.places_of_largest(self.guess(self.sense(x.flatten(0, 1))), self.active)
        return self.chosen_groups(x, ctx, units, None, 1)

    def chosen(self, scores):
        """Ones where the predictor expects winners, (..., units)."""
        return kernels.among_largest(scores, self.active).to(scores.dtype)


class Screens:
    """What MLPs have in common of which a few bits decide, when decoding, which units are read: a copy of the
    matrix in mlp_screen bits scores all units, and only those above the layer's threshold `edge` are computed
    from the weights themselves (TurboSparse, 2406.05955, and SparseInfer, 2411.12692, choose by other means).
    It needs no training: decode/calibrate.py finds the thresholds. A matrix of 4 bits is its own copy, and
    any with mlp_screen=16.

    Off until a call asks for it (GPT.use_policy), and exact then in everything but the units left out.
    """

    @staticmethod
    def check(c):
        belong(c, "mlp_screen", "mlp_live")
        bits = c.mlp_screen
        require(bits in (0, 2, 3, 4, 8, 16), f"mlp_screen={bits} must be 2, 3, 4 or 8 bits, or 16, the gates "
                "of swiglu themselves and no copy; 0 is off")
        require(bits < 16 or c.act == "swiglu", f"mlp_screen={bits} takes the gates themselves, which act="
                f"'{c.act}' has none of: type --mlp_screen=4")
        require(not bits or c.act in ("relu2", "swiglu"), f"mlp_screen={bits} needs units that are zero or a "
                f"gate that is small, act='{c.act}' has neither: it is for relu2 and swiglu")
        require(not bits or c.act == "relu2" or c.mlp_live > type(c).mlp_live, f"mlp_live={c.mlp_live} is "
                f"too little for act='{c.act}', none of whose units is zero by itself: type --mlp_live=0.65, "
                "for example")
        require(not bits or (c.mlp_topk == 1 and not c.event_gate),
                f"mlp_screen={bits} and mlp_topk={c.mlp_topk} or event_gate={c.event_gate} both choose which "
                "units fire: leave one of them out")
        require(0 <= c.mlp_live <= 1, f"mlp_live={c.mlp_live} must be in 0..1, the share of units read; 0: "
                "all that fire by themselves")

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.bits, self.kept_copy = config.mlp_screen, None
        self.register_buffer("edge", torch.full((), math.nan))      # of a model that is not calibrated

    def _load_from_state_dict(self, state, prefix, *args):
        for name, value in self._buffers.items():                  # a checkpoint of a plain MLP has none
            state.setdefault(prefix + name, torch.full_like(value, math.nan))
        super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, fn, *args, **keys):
        before = dict(self._buffers)
        super()._apply(fn, *args, **keys)
        for name, value in before.items():                         # floats whatever the dtype of the weights
            self._buffers[name] = value.to(self._buffers[name].device)
        self.kept_copy = None
        return self

    def regularise(self):
        """A step of training: thresholds of weights that have changed are none."""
        self.edge.fill_(math.nan)
        self.kept_copy = None

    def forward(self, x, ctx):
        return self.ways[ctx.choices.predict](self, x, ctx)

    def is_calibrated(self):
        """Is there a threshold, and all else that it stands on?"""
        return not any(bool(value.isnan().any()) for value in self.buffers(recurse=False))

    def found_edge(self):
        """The threshold; a ConfigError where there is none."""
        require(self.is_calibrated(), "mlp_screen: this model has no thresholds, or was trained on since "
                "they were found: calibrate.calibrate finds them, as sample.py does")
        return self.edge

    def emit(self, p, x, onto):
        if not p.choices.predict:
            return super().emit(p, x, onto)
        if not self.is_calibrated():
            raise NotWritten("thresholds that are not found")
        return self.emit_screened(p, x, onto)

    def own_copy(self):
        """Is the matrix the copy: is there to be none, or has it as few bits?"""
        return self.bits == 16 or getattr(self.c_fc, "bits", 16) <= 4

    def copied(self):
        """Which outputs of c_fc tell what a unit will be: the first, one for each."""
        return slice(self.c_proj.in_features)

    def copy_of(self, cache):
        """Codes and scales of the copy. Making it takes a second for 60 M weights, so it outlives a call,
        until a weight is written to or takes another place."""
        at = [(t.data_ptr(), t.is_inference() or t._version)
              for t in (*self.c_fc.parameters(), *self.c_fc.buffers())]
        if self.kept_copy is None or self.kept_copy[0] != at:
            self.kept_copy = at, kernels.quantize(dense_weight(self.c_fc)[self.copied()], self.bits)
        return self.kept_copy[1]

    def emit_copy(self, p, x, act="none"):
        """Append what the copy says of x."""
        bias = None if self.c_fc.bias is None else self.c_fc.bias[self.copied()]
        return p.linear(x, p.whole(*self.copy_of(p.cache), self.c_fc.in_features, bias), act=act)

    def estimate(self, x, ctx):
        """What the copy says of x (..., C), (..., units) in x's dtype; or the matrix that is its own copy."""
        if self.own_copy():
            return self.c_fc(x)[..., self.copied()]
        y = kernels.whole_product(x, *self.copy_of(ctx))
        return (y if self.c_fc.bias is None else
                y + self.c_fc.bias.to(x.dtype).float()[self.copied()]).to(x.dtype)


class ScreenedUnits(Screens, MLP):
    """Squared ReLU, whose units are zero for most tokens, screened by W_up."""

    def fires(self, x):
        """Which units are not zero by themselves, (..., units)."""
        return self.c_fc(x) > 0

    scores = Screens.estimate

    def screened(self, x, ctx):
        v = self.c_fc(x)
        scores = v if self.own_copy() else self.scores(x, ctx)
        return self.dropout(self.c_proj(torch.where(scores <= self.found_edge(), 0, self.act(v))))

    ways = {False: MLP.forward, True: screened}

    def emit_screened(self, p, x, onto):
        units, edge = self.c_proj.in_features, float(self.edge)
        if self.own_copy():
            a = self.c_fc.emit(p, x, act="relu2")
            a = p.event(a, units, torch.full((units,), max(edge, 0.0) ** 2))
            return self.c_proj.emit(p, a, onto=onto)
        return self.emit_units(p, x, onto, p.above(self.emit_copy(p, x), units, edge))


class ScreenedGates(Screens, SwiGLU):
    """A SwiGLU, screened by W_gate: left out are units whose |silu(gate)| is small beside the layer's
    threshold over the unit's `reach`, how large its up projection is on calibration text times what it
    writes. CATS (2404.08763) has a threshold without it. No unit is zero by itself, so each that is left out
    costs some loss."""
    by_unit = True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("reach", torch.ones(config.units()))

    def fires(self, x):
        """Which units are not zero by themselves: all, so that layers have equal shares."""
        return torch.ones_like(self.up(x), dtype=torch.bool)

    def up(self, x):
        return self.c_fc(x).chunk(2, dim=-1)[1]

    def scores(self, x, ctx):
        return F.silu(self.estimate(x, ctx)).abs() * self.reach

    def edges(self):
        """What |silu(gate)| must exceed, (units,)."""
        return self.found_edge() / self.reach.clamp(min=1e-30)

    def screened(self, x, ctx):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        silent = F.silu(self.estimate(x, ctx)).abs() <= self.edges()
        return self.dropout(self.c_proj(torch.where(silent, 0, F.silu(gate) * up)))

    ways = {False: SwiGLU.forward, True: screened}

    def emit_screened(self, p, x, onto):
        if not self.c_proj.sound():
            raise NotWritten("weights that are not finite")
        own, units = self.own_copy(), self.c_proj.in_features
        gates = self.emit_gate(p, x) if own else self.emit_copy(p, x, act="silu")
        chosen = p.firing(p.event(gates, units, self.edges()), units)
        exact = chosen.by if own else self.emit_gate(p, x, chosen._replace(by=None))
        return self.emit_chosen(p, x, onto, chosen._replace(by=exact))


MLPS = {"columns": Columns, "experts": Experts, "compartments": Dendritic, "mlp_predict": Predictive,
        "mlp_screen": ScreenedUnits}
GATED = {"gate_first": GateFirst, "mlp_screen": ScreenedGates}           # of act='swiglu'

# ------------------------------------------------------------------------------------------------------------
# attention


class BranchGate(nn.Module):
    """Which branches of its dendrites a token opens: (..., C) -> (..., D) gates, zero for the closed ones.

    Open are those of the dendrites_active largest gates sigmoid(w_d.x + b_d) that are a half or more; the
    largest always. Closed ones get the gradient that they would have open (straight-through, 1308.3432), and
    the loss holds dendrite_cost times how far the mean gate is from dendrites_active / dendrites.
    """

    def __init__(self, config):
        super().__init__()
        self.k, D, C = config.dendrites_active, config.dendrites, config.n_embd
        self.target = energy.target(config, self.k / D, config.dendrite_cost, macs=2 * C * C // D)
        self.router = Linear(config.n_embd, config.dendrites, bias=True, hidden=False)

    def init_weights(self, normal_):
        self.router.init_weights(normal_)
        nn.init.constant_(self.router.bias, 1.0)                   # all begin open, as far as k lets them

    def forward(self, x, ctx):
        g = self.router(x).float().sigmoid()
        largest = kernels.among_largest(g, self.k).float()
        kept = largest * (g >= g.amax(dim=-1, keepdim=True).clamp(max=0.5))
        self.target(ctx, g, kept)
        return (g + (g * kept - g).detach()).to(x.dtype)

    def emit(self, p, x, width):
        """Append the choice -> Listed units, `width` of each open branch."""
        return p.branches(self.router.emit(p, x, own=True), self.router.out_features, self.k, width)


class DendriticAttention(Attention):
    """Attention of dendritic neurons: each head's width in D branches, in one fused projection. A branch
    attends with its own part of query, key and value, passes a nonlinearity, and a gate of the token decides
    whether the soma (c_proj) reads it (Poirazi, Brannon & Mel 2003; gated heads: 2210.05144).

    A decode step computes the queries, the attention and the part of c_proj of the open branches alone; keys
    and values are owed for all, because later tokens may look at them. Head h of branch d is d * n_head + h.
    """
    gathers = True

    @staticmethod
    def check(c):
        belong(c, "dendrites", "dendrites_active", "dendrite_cost")
        D, width = c.dendrites, c.n_embd // c.n_head
        require(D >= 0 and (not D or width % D == 0),
                f"dendrites={D} must divide the {width} dimensions of a head (n_embd={c.n_embd} / "
                f"n_head={c.n_head})")
        require(not D or 1 <= c.dendrites_active <= D, f"dendrites={D} needs dendrites_active in 1..{D}, it "
                f"is {c.dendrites_active}: type --dendrites_active={max(1, D // 2)}, for example")
        require(c.dendrite_cost >= 0, f"dendrite_cost={c.dendrite_cost} must not be negative")
        branch = width // max(1, D)
        require(not D or c.pos != "rope" or branch % 2 == 0,
                f"pos='rope' rotates pairs: a branch's {branch} dimensions (dendrites={D}) must be even")
        require(c.attn_topk == 1 or not D, f"attn_topk={c.attn_topk} and dendrites={D} both choose what "
                "attention reads: leave one of them out")

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.part = config.n_embd // config.dendrites
        self.gate = BranchGate(config)
        self.c_proj = NeuronMajor(config.n_embd, config.n_embd, config.bias, std=residual_std(config))

    def forward(self, x, ctx):
        q, k, v = self.by_head(self.c_attn(x)).split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = self.to_heads(q, ctx), self.to_heads(k, ctx)
        k, v, mask = ctx.extend(self.layer, k, v.transpose(1, 2))
        y = self.attention(self.query_gain(q), k, v, mask, self.dropout * self.training)
        return self.resid_dropout(self.c_proj(self.gated(y, self.gate(x, ctx))))

    def gated(self, y, gates):
        """Branches' answers (B, heads, T, width) by their gates (B, T, n branches) -> (B, T, n * C / D)."""
        y = y.transpose(1, 2).contiguous()       # for strided values GELU's gradient has no vectors
        y = F.gelu(y).unflatten(2, (gates.size(-1), -1))
        return (y * gates[..., None, None]).flatten(2)

    def emit(self, p, x, onto):
        if not all(map(kernels.all_finite, self.parameters())):
            raise NotWritten("weights that are not finite")
        C = self.c_attn.in_features
        of_q, of_kv = (self.c_attn.emit_matrix(p, rows) for rows in (slice(C), slice(C, None)))
        branches = self.gate.emit(p, x, self.part)
        q = p.linear(x, of_q, units=branches._replace(by=None))
        y = p.attend_open(q, p.linear(x, of_kv), branches, self.part, self.layer, self.heads, self.width,
                          EPS if self.normalised else None, p.rotation if self.rotate is rotate else None,
                          getattr(self.query_gain, "weight", None))
        return p.rows_sum(y, self.c_proj.emit_matrix(p), onto, branches)


# ------------------------------------------------------------------------------------------------------------
# depth: how a token passes the layers


def all_layers(blocks, x, ctx):
    """Every token through every block."""
    for block in blocks:
        x = block(x, ctx)
    return x


def emit_layers(blocks, p, x):
    """The same of a decode program."""
    for block in blocks:
        x = engine.ops_of(block)(p, x)
    return x


def emit_rms(p, x, size):
    """Append `rms`."""
    return p.norm(x, size, eps=EPS, by_root=True)


class Hourglass(nn.Module):
    """A causal hourglass: the outer layers run on every token, those between them on groups of `hierarchy`
    tokens. A group's state is a weighted mean of its tokens'; what the middle layers add to it is added to
    the tokens that come when it is complete, from its own last one on (2110.13711), times factors that begin
    at zero: a model of the outer layers alone, which learns to listen (ReZero: 2003.04887)."""

    @staticmethod
    def check(c):
        require(c.hierarchy == 0 or c.hierarchy >= 2,
                f"hierarchy={c.hierarchy} must be at least 2 tokens in a group; 0 is off")
        require(c.hierarchy <= c.block_size,
                f"hierarchy={c.hierarchy} tokens do not fit block_size={c.block_size}, no group is complete: "
                f"type --hierarchy={c.block_size} or less; 0 is off")
        require(not c.hierarchy or c.n_layer >= 3,
                f"hierarchy={c.hierarchy} needs layers at both ends and between: n_layer={c.n_layer} must"
                " be 3 or more")

    def __init__(self, config):
        super().__init__()
        self.every, self.outer = config.hierarchy, config.outer_layers()
        self.pool = nn.Parameter(torch.full((self.every, config.n_embd), 1 / self.every))
        self.spread = nn.Parameter(torch.zeros(self.every, config.n_embd))

    def forward(self, blocks, x, ctx):
        first, middle, last = blocks[:self.outer], blocks[self.outer:-self.outer], blocks[-self.outer:]
        x = all_layers(first, x, ctx)
        x = x + ctx.coarse(self, x, lambda groups, inner: all_layers(middle, groups, inner) - groups)
        return all_layers(last, x, ctx)

    def emit(self, blocks, p, x):
        """The same of a decode program."""
        first, middle, last = blocks[:self.outer], blocks[self.outer:-self.outer], blocks[-self.outer:]
        x = emit_layers(first, p, x)
        p.module = "groups"
        groups, before, none_complete = p.group(x, self.pool)
        groups = emit_layers(middle, p, groups)
        p.land(none_complete)
        p.module = "groups"
        return emit_layers(last, p, p.spread(groups, before, x, self.spread))

    def pool_groups(self, x):
        """(B, T, C) -> the states of its completed groups, (B, T // every, C)."""
        groups = x[:, :x.size(1) // self.every * self.every].unflatten(1, (-1, self.every))
        return (groups * self.pool.to(x.dtype)).sum(dim=2)

    def spread_groups(self, said, T):
        """What the groups said (B, n, C) -> what each of T tokens gets (B, T, C): zeros before the first."""
        spread = (said.unsqueeze(2) * self.spread.to(said.dtype)).flatten(1, 2)
        return F.pad(spread, (0, 0, self.every - 1, max(0, T - spread.size(1))))[:, :T]

    def spread_one(self, said, phase):
        """The same for one token, `phase` tokens behind the group's last: an int, or (B,)."""
        return said * self.spread[phase].to(said.dtype).view(-1, 1, said.size(2))


class Exits(nn.Module):
    """Every token through every block, or fewer: after each layer of `exits` the model's own final norm and
    head can already answer (LayerSkip, 2404.16710).

    Training adds the exits' cross-entropies, each in proportion to its depth, and drops layers for whole
    sequences, late ones more often: layer_dropout for the last, nothing for the first. Beside the model, on
    states cut off from the graph, a probe of C multiply-adds learns whether an exit's most likely token is
    the last layer's: to ask it costs one row, where a head costs a vocabulary of rows (2207.07061).

    In a call that lets tokens leave (GPT.use_policy) a token is done at the first exit whose probe is sure
    by the call's threshold. In the layers above, its keys and values are those of the state that it left
    with, and a decode step computes nothing else there. layers_run and tokens_run count what that executed.
    """

    @staticmethod
    def check(c):
        belong(c, "exits", "exit_cost", "exit_threshold", "layer_dropout")
        try:
            after = c.exit_layers()
        except ValueError:
            after = [0]
        require(after == sorted(set(after)) and all(1 <= depth < c.n_layer for depth in after),
                f"exits='{c.exits}' must be rising numbers of layers in 1..{c.n_layer - 1}, by commas: type "
                f"--exits={max(1, c.n_layer // 2)}, for example")
        require(not (c.exits and c.hierarchy), f"exits='{c.exits}' and hierarchy={c.hierarchy}: groups of "
                "tokens cannot leave one by one; choose one of them")
        require(c.exit_cost >= 0, f"exit_cost={c.exit_cost} must not be negative")
        require(0 <= c.exit_threshold <= 1, f"exit_threshold={c.exit_threshold} must be in [0, 1]")
        require(0 <= c.layer_dropout < 1, f"layer_dropout={c.layer_dropout} must be in [0, 1)")

    def __init__(self, config):
        super().__init__()
        last = max(1, config.n_layer - 1)
        self.after = config.exit_layers()
        self.shares = [config.exit_cost * depth / sum(self.after) for depth in self.after]
        self.drops = [config.layer_dropout * (2 ** (i / last) - 1) for i in range(config.n_layer)]
        self.probes = nn.ModuleList(Linear(config.n_embd, 1, bias=True, aside=True) for _ in self.after)
        self.layers_run = self.tokens_run = 0

    def forward(self, blocks, x, ctx):
        return self.ways[ctx.choices.leave_at is not None](self, blocks, x, ctx)

    def whole(self, blocks, x, ctx):
        for depth, (block, drop) in enumerate(zip(blocks, self.drops), 1):
            x = drop_rows(x, block(x, ctx), drop * self.training)
            if depth in self.after:
                ctx.keep_exit_state(x)
        return x

    def losses(self, left, logits_of, logits, targets):
        """What the states (B, T, C) at the exits add to the training loss; logits_of is the head."""
        final = logits.detach().argmax(-1, keepdim=True)
        for share, probe, x in zip(self.shares, self.probes, left):
            early = logits_of(x)
            yield share * cross_entropy(early, targets)
            agrees = (early.detach().argmax(-1, keepdim=True) == final).float()
            yield F.binary_cross_entropy_with_logits(probe(rms(x.detach())).float(), agrees)

    def early(self, blocks, x, ctx):
        self.tokens_run += x[..., 0].numel()
        done = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        run = some_rows if x.size(1) == 1 else some_tokens
        for depth, block in enumerate(blocks, 1):
            going = ~done
            self.layers_run += int(going.sum())
            x = run(block, x, ctx, going)
            done = done | self.sure(depth, x, ctx)
        return x

    def emit(self, blocks, p, x):
        """Append all blocks to a decode program, or with the policy what tokens run of them."""
        threshold, size, skips = p.choices.leave_at, self.probes[0].in_features, []
        if threshold is None:
            return emit_layers(blocks, p, x)
        p.enter(p.counter(self, "tokens_run"))
        owed, out = p.owed(len(blocks), size, p.counter(self, "layers_run")), p.value(size)
        for layer, block in enumerate(blocks):
            if layer >= self.after[0]:
                p.module = f"layer {layer} attention"
                p.pay(owed, layer, block.emit_kv)
            x = block.emit(p, x)
            if layer + 1 in self.after:
                p.module = f"layer {layer} exit"
                probe = self.probes[self.after.index(layer + 1)].emit(p, emit_rms(p, x, size), own=True)
                skips.append(p.leave(x, size, probe, threshold, out, layer + 1, owed))
        p.land(*skips)
        return p.join(x, size, out, len(blocks), owed)

    def sure(self, depth, x, ctx):
        """Which of the tokens x (B, T, C) may be done after so many layers: (B, T) bool, or False."""
        if depth not in self.after:
            return False
        probe = self.probes[self.after.index(depth)]
        return probe(rms(x))[..., 0].float().sigmoid() > ctx.choices.leave_at

    ways = {False: whole, True: early}


class Halting(nn.Module):
    """When a token has thought enough: adaptive computation time (1603.08983) of one block that is run up to
    `ponder` times with the same weights (1807.03819).

    After each run the state y halts with probability p = sigmoid(w.y + b). A token's states weigh their p;
    the last one, where less than EPSILON would be left or after `ponder` runs, weighs all that is left, so
    that the weights sum to 1. The loss holds ponder_cost times the mean of runs and of what was left. Only
    tokens that are still thinking are computed; the others keep the keys and values of their last run.
    steps_run and tokens_run count what that executed.
    """
    EPSILON = 0.01

    @staticmethod
    def check(c):
        belong(c, "ponder", "ponder_cost")
        require(not (c.exits and c.ponder),
                f"exits='{c.exits}' and ponder={c.ponder} both decide how deep a token goes: choose "
                "one of them")
        require(c.ponder == 0 or c.ponder >= 2, f"ponder={c.ponder} must be at least 2 runs; 0 is off")
        require(c.ponder_cost >= 0, f"ponder_cost={c.ponder_cost} must not be negative")

    def __init__(self, config):
        super().__init__()
        self.most, self.cost = config.ponder, config.ponder_cost
        self.halt = Linear(config.n_embd, 1, bias=True, hidden=False)
        self.steps_run = self.tokens_run = 0

    def init_weights(self, normal_):
        self.halt.init_weights(normal_)
        nn.init.constant_(self.halt.bias, -1.0)                    # about four runs

    def start_from(self):
        """Two runs of which the first counts 98%: a token of one run alone would give the halting nothing to
        learn from."""
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, math.log(0.98 / 0.02))

    def forward(self, x, ctx, attn, run):
        """run(states, context) is the block, attn its attention; -> the weighted states (B, T, C)."""
        return ctx.ponder(self, x, attn, run)

    def emit(self, p, x, layer, run):
        """Append the runs of a block to a decode program; run(p, x) appends one."""
        size, skips, counts = self.halt.in_features, [], p.counter(self, "steps_run")
        total = p.enter(p.counter(self, "tokens_run"), size)
        for p.again in range(self.most):
            x = run(p, x)
            p.module = f"layer {layer} halting"
            probe = self.halt.emit(p, emit_rms(p, x, size), own=True)
            skips.append(p.halt(x, size, probe, total, layer, self.most, self.EPSILON, counts))
        p.again = 0
        p.land(*skips)
        return p.join(out=total)

    def weigh(self, y, left, step):
        """States (..., C) of run `step`, how much of 1 is left (...) -> their weights, and which halt."""
        p = self.halt(rms(y))[..., 0].float().sigmoid()
        halts = (left - p <= self.EPSILON) | (step + 1 == self.most)
        return torch.where(halts, left, p), halts

    def several(self, x, ctx, attn, run):
        """Tokens (B, T, C) that begin at column 0."""
        thoughts, total = Thoughts(ctx, attn.window), torch.zeros_like(x)
        left = torch.ones(x.shape[:2], device=x.device)
        thinking, cost = left > 0, 0.0
        self.tokens_run += thinking.numel() if readable(x) else 0
        for step in range(self.most):
            valid = thoughts.choose(thinking, step)
            if not valid.size(1):
                thoughts.copy_kv_to_later_runs(attn.layer, range(step, self.most))
                break
            self.steps_run += int(valid.sum()) if readable(x) else 0
            before = thoughts.take(x)
            y = run(before, thoughts)
            weights, halts = self.weigh(y, thoughts.take(left), step)
            weights = weights * valid
            total = thoughts.add(total, weights[..., None].to(y.dtype) * y)
            left = thoughts.add(left, -weights)
            x = thoughts.put(x, before, y)
            cost = cost + valid.sum() + (weights * halts).sum()
            thinking = thoughts.put(thinking, valid, ~halts)
        thoughts.tell()
        ctx.add_loss(lambda: [(self.cost * cost, left.numel())], as_is)
        return total

    def one(self, x, ctx, attn, run):
        """One token of each row of a decode step (B, 1, C)."""
        total, left = torch.zeros_like(x), torch.ones(len(x), 1, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        self.tokens_run += len(x)
        for step in range(self.most):
            here = ctx.again(step)
            self.steps_run += len(rows)
            y = run(x, here) if len(rows) == len(x) else run(x[rows], here.of_rows(rows))
            weights, halts = self.weigh(y, left[rows], step)
            total.index_add_(0, rows, weights[..., None].to(y.dtype) * y)
            left.index_add_(0, rows, -weights)
            x = x.index_copy(0, rows, y)
            here.copy_kv_to_later_runs(attn.layer, rows[halts[:, 0]])
            rows = rows[~halts[:, 0]]
            if not len(rows):
                break
        return total


DEPTHS = {"hierarchy": Hourglass, "exits": Exits}


def some_tokens(block, x, ctx, going):
    """A block for the tokens (B, T) of a prompt that are going on; computed for all of them."""
    return torch.where(going[..., None], block(x, ctx), x)


def some_rows(block, x, ctx, going):
    """A block for the rows of a decode step that are going on, and nothing but keys and values for others."""
    rows, others = (side[:, 0].nonzero()[:, 0] for side in (going, ~going))
    if not len(others):
        return block(x, ctx)
    if not len(rows):
        block.write_kv(x, ctx)
        return x
    block.write_kv(x[others], ctx.of_rows(others))
    return x.index_copy(0, rows, block(x[rows], ctx.of_rows(rows)))


# whose flags a GPTConfig is asked about, by their `check`
CHECKED = (DendriticAttention, Hourglass, Exits, Halting, MLP, TopK, EventGate, Experts, Columns, Dendritic,
           GroupWinners, SwiGLU, Predictive, Screens)
