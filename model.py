"""GPT: nanoGPT's GPT-2, bit for bit at its defaults, with a slot for every part that a flag may exchange.

Flags are read in constructors only; a block's forward is the same sentence for every model. To add a mechanism: one class,
one entry in the slot dict below, one field of GPTConfig, one row in tests/arms.py, one file in config/.
GPT-2: Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

import decoding
from configurator import require

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

# dense bf16 peak (fp16 before Ampere), fp32 accumulation, FLOP/s, from the vendor's data sheets; the first name that fits wins
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "V100": 112e12, "T4": 65e12, "RTX 5090": 209e12, "RTX 5080": 113e12, "RTX 5070 Ti": 88e12,
    "RTX 5070": 62e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 4070 Ti": 80e12, "RTX 4070": 58e12, "RTX 4060": 30e12,
    "RTX 3090": 71e12, "RTX 3080": 60e12, "RTX 3070": 41e12, "RTX 3060": 25e12,
}


@dataclass(frozen=True)
class GPTConfig:
    """What a model is made of. The first seven are nanoGPT's; the default of every other one is the plain GPT-2."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # number of token ids; GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block; divides n_embd
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # share of activations dropped in training; 0 is good for pretraining, 0.1+ for finetuning
    bias: bool = True  # biases in Linears and LayerNorms, like GPT-2; False: a bit better and faster

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)} must be at least 1")
        require(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: type "
                f"--n_embd={self.n_head * max(1, round(self.n_embd / self.n_head))}, for example")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")

    def model_args(self):
        """The keyword arguments that rebuild this config: nanoGPT's seven keys, and those that differ from their default."""
        return {f.name: getattr(self, f.name) for i, f in enumerate(dataclasses.fields(GPTConfig))
                if i < 7 or getattr(self, f.name) != f.default}


class Context:
    """What one call carries past the blocks: positions, the attention mask, auxiliary losses.

    positions: a slice or a (B, T) tensor of indices into the position table. mask: None (causal) or (B or 1, 1, T, S) bool.
    decoding.CachedContext is the same with a KV cache behind it.
    """
    mask = None

    def __init__(self, positions):
        self.positions = positions
        self.losses = []

    def extend(self, layer, k, v):
        """Keys and values (B, H, T, D) of this call -> all that the queries may look at, (B, H, S, D)."""
        return k, v


def cast(tensor, dtype):
    return tensor if tensor is None else tensor.to(dtype)


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype: fp32 master weights serve a bf16 stream without autocast."""

    def __init__(self, n_in, n_out, bias, std=0.02):
        self.std = std
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self):
        pass                                    # drawn once, by name, in GPT.init_weights

    def init_weights(self, normal_):
        normal_(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), cast(self.bias, x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding drawn by name (std 0.02, GPT-2)."""

    def reset_parameters(self):
        pass

    def init_weights(self, normal_):
        normal_(self.weight, 0.02)


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; statistics in fp32 whatever the stream's dtype (1607.06450)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), cast(self.bias, x.dtype), 1e-5)


def attend(q, k, v, mask, dropout):
    """Softmax attention of queries (B, H, T, D) over (B, H, S, D) -> (B, H, T, D).

    mask: bool (B or 1, 1, T, S), or None: causal where T == S, everything where T == 1.
    On a CPU in bf16 the fused kernel is slower than three plain matmuls up to a few hundred keys, so length decides there.
    """
    causal = mask is None and q.size(2) > 1
    if causal and q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.size(2) <= 256:
        return attend_short(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def attend_short(q, k, v, dropout):
    """Causal attention as baddbmm, softmax, bmm over flattened heads; T == S."""
    B, H, T, D = q.shape
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D ** -0.5).softmax(-1)
    return torch.bmm(F.dropout(weights, dropout), v).view(B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention, q, k and v in one projection (1706.03762)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, std=residual_std(config))
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        k, v = ctx.extend(self.layer, k, v)
        y = attend(q, k, v, ctx.mask, self.dropout * self.training)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two projections with an activation between them, four times as wide as the stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.act = nn.GELU()
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias, std=residual_std(config))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


def residual_std(config):
    """Init of the projections that write to the residual stream: scaled down by their number (GPT-2)."""
    return 0.02 / math.sqrt(2 * config.n_layer)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, layer)

    def forward(self, x, ctx):
        x = x + self.attn(self.ln_1(x), ctx)
        x = x + self.mlp(self.ln_2(x), ctx)
        return x


