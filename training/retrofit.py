"""Retrofit: the weights of a dense model that exists, in a model with blocks switched on.

    python train.py config/train_pylib.py config/bio_window.py --init_from=out-pylib

Tensors are taken by name and shape. What is new begins so that the function is the dense model's where its
mechanism admits that: a module that can do better than its random start has `start_from_dense(dense, x)`, the
module of the same name in the dense model and that module's inputs (n, C) on calibration text.
"""
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from configurator import require
from data import tokenizer as tokenizers
from decode import calibrate
from layers import TwoOfFour, cross_entropy
from training import checkpoint as ckpt
from training.gguf_file import is_gguf

TOKENS = 4096                                    # of training text, that starts are calibrated on
RATE = 0.1                                       # of a new model's learning rates, for one that is trained
SMOOTH = 0.02                                    # ridge of least squares, in mean squares of an input

# ------------------------------------------------------------------------------------------------------------
# what may change

SHAPES = "its tensors have that shape"
STAYS = {                                        # flag: why a checkpoint's weights fit no other value
    "n_layer": SHAPES, "n_head": SHAPES, "n_kv_head": SHAPES, "n_embd": SHAPES, "vocab_size": SHAPES,
    "pos": "its queries and keys have learnt with that",
    **dict.fromkeys(("rope_theta", "rope_factor", "rope_low", "rope_high", "rope_original"),
                    "its queries and keys have learnt with that"),
    "dendrites": "heads are cut otherwise and pass another nonlinearity, so their weights mean other things",
    "compartments": "a branch's W_up reads a part of the stream, a dense one all of it",
    "zero_init": "it says how weights begin, and these have begun",
}
GROUPED = "columns", "experts", "compartments"   # MLPs whose units stand in groups
NO_WEIGHTS = "dropout", "recompute", "loss_chunks", "block_size", "layer_dropout"     # a plain start's too


def changes(old, new):
    """The flags in which two GPTConfigs differ -> {flag: (old, new)}, those of NO_WEIGHTS left out."""
    both = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in fields(old)
            if f.name not in NO_WEIGHTS}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def check(old, new, source):
    """Refuse what would give a tensor of `source`, a model of the config old, another meaning."""
    found = changes(old, new)
    whys = {key: STAYS[key] for key in found if key in STAYS}
    whys |= {key: "its units stand in groups of their own: start from the dense model"
             for key in (*GROUPED, "expert_width", "mlp_units")
             if key in found and any(getattr(old, kind) for kind in GROUPED)}
    if {"act", "mlp_units"} & found.keys() and "swiglu" in (old.act, new.act):
        whys["act" if "act" in found else "mlp_units"] = "W_up of swiglu is two matrices, that of others one"
    if "tie_weights" in found and new.tie_weights:
        whys["tie_weights"] = "its head is not its embedding"
    for key, why in whys.items():
        was, wanted = found[key]
        require(False, f"{key}={wanted}, but the model of --init_from={source} has {key}={was}: {why}; leave "
                       f"--{key} out, or start anew with --init_from=scratch")


# ------------------------------------------------------------------------------------------------------------
# the weights

OF_UNITS = re.compile(r"\.mlp\.(c_fc\.(weight|bias)|c_proj\.weight|act\.(w|phi|b))$")  # see MLP.take_units
# tensors whose meaning hangs on the value of a flag, whatever their shape
MEANS = {".exits.": "exits", ".hierarchy.": "hierarchy", ".adapt.": "adapters", ".ngrams": "ngram_order"}


@dataclass
class Account:
    """What became of every tensor: names of the new model's that are taken and new, of the dense model's that
    are dropped; notes: sentences."""
    taken: list = field(default_factory=list)
    new: list = field(default_factory=list)
    dropped: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def lines(self):
        kinds = (("taken", self.taken), ("new", self.new), ("dropped", self.dropped))
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds)
        listed = [f"  {kind}: {', '.join(by_layer(names))}" for kind, names in kinds[1:] if names]
        return [f"tensors: {counts}", *listed, *self.notes]


def by_layer(names):
    """Names of tensors with the number of the layer left out: each once, and how many it stands for."""
    found = Counter(re.sub(r"^transformer\.(h\.\d+)?", lambda match: "h.*" * bool(match[1]), name)
                    for name in names)
    return [f"{name} ({count})" if count > 1 else name for name, count in found.items()]


@torch.no_grad()
def retrofit(dense, config, ids, seed):
    """-> (a model of `config` that begins where the model `dense`, in eval mode, is, its Account).

    ids: (B, T) int64 of calibration text. seed: of what is drawn. dense stays as it is.
    """
    model = type(dense)(config, seed=seed).eval()
    account = take(model, dense)
    starts = [(name, module) for name, module in model.named_modules()
              if hasattr(module, "start_from_dense") and module is not model]
    seen = inputs_of(dense, [name for name, _ in starts], ids)
    theirs = dict(dense.named_modules())
    for name, module in starts:
        module.start_from_dense(theirs[name], seen[name])
    if dense.config.weights == "dense":
        choose_pruned(model, ids)
    if calibrate.screened(model):
        calibrate.calibrate(model, ids, config.mlp_live)
    account.notes += notes(dense.config, config)
    return model, account


