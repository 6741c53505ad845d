"""Generation at batch 1: ours, nanoGPT, Hugging Face, llama.cpp and ctranslate2 with the same weights; blocks
beside their twin."""
import contextlib
import copy
import importlib.util
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

import sparse_kernels
from benchmarks import Timed
from benchmarks.arms import BASE, SHAPED, twin_of
from benchmarks.load import beside_load
from benchmarks.peers import CTranslate2, HuggingFace, LlamaCpp, peer_model
from benchmarks.record import CT2, HF, LLAMA, OURS, OURS_FP32, PEER, TWIN
from benchmarks.timing import interleave, measurement, milliseconds, show, spread, times_better
from benchmarks.work import ready, work
from configurator import require
from decode import calibrate, engine
from decode.context import Cache, CachedContext
from decode.quantized import check_quantize, kinds_in, quantize
from decode.sampling import recorded_step
from kernels.arena import move_weights, room
from model import GPT, GPTConfig
from training import runtime

SHAPES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024, vocab_size=50304, bias=False),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50304, bias=False),
    "baby": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False),
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=256, bias=False),
}
PRESET = "efficient"                             # of the blocks, what stands beside other engines
READ = "a plain read"                            # of as many bytes as a step of ours

# what a flag imports, and what pip calls it
NEEDS = {"hf": {"transformers": "transformers"},
         "llamacpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
         "ctranslate2": {"ctranslate2": "ctranslate2", "transformers": "transformers"}}


def require_installed(flag):
    """ConfigError where what a flag imports is not here."""
    lacks = [name for name in NEEDS[flag] if not importlib.util.find_spec(name)]
    require(not lacks, f"--{flag} needs {' and '.join(lacks)}: "
                       f"pip install {' '.join(NEEDS[flag][name] for name in lacks)}")


@dataclass(frozen=True)
class Decode(Timed):
    """Tokens per second of generation: ours against nanoGPT's, same weights, one process."""
    shape: str = "gpt2"  # gpt2 (12 layers, 768 wide), gpt2-large, gpt2-xl, baby (6 x 384) or small (4 x 128)
    batch: int = 1  # prompts that every side continues at once; tokens/s are those of all together
    prompt: int = 128  # tokens of context before the first new one
    new: int = 128  # tokens that every side generates
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps
    dtype: str = "auto"  # of ours; nanoGPT runs as in its sample.py: fp32 on a CPU, autocast on CUDA
    blocks: bool = False  # also models of this shape with bio blocks, random weights, beside their dense twin
    hf: bool = False  # also Hugging Face's generate with the same weights, in the dtype of ours
    llamacpp: bool = False  # also llama.cpp with the same weights, as f32, bf16, q8_0 and q4_0 files; on CPUs
    ctranslate2: bool = False  # also ctranslate2 with the same weights, as float32 and int8; on CPUs
    load: int = 0  # busy loops beside ours, which then is timed with and without them; 0: none; on CPUs
    quantize: str = ""  # also ours, and the blocks, in whole numbers: int8,int4,q4_all, or mlp=4,attn=8

    def __post_init__(self):
        super().__post_init__()
        require(self.shape in SHAPES, f"shape='{self.shape}' must be {' or '.join(SHAPES)}")
        block = SHAPES[self.shape]["block_size"]
        require(2 <= self.prompt <= block,
                f"prompt={self.prompt} must be in 2..{block}, the block of --shape={self.shape}")
        require(self.new >= 1, f"new={self.new} must be at least 1")
        one = [f"--{flag}" for flag in ("llamacpp", "ctranslate2") if getattr(self, flag)]
        require(self.batch >= 1 and (self.batch == 1 or not one), f"batch={self.batch} must be at least 1, "
                f"and 1 beside llama.cpp and ctranslate2: leave {' and '.join(one) or '--batch'} out")
        room = block - self.prompt
        for flag in filter(partial(getattr, self), NEEDS):
            require(self.new <= room, f"--{flag}: prompt={self.prompt} and new={self.new} must fit in the "
                    f"block of {block}, where its positions end: type "
                    + (f"--new={room}" if room else f"--prompt={block // 2} --new={block // 2}"))
            require_installed(flag)
        for kind in kinds_in(self.quantize):
            check_quantize(kind, smaller=True)
        require(self.load >= 0, f"load={self.load} must be a number of busy loops, or 0 for none")
        require(not self.load or sys.platform != "win32",
                f"load={self.load} pauses processes, which Windows does not: leave --load out")


