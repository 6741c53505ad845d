"""Train a GPT on one process or many, with nanoGPT's keys.

    python train.py                                             the built-in data and config/train_pylib.py
    python train.py book.txt --block=predict                    a text of yours, and a block of config/
    python train.py config/train_shakespeare_char.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import sparse_kernels
from configurator import ConfigError, begin_script, convert, require, say_and_exit
from data import dataset as datasets
from data import tokenizer as tokenizers
from decode.counters import by_layer, counters, depth_used, summary, trained_step_macs
from layers import window_path
from model import GPT, SIZES, GPTConfig, build_model
from training import checkpoint as ckpt
from training import console, continual, energy, estimate, optimizers, pretrained, retrofit, rundir, runtime
from training.pretrained import GPT2_SIZES
from training.words import Words

# never taken from a checkpoint
HERE_ONLY = ("init_from", "out_dir", "eval_only", "dry_run", "device", "dtype", "compile", "backend", "fsdp",
             "download", "verbose")


@dataclass(frozen=True)
class TrainConfig(GPTConfig):
    """Words, read from left to right, the last one wins: a config file (.py), --key=value, a text to
    train on, or --block=NAME, which is config/bio_NAME.py: columns, compartments, dendrites, energy, event,
    exits, experts, growth, hierarchy, inputs, osc, ponder, predict, topk, two_of_four, window, winners;
    several by commas. Where neither a word nor a config names data, config/train_pylib.py is the base."""
    bias: bool = False  # biases in Linears and LayerNorms; nanoGPT trains without
    vocab_size: int = 0  # number of token ids; 0: the dataset's, or 50304 where it does not say
    # --- run ---
    out_dir: str = "out"  # folder of the checkpoint and of metrics.jsonl
    init_from: str = "scratch"  # scratch, resume, auto (resume if it can), gpt2[-medium...], a run or file
    max_iters: int = 600000  # iterations of the whole run
    eval_interval: int = 2000  # iterations between evaluations; does not change the training curve
    eval_iters: int = 200  # batches per evaluation and split, always the same ones
    log_interval: int = 1  # iterations between rows of metrics.jsonl
    eval_only: bool = False  # evaluate once and stop
    dry_run: bool = False  # print parameters, memory, tokens and time of the run from a few steps, and stop
    always_save_checkpoint: bool = True  # save after every evaluation; False: only when the val loss improves
    keep_checkpoints: int = 2  # saves that stay: ckpt.pt and, as ckpt-ITERATION.pt, those before it
    seed: int = 1337  # decides weights, batches and dropout
    max_skipped_steps: int = 8  # stop after so many steps in a row with a loss or gradient that is not finite
    verbose: bool = False  # say why this device, dtype and compilation were chosen
    wandb_log: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its run name
    # --- data ---
    dataset: str = "openwebtext"  # folder below data/ or path of one; several by weight: NAME:3,NAME:1
    download: bool = False  # let a data set's prepare.py take more than 100 MB from the network
    batch_size: int = 12  # sequences per micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches per iteration, over all processes together
    sampling: str = "random"  # of windows: random (nanoGPT's), or epoch: all of them once, then all again
    documents: bool = False  # a sample stays in one document; data sets of documents have the marks for it
    tasks: str = ""  # data sets to learn one after the other, by commas, lr_decay_iters iterations each
    # --- optimizer ---
    optimizer: str = "adamw"  # adamw, or muon for the matrices inside the blocks with adamw for the rest
    learning_rate: float = 6e-4  # highest learning rate
    min_lr: float = 6e-5  # lowest learning rate, about a tenth of learning_rate
    lr_schedule: str = "cosine"  # cosine, linear, wsd (constant, then linear), constant
    decay_lr: bool = True  # warm up and decay the learning rate; False: constant
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_decay_iters: int = 600000  # iteration where the schedule reaches min_lr
    lr_decay_share: float = 0.3  # wsd: the share of the run that decays
    weight_decay: float = 1e-1  # on tensors of two or more dimensions
    beta1: float = 0.9  # Adam's decay of the mean
    beta2: float = 0.95  # Adam's decay of the mean square
    grad_clip: float = 1.0  # largest gradient norm; 0.0 does not clip
    muon_learning_rate: float = 0.02  # highest learning rate of muon; follows the same schedule
    muon_momentum: float = 0.95  # muon's decay of the mean gradient
    muon_steps: int = 5  # muon's Newton-Schulz iterations; 4 lose little and save time on small models
    # --- machine ---
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16 (with a gradient scaler, CUDA only)
    compile: bool | str = "auto"  # torch.compile: auto, True, False
    backend: str = "nccl"  # of torch.distributed on GPUs; CPUs use gloo
    fsdp: bool = False  # split weights, gradients and optimizer among the processes: FSDP2
    # --- training with blocks ---
    anneal: float = 0.0  # share of lr_decay_iters in which mlp_topk, columns_active fall from all to theirs
    grow: str = ""  # grow up: "2:0.2,4:0.3" trains 2 layers for 0.2 of lr_decay_iters, 4 for 0.3, then all
    train_only: str = ""  # new: train the tensors alone that the flags behind --init_from added; empty: all
    teacher: str = ""  # a run or a GPT-2 whose predictions are learnt too, beside the data; empty: none
    distill: float = 0.5  # the share of the loss that is the divergence from the teacher
    ewc: float = 0.0  # pull to the weights that earlier tasks ended with, by their Fisher information; 0: off
    ewc_samples: int = 256  # sequences of a task that its Fisher information is estimated from
    replay: float = 0.0  # share of each batch's rows that come from earlier tasks
    replay_blocks: int = 1024  # rows of all earlier tasks that are kept for that
    freeze: bool = False  # from the second task on train that task's adapter alone
    # --- model: shape ---
    size: str = ""  # small, medium, large, xlarge, gpt2[-medium|-large|-xl]: sets n_layer, n_head and n_embd

    def __post_init__(self):
        self.check_growth(self.model_config(vocab_size=self.vocab_size or 50304).n_layer)
        for key in ("eval_interval", "log_interval", "eval_iters", "gradient_accumulation_steps",
                    "batch_size", "max_skipped_steps", "keep_checkpoints"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)} must be at least 1")
        for key in ("max_iters", "warmup_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip",
                    "vocab_size"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"{key}={getattr(self, key)} must be in [0, 1)")
        require(0 <= self.anneal <= 1, f"anneal={self.anneal} must be in [0, 1]: a share of the run")
        require(not self.anneal or self.mlp_topk < 1 or self.columns,
                f"anneal={self.anneal} has no effect without mlp_topk or columns: leave it out")
        require(not self.size or self.size in SIZES, f"size='{self.size}' must be one of {', '.join(SIZES)}")
        require(self.sampling in datasets.SAMPLINGS,
                f"sampling='{self.sampling}' must be one of {', '.join(datasets.SAMPLINGS)}")
        optimizers.check(self)
        retrofit.check_keys(self)
        runtime.check_compile(self.compile)
        continual.check(self)

    def task_names(self):
        """The names in `tasks`; without any the data set is the only one."""
        return self.tasks.split(",") if self.tasks else [self.dataset]

    def stages(self):
        """The pairs in `grow`, (layers, share of lr_decay_iters)."""
        try:
            return [(int(layers), float(share)) for layers, share in
                    (stage.split(":") for stage in self.grow.split(",") if stage)]
        except ValueError:
            return [(0, 0.0)]

    def check_growth(self, n_layer):
        layers, shares = zip(*self.stages()) if self.grow else ((), ())
        require(list(layers) == sorted(set(layers)) and all(1 <= n < n_layer for n in layers)
                and all(share > 0 for share in shares) and sum(shares) < 1,
                f"grow='{self.grow}' must be LAYERS:SHARE by commas, layers rising in 1..{n_layer - 1}, "
                "shares above 0 and together below 1: type --grow=1:0.3, for example")
        require(not self.grow or not self.hierarchy, f"grow='{self.grow}' and hierarchy={self.hierarchy}: "
                "the middle layers are those between two ends; choose one of them")
        require(not self.grow or self.init_from in ("scratch", "resume", "auto"),
                f"grow='{self.grow}' and init_from='{self.init_from}': what is loaded is grown already; "
                "leave --grow out")

    def layers_at(self, iteration, n_layer):
        """How many of n_layer layers an iteration trains."""
        begin = 0.0
        for layers, share in self.stages():
            begin += share * self.lr_decay_iters
            if iteration < begin:
                return layers
        return n_layer

    def model_config(self, **changes):
        named = SIZES.get(self.size, {})
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig)} | named | changes)


def open_model(key, source):
    """The model that --init_from or --teacher names -> (GPT on the CPU, in eval mode, the description of its
    tokenizer or None, what is kept of where it comes from, {"dataset": what it was trained on} if known)."""
    data = {}
    if pretrained.is_gpt2(source):
        model, path = GPT.from_pretrained(source), source
        known, iteration = pretrained.description_of(source, model.config.vocab_size), None
    else:
        require(os.path.exists(Path(source)), f"{key}='{source}' must be "
                + "scratch, resume, auto, " * (key == "init_from") + f"{', '.join(GPT2_SIZES)}, or the path "
                "of a checkpoint, a run, a Hugging Face folder or a .gguf file")
        loaded, path = ckpt.read(Path(source))
        model = build_model(loaded, path, learns=key == "init_from")
        known, iteration = loaded.get("tokenizer"), loaded.get("iter_num")
        data = {key: value for key, value in (loaded.get("config") or {}).items()
                if key == "dataset" and isinstance(value, str)}
    return model.eval(), known, {"name": retrofit.name_of(path), "iter_num": iteration,
                                 "sha256": retrofit.sha_of(path)}, data


# -------------------------------------------------- configuration and run directory -------------------------

begin_script()
words = Words(sys.argv[1:], TrainConfig, GPTConfig)
given = words.given                                            # what the user typed, to tell it from defaults
world, device_name = runtime.join_world(*(given.get(key, getattr(TrainConfig, key)) for key in
                                          ("backend", "device")))
say = print if world.master else (lambda *text, **how: None)
for turn in (world.master, not world.master) if words.text else ():
    said = words.prepare_text(given.get("dry_run")) if turn else ""
    say(*[said] * bool(said))
    world.barrier()
given["out_dir"] = words.out_dir()
start = ckpt.start_of(given.get("init_from", TrainConfig.init_from), given["out_dir"], world.restarted())
given = words.keys(start) | {"init_from": start, "out_dir": given["out_dir"]}
if words.about_base(start):
    say(words.about_base(start))
for key in ("n_layer", "n_head", "n_embd"):
    require(not given.get("size") or key not in words.named or key not in given,
            f"size='{given.get('size')}' and {key}={given.get(key)} both set {key}: type one of them")
resumed, base, dense, parent = None, {}, None, None
if start == "resume":
    before_reading = ckpt.stamps(given["out_dir"])
    resumed, resumed_path = ckpt.read(given["out_dir"], resume=True)
    known = {f.name: f for f in fields(TrainConfig) if f.name not in HERE_ONLY}
    base = {k: convert(known[k], v, f"{resumed_path}", v) for k, v in resumed["config"].items()
            if k in known and k not in given}                  # so typing a key mends one that is damaged
elif start != "scratch":
    dense, dense_tokenizer, parent, base = open_model("init_from", start)
    base |= {k: v for k, v in asdict(dense.config).items() if k != "dropout"}
world.require_same(resumed["iter_num"] if resumed else 0, "starts at iteration {}", "out_dir")
cfg = TrainConfig(**{**base, **given})
require(given.get("dataset") in (None, cfg.task_names()[0]), f"dataset='{cfg.dataset}' is not the first of "
        f"tasks='{cfg.tasks}': leave --dataset out")

place = runtime.choose(device_name, cfg.dtype, cfg.compile)
if place.device.type == "cpu":
    runtime.keep_freed_memory()
out_dir = Path(cfg.out_dir)
require(cfg.gradient_accumulation_steps % world.size == 0,
        f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the "
        f"{world.size} processes: type --gradient_accumulation_steps={world.size}, for example")
runtime.check_sharding(cfg, world, place.dtype)


def open_folder():
    """The run's folder, ready for this run alone -> its lock."""
    taken = rundir.take(out_dir)
    require(not resumed or ckpt.stamps(out_dir) == before_reading, f"out_dir={out_dir}: another run, which "
            "has ended now, saved there while this one was reading: type the command again")
    ckpt.sweep(out_dir)
    if resumed:
        ckpt.set_aside(out_dir, resumed_path)
    return taken


