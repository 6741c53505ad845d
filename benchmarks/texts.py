"""Held-out text of several runs: their losses on the same windows of it, and what of them compares."""
import hashlib
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.stats import mean_interval
from configurator import ConfigError
from data import dataset as datasets
from data import tokenizer as tokenizers

AT_ONCE = 2048                                   # tokens of a forward pass that finds a loss
READABLE = 2**24                                 # held-out tokens that are decoded to see if texts are one


def judge(cfg, sides, device):
    """Find the loss of every side that has held-out text, those of one text on the same windows
    -> sentences."""
    texts, notes = {}, []
    for side in sides:
        if side.data:
            texts.setdefault(side.text, []).append(side)
    for of in texts.values():
        try:
            x, y = windows(cfg, of)
        except ConfigError as error:
            notes.append(f"{listed(of)}: no loss: {error}")
            continue
        block, blocks = x.size(1), {side.config().block_size for side in of}
        if len(blocks) > 1:
            notes.append(f"{listed(of)} have blocks of {', '.join(map(str, sorted(blocks)))}: losses are of "
                         f"windows of the shortest, {block}, which is less context than the longer ones know")
        size = bytes_of(y, of[0].data)
        for side in of:
            found = window_losses(side.model, x, y, device)
            if not all(map(math.isfinite, found)):
                notes.append(f"{side.name}: its loss is not a number: its weights are damaged, or its "
                             "training has diverged")
                continue
            loss = statistics.fmean(found)
            side.found |= {"loss": loss, "of_windows": found, "held_out_tokens": y.numel(), "block": block,
                           "data": side.data.name,
                           "bits_per_byte": loss * y.numel() / math.log(2) / size if size else None}
            if not size:
                notes.append(f"{side.name}: no bits a byte: its data do not say what bytes its tokens are")
    return notes + stand_beside(sides)


def text_of(data):
    """What two folders of the same held-out tokens share."""
    return datasets.meta_of(data).get("sha256", {}).get("val") or str(Path(data).resolve())


def windows(cfg, sides):
    """Held-out text in windows of the sides' shortest block, none twice -> x, y (n, block) int64."""
    block = min(side.config().block_size for side in sides)
    vocab = min(side.config().vocab_size for side in sides)
    stream = datasets.TokenStream(sides[0].data, "val", block, 1, 0, vocab, sampling="epoch")
    return stream.rows(0, min(stream.samples, max(2, -(-cfg.tokens // block))))


@torch.inference_mode()
def window_losses(model, x, y, device):
    """The mean loss of each window (n, block), in nats: of the model as it decodes."""
    found, rows = [], max(1, AT_ONCE // x.size(1))
    for ids, targets in zip(x.split(rows), y.split(rows)):
        targets = targets.to(device)
        logits, _ = model(ids.to(device), targets)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        found += losses.view(targets.shape).mean(dim=1).tolist()
    return [round(loss, 6) for loss in found]


def bytes_of(ids, data):
    """The bytes of text that token ids of a data set stand for; None where it does not say."""
    try:
        tokenizer = tokenizers.load(data)
        found, counts = ids.unique(return_counts=True)
        return sum(len(tokenizer.token_bytes(i)) * n for i, n in zip(found.tolist(), counts.tolist()))
    except ConfigError:
        return None


def text_sha(data):
    """SHA-256 of the bytes of a data set's held-out text; None where it is too long or not known."""
    try:
        tokenizer = tokenizers.load(data)
        path = Path(data) / "val.bin"
        dtype = datasets.stored_dtype(data, datasets.meta_of(data), tokenizer.vocab_size)
        if path.stat().st_size // dtype.itemsize > READABLE:
            return None
        ids = np.fromfile(path, dtype)
        table = {i: tokenizer.token_bytes(i) for i in np.unique(ids).tolist()}
        return hashlib.sha256(b"".join(map(table.__getitem__, ids.tolist()))).hexdigest()
    except ConfigError:
        return None


def stand_beside(sides):
    """Add to every side of the first one's text the difference of its loss, and to those of the same text in
    other tokens that of bits a byte -> sentences on the others."""
    first, others = sides[0], {}
    if "loss" not in first.found:
        return ["Losses have nothing to stand beside: the first run has none."] * any(
            "loss" in side.found for side in sides)
    for side in sides:
        if "loss" in side.found and side.text == first.text:
            pairs = zip(side.found["of_windows"], first.found["of_windows"])
            side.found["to_first"] = mean_interval([a - b for a, b in pairs])
            side.found["percent"] = 100 * (side.found["loss"] / first.found["loss"] - 1)
        elif "loss" in side.found:
            others.setdefault(side.data, []).append(side)
    return [other_text(first, data, of) for data, of in others.items()]


def other_text(first, data, sides):
    """The sentence on sides whose losses are of another text, or of other tokens, than the first one's."""
    one, other = text_sha(first.data), text_sha(data)
    if one and one == other and first.found["bits_per_byte"]:
        for side in sides:
            side.found["bits_to_first"] = bits_apart(side.found, first.found)
        return (f"{listed(sides)}: the same held-out text as {first.name}'s in other tokens and windows, so "
                "losses do not compare and bits a byte do.")
    return (f"{listed(sides)}: other data than {first.name}'s ({data.name}, not {first.data.name}), so "
            "neither losses nor bits a byte compare; --dataset=FOLDER measures runs of one tokenizer on one "
            "text.")


def bits_apart(one, other):
    """Bits a byte of one less those of another on windows of their own, with a 95% interval: not paired."""
    means = [mean_interval([loss * found["bits_per_byte"] / found["loss"] for loss in found["of_windows"]])
             for found in (one, other)]
    mean = one["bits_per_byte"] - other["bits_per_byte"]
    half = (math.hypot(*(s["interval"][1] - s["mean"] for s in means))
            if all(s["interval"] for s in means) else None)
    return {"mean": mean, "interval": None if half is None else [mean - half, mean + half],
            "percent": 100 * mean / other["bits_per_byte"]}


def listed(sides):
    """The runs among sides of one text, without those that are the same in whole numbers."""
    return ", ".join(side.name for side in sides if "quantize" not in side.found)