def decode(cfg):
    place = runtime.choose(cfg.device, cfg.dtype, False)
    check_place(cfg, place)
    print(f"ours: {place}, {sparse_kernels.path_taken(place.device)}")
    models, contexts = decoders(cfg, place)
    rivals = {name: model for name, model in models.items() if hasattr(model, "about")}
    parameters = sum(p.numel() for p in models[OURS].parameters())
    vocab_size = SHAPES[cfg.shape]["vocab_size"]
    drawn = torch.Generator().manual_seed(1337)
    prompt = torch.randint(vocab_size, (cfg.batch, cfg.prompt), generator=drawn)
    prompt = prompt.to(place.device)
    agreement = agree(models, prompt, cfg.new)
    blocks = blocks_and_twins() if cfg.blocks else {}
    twins = add_sides(models, contexts, blocks, kinds_in(cfg.quantize), SHAPES[cfg.shape], place)
    ours = [name for name, model in models.items() if isinstance(model, GPT)
            and name.partition(", ")[0] in (OURS, OURS_FP32, PRESET)]
    worked = work_of({name: model for name, model in models.items() if isinstance(model, GPT)}, prompt, twins)
    seconds = interleave({name: partial(generate, model, prompt, cfg.new, contexts[name])
                          for name, model in models.items()}, cfg.repeats, device=place.device, cold=cfg.cold,
                         before=rest if rivals else None)
    rates = {name: [cfg.batch * cfg.new / s for s in values] for name, values in seconds.items()}
    steps = {name: step_of(name, model, prompt, contexts[name]) for name, model in models.items()
             if not isinstance(model, CTranslate2)}
    if place.device.type == "cuda":              # the recorded step without decode/card.py
        steps |= {f"{name}, as forward": cached_step(model, prompt, "it is timed") for name, model in
                  models.items() if isinstance(model, GPT)}
    if place.device.type == "cpu":
        steps[READ] = plain_read(int(worked[OURS]["weight_bytes"]))
    ms = milliseconds(interleave(steps, 4 * cfg.repeats, device=place.device, cold=cfg.cold,
                                 before=wake if rivals else None))
    read = ms.pop(READ, None)
    results = {"decode": measurement("tokens/s", rates, higher_is_better=True), "step": measurement("ms", ms)}
    sides = results["decode"]["sides"]
    if cfg.load:
        run = partial(generate, models[OURS], prompt, cfg.new, contexts[OURS])
        results["load"] = beside_load(run, cfg.batch * cfg.new, cfg.load, cfg.repeats)
    results["decode"] |= {"twins": twins, "to_twin": {
        name: sides[name]["median"] / sides[twin]["median"] for name, twin in twins.items()}}
    for result in results.values() if rivals else ():
        sides, more = result["sides"], result["unit"] == "tokens/s"
        result["against"] = {rival: times_better({name: sides[name] for name in (*ours, rival)}, rival, more)
                             for rival in rivals if rival in sides}
    print(f"{cfg.shape}, {parameters:,} parameters, the same weights on every side of them; "
          f"{PEER} runs {'under autocast' if place.device.type == 'cuda' else 'in fp32'}")
    acts = activations(models)
    if rivals:
        print("activations: " + ", ".join(f"{name} {act}" for name, act in acts.items()))
    tell(cfg, results, worked, read)
    if blocks:
        tell_correlation(results["step"], worked, blocks)
    tell_agreement(agreement)
    return {"measurements": results, "agreement": agreement, "parameters": parameters, "place": str(place),
            "work": worked, "kernels": sparse_kernels.path_taken(place.device), "seeds": [1337],
            "activations": acts, "timed": TIMED,
            "peers": {name: rival.about() for name, rival in rivals.items()}}


