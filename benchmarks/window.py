"""Local attention beside full: a layer's training pass, a decoded token at every context."""
import statistics
from dataclasses import dataclass
from functools import partial

import torch

import layers
import sparse_kernels
from benchmarks import Timed
from benchmarks.arms import twin_of
from benchmarks.record import CAUSAL
from benchmarks.timing import interleave, measurement, milliseconds
from configurator import require
from decode.context import Cache, CachedContext
from model import GPT, GPTConfig
from viz.figures import drawing

MASKED, LOCAL = "SDPA with the window as a mask", "window"
BLOCKS = "in blocks: the window"                 # on a card, where it may be FlexAttention
LAYERS = dict(n_layer=4, n_head=12, n_embd=768, vocab_size=256, bias=False, pos="rope")  # decoded by window


@dataclass(frozen=True)
class Window(Timed):
    """Local attention beside full: forward and backward, and a decoded token's time and memory by context."""
    threads: int = 1  # CPU threads; more than one collapse where the machine is shared
    tokens: int = 2048  # tokens of the forward and backward pass
    window: int = 128  # tokens that each of them sees
    heads: int = 12  # attention heads, 64 wide each
    contexts: str = "1024,2048,4096,8192,16384"  # tokens before the decoded one, by commas
    device: str = "cpu"  # cpu, cuda, mps
    plot: str = ""  # also draw time and memory against the context into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.window >= 1 and self.tokens >= 1 and self.heads >= 1,
                f"tokens={self.tokens}, window={self.window} and heads={self.heads} must be at least 1")
        require(all(n.isdigit() and int(n) >= 1 for n in self.contexts.split(",")),
                f"contexts='{self.contexts}' must be numbers by commas: type --contexts=1024,4096")


def window(cfg):
    device, sides, unlike = torch.device(cfg.device), {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        parts, ending = torch.randn(4, 1, cfg.heads, cfg.tokens, 64, device=device), str(dtype)[6:]
        unlike[ending] = difference(cfg, parts.to(dtype))
        parts = parts.to(dtype).unbind(0)
        for name, attend in attentions(cfg).items():
            sides[f"{name}, {ending}"] = partial(there_and_back, attend, *parts)
    ms = milliseconds(interleave(sides, cfg.repeats, device=device, cold=cfg.cold))
    layer = measurement("ms", ms)
    layer["against"] = {name: statistics.median(ms[name.replace(LOCAL, CAUSAL)]) / statistics.median(values)
                        for name, values in ms.items() if name.startswith(LOCAL)}
    print(f"attention over {cfg.tokens} tokens, {cfg.heads} heads of 64, window {cfg.window}, forward and "
          "backward, ms: median (min to max)")
    for name, s in layer["sides"].items():
        faster = f"  {layer['against'][name]:.2f}x {CAUSAL}" if name in layer["against"] else ""
        print(f"  {name:42}{s['median']:8.2f}  ({s['min']:.2f} to {s['max']:.2f}){faster}")
    print("from blocks in fp32 it differs by " + ", ".join(f"{off:.1e} in {ending}"
                                                           for ending, off in unlike.items()))
    contexts = [int(n) for n in cfg.contexts.split(",")]
    steps, cached = {}, {}
    for side, flags in decoded_sides(cfg).items():
        model = GPT(GPTConfig(block_size=max(contexts), **flags), seed=0).eval()
        model.to(device, torch.bfloat16)
        for context in contexts:
            name = f"{side}, {context}"
            cache = Cache(model, 1, context)
            steps[name], cached[name] = partial(step_at, model, cache, context), cache.nbytes()
    seconds = interleave(steps, 4 * cfg.repeats, device=device, cold=cfg.cold)
    found = measurement("ms", milliseconds(seconds))
    print(f"one token of {LAYERS['n_layer']} layers, {LAYERS['n_embd']} wide, bf16, behind so many: ms "
          "(min to max), MiB of cache")
    for name, s in found["sides"].items():
        mib = cached[name] / 2**20
        print(f"  {name:16}{s['median']:8.2f}  ({s['min']:.2f} to {s['max']:.2f}){mib:10.2f}")
    if cfg.plot:
        draw_contexts(cfg.plot, contexts, found["sides"], cached)
    return {"measurements": {"layer": layer, "decoded token": found}, "cache_bytes": cached,
            "difference": unlike, "kernels": sparse_kernels.path_taken(device), "seeds": [0]}


def decoded_sides(cfg):
    """{side: flags} of the models that decode behind every context."""
    local = LAYERS | dict(window=cfg.window, window_pattern="S")
    return {"window": local, "full": twin_of(local)}


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every comparison."""
    return [tuple(decoded_sides(cfg).values())]


def attentions(cfg):
    """{side: function of q, k, v}."""
    tokens = torch.arange(cfg.tokens, device=cfg.device)
    age = tokens[:, None] - tokens
    seen = (age >= 0) & (age < cfg.window)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    blocks = {BLOCKS: partial(layers.attend_blocks, window=cfg.window, dropout=0.0)}
    return {CAUSAL: partial(sdpa, is_causal=True), MASKED: partial(sdpa, attn_mask=seen),
            LOCAL: lambda q, k, v: layers.attend_window(cfg.window, q, k, v, None, 0.0)
            } | (blocks if tokens.is_cuda else {})


def difference(cfg, parts):
    """How far the window's values and gradients of parts (4, 1, heads, tokens, 64): queries, keys, values and
    what backward begins with, are from those of blocks in fp32: the norm, as a share."""
    found = []
    for attend, of in ((partial(layers.attend_window, cfg.window, mask=None), parts),
                       (partial(layers.attend_blocks, window=cfg.window), parts.float())):
        q, k, v = (t.detach().requires_grad_() for t in of[:3])
        y = attend(q=q, k=k, v=v, dropout=0.0)
        y.backward(of[3])
        found.append(torch.stack([t.detach().float() for t in (y, q.grad, k.grad, v.grad)]))
    return float((found[0] - found[1]).norm() / found[1].norm())


def there_and_back(attend, q, k, v, weights):
    """Attention and its gradients."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    attend(q, k, v).backward(weights)


@torch.inference_mode()
def step_at(model, cache, context):
    """One cached decode step behind context - 1 tokens; what the cache holds does not change its work."""
    idx = torch.zeros(1, context, dtype=torch.int64, device=cache.layers[0].device)
    model.head(model.trunk(idx[:, -1:], CachedContext(cache, context - 1, 1, idx)))


def draw_contexts(path, contexts, sides, cached):
    """Time and cache of a decoded token against the context, with and without the window."""
    with drawing(path, columns=2, size=(9, 3.6)) as axes:
        for side, color in (("full", "black"), ("window", "tab:red")):
            names = [f"{side}, {context}" for context in contexts]
            axes[0].plot(contexts, [sides[name]["median"] for name in names], "o-", color=color, label=side)
            axes[1].plot(contexts, [cached[name] / 2**20 for name in names], "o-", color=color, label=side)
        for axis, label in zip(axes, ("ms a decoded token", "MiB of keys and values")):
            axis.set(xscale="log", xlabel="tokens before it", ylabel=label, ylim=(0, None))
            axis.set_xticks(contexts, [f"{n / 1024:g}k" for n in contexts], minor=False)
            axis.minorticks_off()
            axis.legend(frameon=False)
