"""The rivals: nanoGPT from a checkout; Hugging Face's, llama.cpp's and ctranslate2's GPT-2 with the weights
of ours."""
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch

from benchmarks import ROOT
from configurator import ConfigError, require
from data import dataset as datasets
from model import GPT
from training import gguf_file, pretrained
from training.llama import TURNED

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
    """llama.cpp's GPT-2 or Llama with the weights of one of our models, from a GGUF file of one of its TYPES,
    or from the file at `path` as it is.

    Batch 1, greedy, with torch's number of threads, through llama.cpp's C API: its Python class copies the
    logits. All matrices but the positions have the file's type, the head's too. Its GELU is the form by tanh,
    read from a table in fp16, so that its fp32 is near ours and not equal. Its cache is fp16; beside fp32
    weights it is fp32. All else is llama.cpp's default. Positions end with the block.
    """
    TYPES = "f32", "bf16", "q8_0", "q4_0"
    activation = "gelu_tanh, from a table in float16"

    def __init__(self, ours, stored, path=None):
        self.stored, self.vocab_size, self.block = stored, ours.config.vocab_size, ours.config.block_size
        self.config, self.lib = ours.config, installed("llama_cpp", "llama-cpp-python")
        lib = self.lib
        require(hasattr(lib, "llama_get_memory"),
                f"llama_cpp {lib.__version__} is too old for this: pip install -U llama-cpp-python")
        lib.llama_log_set(errors_alone(lib), None)
        lib.llama_backend_init()
        # the file may go once it is mapped, and does so where the system lets it
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            made = path or Path(folder) / f"{stored}.gguf"
            if path is None:
                write_gguf(ours, stored, made)
            survives(made, stored)
            self.read = bytes_of_matrices(made)
            model = lib.llama_model_load_from_file(str(made).encode(), self.on_cpu())
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
        params.n_threads_batch, params.n_batch = params.n_threads, max(self.block, params.n_batch)
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

    def __call__(self, idx, targets=None):
        """Token ids (B, T) -> the logits of all of them, (B, T, vocab_size), and None, as a model of ours."""
        return torch.stack([self.logits_of(row) for row in idx.tolist()]), None

    def logits_of(self, ids):
        self.lib.llama_memory_clear(self.memory, False)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, number in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = number, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        status = self.lib.llama_decode(self.c, batch)
        self.lib.llama_batch_free(batch)
        require(status == 0, f"llama.cpp failed on {len(ids)} tokens: status {status}")
        size = len(ids) * self.vocab_size
        found = ctypes.cast(self.lib.llama_get_logits(self.c), ctypes.POINTER(ctypes.c_float * size)).contents
        return torch.frombuffer(found, dtype=torch.float32).view(len(ids), -1).clone()

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


# what GGUFWriter adds, and the field of config.json that it is
SHAPE = {"gpt2": dict(context_length="n_positions", embedding_length="n_embd", block_count="n_layer",
                      head_count="n_head", feed_forward_length="n_inner",
                      layer_norm_eps="layer_norm_epsilon"),
         "llama": dict(context_length="max_position_embeddings", embedding_length="hidden_size",
                       block_count="num_hidden_layers", head_count="num_attention_heads",
                       head_count_kv="num_key_value_heads", feed_forward_length="intermediate_size",
                       layer_norm_rms_eps="rms_norm_eps", rope_freq_base="rope_theta",
                       rope_dimension_count="head_dim")}


def write_gguf(ours, stored, path, tokenizer=None):
    """A model of ours as a GGUF file of architecture gpt2 or llama: matrices of type `stored`, positions and
    vectors in fp32. tokenizer: {key behind "tokenizer.": value}; None: none."""
    gguf = installed("gguf", "gguf")
    weights, config = as_gpt2(ours)
    arch = config["model_type"]
    shape = {name: config[key] for name, key in SHAPE[arch].items()}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), shape["block_count"])
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (shape | {"vocab_size": config["vocab_size"]}).items():
        getattr(writer, f"add_{name}")(value)
    for key, value in (tokenizer or {"ggml.model": "none"}).items():
        types = gguf.GGUFValueType
        writer.add_key_value(f"tokenizer.{key}", value, types.UINT32 if type(value) is int else
                             types.get_type(value))
    if config.get("rope_scaling"):
        writer.add_tensor(gguf_file.FACTORS, gguf_file.factors_of(ours.config).numpy())
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue                                             # llama.cpp takes the embedding's
        if arch == "llama" and name.rpartition(".")[0].endswith(TURNED):
            tensor = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)
        given = tensor.float().numpy(force=True)
        given = given.T.copy() if arch == "gpt2" and name.endswith(CONV1D) else given
        plain = given.ndim == 1 or "wpe" in name
        kind = gguf.GGMLQuantizationType["F32" if plain else stored.upper()]
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(given, kind),
                          raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_of_matrices(path):
    """Bytes of the matrices that a step of the model in a GGUF file multiplies by."""
    tensors = [t for t in installed("gguf", "gguf").GGUFReader(path).tensors if len(t.shape) > 1]
    names = {t.name for t in tensors}
    return sum(int(t.n_bytes) for t in tensors if t.name != "position_embd.weight"
               and (t.name != "token_embd.weight" or "output.weight" not in names))


class CTranslate2:
    """ctranslate2's GPT-2 with the weights of one of our models, through its converter, in one of its TYPES.

    Batch 1, greedy, with torch's number of threads, in a process of its own (ct2_apart.py says why). Its
    Python API has no single step over a cache, so it is timed on whole generations alone. Positions end with
    the block.
    """
    TYPES = "float32", "int8"

    def __init__(self, ours, stored):
        installed("ctranslate2", "ctranslate2")
        from transformers import GPT2Config, GPT2LMHeadModel
        self.stored = stored
        weights, config = as_gpt2(ours)
        model = GPT2LMHeadModel(GPT2Config(**config))
        model.load_state_dict(weights)
        self.activation = GELUS[config["activation_function"]]
        with tempfile.TemporaryDirectory() as folder:
            converter_of(model).convert(folder, quantization=stored, force=True)
            says = "import sys; from benchmarks.ct2_apart import main; main(*sys.argv[1:])"
            words = [sys.executable, "-c", says, folder, stored, str(torch.get_num_threads())]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                            cwd=ROOT, start_new_session=True)    # Ctrl-C is ours alone
            weakref.finalize(self, end, self.process)
            self.computes = self.answer()        # it has read the folder

    def answer(self):
        line = self.process.stdout.readline()
        require(line, f"ctranslate2 with {self.stored} weights has ended before its answer")
        return json.loads(line)

    def about(self):
        """What the record keeps of this side."""
        return {"engine": "ctranslate2", "weights": self.stored, "threads": torch.get_num_threads(),
                "computes": self.computes}

    def generate(self, prompt, new, **_):
        """Token ids (1, T) -> (1, T + new)."""
        ids = prompt[0].tolist()
        with contextlib.suppress(BrokenPipeError):               # then no answer comes
            self.process.stdin.write(json.dumps([ids, new]) + "\n")
            self.process.stdin.flush()
        made = self.answer()
        require(len(made) == new, f"ctranslate2 made {len(made)} of {new} tokens")
        return torch.tensor([ids + made])


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):   # what it has not read
        process.stdin.close()


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