def tell(cfg, results, worked, read):
    """Rates and steps, every side beside the dense model of its kind and beside reading its weights."""
    decode = results["decode"]
    show(f"decode, {cfg.new} new tokens after {cfg.prompt}, batch {cfg.batch}", decode)
    for name, ratio in decode["to_twin"].items():
        ceiling, megabytes = worked[name]["ceiling"], worked[name]["weight_bytes"] / 1e6
        print(f"  {name}: {ratio:.2f}x the tokens/s of {decode['twins'][name]} ({ceiling:.2f}x is the "
              f"ceiling by {megabytes:.0f} MB of weights a token), random weights")
    show(f"one token at a context of exactly {cfg.prompt}", results["step"])
    if read:
        tell_bandwidth(results["step"], read, worked[OURS]["weight_bytes"])


def add_sides(models, contexts, blocks, kinds, shape, place):
    """Add to the sides models with blocks ({side: flags}), and each of ours in every kind of whole numbers
    -> {side: its dense twin}; a dense model's, in whole numbers, is itself."""
    twins = {name: named_twin(flags) for name, flags in blocks.items() if named_twin(flags) != name}
    text = torch.randint(shape["vocab_size"], (2, min(256, shape["block_size"])),
                         generator=torch.Generator().manual_seed(1337))
    for name, flags in blocks.items():
        model = GPT(GPTConfig(**shape | flags), seed=1337).eval()
        if calibrate.screened(model):            # of random weights, that no text has trained
            calibrate.calibrate(model, text, model.config.mlp_live)
        models[name] = ready(model, place)
        contexts[name] = contextlib.nullcontext()
    for kind in kinds:
        for name in (OURS, *blocks):
            models[f"{name}, {kind}"] = quantize(copy.deepcopy(models[name]), kind)
            move_weights(models[f"{name}, {kind}"])
            contexts[f"{name}, {kind}"] = contextlib.nullcontext()
            twins[f"{name}, {kind}"] = f"{twins[name]}, {kind}" if name in blocks and name in twins else name
    return twins


TIMED = {"decode": "prompt and new tokens, from an empty cache",
         "step": "one token behind a prompt that is in the cache; ctranslate2 offers none"}


