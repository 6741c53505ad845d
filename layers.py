"""What models are built from: a Linear in its input's dtype, embeddings and positions, attention."""
import hashlib
import math
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

import sparse_kernels as kernels
from configurator import require
from kernels import picked
from kernels.passes import relu2, rms_norm, rotated


def cast(tensor, dtype):
    return tensor if tensor is None else tensor.to(dtype)


def plus(y, bias, rows=slice(None)):
    return y if bias is None else y + bias.to(y.dtype)[rows]


def belong(c, owner, *keys):
    """Flags of a GPTConfig that say how the mechanism `owner` works are at their defaults where it is off."""
    for key in keys:
        require(getattr(c, key) == getattr(type(c), key) or getattr(c, owner),
                f"{key}={getattr(c, key)} has no effect without {owner}: set {owner} too, or leave {key} out")


class Linear(nn.Linear):
    """nn.Linear computed in its input's dtype: fp32 master weights serve a bf16 stream without autocast.

    hidden: a matrix that Muon may take. aside: it learns beside the model, from inputs cut off from the
    graph, and its gradient is clipped apart.
    """

    def __init__(self, n_in, n_out, bias, std=0.02, hidden=True, aside=False):
        self.std, self.hidden, self.aside = std, hidden, aside
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self):
        pass                                    # drawn once, by name, in GPT.init_weights

    def init_weights(self, normal_):
        normal_(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return project(x, self.matrix().to(x.dtype), cast(self.bias, x.dtype))

    def emit(self, p, x, **options):
        """Append the product with x to a decode program (decode/engine.py) -> where the result lies."""
        return p.linear(x, self.emit_matrix(p), **options)

    def emit_matrix(self, p, rows=slice(None)):
        """Its weights as ops read them, of the slice `rows` of its outputs -> a Matrix."""
        return p.matrix(self.matrix()[rows], self.bias if self.bias is None else self.bias[rows])

    def emit_some(self, p, x, rows):
        """`some` of a decode program."""
        return p.linear(x, self.emit_matrix(p, rows))

    def matrix(self):
        """What inputs are multiplied by, (n_out, n_in)."""
        return self.weight

    def sound(self):
        """Are all weights finite? Where one is not, a step that leaves rows unread would not show it, and all
        are read."""
        return kernels.all_finite(self.weight)

    def some(self, x, rows):
        """Of the outputs only the slice `rows`."""
        bias = cast(self.bias, x.dtype)
        return project(x, self.matrix()[rows].to(x.dtype), bias if bias is None else bias[rows])


class Screened(Linear):
    """A Linear of which sometimes only the k largest outputs are wanted: a decode step on a CPU first looks
    at a copy in 8 bits, then at the rows that may be among them. Their values are exact. The copy is made
    anew in every stream."""

    @staticmethod
    def check(c):
        require(not (c.screen and c.softcap), f"screen={c.screen} and softcap={c.softcap}: what is not "
                "wanted is -inf, which a cap would make a logit; choose one of them")


class TwoOfFour(Linear):
    """A Linear that keeps, of every four consecutive weights of an output, the two largest.

    Training lets every weight take the gradient of a kept one, and pulls what is pruned towards zero by
    `pull`, once a step, so that the choice settles (SR-STE, 2102.04010). For inference see settle.
    """

    @staticmethod
    def check(c):
        units = c.units()
        require(c.weights in ("dense", "2:4"), f"weights='{c.weights}' must be dense or 2:4")
        require(c.sr_ste >= 0, f"sr_ste={c.sr_ste} must not be negative")
        require(c.weights == "2:4" or c.sr_ste == type(c).sr_ste,
                f"sr_ste={c.sr_ste} has no effect without weights='2:4': set that too, or leave sr_ste out")
        require(c.weights == "dense" or (c.n_embd % 4 == 0 and units % 4 == 0),
                f"weights='{c.weights}' keeps two of every four: n_embd={c.n_embd} and the {units} units of "
                "the MLP must be multiples of 4")

    def __init__(self, n_in, n_out, bias, std=0.02, pull=0.0):
        super().__init__(n_in, n_out, bias, std)
        self.pull = pull

    def matrix(self):
        return Pruned.apply(self.weight)

    @torch.no_grad()
    def start_from_inputs(self, x):
        """Of a dense model's weights keep those that matter most for inputs x (n, n_in), by |w| times the
        size of what it multiplies (2306.11695): of every four the others get below the two that stay."""
        kept = kernels.two_of_four(self.weight.abs() * x.square().mean(0).sqrt())
        fours = torch.where(kept, self.weight.abs(), torch.inf).unflatten(-1, (-1, 4))
        below = 0.99 * fours.amin(-1, keepdim=True).expand_as(fours).flatten(-2)
        self.weight.copy_(torch.where(kept, self.weight, self.weight.clamp(-below, below)))

    @torch.no_grad()
    def regularise(self):
        """Add the pull to the weight's gradient, where it has one. A backward would add it for every
        micro-batch and every run of a block, and under a loss scale. Of split weights each process holds
        whole rows."""
        if self.weight.grad is not None:
            weight, grad = (getattr(t, "to_local", lambda: t)() for t in (self.weight, self.weight.grad))
            grad.add_(weight - kernels.prune_24(weight), alpha=self.pull)


class Pruned(torch.autograd.Function):
    """Weights (N, K) -> the same with two of every four at zero; straight through."""

    @staticmethod
    def forward(ctx, weight):
        return kernels.prune_24(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Packed(nn.Module):
    """The 2:4 weights of a TwoOfFour in 9/16 of their bytes (bf16), for inference; act: an activation that
    the product ends with."""

    def __init__(self, linear):
        super().__init__()
        values, meta = kernels.pack_24(kernels.prune_24(linear.weight.detach()))
        self.act, self.bias = "none", linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("values", values)
        self.register_buffer("meta", meta)
        self.register_buffer("laid", None, persistent=False)
        self.rewritten()

    def _load_from_state_dict(self, *args, **keys):
        super()._load_from_state_dict(*args, **keys)
        self.rewritten()

    def rewritten(self):
        """The packed weights were written in place: what was made of them is made again."""
        kernels.forget_24(self.values)
        if picked.wanted(self.values.device):
            self.laid, self.laid_as = picked.lay(self.values, self.meta, self.in_features), self.values.dtype

    def forward(self, x):
        bias = cast(self.bias, x.dtype)
        return kernels.linear_24(x, self.values.to(x.dtype), self.meta, bias, act=self.act)

    def emit(self, p, x, act="none", **options):
        return p.linear(x, self.emit_matrix(p), act=act if self.act == "none" else self.act, **options)

    def emit_matrix(self, p, rows=slice(None)):
        """As Linear.emit_matrix."""
        bias = self.bias if self.bias is None else self.bias[rows]
        if not picked.wanted(self.values.device):
            return p.packed(self.values[rows], self.meta[rows], bias, self.in_features)
        laid = self.laid if self.laid_as == p.dtype else picked.lay(self.values.to(p.dtype), self.meta,
                                                                    self.in_features)
        return p.picked(laid[rows].contiguous(), p.dtype, self.in_features, bias)

    def sound(self):
        """As Linear.sound."""
        return kernels.all_finite(self.values)

    def emit_some(self, p, x, rows):
        return p.linear(x, self.emit_matrix(p, rows), act=self.act)

    def some(self, x, rows):
        values, bias = self.values[rows].to(x.dtype), cast(self.bias, x.dtype)
        return kernels.linear_24(x, values, self.meta[rows], bias if bias is None else bias[rows],
                                 act=self.act)


class Settled(Linear):
    """The pruned weights of a TwoOfFour for inference where nothing gains from packing them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = nn.Parameter(kernels.prune_24(linear.weight.detach())), linear.bias


def settle(model, pack=True):
    """For inference: exchange every TwoOfFour of a model for a Packed, or a Settled -> the model. A module
    that ends a Packed one with an activation hands it over."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TwoOfFour):
                setattr(module, name, (Packed if pack else Settled)(child))
        getattr(module, "fuse", as_is)()
    return model


def check_pruned(model, config):
    """weights='2:4' must find a matrix."""
    require(config.weights == "dense" or any(isinstance(m, TwoOfFour) for m in model.modules()),
            f"weights='{config.weights}' finds nothing to prune: attention and MLP choose what they read, so "
            "leave weights out")


def linear(config):
    """The class of a matrix that reads all its inputs and computes all its outputs."""
    return partial(TwoOfFour, pull=config.sr_ste) if config.weights == "2:4" else Linear


class NeuronMajor(Linear):
    """A Linear whose (n_out, n_in) weight lies in memory input by input: what one input unit writes is one
    contiguous row, and a decode step reads the rows of units that are not zero. Values are a Linear's."""

    def __init__(self, n_in, n_out, bias, std=0.02):
        super().__init__(n_in, n_out, bias, std)
        self.weight = nn.Parameter(torch.empty(n_in, n_out).t())

    def forward(self, a):
        if kernels.in_step:
            return kernels.live_down(a, self.weight.t().to(a.dtype), cast(self.bias, a.dtype))
        return super().forward(a)

    def emit(self, p, a, onto=None, units=None):
        return p.rows_sum(a, self.emit_matrix(p), onto, units, all=not self.sound())

    def emit_matrix(self, p):
        return p.matrix(self.weight.t(), self.bias)


class Winners(NeuronMajor):
    """A NeuronMajor whose inputs are 2 of 4: where a card has sparse units, training multiplies on them."""

    def forward(self, a):
        if not (a.is_cuda and torch.is_grad_enabled()):
            return super().forward(a)
        y = kernels.winners_product(a.flatten(0, -2), self.weight.to(a.dtype)).unflatten(0, a.shape[:-1])
        return plus(y, self.bias)


class LargestInputs(NeuronMajor):
    """A Linear that reads, of each token's inputs, the share `share` with the largest |x|: the weights of the
    others are not read in a decode step (TEAL thresholds for this, 2408.14690; a fixed count is the same for
    every token)."""

    @staticmethod
    def check(c):
        require(0 < c.attn_topk <= 1, f"attn_topk={c.attn_topk} must be in (0, 1]: the share of inputs read")

    def __init__(self, n_in, n_out, bias, std=0.02, share=1.0):
        super().__init__(n_in, n_out, bias, std)
        self.k = max(1, round(share * n_in))

    def forward(self, x):
        return super().forward(kernels.keep_largest(x, self.k))

    def emit(self, p, x, **options):
        return super().emit(p, p.largest(x, self.in_features, self.k), **options)

    def emit_some(self, p, x, rows):
        matrix = p.without_first(p.matrix(self.weight.t(), self.bias), rows.start)
        return p.rows_sum(p.largest(x, self.in_features, self.k), matrix, all=not self.sound())

    def some(self, x, rows):
        return super().some(kernels.keep_largest(x, self.k), rows)


def attention_linear(config):
    """The same for attention's two projections."""
    return partial(LargestInputs, share=config.attn_topk) if config.attn_topk < 1 else linear(config)

class Table(nn.Embedding):
    """Rows drawn by name (std 0.02)."""

    def reset_parameters(self):
        pass

    def init_weights(self, normal_):
        normal_(self.weight, 0.02)


class Embedding(Table):
    """Token ids (B, T) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.n_embd)
        self.tied = ()                           # the quantised head whose rows it reads, see quantize

    def forward(self, idx, ctx):
        return self.tied[0].rows(idx) if self.tied else F.embedding(idx, self.weight)

    def emit(self, p, positions):
        """Append the embedding of the token that is read, at its row of `positions` or None."""
        return p.embed(self.emit_matrix(p), positions)

    def emit_matrix(self, p):
        return self.tied[0].emit_matrix(p) if self.tied else p.matrix(self.weight)


class NgramEmbedding(Embedding):
    """Token embedding plus one row of a hashed table for each n-gram, 2 to ngram_order tokens long, that ends
    at a position: what the first attention layers would otherwise have to learn. The table starts at zero;
    ngram_order - 1 of its rows are read per token (hashed n-grams: 1607.04606)."""

    def __init__(self, config):
        super().__init__(config)
        self.order = config.ngram_order
        self.ngrams = nn.Parameter(torch.zeros(config.ngram_buckets, config.n_embd))

    def forward(self, idx, ctx):
        last, *before = (ctx.with_past(idx, self.order - 1) + 1).unfold(1, idx.size(1), 1).flip(1).unbind(1)
        key, keys = last * 1_000_003, []
        for n, token in enumerate(before):
            key = key * 31 + token * 10_007 + n
            keys.append(key % len(self.ngrams))
        rows = torch.stack(keys, dim=-1).flatten(0, 1)
        return super().forward(idx, ctx) + F.embedding_bag(rows, self.ngrams, mode="sum").view(*idx.shape, -1)

    def emit(self, p, positions):
        return p.embed(self.emit_matrix(p), positions, self.ngrams, self.order)


class LearnedPositions(Table):
    """GPT-2's table, one row per position, added to the token embedding."""

    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x, ctx):
        return x + self.weight[ctx.positions]

    rotation = None                             # tables of a rotation of queries and keys

    def table(self):
        """What is added to the tokens' rows."""
        return self.weight

    def note(self, ctx):
        """Tell blocks the positions; they need none: the stream knows."""

    def crop(self, block_size):
        self.weight = nn.Parameter(self.weight[:block_size].detach().clone())


def slowed(frequencies, factor, low, high, original):
    """Llama 3.1's rotation for contexts longer than the `original` positions of its training (2407.21783):
    frequencies that turn fewer than `low` times in those become `factor` times slower, those of `high` turns
    and more stay, and between them it goes over evenly."""
    turns = original * frequencies / (2 * math.pi)
    stays = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (stays + (1 - stays) / factor)


class RotaryPositions(nn.Module):
    """Cosines and signed sines of the angles by which q and k turn, (block_size, 1, D), half-split layout
    (2104.09864)."""

    @staticmethod
    def check(c):
        belong(c, "rope_factor", "rope_low", "rope_high", "rope_original")
        require(c.rope_theta > 0, f"rope_theta={c.rope_theta} must be above 0: 10000 is usual")
        for key in ("rope_theta", "rope_factor"):
            require(c.pos == "rope" or getattr(c, key) == getattr(type(c), key), f"{key}={getattr(c, key)} "
                    f"has no effect without pos='rope': type --pos=rope too, or leave {key} out")
        require(c.rope_factor == 0 or c.rope_factor >= 1, f"rope_factor={c.rope_factor} must be at least 1, "
                "how many times slower the slow frequencies turn; 0 is off")
        require(0 < c.rope_low < c.rope_high, f"rope_low={c.rope_low} must be above 0 and below "
                f"rope_high={c.rope_high}: 1 and 4 are Llama's")
        require(c.rope_original >= 1, f"rope_original={c.rope_original} must be at least 1 position: 8192 is "
                "Llama's")

    def __init__(self, config):
        super().__init__()
        _, self.width = config.heads()
        self.theta = config.rope_theta
        self.slowed = partial(slowed, factor=config.rope_factor, low=config.rope_low, high=config.rope_high,
                              original=config.rope_original) if config.rope_factor else as_is
        for name, table in zip(("cos", "sin"), self.tables(config.block_size)):
            self.register_buffer(name, table.to(torch.empty(0).device), persistent=False)

    def tables(self, length):
        """On the CPU: where tensors have no memory, arange would import torch's compiler, for seconds."""
        pairs = torch.arange(0, self.width, 2, device="cpu")
        frequencies = self.slowed(self.theta ** (-pairs / self.width))
        angles = torch.arange(length, device="cpu")[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)

    def _apply(self, *args, **keys):
        """A model that goes to another dtype gets its tables anew: what one has rounded away does not stay
        lost in the next."""
        super()._apply(*args, **keys)
        self.cos, self.sin = [table.to(self.cos) for table in self.tables(len(self.cos))]
        return self

    @property
    def rotation(self):
        return self.cos, self.sin

    def table(self):
        """Nothing is added to the tokens' rows."""

    def rotation_of(self, positions):
        return self.cos[positions], self.sin[positions]

    def forward(self, x, ctx):
        self.note(ctx)
        return x

    def note(self, ctx):
        """Tell blocks the positions of a call."""
        ctx.rotation_of, ctx.rotation = self.rotation_of, self.rotation_of(ctx.positions)

    def crop(self, block_size):
        self.cos, self.sin = self.cos[:block_size], self.sin[:block_size]


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; statistics in fp32 whatever the stream's dtype (1607.06450)."""

    @staticmethod
    def check(c):
        require(c.norm_eps >= 0, f"norm_eps={c.norm_eps} must not be negative; 0 takes the norm's own")

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps or 1e-5
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), cast(self.bias, x.dtype), self.eps)

    def emit(self, p, x):
        return p.norm(x, len(self.weight), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm with a gain; statistics in fp32 (1910.07467)."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps or 1e-6
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return rms_norm(x, self.eps, self.weight.to(x.dtype))

    def emit(self, p, x):
        return p.norm(x, len(self.weight), self.weight, None, self.eps, by_root=True)


def project(x, weight, bias):
    """F.linear, counted."""
    kernels.note(x.numel() // x.size(-1), weight)
    return kernels.in_fp32(F.linear, x, weight, bias)


def rotate(x, ctx):
    """Turn (B, T, H, D) by each token's position: the halves (a, b) to (a cos + b sin, b cos - a sin)."""
    return rotated(x, *(table.to(x.dtype) for table in ctx.rotation))


def as_is(x=None, *_):
    return x


EPS = torch.finfo(torch.float32).eps              # whatever the dtype: torch's own default has changed


def rms(x):
    """Root-mean-square normalisation of the last dimension, statistics in fp32."""
    return rms_norm(x, EPS)


class QueryGain(nn.Module):
    """A learned factor of each head's normalised queries (B, H, T, D): without it no score passes sqrt(D),
    too little for narrow heads to pick one key of many (2010.04245)."""

    @staticmethod
    def check(c):
        belong(c, "qk_norm", "qk_gain")
        require(c.qk_gain >= 0, f"qk_gain={c.qk_gain} must not be negative; 0 is none")

    def __init__(self, heads, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), start))

    def forward(self, q, heads=slice(None)):
        return q * self.weight[heads].to(q.dtype).view(-1, 1, 1)


