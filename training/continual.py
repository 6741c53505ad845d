"""Learning one task after another without forgetting those before.

    python train.py config/continual_best.py

Tasks are data sets over one vocabulary, each trained on for lr_decay_iters iterations under a schedule that
begins anew. What holds the earlier ones: a pull towards the weights that mattered to them (ewc), rows of
theirs among the batch's (replay), a bottleneck of its own for each (adapters), alone or together.
"""
import functools
import re

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import sparse_kernels as kernels
from configurator import close_match, require
from data.tokenizer import GPT2Tokenizer, meta_of
from layers import EPS, Linear, as_is, belong, rms

KEPT, DRAWN = 2, 3                              # streams of random bits beside dataset's, one for each split
CHUNK = 1 << 20                                 # keys in memory at a time while a reservoir is filled

# ------------------------------------------------------------------------------------------------------------
# adapters


class Adapters(nn.Module):
    """A bottleneck behind a block for each task or language: x + W_up gelu(W_down rms(x)), with W_up zero at
    first, so that each begins as the identity (1902.00751; one a language, behind each layer: 1909.08478).

    One of them is on for all rows of a call, or each row has one (context.Choices); only those that are on
    get a gradient.
    """

    def __init__(self, config):
        super().__init__()
        C, R, names = config.n_embd, config.adapter_width, config.adapter_names()
        self.down = nn.ModuleList(Linear(C, R, bias=False, hidden=False) for _ in names)
        self.up = nn.ModuleList(Linear(R, C, bias=False, hidden=False, std=0.0) for _ in names)

    def forward(self, x, ctx):
        on = ctx.choices.adapters
        return x + (self.alike if len(on) == 1 else self.by_row)(rms(x), on)

    def alike(self, x, on):
        return self.up[on[0]](F.gelu(self.down[on[0]](x)))

    def by_row(self, x, on):
        """(B, T, C), one adapter for each of B rows."""
        for part in (self.down, self.up):
            for i in on:
                kernels.note(x.size(1), part[i].weight)
        down, up = (torch.stack([part[i].weight for i in on]).to(x.dtype) for part in (self.down, self.up))
        return F.gelu(x @ down.mT) @ up.mT

    def emit(self, p, x):
        """Append the adapters that are on to a decode program -> where the result lies: in place of x."""
        on = p.choices.adapters
        (R, C), y = self.down[0].weight.shape, p.norm(x, self.down[0].in_features, eps=EPS, by_root=True)
        if len(on) == 1:
            return self.up[on[0]].emit(p, self.down[on[0]].emit(p, y, act="gelu", own=True), onto=x)
        used = sorted(set(on))
        down, up = (torch.cat([p_of(part[i].weight) for i in used]).view(-1, C)
                    for part, p_of in ((self.down, torch.Tensor.detach), (self.up, torch.t)))
        mine = p.rows_of([used.index(i) * R for i in on], R)
        a = p.linear(y, p.matrix(down), act="gelu", units=mine)
        return p.rows_sum(a, p.matrix(up), x, mine, all=True)

    def requires_grad_of(self, number):
        """Let one adapter train."""
        for part in (self.down, self.up):
            part[number].requires_grad_(True)


def adapters(config):
    """What follows a block: its adapters, or nothing."""
    return Adapters(config) if config.adapters else as_is


def use_adapters(model, on):
    """Switch adapters on for the calls of a model from now on: one number for all rows, or one for each. A
    model without any stays as it is."""
    if model.config.adapters:
        model.choose(adapters=tuple(on) if len(set(on)) > 1 else (on[0],))


def check_rows(adapters, rows):
    """Refuse to give a batch the adapters of another one."""
    require(len(adapters) in (1, rows), f"adapters of {len(adapters)} rows are switched on, the batch has "
            f"{rows}: type continual.use_adapters(model, [NUMBER]) for all, or a number for each row")