def plain_read(size):
    """-> a function that reads so many bytes from huge pages once, on torch's threads."""
    numbers = (room(size) if sys.platform == "linux" else torch.empty(size, dtype=torch.uint8))
    numbers = numbers[:size // 8 * 8].fill_(1).view(torch.float32)
    return numbers.sum


def tell_bandwidth(step, ms, size):
    """Print, and keep in the record, how near a step of ours comes to a plain read of its bytes."""
    step["plain_read"] = spread(ms)
    share = step["plain_read"]["median"] / step["sides"][OURS]["median"]
    print(f"  {OURS}: {share:.0%} of the speed of {READ} of its {size / 1e6:,.1f} MB, which takes "
          f"{step['plain_read']['median']:.3f} ms, {size / step['plain_read']['median'] / 1e6:.1f} GB/s")


def tell_correlation(step, worked, blocks):
    """Print, and keep in the record, whether the models that read less take less time."""
    ms = [step["sides"][name]["median"] for name in blocks]
    size = [worked[name]["weight_bytes"] for name in blocks]
    step["rank_correlation"] = rank_correlation(ms, size)
    print(f"  a step's time and its bytes, of {len(blocks)} models: rank correlation "
          f"{step['rank_correlation']:.2f}")


def rank_correlation(a, b):
    """Spearman's, of two lists of numbers: from -1 to 1."""
    ranks = [torch.tensor(of).argsort().argsort().double() for of in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def check_place(cfg, place):
    """llama.cpp and ctranslate2 are built for CPUs here, and busy loops take those."""
    flags = [f"--{flag}" for flag in ("llamacpp", "ctranslate2", "load") if getattr(cfg, flag)]
    require(not flags or place.device.type == "cpu",
            f"{' and '.join(flags)} would run on the CPU and ours on {place.device}: type --device=cpu")


def activations(models):
    """{side: the activation of its MLP}: GELU on every side of the same weights, squared ReLU in the blocks
    and their twins, which no peer knows: beside those, peers are models of the same shape with GELU."""
    return {name: getattr(model, "activation", None) or getattr(model.config, "act", "gelu")
            for name, model in models.items()}


def rest(run):
    """Let the threads of the side before fall asleep: some spin for milliseconds after their last product."""
    time.sleep(0.05)


def wake(run):
    """One call ahead of a timed one, behind a rest: a step is short beside waking threads up."""
    rest(run)
    run()


def work_of(models, prompt, twins, new=8):
    """{side: multiply-adds and bytes of weights of a decoded token, and how many times fewer bytes than its
    dense twin (ours where it has none): as much faster could decoding be if it read weights and did nothing
    else}."""
    found = {name: work(model, prompt, new) for name, model in models.items()}
    return {name: of | {"ceiling": found[twins.get(name, OURS)]["weight_bytes"] / of["weight_bytes"]}
            for name, of in found.items()}


# blocks whose decode saves outside the MLP
OTHER_BLOCKS = {"window 128": dict(window=128, window_pattern="S"), "hierarchy 4": dict(hierarchy=4),
                "1 of 4 dendrites": dict(dendrites=4, dendrites_active=1)}


def decoded_blocks(rank, active):
    """{name: flags} of the blocks whose decode reads a share of the MLP that no weight decides."""
    return {"top 10%": dict(mlp_topk=0.1), "columns 3 of 32": dict(columns=32, columns_active=3),
            f"predicted {active:.0%}": dict(mlp_topk=0.1, mlp_predict=rank, mlp_active=active)}


def blocks_and_twins():
    """{side: flags} of all models with blocks, and of their dense twins."""
    blocks = {name: BASE | flags for name, flags in (decoded_blocks(64, 0.2) | OTHER_BLOCKS | SHAPED).items()}
    return {named_twin(flags): twin_of(flags) for flags in blocks.values()} | blocks


def named_twin(flags):
    """The side that is the dense twin of a model with these flags."""
    return ", ".join([TWIN, *(f"{key}={value}" for key, value in twin_of(flags).items())])


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every comparison."""
    sides = blocks_and_twins()
    return [(flags, sides[named_twin(flags)]) for name, flags in sides.items() if name != named_twin(flags)]


def decoders(cfg, place):
    """-> ({side: model in eval mode on the device}, {side: the context it runs in}); same weights in all."""
    ours = GPT(GPTConfig(**SHAPES[cfg.shape]), seed=1337).eval()
    models, contexts = {}, {}
    if cfg.nanogpt:
        models[PEER] = peer_model(cfg.nanogpt, SHAPES[cfg.shape]).eval()
        ours.load_state_dict(models[PEER].state_dict())
    with torch.no_grad():           # at their init greedy ids repeat one token, and then any two models agree
        for model in (ours, *models.values()):
            model.transformer.wpe.weight.mul_(30)
    models |= our_sides(ours, place)
    if place.device.type == "cuda":
        contexts[PEER] = torch.amp.autocast("cuda", dtype=runtime.choose_dtype("auto", place.device)[0])
    models = {name: model.to(place.device) for name, model in models.items()}
    for name in filter(models.get, (OURS, OURS_FP32)):
        move_weights(models[name])
    if cfg.hf:
        models[HF] = HuggingFace(models[OURS])
    for flag, name, rival in (("llamacpp", LLAMA, LlamaCpp), ("ctranslate2", CT2, CTranslate2)):
        if getattr(cfg, flag):
            models |= {f"{name} {stored}": rival(ours, stored) for stored in rival.TYPES}
    return models, {name: contexts.get(name, contextlib.nullcontext()) for name in models}


def our_sides(ours, place):
    """{side: model} of ours, from a model in fp32: one for every kind of weights."""
    sides = {OURS: copy.deepcopy(ours).to(place.dtype)}
    return sides if place.dtype == torch.float32 else sides | {OURS_FP32: ours}


def generate(model, prompt, new, context):
    """The same call on every side."""
    with context:
        model.generate(prompt, new, top_k=1)


def step_of(name, model, prompt, context):
    """-> a function that computes one token behind the rest of the prompt, as the side's generate does."""
    if name == PEER:
        return partial(whole_context, model, prompt, context)
    return cached_step(model, prompt) if isinstance(model, GPT) else model.cached_step(prompt)


@torch.no_grad()
def whole_context(model, prompt, context):
    """What nanoGPT computes for one token: a forward over all of them."""
    with context:
        model(prompt)


@torch.inference_mode()
def cached_step(model, prompt, forward=""):
    """What ours computes for one token, over a cache of those before it -> a function that does it, and
    returns the logits. forward: see Choices."""
    past = prompt.size(1) - 1
    rows = len(prompt)
    choices = model.chosen(rows)
    cache = Cache(model, rows, prompt.size(1), choices._replace(forward=forward or choices.forward))
    model.trunk(prompt[:, :past], CachedContext(cache, 0, past, prompt))
    recorded = recorded_step(model, cache, prompt, model.config.vocab_size)
    history = torch.nn.functional.pad(prompt, (0, 1))         # a program writes the next id behind the prompt
    program = engine.program_of(model, cache, model.config.vocab_size, 1, prompt.device)

    @torch.inference_mode()                     # as generation does
    def run():
        if program:
            program.begin(history, rows * [0], rows * [past + 1])
            program.advance()
            return program.out
        states = (recorded(rows * [past + 1]) if recorded else
                  model.trunk(prompt[:, past:], CachedContext(cache, past, 1, prompt))[:, 0])
        if recorded and recorded.card:
            return states                       # they are logits
        return model.head(states)
    return run


def agree(models, prompt, new):
    """Greedy ids of every side against nanoGPT's in fp32 (without it: against our own in fp32), TF32 off.

    -> {"of": that side, "distinct": different ids in it, "sides": {side: result of compare(), and its dtype}}
    """
    of = PEER if PEER in models else OURS_FP32 if OURS_FP32 in models else OURS
    greedy = {name: dict(top_k=1) if name == PEER else dict(temperature=0) for name in models}
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    ids = {name: model.generate(prompt[:1], new, **greedy[name])[0, -new:] for name, model in models.items()}
    torch.backends.cuda.matmul.allow_tf32 = tf32
    dtypes = {name: getattr(model, "stored", None) or str(model.lm_head.weight.dtype).removeprefix("torch.")
              for name, model in models.items()}
    return {"of": of, "distinct": len(ids[of].unique()),
            "sides": {name: compare(ids[of], found) | {"dtype": dtypes[name]}
                      for name, found in ids.items() if name != of}}


def compare(expected, found):
    """Share of equal ids; index of the first that differs (the contexts differ after it) or None."""
    same = (expected == found).tolist()
    return {"equal": sum(same) / len(same), "first_difference": None if all(same) else same.index(False)}


def tell_agreement(agreement):
    """Print the shares; an fp32 side must agree in every token."""
    for name, found in agreement["sides"].items():
        first = found["first_difference"]
        print(f"greedy ids, {name} ({found['dtype']}) against {agreement['of']}: {found['equal']:.4f} equal"
              + f", first difference at new token {first}" * (first is not None)
              + f", {agreement['distinct']} different ids")
        if found["dtype"] == "float32" and first is not None:
            print(f"!!! GREEDY IDS DIFFER: {name} is fp32 and must give {agreement['of']}'s; quote nothing")
