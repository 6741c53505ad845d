"""The rivals: nanoGPT from a checkout; Hugging Face's, llama.cpp's and ctranslate2's GPT-2 with the weights
of ours."""
import contextlib
import dataclasses
import functools
import importlib.util
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch

from configurator import ConfigError, require
from data import dataset as datasets
from model import GPT
from training import pretrained

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


def installed(package, install):
    """Import a rival's package. ConfigError where it is there and does not load."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:       # of a shared library: what its loader raises
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{package} does not load ({why}): "
                          f"pip install --force-reinstall {install}") from error


def as_gpt2(ours):
    """A model of ours -> (state dict, config) of Hugging Face's GPT-2. GPT-2 knows no squared ReLU: GELU
    takes its place over the same weights. Any other flag that GPT-2 has no name for is a ConfigError."""
    if ours.config.act == "relu2":
        twin = GPT(dataclasses.replace(ours.config, act="gelu"), init=False)
        twin.load_state_dict(ours.state_dict())
        ours = twin.to(ours.lm_head.weight)
    return pretrained.to_hf(ours)


class HuggingFace:
    """transformers' GPT-2 with the weights of one of our models, on its device and in its dtype.

    Its generate() takes what ours takes and is greedy, over transformers' own cache. The biases that our
    model may lack are zeros here. Positions end with the block: there is no sliding.
    """

    def __init__(self, ours):
        from transformers import GPT2Config, GPT2LMHeadModel
        weights, config = as_gpt2(ours)
        self.model = GPT2LMHeadModel(GPT2Config(**config))
        self.model.load_state_dict(weights)
        self.model.eval().to(ours.lm_head.weight.device, ours.lm_head.weight.dtype)
        self.lm_head, self.activation = self.model.lm_head, GELUS[config["activation_function"]]
        self.stored = str(self.lm_head.weight.dtype).removeprefix("torch.")

    def about(self):
        """What the record keeps of this side."""
        return {"engine": "transformers", "weights": self.stored, "threads": torch.get_num_threads()}

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


GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh"}          # our names of Hugging Face's


ONE_PROMPT = "import sys, llama_cpp as c; c.Llama(sys.argv[1], n_ctx=64, verbose=False).eval([1] * 32)"
NO_AMX = ("-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON "
          "-DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON")


def survives(path, stored):
    """Let llama.cpp compute a prompt of a GGUF file in a process of its own. ConfigError where that dies of a
    signal: it would take the measurement with it. Some processors with AMX do (llama.cpp's issue 20824)."""
    died = -subprocess.run([sys.executable, "-c", ONE_PROMPT, str(path)], capture_output=True).returncode
    require(died <= 0, f"llama.cpp's process dies of signal {died} on this processor (file of {stored}). "
                       "Where it has AMX, llama.cpp without it: "
                       f"CMAKE_ARGS='{NO_AMX}' pip install "
                       "--force-reinstall --no-cache-dir --no-deps llama-cpp-python")


class LlamaCpp:
    """llama.cpp's GPT-2 with the weights of one of our models, from a GGUF file of one of its TYPES.

    Batch 1, greedy, with torch's number of threads, through llama.cpp's C API: its Python class copies the
    logits. All matrices but the positions have the file's type, the head's too. Its GELU is the form by tanh,
    read from a table in fp16, so that its fp32 is near ours and not equal. Its cache is fp16; beside fp32
    weights it is fp32. All else is llama.cpp's default. Positions end with the block.
    """
    TYPES = "f32", "bf16", "q8_0", "q4_0"
    activation = "gelu_tanh, from a table in float16"

    def __init__(self, ours, stored):
        self.stored, self.vocab_size, self.block = stored, ours.config.vocab_size, ours.config.block_size
        self.lib = lib = installed("llama_cpp", "llama-cpp-python")
        require(hasattr(lib, "llama_get_memory"),
                f"llama_cpp {lib.__version__} is too old for this: pip install -U llama-cpp-python")
        lib.llama_log_set(errors_alone(lib), None)
        lib.llama_backend_init()
        # the file may go once it is mapped, and does so where the system lets it
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"{stored}.gguf"
            write_gguf(ours, stored, path)
            survives(path, stored)
            model = lib.llama_model_load_from_file(str(path).encode(), self.on_cpu())
        require(model, f"llama.cpp did not load the {stored} file of this model")
        self.c = lib.llama_init_from_model(model, self.context())
        require(self.c, f"llama.cpp made no context for {self.block} tokens")
        self.memory, self.greedy = lib.llama_get_memory(self.c), lib.llama_sampler_init_greedy()
        weakref.finalize(self, release, lib, self.greedy, self.c, model)

    def on_cpu(self):
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        return params

    def context(self):
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_threads = self.block, torch.get_num_threads()
        params.n_threads_batch = params.n_threads
        if self.stored == "f32":
            params.type_k = params.type_v = 0                   # GGML_TYPE_F32
        return params

    def about(self):
        """What the record keeps of this side."""
        return {"engine": "llama.cpp", "weights": self.stored, "threads": torch.get_num_threads(),
                "cache": "float32" if self.stored == "f32" else "float16",
                "built": self.lib.llama_print_system_info().decode().strip()}

    def next_id(self, ids):
        """The greedy id behind what the cache holds and these ids, which go into it."""
        held = (self.lib.llama_token * len(ids))(*ids)          # the batch points into it
        status = self.lib.llama_decode(self.c, self.lib.llama_batch_get_one(held, len(ids)))
        require(status == 0, f"llama.cpp failed on {len(ids)} tokens: status {status}")
        return self.lib.llama_sampler_sample(self.greedy, self.c, -1)

    def logits(self):
        """Of the last token that was computed, a list."""
        return self.lib.llama_get_logits_ith(self.c, -1)[:self.vocab_size]

    def generate(self, prompt, new, **_):
        """Token ids (1, T) -> (1, T + new)."""
        ids = prompt[0].tolist()
        require(len(ids) + new <= self.block,       # llama.cpp ends the process where positions are missing
                f"{len(ids)} tokens and {new} new ones do not fit block_size={self.block}")
        self.lib.llama_memory_clear(self.memory, False)
        found = [self.next_id(ids)]
        while len(found) < new:
            found.append(self.next_id(found[-1:]))
        return torch.tensor([ids + found])

    def cached_step(self, prompt):
        """A function that computes the prompt's last token over a cache of those before it -> the next id."""
        *before, last = prompt[0].tolist()
        self.lib.llama_memory_clear(self.memory, False)
        self.next_id(before)

        def run():
            found = self.next_id([last])
            self.lib.llama_memory_seq_rm(self.memory, -1, len(before), -1)     # as this call found it
            return found
        return run


@functools.cache                                                # C keeps its address
def errors_alone(lib):
    """What llama.cpp logs to: errors go to stderr, its lines on every tensor nowhere."""
    @lib.llama_log_callback
    def log(level, text, _):
        if level == 4:                                          # GGML_LOG_LEVEL_ERROR
            print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
    return log


def release(lib, sampler, context, model):
    """Give back what llama.cpp holds outside Python."""
    lib.llama_sampler_free(sampler)
    lib.llama_free(context)
    lib.llama_model_free(model)


def write_gguf(ours, stored, path):
    """A model of ours as a GGUF file of architecture gpt2: matrices of type `stored`, positions and vectors
    in fp32, no tokenizer."""
    gguf = installed("gguf", "gguf")
    weights, config = as_gpt2(ours)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    writer = gguf.GGUFWriter(path, "gpt2")
    for add, key in (("vocab_size", "vocab_size"), ("context_length", "n_positions"),
                     ("embedding_length", "n_embd"), ("block_count", "n_layer"), ("head_count", "n_head"),
                     ("feed_forward_length", "n_inner"), ("layer_norm_eps", "layer_norm_epsilon")):
        getattr(writer, f"add_{add}")(config[key])
    writer.add_tokenizer_model("none")
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue                                             # llama.cpp takes the embedding's
        given = tensor.float().numpy(force=True)
        given = given.T.copy() if name.endswith(CONV1D) else given
        plain = given.ndim == 1 or "wpe" in name
        kind = gguf.GGMLQuantizationType["F32" if plain else stored.upper()]
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(given, kind),
                          raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class CTranslate2:
    """ctranslate2's GPT-2 with the weights of one of our models, through its converter, in one of its TYPES.

    Batch 1, greedy, with torch's number of threads. Its Python API has no single step over a cache, so it is
    timed on whole generations alone. Positions end with the block.
    """
    TYPES = "float32", "int8"

    def __init__(self, ours, stored):
        installed("ctranslate2", "ctranslate2")
        from ctranslate2 import Generator
        from transformers import GPT2Config, GPT2LMHeadModel
        self.stored = stored
        weights, config = as_gpt2(ours)
        model = GPT2LMHeadModel(GPT2Config(**config))
        model.load_state_dict(weights)
        self.activation = GELUS[config["activation_function"]]
        with tempfile.TemporaryDirectory() as folder:
            converter_of(model).convert(folder, quantization=stored, force=True)
            self.generator = Generator(folder, device="cpu", compute_type=stored, inter_threads=1,
                                       intra_threads=torch.get_num_threads())

    def about(self):
        """What the record keeps of this side."""
        return {"engine": "ctranslate2", "weights": self.stored, "threads": torch.get_num_threads(),
                "computes": self.generator.compute_type}

    def generate(self, prompt, new, **_):
        """Token ids (1, T) -> (1, T + new)."""
        ids = prompt[0].tolist()
        found, = self.generator.generate_batch(
            [[str(number) for number in ids]], max_length=new, beam_size=1, sampling_topk=1,
            end_token=[], include_prompt_in_result=False)       # no id ends a text
        made = found.sequences_ids[0]
        require(len(made) == new, f"ctranslate2 made {len(made)} of {new} tokens")
        return torch.tensor([ids + made])


def converter_of(model):
    """ctranslate2's converter of a transformers GPT-2 in memory; tokens are named by their numbers."""
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import GPT2Loader

    class InMemory(Converter):
        def _load(self):
            spec = GPT2Loader().get_model_spec(model)
            spec.register_vocabulary([str(number) for number in range(model.config.vocab_size)])
            return spec
    return InMemory()
