"""GPT: nanoGPT's GPT-2, bit for bit at its defaults, with a slot for every part that a flag may exchange.

Flags are read in constructors only; a block's forward is the same sentence for every model.
To add a mechanism: one class, one entry in the slot dict below, one field of GPTConfig, one row in
tests/arms.py, one file in config/.
GPT-2: Radford et al. 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""
import dataclasses
import functools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

import bio_modules
import layers
import sparse_kernels as kernels
from bio_modules import (
    ACTS,
    DEPTHS,
    GATED,
    MLP,
    MLPS,
    DendriticAttention,
    Halting,
    SwiGLU,
    all_layers,
    emit_layers,
)
from configurator import ConfigError, require
from decode import counters, engine, sampling
from decode.context import Choices, Context
from decode.quantized import quantize
from layers import (
    Attention,
    Embedding,
    LayerNorm,
    LearnedPositions,
    Linear,
    NgramEmbedding,
    RMSNorm,
    RotaryPositions,
    Screened,
    as_is,
    attention_linear,
    check_pruned,
    cross_entropy,
    loss_in_chunks,
    normal_by_name_,
    residual_std,
    settle,
    soft_cap,
)
from training import continual, energy, optimizers, pretrained
from training.pretrained import GPT2_SIZES, is_tied
from training.runtime import peak_flops

SIZES = {
    "small": dict(n_layer=6, n_head=8, n_embd=512),
    "medium": dict(n_layer=12, n_head=16, n_embd=1024),
    "large": dict(n_layer=24, n_head=24, n_embd=1536),
    "xlarge": dict(n_layer=48, n_head=32, n_embd=2048),
} | GPT2_SIZES


@dataclass(frozen=True)
class GPTConfig:
    """What a model is made of. The first seven are nanoGPT's; every other default is the plain GPT-2."""
    # --- model: shape ---
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # number of token ids; GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block; divides n_embd
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # share of activations dropped in training; 0 for pretraining, 0.1+ for finetuning
    bias: bool = True  # biases in Linears and norms, like GPT-2; False: a bit better and faster
    # --- model: architecture switches ---
    norm: str = "layernorm"  # layernorm or rmsnorm
    pos: str = "learned"  # position table (learned), or rotation of queries and keys (rope)
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    qk_gain: float = 0.0  # learned factor of each head's normalised queries, from this on; 0: none
    act: str = "gelu"  # activation of the MLP: gelu, gelu_tanh (OpenAI's), relu2, swiglu (8/3 as wide), osc
    softcap: float = 0.0  # bound logits to (-softcap, softcap) by tanh; 0: off
    zero_init: bool = False  # start the projections into the residual stream, and an untied head, at zero
    tie_weights: bool = True  # one matrix for the token embedding and the head
    ngram_buckets: int = 0  # rows of a hashed n-gram table added to the embedding; 0: off
    ngram_order: int = 3  # longest n-gram in that table
    recompute: bool = False  # recompute activations in the backward pass: less memory, a third more compute
    loss_chunks: int = 0  # in training head and loss in so many parts of the tokens: less memory; 0: off
    weights: str = "dense"  # 2:4: of every four weights of an output two are kept; packed when decoding
    sr_ste: float = 2e-4  # how strongly training pulls pruned weights of 2:4 towards zero
    screen: bool = False  # decoding looks at 8 bits of the head first, then at rows that can win: same tokens
    n_kv_head: int = 0  # heads of keys and values, each for n_head / n_kv_head queries (GQA); 0: one each
    rope_theta: float = 10000.0  # base of the wavelengths of pos=rope: larger for longer contexts
    rope_factor: float = 0.0  # Llama 3.1's rotation: how many times slower slow frequencies turn; 0: off
    rope_low: float = 1.0  # those are slow that turn fewer times than that in rope_original positions
    rope_high: float = 4.0  # those of so many turns and more stay; between the two it goes over evenly
    rope_original: int = 8192  # positions of the training that a model with rope_factor has had before
    norm_eps: float = 0.0  # added to a norm's mean square; 0: 1e-5 in layernorm, 1e-6 in rmsnorm
    mlp_units: int = 0  # hidden units of the MLP; 0: 4 * n_embd (swiglu: 8/3 * n_embd, rounded up to 64)
    # --- block: the largest units fire ---
    mlp_topk: float = 1.0  # share of the MLP's units left firing per token, the largest ones
    mlp_topk_group: int = 0  # winners in groups of so many neighbours (4, mlp_topk=0.5: 2 of 4); 0: of all
    gate_first: bool = False  # swiglu: units are chosen by their gate alone, before the up projection
    # --- block: event gates ---
    event_gate: bool = False  # units fire only above a learned threshold of their own
    event_rate: float = 0.1  # the share of units that the event gates aim at
    event_cost: float = 0.1  # weight of that aim in the loss
    # --- block: cortical columns ---
    columns: int = 0  # cortical columns: the units in so many groups, gated before the up projection; 0: off
    columns_active: int = 0  # columns that answer each token
    # --- block: dendritic MLP ---
    compartments: int = 0  # dendritic branches of each MLP, which each see a part of the stream; 0: off
    # --- block: routed experts ---
    experts: int = 0  # routed experts; 0: off
    experts_active: int = 0  # experts that each token visits
    expert_width: int = 0  # units of an expert; 0: a dense MLP's units divided by experts
    # --- block: predicted units ---
    mlp_predict: int = 0  # rank of a predictor of the winners of mlp_topk, for decoding; 0: off
    mlp_active: float = 0.2  # share of the units that the predictor picks
    # --- block: screened units ---
    mlp_screen: int = 0  # bits of a copy of W_up (swiglu: of W_gate; 16: itself) that picks the units read
    mlp_live: float = 0.15  # mean share of the units that it picks; 0: all that fire by themselves
    # --- block: the larger inputs of attention ---
    attn_topk: float = 1.0  # share of the inputs that attention's projections read per token, the largest
    # --- block: windows ---
    window: int = 0  # tokens that a local layer sees, itself included; 0: all layers see everything
    window_pattern: str = "SSSL"  # layers in turn: S sees the window, L everything
    # --- block: dendritic attention ---
    dendrites: int = 0  # dendritic branches of each head, gated per token; 0: off
    dendrites_active: int = 0  # branches that each token may open
    dendrite_cost: float = 0.1  # weight in the loss of the aim that so many are open
    # --- block: hierarchy ---
    hierarchy: int = 0  # tokens in a group that the middle layers run on; 0: off
    # --- block: early exits ---
    exits: str = ""  # layers after which a token may be done, such as "2,4"
    exit_cost: float = 0.5  # weight of the exits' losses together, each in proportion to its depth
    exit_threshold: float = 0.9  # how sure an exit's probe must be for a token to leave
    # --- block: pondering ---
    ponder: int = 0  # most runs of the middle layer's block, as many as each token needs; 0: off
    ponder_cost: float = 0.01  # weight in the loss of the mean number of runs
    # --- block: random depth ---
    layer_dropout: float = 0.0  # in training, share of sequences that skip the last layer; less the earlier
    # --- block: adapters ---
    adapters: str = ""  # names of bottlenecks behind each block, by commas, one for each task or language
    adapter_width: int = 16  # their units
    # --- block: an energy budget ---
    energy_budget: float = 0.0  # share of what all gates can close that they may leave open; 0: off
    energy_cost: float = 0.5  # weight of that aim in the loss

    def __post_init__(self):
        for key, slot in (("norm", NORMS), ("pos", POSITIONS), ("act", [*ACTS, "swiglu"])):
            require(getattr(self, key) in slot, f"{key}='{getattr(self, key)}' must be {' or '.join(slot)}")
        require(self.softcap >= 0 and self.ngram_buckets >= 0, f"softcap={self.softcap} and "
                f"ngram_buckets={self.ngram_buckets} must not be negative; 0 is off")
        require(2 <= self.ngram_order <= 8, f"ngram_order={self.ngram_order} must be in 2..8")
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)} must be at least 1")
        require(self.n_embd % self.n_head == 0,
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: type "
                f"--n_embd={self.n_head * max(1, round(self.n_embd / self.n_head))}, for example")
        require(self.pos != "rope" or self.n_embd // self.n_head % 2 == 0,
                f"pos='rope' rotates pairs: n_embd/n_head={self.n_embd // self.n_head} must be even")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        for mechanism in (*layers.CHECKED, *bio_modules.CHECKED):
            mechanism.check(self)
        continual.check_adapters(self)
        energy.check(self)

    def heads(self):
        """Heads that attend on their own, and the width of each: a branch of a head is one."""
        heads = self.n_head * max(1, self.dendrites)
        return heads, self.n_embd // heads

    def kv_heads(self):
        """How many of them have keys and values of their own; heads that are neighbours share."""
        return (self.n_kv_head or self.n_head) * max(1, self.dendrites)

    def exit_layers(self):
        """The numbers in `exits`."""
        return [int(depth) for depth in self.exits.split(",")] if self.exits else []

    def adapter_names(self):
        """The different names in `adapters`."""
        return list(dict.fromkeys(self.adapters.split(","))) if self.adapters else []

    def pondering_layer(self):
        return self.n_layer // 2

    def outer_layers(self):
        """How many layers at each end run on every token; those between them run on groups."""
        return max(1, self.n_layer // 4) if self.hierarchy else self.n_layer

    def columns_of_layers(self, tokens):
        """For each layer, how many columns so many tokens make: tokens, or their completed groups."""
        outer, every = self.outer_layers(), max(1, self.hierarchy)
        return [tokens if min(i, self.n_layer - 1 - i) < outer else tokens // every
                for i in range(self.n_layer)]

    def window_of(self, layer):
        """Columns that a layer sees, 0: all of them."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] == "S" else 0

    def units(self):
        """Hidden units of an MLP."""
        dense = {"swiglu": -(-8 * self.n_embd // 3 // 64) * 64}.get(self.act, 4 * self.n_embd)
        return self.mlp_units or dense

    def model_args(self):
        """Keyword arguments that rebuild this config: nanoGPT's seven, and those not at their default."""
        return {f.name: getattr(self, f.name) for i, f in enumerate(dataclasses.fields(GPTConfig))
                if i < 7 or getattr(self, f.name) != f.default}


class CausalSelfAttention(Attention):
    """Multi-head causal attention, q, k and v in one projection (1706.03762)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.c_proj = attention_linear(config)(config.n_embd, config.n_embd, config.bias,
                                               std=residual_std(config))

    def forward(self, x, ctx):
        return self.resid_dropout(self.c_proj(self.attend(self.c_attn(x), ctx)))

    def emit(self, p, x, onto):
        return self.c_proj.emit(p, self.emit_attention(p, self.c_attn.emit(p, x)), onto=onto)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
POSITIONS = {"learned": LearnedPositions, "rope": RotaryPositions}


def depth(config):
    """How tokens pass the blocks, where that is not straight: {flag: module}."""
    return {flag: DEPTHS[flag](config) for flag in DEPTHS if getattr(config, flag)}


def mlp(config, layer):
    """The MLP that the flags choose: one of the bio blocks, SwiGLU, or the dense one."""
    kinds, plain = (GATED, SwiGLU) if config.act == "swiglu" else (MLPS, MLP)
    return next((kinds[flag] for flag in kinds if getattr(config, flag)), plain)(config, layer)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = (DendriticAttention if config.dendrites else CausalSelfAttention)(config, layer)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = mlp(config, layer)
        self.adapt = continual.adapters(config)

    def forward(self, x, ctx):
        x = x + self.attn(self.ln_1(x), ctx)
        x = x + self.mlp(self.ln_2(x), ctx)
        return self.adapt(x, ctx)

    def emit(self, p, x):
        """Append the block to a decode program -> where its result lies: in place of x."""
        ops = engine.ops_of
        p.module = f"layer {self.attn.layer} attention"
        x = ops(self.attn)(p, ops(self.ln_1)(p, x), onto=x)
        p.module = f"layer {self.attn.layer} MLP"
        x = ops(self.mlp)(p, ops(self.ln_2)(p, x), onto=x)
        if self.adapt is as_is:
            return x
        p.module = f"layer {self.attn.layer} adapter"
        return ops(self.adapt)(p, x)

    def emit_kv(self, p, x):
        """Append `write_kv`."""
        p.module = f"layer {self.attn.layer} attention"
        self.attn.emit_kv(p, self.ln_1.emit(p, x))

    def write_kv(self, x, ctx):
        """Only what later tokens may look at: keys and values of x (B, T, C)."""
        self.attn.write_kv(self.ln_1(x), ctx)


class PonderingBlock(Block):
    """A block that is run again on tokens that have not halted."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.halting = Halting(config)

    def start_from_dense(self, dense, x):
        """See training/retrofit.py."""
        if not isinstance(dense, PonderingBlock):
            self.halting.start_from()

    def forward(self, x, ctx):
        return self.halting(x, ctx, self.attn, super().forward)

    def emit(self, p, x):
        return self.halting.emit(p, x, self.attn.layer, super().emit)


class RecomputedBlock(Block):
    """A block that keeps only its input for the backward pass and computes the rest again (1604.06174)."""

    def forward(self, x, ctx):
        return activation_checkpoint(super().forward, x, ctx, use_reentrant=False)

    emit = Block.emit


def block_of(config, layer):
    """The class of a layer."""
    if config.ponder and layer == config.pondering_layer():
        return PonderingBlock
    return RecomputedBlock if config.recompute else Block


@functools.cache
def training_macs(config, layers):
    """counters.count_training of a whole block of tokens through so many layers: on a model without
    weights, because shapes decide it."""
    with torch.device("meta"):
        twin = GPT(dataclasses.replace(config, recompute=False, loss_chunks=0, dropout=0.0,
                                       layer_dropout=0.0), init=False)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
    twin.use_layers(layers)
    return counters.count_training(twin, idx)


class GPT(nn.Module):
    """A decoder-only transformer with nanoGPT's interface, parameter names and shapes.

    config: GPTConfig. init=False leaves the weights unset for a state dict that is loaded next. Every tensor
    is drawn from its own generator, seeded by `seed` (default: torch's current seed) and the parameter's
    name, so two models that differ in one mechanism share every other weight bit for bit.
    compute_dtype: dtype of the residual stream and the matmuls; None means the weights' own.
    auxiliary: what mechanisms added to the last training forward's cross-entropy; None: nothing.
    """

    def __init__(self, config, init=True, seed=None):
        super().__init__()
        self.config = config
        self.compute_dtype, self.choices, self.auxiliary = None, Choices(), 0
        self.transformer = nn.ModuleDict(dict(
            wte=(NgramEmbedding if config.ngram_buckets else Embedding)(config),
            wpe=POSITIONS[config.pos](config),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([block_of(config, i)(config, i) for i in range(config.n_layer)]),
            ln_f=NORMS[config.norm](config),
        ) | depth(config))
        self.blocks = list(self.transformer.h)   # those in use, see use_layers
        self.lm_head = (Screened if config.screen else Linear)(
            config.n_embd, config.vocab_size, bias=False,
            std=0.02 * (config.tie_weights or not config.zero_init))
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight  # 1608.05859
        check_pruned(self, config)
        self.cap = partial(soft_cap, config.softcap) if config.softcap else as_is
        self.loss_of_states = config.loss_chunks and partial(loss_in_chunks, chunks=config.loss_chunks,
                                                             cap=config.softcap)
        self.over_budget = energy.budget(config)
        if init:
            self.init_weights(torch.initial_seed() if seed is None else seed)

    @property
    def depth_policy(self):
        """How tokens pass the blocks; transformer holds it, so that a state dict names each tensor once."""
        return next((self.transformer[name] for name in DEPTHS if name in self.transformer), all_layers)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw a new model's random weights from (seed, their name); each module knows its own scales. Gains
        and n-gram tables keep the ones and zeros they were made with."""
        names = {}
        for name, p in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), name)     # a tied matrix keeps its first name: untying does not redraw it
        for module in self.modules():
            if hasattr(module, "init_weights") and module is not self:
                module.init_weights(lambda p, std: normal_by_name_(p, std, seed, names[id(p)]))

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out positions (the token table is the head's matrix)."""
        count = sum(p.numel() for p in self.parameters())
        return count - sum(p.numel() for p in self.transformer.wpe.parameters()) * non_embedding

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64, target -1 is ignored -> (logits, loss).

        With targets: logits (B, T, vocab_size), cross-entropy in nats, in training mode with auxiliary terms;
        with loss_chunks no logits, but None, in training mode or where `choose(loss_alone=True)` said so.
        Without: logits of the last position alone, (B, 1, vocab_size), and None.
        """
        ctx = Context(self.positions(idx.size(1)), self.training, self.chosen(len(idx)))
        x = self.trunk(idx, ctx)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits, loss = self.logits_and_loss(x, targets)
        also = *(ctx.losses or ()), *self.exit_losses(ctx, logits, targets), *self.over_budget(ctx)
        self.auxiliary = sum(term.detach() for term in also)           # what a log shows apart
        return logits, sum(also, start=loss)

    def logits_and_loss(self, x, targets):
        """Normalised states (B, T, C), targets (B, T) -> (logits or None, cross-entropy)."""
        if self.loss_of_states and (self.training or self.choices.loss_alone):
            return None, self.loss_of_states(x, self.lm_head.matrix(), targets)
        logits = self.head(x)
        return logits, cross_entropy(logits, targets)

    def exit_losses(self, ctx, logits, targets):
        """What early exits add in training; nothing where no state has left."""
        return (self.depth_policy.losses(ctx.exit_states, self.logits_of, logits, targets)
                if ctx.exit_states else ())

    def positions(self, T):
        """Where a sequence of T tokens stands in the position table; ValueError if it is too long."""
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens does not fit block_size={self.config.block_size}: "
                             "crop it to its last tokens")
        return slice(0, T)

    def trunk(self, idx, ctx):
        """Token ids (B, T) -> normalised states (B, T, C)."""
        return self.transformer.ln_f(self.depth_policy(self.blocks, self.embed(idx, ctx), ctx))

    def emit(self, p, blocks=None):
        """Append all ops of a decode step, from the token to its logits (decode/engine.py). blocks: those
        that run; None: all."""
        positions = self.transformer.wpe
        p.rotation = positions.rotation
        x = self.transformer.wte.emit(p, positions.table())
        policy = self.depth_policy
        layers_of = emit_layers if policy is all_layers else engine.ops_of(policy)
        p.states = x = layers_of(blocks or self.blocks, p, x)
        p.module = "head"
        x = self.transformer.ln_f.emit(p, x)
        matrix = self.lm_head.emit_matrix(p, slice(p.ids))
        screens = isinstance(self.lm_head, Screened) and p.rows == 1 and p.wants and p.wants < p.ids
        copy = screens and p.cache.copy_of(self.lm_head, partial(kernels.copy_in_8_bits, self.lm_head.weight))
        p.logits(x, matrix, self.config.softcap, copy or None)

    def embed(self, idx, ctx):
        """Token ids (B, T) -> what enters the first block (B, T, C)."""
        x = self.transformer.wpe(self.transformer.wte(idx, ctx), ctx)
        return self.transformer.drop(x.to(self.compute_dtype or x.dtype))

    def logits_of(self, x):
        """States between blocks -> logits in fp32, as if no block followed."""
        return self.head(self.transformer.ln_f(x))

    def head(self, x):
        """States -> logits in fp32."""
        return self.cap(self.lm_head(x).float())

    def crop_block_size(self, block_size):
        """Shorten the context in place, for example of a pretrained GPT-2."""
        require(block_size <= self.config.block_size, f"block_size={block_size} is longer than the model's "
                f"{self.config.block_size}: type --block_size={self.config.block_size} or less")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        self.transformer.wpe.crop(block_size)

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """OpenAI's GPT-2 weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' through the transformers
        package, or a local Hugging Face folder of GPT-2 or of Llama's family or a file of weights in one,
        computed as transformers does or refused. override_args may hold dropout alone, as in nanoGPT."""
        override = override_args or {}
        require(set(override) <= {"dropout"},
                f"from_pretrained: {sorted(override)} cannot be overridden, only dropout can")
        args, weights = pretrained.read(model_type)
        config = GPTConfig(**{"bias": True} | args | override)
        with torch.device("meta"):              # a config.json that lies about sizes takes no memory
            expected = {name: t.shape for name, t in cls(config, init=False).state_dict().items()}
        pretrained.check_shapes(weights, expected, model_type)
        model = cls(config, init=False)
        model.load_state_dict(weights)
        return model

    def use_policy(self, on=True):
        """Switch shortcuts on that change the output (predicted units, early exits) -> self. They start off.
        """
        return self.choose(predict=on, leave_at=self.config.exit_threshold if on else None)

    def choose(self, **what):
        """Change what calls from now on do, see context.Choices -> self."""
        self.choices = self.choices._replace(**what)
        return self

    def chosen(self, rows):
        """What a call of so many rows does."""
        continual.check_rows(self.choices.adapters, rows)
        return self.choices

    @torch.no_grad()
    def begin_with_layers(self, count):
        """Zero what blocks from `count` on add to the stream: each enters as the identity (1511.05641)."""
        for block in self.transformer.h[count:]:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                for p in part.parameters():
                    p.zero_()

    def use_layers(self, count):
        """Run the first `count` blocks alone; the others wait, without gradients."""
        self.blocks = list(self.transformer.h)[:count]

    def anneal(self, progress):
        """Tell the mechanisms that follow a schedule how much of it has passed, in [0, 1]."""
        for module in self.modules():
            if hasattr(module, "anneal") and module is not self:
                module.anneal(progress)

    def regularise(self):
        """Add to the gradients what modules pull their weights to whatever the data are: once a step, behind
        all backwards and on unscaled gradients, before they are clipped. A training loop calls it."""
        for module in self.modules():
            if hasattr(module, "regularise") and module is not self:
                module.regularise()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in nanoGPT's two groups, see optimizers.adamw."""
        return optimizers.adamw([p for p in self.parameters() if p.requires_grad],
                                weight_decay, learning_rate, betas, device_type)

    def flops_per_token(self):
        """Training FLOPs per token, forward and backward: six for each multiply-add of matrices and attention
        that a forward executes (PaLM, 2204.02311, appendix B). Gains and biases, which nanoGPT counts too,
        are not among them: 0.1% at GPT-2's shape. A block that ponders counts as often as its tokens have
        been run so far; all its runs where none has been, or a compiler executes them all.
        """
        macs, pondered = training_macs(self.config, len(self.blocks))
        for halting in (block.halting for block in self.blocks if hasattr(block, "halting")):
            runs = halting.steps_run / halting.tokens_run if halting.tokens_run else halting.most
            macs -= pondered * (1 - runs / halting.most)
        return round(6 * macs / self.config.block_size)

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Share of the device's peak FLOP/s that fwdbwd_per_iter sequences in dt s make; None: unknown."""
        peak = peak_flops(self.lm_head.weight.device)
        return peak and self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, lengths=None, overflow="exact",
                 **filters):
        """Continue token ids (B, T) by max_new_tokens -> (B, T + max_new_tokens), with a KV cache.

        lengths: (B,) ints where the prompts fill only the first lengths[b] columns of their rows; new tokens
        then follow each prompt directly, and the rest of the row is 0. temperature=0 is greedy. overflow and
        filters (top_p, min_p, repetition_penalty; draws="torch", or "engine" for draws by a counter): see
        sampling.stream and sampling.Sampler. Call .eval() first.
        """
        sampler = sampling.Sampler(temperature=temperature, top_k=top_k, **filters)
        new = torch.cat(list(sampling.stream(self, idx, max_new_tokens, sampler, lengths, overflow))
                        or [idx[:, :0]], dim=1)
        return sampling.join(idx, new, lengths)


