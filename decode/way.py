"""What decodes a model on a device, and on how many threads: chosen once, the same for every script."""
import torch

from decode import engine, sampling
from decode.context import Cache
from kernels.faster import fastest


def choose_way(model, device, threads=0):
    """Choose the threads of a model's decode steps -> (what decodes, in words; how many threads, None on a
    GPU; {threads: seconds of a step} where they were timed). threads: so many; 0: as many as are fastest."""
    if device.type == "cuda":
        return choose_on_card(model, device), None, {}
    most = threads or torch.get_num_threads()
    program = engine.trial(model, device, most)
    if not program:
        return f"forward decodes ({program})", most, {}
    took = {} if threads else engine.time_threads(program)
    threads = threads or engine.fewest(took)
    model.choose(threads=threads)
    return "decode engine", threads, took


@torch.inference_mode()
def choose_on_card(model, device):
    """Let the kernels of decode/card.py decode, or forward where that is faster on this card -> the words."""
    kernels = recorded(model, device, model.choices.forward)
    if not kernels.card:
        return f"forward decodes ({kernels.card.args[0]})"
    said = f"{len(kernels.card.launches)} kernels a token"
    if any(getattr(model.config, flag) for flag in sampling.HOST_DECIDES):
        return said                              # forward would ask the host
    forward = recorded(model, device, "forward is timed")
    form, took = fastest(described(model), {
        "kernels": lambda: kernels([1]), "forward": lambda: model.head(forward([1]))}, device)
    us = {name: f"{seconds * 1e6:,.0f} us" for name, seconds in took.items()}
    if form == "forward":
        model.choose(forward=f"{us['forward']} a step on this card, {us['kernels']} by {said}")
        return f"forward decodes ({model.choices.forward})"
    return f"{said}, {us['kernels']} a step on this card, {us['forward']} by forward"


def recorded(model, device, forward):
    """A Step of one row; forward: see context.Choices."""
    length = min(model.config.block_size, 64)
    cache = Cache(model, 1, length, model.chosen(1)._replace(forward=forward))
    history = torch.zeros(1, length, dtype=torch.long, device=device)
    return sampling.Step(model, cache, history, model.config.vocab_size)


def described(model):
    """What decides how long a step takes: shape, flags, weights, policy."""
    kinds = sorted({type(module).__name__ for module in model.modules()})
    weights = sorted({str(t.dtype) for t in (*model.parameters(), *model.buffers())})
    return " ".join(map(str, (model.config.model_args(), weights, kinds, model.choices.predict,
                              model.choices.leave_at)))