class GPT(nn.Module):
    """A decoder-only transformer with nanoGPT's interface, parameter names and shapes.

    config: GPTConfig. init=False leaves the weights unset for a state dict that is loaded next. Every tensor is drawn from
    its own generator, seeded by `seed` (default: torch's current seed) and the parameter's name, so two models that differ
    in one mechanism share every other weight bit for bit.
    compute_dtype: dtype of the residual stream and the matmuls; None means the weights' own.
    """

    def __init__(self, config, init=True, seed=None):
        super().__init__()
        self.config = config
        self.compute_dtype = None
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.vocab_size, config.n_embd),
            wpe=Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=LayerNorm(config),
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight     # tied (1608.05859)
        if init:
            self.init_weights(torch.initial_seed() if seed is None else seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw every weight anew from (seed, name); each module knows its own scales."""
        for name, module in self.named_modules():
            if hasattr(module, "init_weights") and module is not self:
                module.init_weights(lambda tensor, std: normal_by_name_(tensor, std, seed, name))  # noqa: B023

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves the position table out (the token table is the head's matrix)."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() * non_embedding

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64, target -1 is ignored -> (logits, loss).

        With targets: logits (B, T, vocab_size), loss = cross-entropy in nats, plus auxiliary terms in training mode.
        Without: logits of the last position alone, (B, 1, vocab_size), and None.
        """
        T, longest = idx.size(1), self.config.block_size
        if T > longest:
            raise ValueError(f"a sequence of {T} tokens does not fit block_size={longest}: crop it to its last {longest}")
        ctx = Context(slice(0, T))
        x = self.trunk(idx, ctx)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss + self.training * sum(ctx.losses)

    def trunk(self, idx, ctx):
        """Token ids (B, T) -> normalised states (B, T, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[ctx.positions]
        x = self.transformer.drop(x.to(self.compute_dtype or x.dtype))
        for block in self.transformer.h:
            x = block(x, ctx)
        return self.transformer.ln_f(x)

    def head(self, x):
        """States -> logits in fp32."""
        return self.lm_head(x).float()

    def crop_block_size(self, block_size):
        """Shorten the context in place, for example of a pretrained GPT-2."""
        require(block_size <= self.config.block_size, f"block_size={block_size} is longer than the model's "
                f"{self.config.block_size}: type --block_size={self.config.block_size} or less")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """OpenAI's GPT-2 weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' through the transformers package, or a
        local Hugging Face GPT-2 folder. override_args may hold dropout alone, as in nanoGPT."""
        override = override_args or {}
        require(set(override) <= {"dropout"}, f"from_pretrained: {sorted(override)} cannot be overridden, only dropout can")
        args, weights = read_hf_folder(Path(model_type)) if Path(model_type).is_dir() else download_gpt2(model_type)
        model = cls(GPTConfig(**args, bias=True, **override), init=False)
        model.load_state_dict(from_hf_names(weights))
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW (1711.05101) in nanoGPT's two groups: tensors of two or more dimensions decay, gains and biases do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))

    def flops_per_token(self):
        """Training FLOPs per token, forward and backward (PaLM, 2204.02311, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Share of the device's peak FLOP/s that `fwdbwd_per_iter` sequences in `dt` seconds make; None: peak unknown."""
        device = self.lm_head.weight.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        return peak and self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, lengths=None, overflow="exact", **filters):
        """Continue token ids (B, T) by max_new_tokens -> (B, T + max_new_tokens), with a KV cache.

        lengths: (B,) ints where the prompts fill only the first lengths[b] columns of their rows; new tokens then follow
        each prompt directly, and the rest of the row is 0. temperature=0 is greedy. overflow and filters (top_p, min_p,
        repetition_penalty): see decoding.stream and decoding.Sampler. Call .eval() first.
        """
        sampler = decoding.Sampler(temperature=temperature, top_k=top_k, **filters)
        new = torch.cat(list(decoding.stream(self, idx, max_new_tokens, sampler, lengths, overflow)) or [idx[:, :0]], dim=1)
        return decoding.join(idx, new, lengths)


def normal_by_name_(tensor, std, seed, name):
    """Fill with normals of a generator that only (seed, name) decide."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(key)).mul_(std))


def download_gpt2(model_type):
    """GPT-2's config arguments and state dict through transformers."""
    require(model_type in GPT2_SIZES, f"'{model_type}' is neither a folder nor one of {', '.join(GPT2_SIZES)}")
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        require(False, f"'{model_type}' needs the transformers package ({error}): pip install transformers, or name a local "
                       "Hugging Face GPT-2 folder")
    try:
        weights = GPT2LMHeadModel.from_pretrained(model_type).state_dict()
    except OSError as error:
        require(False, f"'{model_type}' could not be downloaded ({str(error).splitlines()[0]}): without a network, name a "
                       "local Hugging Face GPT-2 folder (config.json, model.safetensors)")
    return dict(GPT2_SIZES[model_type], vocab_size=50257, block_size=1024), weights


def read_hf_folder(folder):
    """A Hugging Face GPT-2 folder (config.json with model.safetensors or pytorch_model.bin) -> (config args, state dict)."""
    require((folder / "config.json").is_file(), f"{folder} has no config.json: not a Hugging Face GPT-2 folder")
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    require(c.get("model_type") == "gpt2", f"{folder} holds a '{c.get('model_type')}' model, expected 'gpt2'")
    if (folder / "model.safetensors").is_file():
        try:
            from safetensors.torch import load_file
        except ImportError:
            require(False, f"{folder}/model.safetensors needs the safetensors package: pip install safetensors")
        weights = load_file(folder / "model.safetensors")
    else:
        require((folder / "pytorch_model.bin").is_file(), f"{folder} has neither model.safetensors nor pytorch_model.bin")
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return dict(n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"], vocab_size=c["vocab_size"],
                block_size=c["n_positions"]), weights


def from_hf_names(weights):
    """Hugging Face's GPT-2 state dict -> ours: the Conv1D matrices transposed, mask buffers dropped, the head tied."""
    out = {}
    for name, tensor in weights.items():
        name = "transformer." + name.removeprefix("transformer.") if not name.startswith("lm_head") else name
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        out[name] = tensor.t() if conv1d else tensor
    out["lm_head.weight"] = out["transformer.wte.weight"]
    return out