def config_of(checkpoint, path, **overrides):
    """The config of a checkpoint's model; overrides replace model arguments."""
    for field in dataclasses.fields(GPTConfig):
        value, kind = checkpoint["model_args"].get(field.name, field.default), type(field.default)
        require(type(value) is kind or (kind is float and type(value) is int),
                f"{path}: model_args and weights do not fit this version ({field.name}={str(value)[:40]!r}, "
                f"expected {kind.__name__})")
    try:
        return GPTConfig(**{**checkpoint["model_args"], **overrides})
    except (TypeError, ConfigError) as error:
        raise misfit(path, error) from error


def misfit(path, error):
    return ConfigError(f"{path}: model_args and weights do not fit this version "
                       f"({str(error).splitlines()[-1].strip()})")


def build_model(checkpoint, path, learns=False, **overrides):
    """A checkpoint's model; overrides replace model arguments that do not change shapes (dropout). learns:
    it is to be trained, so packed weights will not do."""
    config = config_of(checkpoint, path, **overrides)
    packed = any(key.endswith(".meta") for key in checkpoint["model"])
    kind = checkpoint.get("quantize")
    require(not (kind and learns), f"{path} holds quantised weights, which cannot learn: name the checkpoint "
                                   "that was quantised")
    require(not (packed and learns), f"{path} holds packed 2:4 weights, which cannot learn: name the "
                                     "checkpoint that was packed")
    try:
        model = GPT(config, init=packed)
        model = settle(model) if packed else model
        model = quantize(model, kind, empty=True) if kind else model
        model.load_state_dict(checkpoint["model"])
        require(kind or not model.config.tie_weights or is_tied(checkpoint["model"]),
                "tie_weights=True, but its head is not its embedding")
    except (TypeError, RuntimeError, ConfigError) as error:
        raise misfit(path, error) from error
    return model