looks_only = cfg.eval_only or cfg.dry_run                      # nothing is written, so no lock is needed
lock = None if looks_only else world.by_master(open_folder)
for turn in (world.master, world.local_rank == 0):             # hosts may have data folders of their own
    for name in cfg.task_names() if turn and not cfg.dry_run else ():
        datasets.prepare_sources(name, cfg.download)
    world.barrier()
say(console.place_line(place, torch.get_num_threads(), world.size, cfg.verbose))

# -------------------------------------------------- what the flags select, built once -----------------------

lacking = []                                                   # data sets that a dry run goes without
task_sources = [datasets.prepare_sources(name, cfg.download) if not cfg.dry_run else
                datasets.sources_or_random(name, cfg.vocab_size, cfg.block_size, lacking)
                for name in cfg.task_names()]
folders = [folder for sources in task_sources for folder, _ in sources]
continual.one_vocabulary(folders if cfg.tasks else folders[:1])
meta = datasets.common_meta([source for sources in task_sources for source in sources])
tokenizer = {"tokenizer": tokenizers.described(meta)} if "tokenizer" in meta else {}


def start_model():
    """The model that init_from names -> (GPT on the CPU, iterations done, best val loss, seconds trained)."""
    vocab_size = cfg.vocab_size or meta.get("vocab_size") or 50304
    if cfg.init_from == "scratch":
        model = GPT(cfg.model_config(vocab_size=vocab_size), seed=cfg.seed)
        model.begin_with_layers(cfg.layers_at(0, model.config.n_layer))
        return model, 0, 1e9, 0.0
    if resumed:
        model = pretrained.fit_vocabulary(load_model(resumed, resumed_path), resumed.get("tokenizer"), meta)
        return model, resumed["iter_num"], float(resumed["best_val_loss"]), resumed.get("seconds", 0.0)
    model = pretrained.fit_vocabulary(dense, dense_tokenizer, meta)
    return model, 0, 1e9, 0.0


