"""The rivals: nanoGPT from a checkout, and Hugging Face's GPT-2 with the weights of ours."""
import contextlib
import importlib.util
import pickle
import re
import shutil
import sys
from pathlib import Path

import torch

from configurator import require
from data import dataset as datasets

# matrices that Hugging Face keeps as (in, out)
CONV1D = "c_attn.weight", "c_proj.weight", "c_fc.weight"


def peer_model(folder, shape):
    """nanoGPT's own GPT of this shape, from its model.py; what it prints goes to stderr."""
    module = load_module("nanogpt_model", Path(folder) / "model.py")
    torch.manual_seed(1337)
    with contextlib.redirect_stdout(sys.stderr):
        return module.GPT(module.GPTConfig(**shape, dropout=0.0))


def load_module(name, path):
    """Import a file under another name, so that two files called model.py live side by side."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)     # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def copy_peer(checkout, folder, data, vocab_size):
    """nanoGPT's scripts beside a data/bench with our token files and its meta.pkl, in a folder apart."""
    bench = folder / "data" / "bench"
    bench.mkdir(parents=True)
    for script in Path(checkout).glob("*.py"):
        shutil.copy(script, folder)
    for split in datasets.SPLITS:
        shutil.copy(data / f"{split}.bin", bench)
    (bench / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def peer_iterations(said):
    """nanoGPT's lines 'iter 7: loss 3.2, time 12.5ms, mfu ...' -> [(ms, loss)]."""
    found = re.findall(r"^iter \d+: loss (\S+), time (\S+)ms", said, re.MULTILINE)
    return [(float(ms), float(loss)) for loss, ms in found]


class HuggingFace:
    """transformers' GPT-2 with the weights of one of our models, on its device and in its dtype.

    Its generate() takes what ours takes and is greedy, over transformers' own cache. The biases that our
    model may lack are zeros here. Positions end with the block: there is no sliding.
    """

    def __init__(self, ours):
        from transformers import GPT2Config, GPT2LMHeadModel
        c, weight = ours.config, ours.lm_head.weight
        self.model = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, activation_function="gelu", bos_token_id=None, eos_token_id=None))
        self.model.load_state_dict(to_hf_names(ours.state_dict(), self.model.state_dict()))
        self.model.eval().to(weight.device, weight.dtype)
        self.lm_head = self.model.lm_head

    def parameters(self):
        return self.model.parameters()

    def generate(self, prompt, new, **_):
        return self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                                   do_sample=False, pad_token_id=0)

    def cached_step(self, prompt):
        """A function that computes the logits of the prompt's last token over a cache of those before it."""
        past = prompt.size(1) - 1
        with torch.inference_mode():
            cache = self.model(prompt[:, :past], use_cache=True).past_key_values

        @torch.inference_mode()
        def run():
            self.model(prompt[:, past:], past_key_values=cache, use_cache=True)
            cache.crop(-1)                      # the next call finds what this one found
        return run


def to_hf_names(ours, theirs):
    """Our state dict -> Hugging Face's: Conv1D matrices transposed, zeros for biases that ours lacks."""
    def of(name, tensor):
        held = ours.get(name)
        require(held is not None or name.endswith(".bias"), f"our model has no {name}: it is not GPT-2's")
        held = torch.zeros_like(tensor) if held is None else held.to(tensor)
        return held.t() if name.endswith(CONV1D) else held
    return {name: of(name, tensor) for name, tensor in theirs.items()}
