"""What decodes a model on a device, and on how many threads: chosen once, the same for every script."""
import torch

from decode import card, engine


def choose_way(model, device, threads=0):
    """Choose the threads of a model's decode steps -> (what decodes, in words; how many threads, None on a
    GPU; {threads: seconds of a step} where they were timed). threads: so many; 0: as many as are fastest."""
    if device.type == "cuda":
        made = card.trial(model, device)
        said = f"{len(made.launches)} kernels a token" if made else f"forward decodes ({made.args[0]})"
        return said, None, {}
    most = threads or torch.get_num_threads()
    program = engine.trial(model, device, most)
    if not program:
        return f"forward decodes ({program})", most, {}
    took = {} if threads else engine.time_threads(program)
    threads = threads or engine.fewest(took)
    model.choose(threads=threads)
    return "decode engine", threads, took
