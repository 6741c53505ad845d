"""What one decoded token costs a model, counted from what runs, and what the model holds meanwhile."""
import torch

import sparse_kernels as kernels
from decode import quantized
from decode.context import Cache
from kernels.arena import move_weights
from layers import settle


def ready(model, place):
    """A model as sample.py would decode with it: the device's dtype, 2:4 weights packed where that pays, its
    shortcuts on, its weights on huge pages."""
    model = model.eval().to(place.device, place.dtype)
    settle(model, pack=kernels.packing_pays(place.device)[0]).use_policy()
    move_weights(model)
    return model


@torch.inference_mode()
def work(model, prompt, new):
    """Multiply-adds of weights and bytes of weights of one decoded token, the mean of `new` greedy ones
    behind prompts (B, T), counted as they run: all that generation executes less what the prompt does."""
    def tally(count):
        with kernels.counting() as found:
            model.generate(prompt, count, temperature=0)
        return found
    whole, first = tally(1 + new), tally(1)
    return {"macs": (whole.macs - first.macs) / new, "weight_bytes": (whole.bytes - first.bytes) / new}


def held_bytes(model, length):
    """Bytes of weights and buffers that decoding holds, and of the cache for one row of `length` tokens."""
    return {"weights": quantized.held_bytes(model), "cache": Cache(model, 1, length).nbytes()}
