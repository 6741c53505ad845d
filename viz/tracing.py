"""What a model did for every token that it wrote, as one HTML page that opens without a network.

    python sample.py --out_dir=out-pylib --trace=trace.html

The work of a layer is what its products of weights executed in the decode step that made the token, counted
from the shapes that ran (sparse_kernels.counting). Surprise is -log2 of the probability that the model gave
the token before any temperature or filter. The first token of a sample is made while the prompt is read, so
it has no step of its own and no work is shown for it.
"""
import json
from functools import partial
from pathlib import Path

import sparse_kernels as kernels
from configurator import ConfigError, require
from decode import sampling

FORWARD = "a trace watches the modules' own steps"
LIKELY = 5                                       # alternatives that the page names for each token
FORWARD = "a trace watches the modules' own steps"
PAGE = Path(__file__).with_suffix(".html")


class Listening(sampling.Sampler):
    """A Sampler that also keeps what the model thought of the tokens: (surprise in bits, [(id, chance)])."""

    def __init__(self, sampler):
        self.__dict__.update(sampler.__dict__)
        self.thoughts = []

    def wants(self):
        """All logits exactly: a surprise is a share of all of them."""
        return None

    def __call__(self, logits, seen):
        token = super().__call__(logits, seen)
        said = logits[0].float().log_softmax(-1)
        likely = said.topk(min(LIKELY, len(said)))
        self.thoughts.append((-said[token[0, 0]].item() / LN2, likely.indices.tolist(),
                              likely.values.exp().tolist()))
        return token


LN2 = 0.6931471805599453


class Recorder:
    """Watches a model decode one row at a time on a CPU. `samples` holds, for each of their tokens, its id,
    text, surprise, the layers that ran, each layer's multiply-adds, the columns or experts that answered."""

    def __init__(self, model, sampler):
        require(model.lm_head.weight.device.type == "cpu", "trace counts the work of a CPU's decode steps: "
                "type --device=cpu")
        self.model, self.sampler, self.samples = model, Listening(sampler), []
        layers = len(model.transformer.h)
        self.macs, self.runs, self.groups = [0] * layers, [0] * layers, [[] for _ in range(layers)]

    def hooks(self):
        """On every block's two parts: before and behind each, what the tally says."""
        for layer, block in enumerate(self.model.transformer.h):
            for part in (block.attn, block.mlp):
                yield part.register_forward_pre_hook(partial(self.count, layer, -1))
                yield part.register_forward_hook(partial(self.count, layer, 1))
            yield block.mlp.register_forward_pre_hook(partial(self.see, layer))

    def count(self, layer, sign, *_):
        self.macs[layer] += sign * kernels.tally.macs

    def see(self, layer, mlp, args):
        """An MLP is about to run: which of its columns or experts will answer, where it has any."""
        self.runs[layer] += 1
        if hasattr(mlp, "gate") and args[0].size(1) == 1:
            before = kernels.tally.macs, kernels.tally.bytes
            chosen, _ = mlp.gate.chosen(args[0])
            kernels.tally.macs, kernels.tally.bytes = before
            self.groups[layer] = sorted(chosen[0].tolist())

    def watch(self, layer, block):
        """What a block computes for tokens that it does not pass on: keys and values of early leavers."""
        plain = block.write_kv

        def counted(x, ctx):
            self.count(layer, -1)
            plain(x, ctx)
            self.count(layer, 1)
        block.write_kv = counted

    def stream(self, stream, prompt, count, spoken, text, **keys):
        """Continue the prompt (1, T), which reads `spoken`, by `count` tokens of `stream` -> what each adds
        to the text of the StreamDecoder `text`."""
        self.samples.append({"prompt": spoken, "tokens": []})
        hooks, blocks, choices = list(self.hooks()), self.model.transformer.h, self.model.choices
        self.model.choose(forward=FORWARD)       # the engine's step is one call, which runs no module
        for layer, block in enumerate(blocks):
            self.watch(layer, block)
        try:
            with kernels.counting():
                for token in stream(prompt, count, self.sampler, **keys):
                    yield self.note(int(token), text)
                    self.forget()
        finally:
            for hook in hooks:
                hook.remove()
            for block in blocks:
                del block.write_kv
            self.model.choices = choices
            self.forget()

    def forget(self):
        self.macs[:], self.runs[:] = [0] * len(self.macs), [0] * len(self.runs)
        self.groups[:] = [[] for _ in self.groups]

    def note(self, token, text):
        """Keep what was seen of a token -> what it adds to the text."""
        first = not self.samples[-1]["tokens"]
        surprise, ids, chances = self.sampler.thoughts[-1]
        said = text.feed(token)
        self.samples[-1]["tokens"].append({
            "id": token, "text": said, "bits": round(surprise, 3),
            "likely": [[spelt(text.token_bytes(i)), round(p, 4)] for i, p in zip(ids, chances)],
            "layers": None if first else sum(self.runs), "macs": None if first else list(self.macs),
            "groups": [list(groups) for groups in self.groups]})
        return said


def spelt(raw):
    """A token's bytes, readable: a part of a character is shown as hexadecimal numbers."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in raw)


def dense_macs(config):
    """Multiply-adds of one token through one block of the dense twin's weights."""
    matrices = 3 if config.act == "swiglu" else 2
    return 4 * config.n_embd**2 + matrices * config.n_embd * config.units()


def totals(samples, config):
    """What the page's head says of all tokens that have a step of their own."""
    steps = [token for sample in samples for token in sample["tokens"] if token["macs"] is not None]
    everything = [token for sample in samples for token in sample["tokens"]]
    macs = sum(sum(token["macs"]) for token in steps)
    dense = len(steps) * config.n_layer * dense_macs(config)
    return {"tokens": len(everything), "bits": sum(t["bits"] for t in everything) / max(1, len(everything)),
            "layers": sum(t["layers"] for t in steps) / max(1, len(steps)),
            "macs": macs / max(1, len(steps)), "share": macs / max(1, dense)}


def varying(samples, dense):
    """The page's measures that differ from token to token, work first: what it colours by is the first one.
    dense: multiply-adds of a token in the dense twin's blocks; less than 1% of them is no difference."""
    steps = [token for sample in samples for token in sample["tokens"] if token["macs"] is not None]
    work, layers = [sum(token["macs"]) for token in steps], [token["layers"] for token in steps]
    return (["active share"] * bool(work and max(work) - min(work) > 0.01 * dense)
            + ["layers used"] * (len(set(layers)) > 1) + ["surprise"])


def write(path, recorder, about):
    """The page of what a Recorder has seen; about: {name: value} for its head."""
    config = recorder.model.config
    flags = [f"{key}={value}" for key, value in list(config.model_args().items())[7:]]
    about = {"model": f"{config.n_layer} layers, {config.n_embd} wide", "flags": " ".join(flags) or "none",
             **about}
    longest = max(len(sample["tokens"]) for sample in recorder.samples)
    if longest > config.block_size and about.get("overflow", "exact") == "exact":
        about["note"] = f"past {config.block_size} tokens --overflow=exact reads the window anew every step"
    data = {"about": about, "layers": config.n_layer, "dense": dense_macs(config),
            "groups": config.columns or config.experts, "group": "column" if config.columns else "expert",
            "vary": varying(recorder.samples, config.n_layer * dense_macs(config)),
            "totals": totals(recorder.samples, config), "samples": recorder.samples}
    said = json.dumps(data, ensure_ascii=False, default=str).replace("<", "\\u003c")
    try:
        page = PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", said)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"trace={path} cannot be written ({error.strerror}): name another file") from error