def query_gain(heads, config):
    return QueryGain(heads, config.qk_gain) if config.qk_gain else as_is


def attend(q, k, v, mask, dropout):
    """Softmax attention of queries (B, H, T, D) over (B, H, S, D) -> (B, H, T, D).

    mask: bool (B or 1, 1, T, S), or None: the queries are the last T of S tokens, each sees up to itself.
    On a CPU in bf16 the fused kernel is slower than three plain matmuls up to a few hundred keys, so length
    decides there.
    """
    if mask is None and q.size(2) == 1 and not dropout:
        return attend_single(q, k, v)
    causal = mask is None
    if causal and q.size(2) < k.size(2):
        return attend_last(q, k, v)
    if causal and is_short(q):
        return attend_short(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def attend_single(q, k, v):
    """attend for one query, not by torch's operator: its answer on a CPU to scores that are all NaN is 0,
    which would hide a damaged weight."""
    weights = kernels.in_fp32(torch.matmul, q * q.size(-1) ** -0.5, k.mT).softmax(-1)
    return kernels.in_fp32(torch.matmul, weights, v)


def attend_last(q, k, v):
    """attend for the last 1 < T < S tokens of S, without dropout."""
    T, S = q.size(2), k.size(2)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def is_short(q):
    """Are three plain matmuls faster than what is fused, or split into blocks?"""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.size(2) <= 256


def attend_short(q, k, v, dropout, window=math.inf):
    """Causal attention as baddbmm, softmax, bmm over flattened heads; T == S. window: attend_window's."""
    B, H, T, D = q.shape
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    unseen = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    if window < T:
        unseen += torch.full_like(unseen, -math.inf).tril_(-window)
    weights = kernels.in_fp32(partial(torch.baddbmm, alpha=D ** -0.5), unseen, q, k.transpose(1, 2))
    weights = weights.softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return kernels.in_fp32(torch.bmm, weights, v).view(B, H, T, D)


def attention(window, groups=False):
    """What computes a layer's attention: attend, or the same over a window; groups: of queries that share
    their key and value."""
    one = partial(attend_window, window) if window else attend
    return partial(attend_groups, one) if groups else one


def attend_groups(attention, q, k, v, mask, dropout):
    """attend, where neighbours of q's heads look at one head of k and v (2305.13245), of which each has a
    copy."""
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    return attention(q, k, v, mask, dropout)


def attend_window(window, q, k, v, mask, dropout):
    """attend, where each of T tokens sees itself and the window - 1 before it: exact, in O(T * window) beyond
    a few hundred tokens.

    A mask, and a single query, say by themselves what is seen: the cache holds no more than the window.
    """
    if mask is not None or q.size(2) <= min(window, k.size(2)):
        return attend(q, k, v, mask, dropout)
    if is_short(q) and not kernels.emulated(q):
        return attend_short(q, k, v, dropout, window)
    y = attend_fused(q, k, v, window) if fused(q.device, q.dtype, q.size(2), q.size(3), dropout) else None
    return attend_blocks(q, k, v, window, dropout) if y is None else y


def fused(device, dtype, tokens, width, dropout):
    """Is a window of so many tokens, in heads of this width, a matter for FlexAttention? In fp32 the blocks
    are no slower than what torch has for all tokens."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and tokens >= 1024
            and width in (16, 32, 64, 128, 256) and not dropout)


def attend_fused(q, k, v, window):
    """attend_window by FlexAttention; None where this card cannot."""
    from kernels import flex  # here, because it imports a compiler
    return flex.attend(q, k, v, window)


def window_path(config, device, dtype):
    """The sentence that train.py prints of a model with windows on a card."""
    from kernels import flex
    fits = fused(device, dtype, config.block_size, config.heads()[1], config.dropout)
    return "windows: " + ("FlexAttention" if fits and flex.able(device) else "plain products of blocks")


def attend_blocks(q, k, v, window, dropout):
    """Queries in blocks of half a window, each over the keys of its own block and the window before it: the
    blocks of 2004.05150."""
    B, H, T, D = q.shape
    size = window // 2 if window % 2 == 0 else window
    blocks = -(-T // size)
    q = F.pad(q.reshape(B * H, T, D), (0, 0, 0, blocks * size - T)).reshape(-1, size, D)
    k, v = (F.pad(t.reshape(B * H, T, D), (0, 0, window, blocks * size - T)) for t in (k, v))
    k, v = (torch.cat([t[:, i:i + blocks * size].reshape(-1, size, D)
                       for i in range(0, window + 1, size)], dim=1) for t in (k, v))
    columns = torch.arange(size + window, device=q.device)
    age = columns[:size, None] + window - columns
    unseen = torch.zeros_like(age, dtype=q.dtype).masked_fill_((age < 0) | (age >= window), -math.inf)
    scores = kernels.in_fp32(partial(torch.baddbmm, alpha=D ** -0.5), unseen, q, k.transpose(1, 2))
    for i in range(min(blocks, window // size)):                               # no keys before the first
        scores.view(B * H, blocks, size, -1)[:, i, :, :window - i * size] = -math.inf
    weights = scores.softmax(-1)
    y = kernels.in_fp32(torch.bmm, F.dropout(weights, dropout) if dropout else weights, v)
    return y.view(B, H, blocks * size, D)[:, :, :T]


def drop_rows(x, y, rate):
    """y, but x for a share `rate` of the rows (B, T, C), whole sequences each (1603.09382)."""
    return torch.where(torch.rand(len(x), 1, 1, device=x.device) < rate, x, y) if rate else y


def dropout(config):
    """Dropout, or nothing at all where it would drop nothing: a module call is not free in a decode step."""
    return nn.Dropout(config.dropout) if config.dropout else as_is


class Attention(nn.Module):
    """What every attention layer has: one projection to queries, keys and values, and a cached past."""
    gathers = False                             # does a decode step choose outputs of that projection?

    @staticmethod
    def check(c):
        belong(c, "window", "window_pattern")
        require(c.window >= 0, f"window={c.window} must not be negative; 0 is off")
        require(c.window_pattern and set(c.window_pattern) <= {"S", "L"},
                f"window_pattern='{c.window_pattern}' must be letters S (the window) and L (everything): "
                "type --window_pattern=SSSL, for example")
        require(c.n_kv_head >= 0 and c.n_head % (c.n_kv_head or 1) == 0, f"n_kv_head={c.n_kv_head} must "
                f"divide n_head={c.n_head}: so many queries share a key and a value; 0 is one for each")

    def __init__(self, config, layer):
        super().__init__()
        (self.heads, self.width), self.kv_heads = config.heads(), config.kv_heads()
        self.layer, self.dropout, self.window = layer, config.dropout, config.window_of(layer)
        self.attention = attention(self.window, self.kv_heads < self.heads)
        of = Linear if self.gathers else attention_linear(config)
        self.c_attn = of(config.n_embd, config.n_embd + 2 * self.kv_heads * self.width, config.bias)
        self.resid_dropout = dropout(config)
        self.normalised = config.qk_norm
        self.normalise = rms if config.qk_norm else as_is
        self.rotate = rotate if config.pos == "rope" else as_is
        self.query_gain = query_gain(self.heads, config)

    def by_head(self, flat):
        """(B, T, n * width) -> (B, T, n, width)."""
        return flat.unflatten(-1, (-1, self.width))

    def to_heads(self, t, ctx):
        """Queries or keys (B, T, n, width) -> normalised, rotated, (B, n, T, width)."""
        return self.rotate(self.normalise(t), ctx).transpose(1, 2)

    def attend(self, flat, ctx):
        """Queries, keys and values (B, T, C + 2 G D) -> what each token attends to, (B, T, C)."""
        qk, v = self.by_head(flat).split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = self.to_heads(qk, ctx).split((self.heads, self.kv_heads), dim=1)
        k, v, mask = ctx.extend(self.layer, k, v.transpose(1, 2))
        y = self.attention(self.query_gain(q), k, v, mask, self.dropout * self.training)
        return y.transpose(1, 2).flatten(2)

    def emit_attention(self, p, qkv, alone=False):
        """Append what `attend` computes of queries, keys and values; alone: see Program.attend."""
        return p.attend(qkv, self.layer, self.heads, self.width, EPS if self.normalised else None,
                        p.rotation if self.rotate is rotate else None,
                        getattr(self.query_gain, "weight", None), alone)

    def emit_kv(self, p, x):
        """Append `write_kv` of x."""
        self.emit_attention(p, self.c_attn.emit_some(p, x, slice(self.heads * self.width, None)), alone=True)

    def write_kv(self, x, ctx):
        """The keys and values of x (B, T, C) alone -> what ctx.extend makes of them."""
        k, v = self.by_head(self.c_attn.some(x, slice(x.size(-1), None))).chunk(2, dim=2)
        return ctx.extend(self.layer, self.to_heads(k, ctx), v.transpose(1, 2))


class GELU(nn.Module):
    """GPT-2's activation in its exact form (1606.08415)."""
    name = "gelu"

    def forward(self, x, rows=None):
        return F.gelu(x)


class TanhGELU(nn.Module):
    """The approximation by tanh that OpenAI's GPT-2 was trained with (1606.08415)."""
    name = "gelu_tanh"

    def forward(self, x, rows=None):
        return F.gelu(x, approximate="tanh")


class ReLU2(nn.Module):
    """max(x, 0) squared (2109.08668): cheap, and most units are exactly zero."""
    name = "relu2"

    def forward(self, x, rows=None):
        return relu2(x)


def residual_std(config):
    """Init of the projections into the residual stream: scaled down by their number (GPT-2), or zero."""
    return 0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer)