def choose_pruned(model, ids):
    """Choose the weights that 2:4 keeps of a dense model's by what they multiply in text ids (B, T)."""
    pruned = [name for name, module in model.named_modules() if isinstance(module, TwoOfFour)]
    for name, x in inputs_of(model, pruned, ids).items():
        model.get_submodule(name).start_from_inputs(x)


def take(model, dense):
    """Copy every tensor that fits by name and shape -> Account."""
    ours, theirs, account = model.state_dict(), dense.state_dict(), Account()
    other = tuple(part for part, flag in MEANS.items()
                  if not fits(getattr(dense.config, flag), getattr(model.config, flag), flag))
    for name, tensor in ours.items():
        same = (name in theirs and theirs[name].shape == tensor.shape
                and not any(part in name for part in other))
        (account.taken if same or (name in theirs and OF_UNITS.search(name)) else account.new).append(name)
        if same:
            tensor.copy_(theirs[name])
    account.dropped = [name for name in theirs if name not in set(account.taken)]
    return account


def fits(old, new, flag):
    """Do a mechanism's tensors of the old value serve the new one? Adapters may only follow."""
    return new.split(",")[:old.count(",") + 1] == old.split(",") if flag == "adapters" else old == new


def inputs_of(model, names, ids):
    """What the modules of these names read of text ids (B, T) -> {name: (n, C) in fp32}."""
    found = {name: [] for name in names}

    def look(name, module, args):
        found[name].append(args[0].detach().flatten(0, -2).float())

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in names]
    calibrate.run_with(model, ids.split(8) if names else (), handles)
    return {name: torch.cat(parts) for name, parts in found.items()}


def notes(old, new):
    """What somebody who switches these flags on should know."""
    found = changes(old, new)
    if "hierarchy" in found and new.hierarchy:
        yield ("hierarchy: what the middle layers add has factors of zero, so the model begins as its outer "
               f"{2 * new.outer_layers()} of {new.n_layer} layers")
    if "ponder" in found and new.ponder:
        yield "ponder: begins with two runs of which the first counts 98%"
    if "mlp_predict" in found and new.mlp_predict and new.n_embd >= 512:
        yield (f"mlp_predict: rank {new.mlp_predict} at {new.n_embd} wide loses several percent; "
               "mlp_screen=4 (squared ReLU) loses almost nothing and needs no training")


def beside(losses, found):
    """The sentence of the validation losses before the first step. found: see changes."""
    dense, untouched = losses["val_loss"], losses["untouched"]
    also = (f"; {losses['untouched_decoding']:.4f} with sparse_decode"
            if "untouched_decoding" in losses else "")
    return (f"val loss {dense:.4f} dense, {untouched:.4f} ({untouched - dense:+.4f}) with "
            f"{', '.join(f'{key}={new}' for key, (_, new) in found.items())} and nothing trained{also}")


# ------------------------------------------------------------------------------------------------------------
# what starts are calculated with


def small_router(x, energies, all_answer, size=0.2):
    """Least squares from inputs x (n, C) to groups' energies (n, N) -> (N, C), (N,), scaled so that scores
    have the deviation `size`; zeros, where it does not matter who wins."""
    weight, offset, _ = least_squares(x, energies)
    scale = 0 if all_answer else size / (x @ weight.t() + offset).std().clamp(min=1e-12)
    return weight * scale, offset * scale


def least_squares(x, y, ridge=SMOOTH):
    """x (n, C), y (n, m) -> W (m, C), b (m,) so that x W^T + b is near y, and a root L (C, C) of the inputs'
    second moments about their mean."""
    mean, aim = x.mean(0), y.mean(0)
    x, y = x - mean, y - aim
    moments = x.t() @ x / len(x)
    moments.diagonal().add_(ridge * moments.diagonal().mean() + 1e-12)
    root = torch.linalg.cholesky(moments)
    W = torch.cholesky_solve(x.t() @ y / len(x), root).t()
    return W, aim - W @ mean, root


def low_rank(W, root, rank):
    """W (m, C) as guess (m, rank) @ sense (rank, C), best for inputs of the second moments root root^T."""
    M = W @ root
    _, vectors = torch.linalg.eigh(M.t() @ M)
    vectors = vectors[:, -rank:]                 # all C, where rank is more: the others stay zero
    guess = M @ vectors
    sense = torch.linalg.solve_triangular(root.t(), vectors, upper=True).t()
    return F.pad(guess, (0, rank - guess.size(1))), F.pad(sense, (0, 0, 0, rank - len(sense)))