def load_model(loaded, path):
    """A checkpoint's model, with the flags of this run that are no part of it where the user typed them."""
    dropout = loaded["model_args"].get("dropout", cfg.dropout)
    typed = {key: given[key] for key in ("dropout", "recompute", "loss_chunks") if key in given}
    return build_model(loaded, path, learns=True, **{"dropout": dropout} | typed)


def with_flags(model):
    """The model that a run starts from with the flags that were typed -> (model, Account or None)."""
    new = cfg.model_config(vocab_size=given.get("vocab_size") or model.config.vocab_size,
                           block_size=model.config.block_size)
    if not retrofit.changes(model.config, new):
        return pretrained.rebuilt(model, new), None
    retrofit.check(model.config, new, cfg.init_from)
    require(not retrofit.is_run(cfg.init_from, out_dir), f"out_dir={out_dir} is the run of "
            f"--init_from={cfg.init_from}, which the new one is compared with: type --out_dir=ANOTHER_FOLDER")
    rows = max(1, retrofit.TOKENS // new.block_size)
    stream = datasets.open_stream(task_sources[0], "train", new.block_size, rows, seed=cfg.seed,
                                  vocab_size=new.vocab_size)
    return retrofit.retrofit(model, new, stream.batch(0)[0], cfg.seed)


def same_shape(config):
    """What the user typed of the model must be what the loaded one is; the caller crops the block."""
    free = {"dropout", "recompute", "loss_chunks", "block_size"}
    typed = given.keys() & {f.name for f in fields(GPTConfig)} - free
    wanted = {key: given[key] for key in typed} | SIZES.get(given.get("size"), {})
    for key, value in wanted.items():
        name = key if key in typed else "size"
        require(value == getattr(config, key) or (key == "vocab_size" and not value),
                f"{name}={given[name]}, but the model of --init_from={cfg.init_from} has "
                f"{key}={getattr(config, key)}: leave --{name} out, or start anew with --init_from=scratch"
                + f", or switch it on in another run: --init_from={cfg.out_dir} --out_dir=ANOTHER_FOLDER"
                * (cfg.init_from == "resume" and key not in retrofit.STAYS))


raw_model, iter_num, best_val_loss, seconds_before = start_model()
require("block_size" not in given or cfg.block_size <= raw_model.config.block_size,
        f"block_size={cfg.block_size} is longer than the {raw_model.config.block_size} of the loaded model: "
        "leave --block_size out")
if cfg.block_size < raw_model.config.block_size:
    raw_model.crop_block_size(cfg.block_size)
for folder in folders:
    datasets.check(folder, raw_model.config.block_size, raw_model.config.vocab_size)
dense, account = raw_model, None
if parent:
    raw_model, account = with_flags(dense)
    parent["new"] = account.new if account else []
parent = (resumed or {}).get("parent", parent)
model_config = raw_model.config
same_shape(model_config)
if cfg.train_only:
    retrofit.freeze_all_but(raw_model, (parent or {}).get("new", ()))
settings = asdict(cfg) | asdict(model_config) | {"size": ""}   # what the model is, whatever named it
raw_model = runtime.shard(raw_model, place.device) if cfg.fsdp else raw_model.to(place.device)
raw_model.compute_dtype = place.dtype
if (model_config.mlp_topk_group, model_config.mlp_topk) == (4, 0.5):
    say(sparse_kernels.winners_path(place.device))
if model_config.window and place.device.type == "cuda":
    say(window_path(model_config, place.device, place.dtype))
say(f"model {model_config.n_layer} layers, {model_config.n_embd} wide, {raw_model.get_num_params():,} "
    f"parameters without positions; data {', '.join(map(str, folders)) if not lacking else 'random tokens, '}"
    f"{' and '.join(lacking)}{' is not here' * bool(lacking)}, vocabulary {model_config.vocab_size}")

for line in optimizers.standstill(cfg):
    say(line)
optimizer = optimizers.build(raw_model, cfg, place.device.type)
clipped = optimizers.by_clipping(raw_model)                    # each list has a gradient norm of its own
scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
if resumed:
    ckpt.load_optimizer(optimizer, resumed["optimizer"], resumed_path)
    runtime.split_state(optimizer)
    if resumed.get("scaler"):
        scaler.load_state_dict(resumed["scaler"])
saved_tasks = (resumed or {}).get("tasks")
run_id = rundir.id_of(out_dir, resumed)
resumed = None                                                  # frees the weights held twice

accumulation = cfg.gradient_accumulation_steps // world.size
tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * model_config.block_size
shape = (model_config.block_size, cfg.batch_size)
train_streams = [datasets.open_stream(sources, "train", *shape, seed=cfg.seed, sampling=cfg.sampling,
                                      vocab_size=model_config.vocab_size,
                                      documents=cfg.documents and not lacking)
                 for sources in task_sources]
eval_streams = [{split: datasets.open_stream(sources, split, *shape, seed=0,   # the same for every sampling
                                             vocab_size=model_config.vocab_size)
                 for split in ("train", "val")} for sources in task_sources]
world.require_same([stream.tokens for stream in train_streams], "trains on {} tokens", "data sets")
tasks = continual.Tasks(cfg, raw_model, train_streams, world, saved_tasks, iter_num)
model = torch.compile(raw_model) if place.compile else raw_model
parallel = (DDP(model, device_ids=[place.device.index] if place.device.type == "cuda" else None,
                find_unused_parameters=bool(cfg.grow or cfg.adapters))
            if world.size > 1 and not cfg.fsdp else model)
teacher = retrofit.check_teacher(cfg, model_config, meta, *open_model("teacher", cfg.teacher)[:2]
                                 ) if cfg.teacher else None


def to_device(batch):
    """Two int64 tensors -> on the device; from pinned memory, so a GPU copies them while it computes."""
    if place.device.type == "cuda":
        return [t.pin_memory().to(place.device, non_blocking=True) for t in batch]
    return [t.to(place.device) for t in batch]


def numbered(iteration, micro):
    """The global micro-batches of an iteration are numbered; this rank takes every world.size-th. So any
    number of processes sees the same data, and a resumed run needs no position but iter_num."""
    return iteration * cfg.gradient_accumulation_steps + micro * world.size + world.rank


def micro_batch(iteration, micro):
    return to_device(tasks.lessons.batch(numbered(iteration, micro)))


@torch.no_grad()
def evaluate(task, splits=datasets.SPLITS, net=model):
    """Mean loss over eval_iters fixed batches of a task's splits, shared among the ranks -> {split: loss}."""
    tasks.look_at(task)
    net.eval().choose(loss_alone=True)
    ends = cfg.eval_iters + (-cfg.eval_iters % world.size) * cfg.fsdp     # all ranks gather split weights
    sums = [sum(net(*to_device(eval_streams[task][split].batch(k)))[1].item() * (k < cfg.eval_iters)
                for k in range(world.rank, ends, world.size))
            for split in splits]
    net.choose(loss_alone=False)
    model.train()
    return {split: total / cfg.eval_iters for split, total in zip(splits, world.sum(sums))}


def tell_retrofit():
    """Before the first step: what became of the dense model's tensors, and its loss beside this one's."""
    dense.to(place.device).compute_dtype = place.dtype
    losses = {"val_loss": evaluate(0, ["val"], dense)["val"], "untouched": evaluate(0, ["val"])["val"]}
    if model_config.mlp_screen or model_config.mlp_predict:
        raw_model.choose(predict=True)
        losses["untouched_decoding"] = evaluate(0, ["val"], raw_model)["val"]
        raw_model.choose(predict=False)
    parent.update(losses)
    say(f"from {parent['name']}: ", "\n".join(account.lines()), sep="")
    say(retrofit.beside(losses, retrofit.changes(dense.config, model_config)))


def own_loss(batch):
    return parallel(*batch)[1]


def loss_beside_teacher(batch):
    logits, loss = parallel(*batch)
    with torch.no_grad():
        theirs = teacher(*batch)[0]
    return retrofit.distilled(cfg.distill, loss, logits, theirs, batch[1])


def finish_task():
    """Between two tasks and behind the last: the losses on all of them -> what the log gets."""
    names = cfg.task_names()
    losses = {name: evaluate(task, ["val"])["val"] for task, name in enumerate(names)}
    found = {"after_task": names[len(tasks.matrix)]} | tasks.finish(losses)
    if world.master:
        tqdm.write(f"after {found['after_task']}: " + ", ".join(f"{k} {v:.4f}" for k, v in
                   (losses | found).items() if k != "after_task"))
    return found | {f"val_loss of {name}": loss for name, loss in losses.items()}


def share_gradients(now):
    """Whether the next backward adds its gradients up over the processes, as the last of a step does."""
    parallel.require_backward_grad_sync = now                   # DDP's
    if cfg.fsdp:
        raw_model.set_requires_gradient_sync(now)


def train_step(iteration, batch):
    """One optimizer step -> (global mean loss, what mechanisms added to it, gradient norm, next step's first
    batch, does any rank stop).

    Where either is not finite the weights and the optimizer stay as they are, on all ranks alike.
    """
    torch.manual_seed(((cfg.seed * 1_000_003 + iteration) * 1009 + world.rank) % 2**63)  # stateless dropout
    total, extra = torch.zeros(2, device=place.device)
    for micro in range(accumulation):
        share_gradients(micro == accumulation - 1)
        tasks.listen(numbered(iteration, micro))
        loss = loss_of(batch) / accumulation
        last = micro == accumulation - 1
        batch = micro_batch(iteration + last, 0 if last else micro + 1)     # gathered while a GPU computes
        scaler.scale(loss).backward()
        total += loss.detach()
        extra += raw_model.auxiliary / accumulation
    scaler.unscale_(optimizer)
    raw_model.regularise()
    tasks.pull()
    norms = [runtime.whole(torch.nn.utils.clip_grad_norm_(part, cfg.grad_clip or math.inf))
             for part in clipped]
    total, extra, norm = torch.stack((total, extra, sum(norms).to(total.dtype))).tolist()
    total, extra, stops = world.sum([total / world.size, extra / world.size, float(stop_signal)])
    if (math.isfinite(total) and math.isfinite(norm)) or scaler.is_enabled():
        scaler.step(optimizer)                                              # a scaler skips by itself
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, extra, norm, batch, stops > 0


def grow(iteration):
    """Run the layers that this iteration trains; what waits has been the identity since the start."""
    raw_model.use_layers(cfg.layers_at(iteration, model_config.n_layer))
    if world.master:
        tqdm.write(f"step {iteration}: {len(raw_model.blocks)} of {model_config.n_layer} layers")


def save_checkpoint(path):
    """Write the state before iteration iter_num; weights that are not finite are never written."""
    global asked
    asked = iter_num
    weights, moments = runtime.whole([raw_model.state_dict(), optimizer.state_dict()])   # by all ranks
    if not world.master:
        return
    learnt = dict(raw_model.named_parameters())                 # a threshold that is not found yet is NaN
    if not all(bool(torch.isfinite(p).all()) for name, p in weights.items() if name in learnt):
        return tqdm.write(f"iteration {iter_num}: weights are not finite, {path} is left as it is",
                          file=sys.stderr)
    lock.check()
    ckpt.save(dict(model=weights, optimizer=moments, run=run_id,
                   model_args=model_config.model_args(), iter_num=iter_num, best_val_loss=best_val_loss,
                   config=settings, **tokenizer, scaler=scaler.state_dict(), seconds=seconds(),
                   **({"tasks": tasks.state_dict()} if cfg.tasks else {}),
                   **({"parent": parent} if parent else {}),
                   **({"launch": ckpt.launch()} if ckpt.launch() else {})), path, cfg.keep_checkpoints)
    saved[path.name] = iter_num
    if path.name == "ckpt.pt":
        ckpt.discard(out_dir / "ckpt_last.pt")
        saved.pop("ckpt_last.pt", None)


def open_metrics():
    """metrics.jsonl, opened to append; a resumed run drops rows past its checkpoint: iterations only rise."""
    path, kept = out_dir / rundir.LOG, ""
    if cfg.init_from != "resume":
        rundir.begin(out_dir, run_id, cfg.init_from)
    try:
        if cfg.init_from == "resume" and path.is_file() and not rundir.kept_as_another(path, run_id):
            kept = rundir.rows_before(path, iter_num)
        path.write_text(kept, encoding="utf-8")
        return open(path, "a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): type "
                          "--out_dir=ANOTHER_FOLDER") from error


def log(row):
    """One row of metrics.jsonl, with the run's id; what is not finite is null, as JSON has no NaN."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    if world.master:
        try:
            metrics.write(json.dumps(row | {"run": run_id}) + "\n")
        except OSError as error:
            raise ConfigError(f"{metrics.name} cannot be written ({error.strerror}); "
                              f"{ckpt.free_space(out_dir)} free there") from error
    if wandb:
        wandb.log({k: v for k, v in row.items() if k != "by_layer"}, step=row["iter"])


def what_is_saved():
    return console.saved_line(raw_model, out_dir, saved, iter_num, iter_before, best_val_loss, evaluated)


def seconds():
    """Seconds of this run's loop, earlier parts of a resumed run included."""
    return seconds_before + time.perf_counter() - started


def request_stop(number, frame):
    """First signal: stop at the next step boundary. Second: now."""
    global stop_signal
    if stop_signal:
        if lock:
            lock.release()
        os._exit(128 + number)
    stop_signal = number
    if number == HANG_UP:
        runtime.leave_lost_terminals()


def answer(kind, error, trace):
    """sys.excepthook of a run: a sentence on a line of its own; to a lack of memory, what to type."""
    bar.close()
    if estimate.is_out_of_memory(error):
        kind, error = ConfigError, estimate.smaller(cfg, place.device)
    say_and_exit(kind, error, trace)


def timed_step(micro_batches):
    """One training step of so many micro-batches -> its seconds; the loop's state goes on: for dry runs."""
    global accumulation, batch
    accumulation, clock = micro_batches, time.perf_counter()
    batch = train_step(iter_num, batch)[3]
    return time.perf_counter() - clock


loss_of = own_loss
if teacher:
    teacher, loss_of = teacher.to(place.device), loss_beside_teacher
    teacher.compute_dtype = place.dtype
wandb = console.start_wandb(cfg, settings) if cfg.wandb_log and world.master and not looks_only else None

# -------------------------------------------------- the loop ------------------------------------------------

stop_signal, skipped, status = 0, 0, 0
saved, asked = {}, None                                        # {file: iteration} by the master; iteration
evaluated = best_val_loss                                      # the last val loss
HANG_UP = getattr(signal, "SIGHUP", 0)                         # the terminal has gone; Windows has none
for number in () if cfg.dry_run else (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, request_stop)
if cfg.dry_run:                                                # it has nothing to save: it ends at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
elif HANG_UP and signal.getsignal(HANG_UP) != signal.SIG_IGN:     # ignored under nohup, and left so
    signal.signal(HANG_UP, request_stop)
world.barrier()                                                # all have read what the run starts from
metrics = None if looks_only else world.by_master(open_metrics)
if account and not cfg.dry_run:
    tell_retrofit()
dense = None                                                    # frees its weights
terminal = sys.stderr.isatty()
iter_before = iter_num
bar = tqdm(total=cfg.max_iters, initial=iter_num, disable=not world.master or looks_only,
           dynamic_ncols=True, mininterval=0.2 if terminal else 20)
sys.excepthook = answer
batch, meter = micro_batch(iter_num, 0), energy.Meter(place.device)
model.train()
started = time.perf_counter()
if cfg.dry_run:
    tokens = None if lacking else sum(stream.tokens for stream in train_streams)
    for line in estimate.dry_run(cfg, raw_model, optimizer, batch, timed_step, tokens_per_iter, tokens,
                                 world.size, quiet=not world.master):
        say(line, flush=True)
    runtime.leave(world, 0)

while True:
    if cfg.layers_at(iter_num, model_config.n_layer) != len(raw_model.blocks):
        grow(iter_num)
    row = {"iter": iter_num, "tokens": iter_num * tokens_per_iter}
    if cfg.sampling == "epoch":
        drawn = iter_num * cfg.gradient_accumulation_steps * cfg.batch_size
        row["epochs"] = train_streams[tasks.at(iter_num)].epochs(drawn)
    best_val_loss = best_val_loss if tasks.step(iter_num) else 1e9            # of this task
    if iter_num % cfg.eval_interval == 0 or iter_num >= cfg.max_iters or cfg.eval_only:
        losses, streams = evaluate(tasks.at(iter_num)), eval_streams[tasks.at(iter_num)]
        evaluated = losses["val"]
        row |= {"train_loss": losses["train"], "val_loss": losses["val"]}
        work = []
        if world.master and not cfg.fsdp:                       # these look at whole weights
            example = to_device(streams["val"].batch(0))[0]
            seen = counters(raw_model, example)
            row |= summary(seen) | depth_used(raw_model, example)
            row |= {"by_layer": by_layer(seen, model_config.n_layer)} if seen else {}
            work = console.work_lines(raw_model, row, trained_step_macs(raw_model, example[:1]))
        if world.master:
            tqdm.write(console.evaluation_line(iter_num, cfg.max_iters, losses, work))
        better = losses["val"] < best_val_loss
        best_val_loss = losses["val"] if better else best_val_loss    # a NaN is never better
        begun = iter_num > 0 or (account and cfg.max_iters == 0)     # what flags make of a dense model alone
        if ((better or (cfg.always_save_checkpoint and math.isfinite(losses["val"])))
                and begun and not cfg.eval_only):
            save_checkpoint(out_dir / "ckpt.pt")
    if tasks.over(iter_num) and not cfg.eval_only:
        row |= finish_task()
    if iter_num >= cfg.max_iters or cfg.eval_only:
        if not cfg.eval_only:
            log(row | {"seconds": seconds(), "joules": meter.joules()})
            if iter_num not in (iter_before, asked):
                save_checkpoint(out_dir / "ckpt_last.pt")       # not better than the best, but the last
        break

    raw_model.anneal(min(1.0, iter_num / (cfg.anneal * cfg.lr_decay_iters)) if cfg.anneal else 1.0)
    tasks.begin(iter_num)
    lr = optimizers.learning_rate(cfg, tasks.step(iter_num))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    step_clock = time.perf_counter()
    loss, extra, norm, batch, stop = train_step(iter_num, batch)
    step_seconds = time.perf_counter() - step_clock
    finite = math.isfinite(loss) and math.isfinite(norm)
    skipped = 0 if finite else skipped + 1
    row |= {"loss": loss, "grad_norm": norm} if finite else {"skipped": f"loss {loss}, gradient norm {norm}"}
    row |= {"layers": len(raw_model.blocks)} if cfg.grow else {}
    row |= {"lr": lr, "ms": 1e3 * step_seconds, "tokens_per_s": tokens_per_iter / step_seconds,
            "seconds": seconds()}
    mfu = raw_model.estimate_mfu(cfg.batch_size * accumulation, step_seconds)
    row |= {"mfu": mfu} if mfu else {}                         # only where the device's peak is known
    if iter_num % cfg.log_interval == 0 or row.keys() & {"val_loss", "after_task"} or not finite:
        log(row)
    bar.set_postfix_str(console.bar_text(loss, extra, row["tokens_per_s"]), refresh=False)
    bar.update()
    iter_num += 1

    if skipped >= cfg.max_skipped_steps:
        status = 1
        break
    if stop:
        status = 128 + (stop_signal or signal.SIGTERM)
        save_checkpoint(out_dir / ("ckpt.pt" if cfg.always_save_checkpoint else "ckpt_last.pt"))
        break

bar.close()
if status == 1:
    say(f"train.py: stopped at iteration {iter_num}: {row['skipped']}, {skipped} steps in a row; "
        f"no weight was changed by them. The last learning rate was {lr:.2e}: "
        "type a lower --learning_rate, or --dtype=float32; " + what_is_saved(), file=sys.stderr)
elif status:
    say(f"stopped by signal {status - 128} before iteration {iter_num}; "
        + (f"go on with: python train.py --init_from=resume --out_dir={cfg.out_dir}"
           if iter_num in saved.values() else what_is_saved()))
elif not cfg.eval_only:
    say(f"done in {seconds():.0f} s{f', {meter}' * bool(meter.read or cfg.verbose)}: {what_is_saved()}")
runtime.leave(world, status)