def cross_entropy(logits, targets):
    """Mean over the targets (B, T) that are not -1, in nats."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


class LossInChunks(torch.autograd.Function):
    """`cross_entropy` of the head's logits, of which only a chunk of tokens' exists at a time: its loss and
    what the loss does to states and matrix are computed together, and backward scales them (2410.10989).

    In bf16 a compiled model's gradients are several per cent from an eager one's, with chunks or without: the
    compiler rounds less, and is nearer to fp32.
    """

    @staticmethod
    def check(c):
        require(c.loss_chunks >= 0, f"loss_chunks={c.loss_chunks} must be 1 or more; 0 is off")
        require(not (c.loss_chunks and c.exits), f"exits='{c.exits}' and loss_chunks={c.loss_chunks}: exits "
                "learn from the logits of all tokens at once; leave --loss_chunks out")

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, cap, learns):
        """x (n, C), weight (V, C), targets (n,), cap of the logits or 0, learns: are gradients of (x, weight)
        wanted? -> the mean over targets that are not -1, 0-dim in fp32."""
        size = max(1, -(-len(x) // chunks))
        ctx.up, down = (64.0, 2.0 ** -math.ceil(math.log2(size))) if x.dtype == torch.float16 else (1.0, 1.0)
        matrix, ids = weight.to(x.dtype), torch.arange(len(weight), device=x.device)
        total, parts = torch.zeros((), device=x.device), []
        dw = torch.zeros_like(weight, dtype=torch.float32) if learns[1] else None
        for rows, aims in zip(x.split(size), targets.split(size)):
            loss, slope = loss_and_slope(project(rows, matrix, None).float(), aims, ids, cap, any(learns))
            total = total + loss
            if any(learns):
                slope = (slope * ctx.up if ctx.up > 1 else slope).to(x.dtype)
            if learns[0]:
                parts.append(kernels.in_fp32(torch.mm, slope, matrix).to(x.dtype))
            if learns[1]:
                rows = rows * down if down < 1 else rows       # fp16 holds neither large sums nor small parts
                dw.add_(kernels.in_fp32(torch.mm, slope.T, rows), alpha=1 / (ctx.up * down))
        count = (targets != -1).sum()
        ctx.save_for_backward(torch.cat(parts) if learns[0] else None, dw, count)
        ctx.kept = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, gradient):
        dx, dw, count = ctx.saved_tensors
        factor = gradient / count
        dx = dx if dx is None else (dx.float() * (factor / ctx.up)).to(dx.dtype)
        dw = dw if dw is None else (dw * factor).to(ctx.kept)
        return dx, dw, None, None, None, None


def loss_and_slope(logits, targets, ids, cap, learns):
    """Logits (n, V) in fp32, which are overwritten, targets (n,), ids (V,): 0..V-1 -> (summed loss of the
    targets that are not -1, its gradient (n, V), or None where nothing learns)."""
    capped = soft_cap(cap, logits) if cap else logits
    counts, norms = (targets != -1)[:, None], capped.logsumexp(-1, keepdim=True)
    aims = torch.where(counts, targets[:, None], 0)
    total = torch.where(counts, norms - capped.gather(1, aims), 0).sum()
    if not learns:
        return total, None
    bends = (1 - (capped / cap).square()) * counts if cap else counts
    return total, capped.sub_(norms).exp_().add_(ids == aims, alpha=-1).mul_(bends)


def loss_in_chunks(x, weight, targets, chunks, cap):
    """`cross_entropy` of the logits of states x (B, T, C), in so many chunks of tokens."""
    learns = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    return LossInChunks.apply(x.flatten(0, 1), weight, targets.reshape(-1), chunks, cap, learns)


def soft_cap(cap, logits):
    """Bound logits to (-cap, cap) smoothly (2408.00118)."""
    return cap * torch.tanh(logits / cap)


def normal_by_name_(tensor, std, seed, name):
    """Fill with normals of a generator that only (seed, name) decide."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(key)).mul_(std))


# whose flags a GPTConfig is asked about, by their `check`
CHECKED = (QueryGain, TwoOfFour, Screened, Attention, LargestInputs, RotaryPositions, LayerNorm,
           LossInChunks)