def clusters(a, groups, width, rounds=8):
    """Units of which a (n, H) are the activations, in groups of at most `width` that fire together ->
    (groups, width) numbers of units, -1 where there are none (balanced k-means on what units do together, as
    in 2110.01786)."""
    units = a.abs()
    units = (units / units.norm(dim=0).clamp(min=1e-12)).t()                     # (H, n), of length 1
    centres = spread_out(units, groups)
    for _ in range(rounds):
        like = units @ centres.t()                                               # (H, groups)
        member = assign(like, width)
        sums = torch.zeros_like(centres).index_add_(0, member, units)
        centres = sums / sums.norm(dim=1, keepdim=True).clamp(min=1e-12)
    out = torch.full((groups, width), -1)
    for group in range(groups):
        found = (member == group).nonzero()[:, 0]
        out[group, :len(found)] = found
    return out


def spread_out(units, count):
    """`count` of the rows (H, n), each the one least like those before it; the first fires most."""
    chosen = [int(units.sum(dim=1).argmax())]
    nearest = units @ units[chosen[0]]
    for _ in range(count - 1):
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, units @ units[chosen[-1]])
    return units[chosen].clone()


def assign(like, width):
    """Likeness (H, groups) -> the group of each unit (H,), at most `width` in each: those first that lose
    most by another than their best."""
    best = like.topk(min(2, like.size(1)), dim=1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    wishes, room = like.argsort(dim=1, descending=True, stable=True).tolist(), [width] * like.size(1)
    member = torch.empty(len(like), dtype=torch.long)
    for unit in order:
        group = next(group for group in wishes[unit] if room[group])
        room[group] -= 1
        member[unit] = group
    return member


# ------------------------------------------------------------------------------------------------------------
# training


def distilled(share, loss, logits, teacher, targets):
    """A training loss whose cross-entropy counts 1 - share and the KL divergence to the teacher's logits
    (B, T, vocabulary) share (1503.02531, temperature 1). loss: what the model gave, auxiliary terms
    included; targets (B, T), -1 is ignored."""
    return loss + share * (divergence(logits, teacher, targets) - cross_entropy(logits, targets))


def divergence(logits, teacher, targets):
    """KL(teacher || model) a token, in nats: the mean over targets that are not -1."""
    ours, theirs = (t.float().flatten(0, 1).log_softmax(-1) for t in (logits, teacher))
    each = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    counts = targets.flatten() != -1
    return torch.where(counts, each, 0).sum() / counts.sum().clamp(min=1)


def freeze_all_but(model, new):
    """Let the parameters of these names alone learn; a ConfigError where there are none."""
    named = dict(model.named_parameters())
    require(any(name in named for name in new), "train_only=new: what was switched on has no parameters of "
            "its own, so nothing would learn; leave train_only out")
    for name, p in named.items():
        p.requires_grad_(name in new)


def check_keys(c):
    """The keys of a training config that are about what a run starts from and learns from."""
    require(c.train_only in ("", "new"), f"train_only='{c.train_only}' must be new, or empty: all is trained")
    require(not c.train_only or c.init_from != "scratch", f"train_only={c.train_only} needs a model to which "
            "something is added: type --init_from=RUN and the flags that switch it on")
    require(0 < c.distill <= 1, f"distill={c.distill} must be in (0, 1]: the teacher's share of the loss")
    require(c.teacher or c.distill == type(c).distill, f"distill={c.distill} has no effect without teacher: "
            "type --teacher=RUN too")
    require(not (c.teacher and c.loss_chunks), f"teacher={c.teacher} and loss_chunks={c.loss_chunks}: a "
            "teacher's predictions are learnt from the logits of all tokens at once; leave --loss_chunks out")
    require(not c.teacher or not is_run(c.teacher, c.out_dir), f"teacher={c.teacher} is out_dir itself, "
            "whose checkpoints this run replaces: type --out_dir=ANOTHER_FOLDER")


def check_teacher(cfg, config, meta, teacher, known):
    """Refuse a teacher, of whose tokenizer `known` is the description, whose predictions are of other tokens
    or contexts than the run's -> the teacher."""
    c, again = teacher.config, "name a teacher that read the same tokens"
    require(c.vocab_size == config.vocab_size, f"teacher={cfg.teacher} has vocab_size={c.vocab_size}, this "
            f"model {config.vocab_size}: {again}")
    require(c.block_size >= config.block_size, f"teacher={cfg.teacher} has block_size={c.block_size}, this "
            f"model {config.block_size}: type --block_size={c.block_size}")
    tokenizers.require_same(known, tokenizers.described(meta), f"teacher={cfg.teacher} and the data", again)
    return teacher.requires_grad_(False)


def is_run(source, folder):
    """Is what --init_from names the run of this folder?"""
    source = Path(source)
    return source.exists() and Path(folder).resolve() in (source.resolve(), source.resolve().parent)


def sha_of(path):
    """SHA-256 of the file of weights at path, or in this folder; None where there is none."""
    return ckpt.sha_of(path) or ckpt.sha_of(Path(path) / "model.safetensors")


def name_of(path):
    """A run's name for the record, without what is above it: that of the folder, where path is a file, but
    for one that is a model by itself."""
    path = Path(path).resolve()
    return path.stem if is_gguf(path) else (path.parent if path.is_file() else path).name