def switch_on(model, name):
    """Switch the adapter of this name on, or the first -> what to print of that."""
    names = model.config.adapter_names()
    require(not name or names, f"adapter='{name}': this model has no adapters, leave --adapter out")
    require(not name or name in names,
            f"adapter='{name}'{close_match(name, names)} must be {' or '.join(names)}")
    use_adapters(model, [names.index(name or names[0])] if names else [])
    return f", adapter '{name or names[0]}' of {', '.join(names)}" if names else ""


def check_adapters(c):
    """The flags `adapters` and `adapter_width` of a GPTConfig."""
    belong(c, "adapters", "adapter_width")
    for name in c.adapters.split(",") if c.adapters else ():
        require(re.fullmatch(r"\w[\w.-]{0,99}", name), f"adapters='{c.adapters}': '{name}' must be a name of "
                "letters, digits, '_', '-', '.': type --adapters=python,english, for example")
    require(c.adapter_width >= 1, f"adapter_width={c.adapter_width} must be at least 1")


# ------------------------------------------------------------------------------------------------------------
# replay


class Lessons:
    """Numbered batches of a run of tasks: batch `number` is always the same one, as in dataset.TokenStream.

    Behind the first task a share `replay` of the rows is drawn from a reservoir: of all rows that earlier
    tasks have drawn, the `kept` ones with the smallest random keys. That is the uniform sample which
    reservoir sampling keeps (Vitter 1985), and whoever knows the seed can tell it without a state to save.
    """

    def __init__(self, streams, batches, replay=0.0, kept=0, seed=0):
        """streams: a TokenStream for each task; batches: how many numbers a task has; the last goes on."""
        self.streams, self.batches, self.share, self.kept = streams, batches, replay, kept
        self.seed, self.rows = seed % 2**64, streams[0].batch_size
        self.reservoir = functools.lru_cache(maxsize=1)(self.fill)

    def task(self, number):
        return min(number // self.batches, len(self.streams) - 1)

    def batch(self, number):
        """(x, y), each (batch_size, block_size) int64; y is x one token later. Replayed rows come last."""
        task = self.task(number)
        x, y = self.streams[task].batch(number)
        for row, slot in enumerate(self.slots(number), self.rows - self.replayed(number)):
            x[row], y[row] = self.reservoir(task)[1][slot]
        return x, y

    def tasks(self, number):
        """The task of each row of a batch."""
        task, slots = self.task(number), self.slots(number)
        return [task] * (self.rows - len(slots)) + [self.reservoir(task)[0][slot] for slot in slots]

    def replayed(self, number):
        """Rows of a batch that are replayed; over many batches exactly the share."""
        a_batch = self.share * self.rows * (self.task(number) > 0)
        return int(a_batch * (number + 1)) - int(a_batch * number)

    def slots(self, number):
        """Which rows of the reservoir a batch replays."""
        counter = np.array([0, 0, 0, number], np.uint64)
        bits = np.random.Philox(key=np.array([self.seed, DRAWN], np.uint64), counter=counter)
        count = min(self.kept, self.task(number) * self.batches * self.rows)
        return [int(raw % np.uint64(count)) for raw in bits.random_raw(self.replayed(number))]

    def fill(self, task):
        """What is kept when a task begins -> (the task of each row, its (x, y))."""
        drawn = smallest(task * self.batches * self.rows, self.kept, self.seed)
        numbers, rows = drawn // self.rows, drawn % self.rows
        tasks = [self.task(number) for number in numbers.tolist()]
        batches = map(self.of_stream, tasks, numbers.tolist())
        return tasks, [(x[row].clone(), y[row].clone()) for (x, y), row in zip(batches, rows.tolist())]

    def of_stream(self, task, number):
        return self.streams[task].batch(number)


def smallest(count, keep, seed):
    """Of `count` numbered rows those `keep` with the smallest random keys, in order."""
    bits = np.random.Philox(key=np.array([seed, KEPT], np.uint64))
    keys, rows = np.empty(0, np.uint64), np.empty(0, np.int64)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        keys = np.concatenate([keys, bits.random_raw(size)])
        rows = np.concatenate([rows, np.arange(start, start + size)])
        best = np.argsort(keys, kind="stable")[:keep]
        keys, rows = keys[best], rows[best]
    return np.sort(rows)


# ------------------------------------------------------------------------------------------------------------
# elastic weight consolidation


class Consolidation:
    """Elastic weight consolidation (1612.00796): the loss gains weight / 2 * sum of F_i (w - w_i)**2 over all
    weights and earlier tasks i, where w_i are the weights that task i ended with and F_i its Fisher
    information.

    Up to a constant that sum is weight / 2 * sum of F (w - w0)**2 with F the sum of the F_i and w0 the mean
    of the w_i weighed by them: two tensors as large as the model, however many tasks there are. F is kept
    with bf16's eight bits and saved as bf16, so a checkpoint grows by six bytes a weight.
    """

    def __init__(self, model, weight):
        self.weights, self.weight, self.tasks = dict(model.named_parameters()), weight, 0
        self.fisher, self.anchor = {}, {}

    @torch.no_grad()
    def remember(self, fisher):
        """A task has ended. fisher: {name: F_i} as `fisher_information` gives it."""
        for name, new in fisher.items():
            w, total = self.weights[name], (self.fisher.get(name, 0.0) + new).bfloat16().float()
            before = self.anchor.get(name, w)
            self.anchor[name] = torch.lerp(before, w, (new / total).clamp(max=1).nan_to_num(1.0))
            self.fisher[name] = total
        self.tasks += 1

    @torch.no_grad()
    def pull(self):
        """Add the penalty's gradient to that of each weight that has one: the others do not move."""
        names = [name for name in self.fisher if self.weights[name].grad is not None]
        if names:
            weights, fisher, anchor = ([part[name] for name in names]
                                       for part in (self.weights, self.fisher, self.anchor))
            drift = torch._foreach_sub(weights, anchor)
            torch._foreach_addcmul_([w.grad for w in weights], drift, fisher, self.weight)

    def penalty(self):
        """What `pull` is the gradient of."""
        return self.weight / 2 * sum((f * (self.weights[name] - self.anchor[name]).square()).sum()
                                     for name, f in self.fisher.items())

    def state_dict(self):
        return {"tasks": self.tasks, "anchor": self.anchor,
                "fisher": {name: f.bfloat16() for name, f in self.fisher.items()}}

    def load_state_dict(self, state):
        on_device = lambda name, saved: saved.to(self.weights[name].device, torch.float32)
        self.tasks = state["tasks"]
        self.fisher, self.anchor = ({name: on_device(name, saved) for name, saved in state[part].items()}
                                    for part in ("fisher", "anchor"))


def fisher_information(model, rows, seeds, add_up=lambda tensors: None, total=None):
    """The diagonal of the Fisher information per token -> {parameter: tensor}.

    rows: token ids (T,), one sequence each; seeds: of their labels. Each row's labels are drawn from the
    model itself, each row's gradient is squared by itself, then averaged: neither the data's labels nor the
    square of a mean gradient will do (1905.12558). Labels of one row are drawn independently, so cross terms
    vanish on average, and the squared gradient of the sum over T tokens, divided by T, is a token's. add_up
    sums a list of tensors over the processes that share `total` rows.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums, training = [torch.zeros_like(p) for p in named.values()], model.training
    model.eval()
    for row, seed in zip(rows, seeds):
        loss = sampled_loss(model, row, torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(loss, named.values(), allow_unused=True)
        used, grads = zip(*((s, g) for s, g in zip(sums, grads) if g is not None))
        torch._foreach_addcmul_(used, grads, grads, 1 / (len(row) * (total or len(rows))))
    model.train(training)
    add_up(sums)
    return dict(zip(named, sums))


def sampled_loss(model, row, generator):
    """Summed cross-entropy of one row (T,) against labels that the model itself draws."""
    logits = model(row[None], row[None])[0][0]
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels.to(row.device), reduction="sum")


# ------------------------------------------------------------------------------------------------------------
# what was forgotten


def judged(matrix):
    """What the losses say. matrix: a row {task: val loss} after each task, of all tasks, in nats.

    average: of all tasks in the end. Of the tasks before the last: backward_transfer, how much better each is
    in the end than when it had just been learnt (1706.08840; below zero where later tasks did harm), and
    forgetting, how much worse than at its best before the last (1801.10112).
    """
    names, last = list(matrix[0])[:len(matrix)], matrix[-1]
    found = {"average_loss": sum(last[name] for name in names) / len(names)}
    earlier = names[:-1]
    if earlier:
        just = {name: row[name] for name, row in zip(earlier, matrix)}
        best = {name: min(row[name] for row in matrix[i:-1]) for i, name in enumerate(earlier)}
        found["backward_transfer"] = sum(just[name] - last[name] for name in earlier) / len(earlier)
        found["forgetting"] = sum(last[name] - best[name] for name in earlier) / len(earlier)
    return found


# ------------------------------------------------------------------------------------------------------------
# a run


class Tasks:
    """What a run's keys select for its tasks, built once for the loop to call; one task asks for nothing."""

    def __init__(self, cfg, model, streams, world, saved=None, iteration=0):
        """streams: a TokenStream of training batches for each task; saved: state_dict() of a checkpoint
        written before `iteration`."""
        self.names, self.length, self.last = cfg.task_names(), max(1, cfg.lr_decay_iters), cfg.max_iters
        self.model, self.world, self.seed, self.samples = model, world, cfg.seed, cfg.ewc_samples
        self.lessons = Lessons(streams, self.length * cfg.gradient_accumulation_steps, cfg.replay,
                               cfg.replay_blocks, cfg.seed)
        unique, named = model.config.adapter_names(), cfg.adapters.split(",")
        self.adapter = [unique.index(named[i]) for i in range(len(self.names))] if unique else []
        self.ewc = Consolidation(model, cfg.ewc) if cfg.ewc else None
        self.freezes, self.matrix = cfg.freeze, []
        if saved:
            self.load_state_dict(saved)
        missing = self.at(iteration) - len(self.matrix)
        require(0 <= missing <= (iteration % self.length == 0), f"tasks='{cfg.tasks}': {self.at(iteration)} "
                f"of them would be over by iteration {iteration}, the checkpoint knows {len(self.matrix)}: "
                "start anew with --init_from=scratch")

    def at(self, iteration):
        """The number of the task that an iteration trains."""
        return min(iteration // self.length, len(self.names) - 1)

    def step(self, iteration):
        """Iterations since the task began: where its schedule is."""
        return iteration - self.at(iteration) * self.length

    def over(self, iteration):
        """Has a task ended of which the matrix has no row?"""
        done = len(self.names) if iteration >= self.last else self.at(iteration)
        return done > len(self.matrix) and len(self.names) > 1

    def begin(self, iteration):
        """From the second task on `freeze` leaves its adapter alone to train."""
        if self.freezes and self.at(iteration):
            self.model.requires_grad_(False)
            for block in self.model.transformer.h:
                block.adapt.requires_grad_of(self.adapter[self.at(iteration)])

    def listen(self, number):
        """Give each row of a training batch the adapter of its task."""
        if self.adapter:
            use_adapters(self.model, [self.adapter[task] for task in self.lessons.tasks(number)])

    def look_at(self, task):
        """Give all rows the adapter of one task."""
        if self.adapter:
            use_adapters(self.model, [self.adapter[task]])

    def pull(self):
        """Add what the loss gains by EWC to the gradients."""
        if self.ewc:
            self.ewc.pull()

    def finish(self, losses):
        """A task is over. losses: {task: val loss} of all -> what they say."""
        task = len(self.matrix)
        self.matrix.append(losses)
        if self.ewc and task < len(self.names) - 1:
            self.look_at(task)
            self.ewc.remember(self.fisher(task))
        return judged(self.matrix)

    def fisher(self, task):
        """Each rank takes every world.size-th of ewc_samples rows that the task has seen."""
        mine = range(self.world.rank, self.samples, self.world.size)
        rows = [self.row(task, n) for n in mine]
        seeds = [((self.seed * 1_000_003 + task) * 1_000_003 + n) % 2**63 for n in mine]
        return fisher_information(self.model, rows, seeds, self.world.add_up, self.samples)

    def row(self, task, n):
        """Row n of the training batches of a task: token ids (T,) on the model's device."""
        batch, row = divmod(n, self.lessons.rows)
        x, _ = self.lessons.streams[task].batch(task * self.lessons.batches + batch)
        return x[row].to(self.model.lm_head.weight.device)

    def state_dict(self):
        state = {"names": self.names, "matrix": self.matrix}
        return state | ({"ewc": self.ewc.state_dict()} if self.ewc else {})

    def load_state_dict(self, saved):
        before = saved["names"]
        require(before == self.names[:len(before)], f"tasks='{','.join(self.names)}' must begin with those "
                f"of the checkpoint, {','.join(before)}: others can only follow")
        self.matrix = saved["matrix"]
        require(bool(self.ewc) == ("ewc" in saved) or not self.matrix, "ewc cannot change after the first "
                "task: what it holds is measured when a task ends; start anew with --init_from=scratch")
        if self.ewc and "ewc" in saved:
            self.ewc.load_state_dict(saved["ewc"])


# ------------------------------------------------------------------------------------------------------------
# what the keys may be


def check(c):
    """The keys of a training config that are about tasks."""
    names = c.task_names()
    for key in ("ewc", "replay", "freeze"):
        require(not getattr(c, key) or len(names) > 1, f"{key}={getattr(c, key)} has no effect without an "
                "earlier task: type --tasks=ONE,ANOTHER, or leave it out")
    require(not c.tasks or (all(names) and len(set(names)) == len(names)),
            f"tasks='{c.tasks}' must be different data sets by commas: type --tasks=pylib,shakespeare_bytes")
    require(c.ewc >= 0 and c.ewc_samples >= 1,
            f"ewc={c.ewc} must not be negative and ewc_samples={c.ewc_samples} at least 1")
    require(0 <= c.replay < 1 and c.replay_blocks >= 1,
            f"replay={c.replay} must be in [0, 1), a share of the batch, and replay_blocks={c.replay_blocks} "
            "at least 1")
    require(not c.tasks or c.max_iters >= (len(names) - 1) * c.lr_decay_iters,
            f"max_iters={c.max_iters} must reach into the last of {len(names)} tasks of lr_decay_iters="
            f"{c.lr_decay_iters} iterations each: type --max_iters={len(names) * c.lr_decay_iters}")
    require(not c.tasks or c.always_save_checkpoint, "always_save_checkpoint=False keeps the lowest val "
            f"loss, but those of tasks='{c.tasks}' do not compare: leave it out")
    wanted, given = len(names), len(c.adapters.split(","))
    require(not c.adapters or given == wanted, f"adapters='{c.adapters}' names {given}, the run has "
            f"{wanted} tasks: name one for each, the same one twice where tasks share it")
    require(not c.freeze or c.adapters, f"freeze={c.freeze} trains the adapters alone: type "
            f"--adapters={','.join(f'task{i}' for i in range(wanted))}")
    for key in ("ewc", "replay"):
        require(not c.freeze or not getattr(c, key), f"freeze={c.freeze} keeps earlier tasks as they are, so "
                f"{key}={getattr(c, key)} has nothing to hold: choose one of them")


def one_vocabulary(folders):
    """Refuse tasks whose ids mean different things."""
    kinds = [vocabulary(meta_of(folder)) for folder in folders]
    for folder, (said, chars) in zip(folders, kinds):
        require((said, chars) == kinds[0], f"tasks of one run share a tokenizer: '{folders[0].name}' has "
                f"{kinds[0][0]}, '{folder.name}' has {said}; type python data/prepare.py --input=FILE.txt "
                f"--name={folder.name}_bytes --tokenizer=byte, for example")


def vocabulary(meta):
    """What a folder's ids mean -> (in words, its characters); without a meta file they are GPT-2's."""
    meta = meta or GPT2Tokenizer().meta() | {"vocab_size": GPT2Tokenizer.vocab_size}
    return f"'{meta.get('tokenizer', 'unknown')}' with {meta.get('vocab_size')} ids", meta.get("chars")
