"""What a model did for every token that it wrote, as one HTML page that opens without a network.

    python sample.py --out_dir=out-pylib --trace=trace.html

The work of a layer is what its attention and its MLP executed of products of weights in the decode step that
made the token, as the decode engine counts it (Program.done). Surprise is -log2 of the probability that the
model gave the token before any temperature or filter. The first token of a sample is made while the prompt is
read, so it has no step of its own and no work is shown for it.
"""
import json
from pathlib import Path

from configurator import ConfigError, require
from decode import engine, sampling

LIKELY = 5                                       # alternatives that the page names for each token
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
        device = model.lm_head.weight.device
        require(device.type == "cpu", "trace counts the work of a CPU's decode steps: type --device=cpu")
        runs = engine.trial(model, device, 1)
        require(runs, f"trace reads what the decode engine counts, which does not run here ({runs}): leave "
                "trace out")
        self.model, self.sampler, self.samples = model, Listening(sampler), []
        self.program, self.seen = None, None

    def show(self, program):
        """The engine says that this program decodes from now on."""
        self.program, self.seen = program, self.counts(program)

    @staticmethod
    def counts(program):
        """A program's counts so far: steps, {part: (multiply-adds, bytes)}, how often each op has run."""
        return program.c.steps, program.done(), [op.runs for op in program.table]

    def stream(self, stream, prompt, count, spoken, text, **keys):
        """Continue the prompt (1, T), which reads `spoken`, by `count` tokens of `stream` -> what each adds
        to the text of the StreamDecoder `text`."""
        self.samples.append({"prompt": spoken, "tokens": []})
        choices, self.program = self.model.choices, None
        self.model.choose(watch=self)
        try:
            for token in stream(prompt, count, self.sampler, **keys):
                yield self.note(int(token), text)
        finally:
            self.model.choices = choices

    def step(self):
        """What the step of the last token has executed -> the layers that ran, each layer's multiply-adds and
        the groups that answered. None where no step made it: its window was read by forward."""
        layers = range(len(self.model.transformer.h))
        groups, ran = [[] for _ in layers], 0
        if self.program is None or self.program.c.steps == self.seen[0]:
            return None, None, groups
        (_, before, old), self.seen = self.seen, self.counts(self.program)
        _, after, new = self.seen
        macs = [sum(after[part][0] - before[part][0] for part in parts if part in after)
                for parts in ((f"layer {layer} attention", f"layer {layer} MLP") for layer in layers)]
        for n, name in enumerate(self.program.names):
            code, _, part = name.partition(" ")
            if part.endswith("MLP") and new[n] > old[n]:
                ran += code == "norm"
                if code in ("columns", "experts"):
                    width, layer = self.program.table[n].n[2], int(part.split()[1])
                    groups[layer] = sorted({unit // width for unit in self.program.listed_by(n)})
        return ran, macs, groups

    def note(self, token, text):
        """Keep what was seen of a token -> what it adds to the text."""
        surprise, ids, chances = self.sampler.thoughts[-1]
        said, (ran, macs, groups) = text.feed(token), self.step()
        self.samples[-1]["tokens"].append({
            "id": token, "text": said, "bits": round(surprise, 3),
            "likely": [[spelt(text.token_bytes(i)), round(p, 4)] for i, p in zip(ids, chances)],
            "layers": ran, "macs": macs, "groups": groups})
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
