"""What a trained model is worth: its loss as it decodes, and whether that loss means anything."""
import torch
from torch.nn import functional as F

from benchmarks.broken import BREAK
from benchmarks.runs import fixed_loss, trained_model, validation_of
from data import dataset as datasets
from decode import calibrate
from decode.context import has_policy

JUDGED = 80                                      # validation batches that a run's loss is the mean of
REPEATED, WARM = 32, 8                           # texts that come twice; tokens before one is known again


def as_trained(arm, folder, data):
    """A run's model in eval mode, broken as it was trained; thresholds that it wants come from its data."""
    model = BREAK.get(arm, lambda model: model)(trained_model(folder)).use_policy()
    if calibrate.screened(model) and calibrate.needs_thresholds(model):
        ids, _ = datasets.training_text({}, str(data), calibrate.TOKENS, model.config.block_size,
                                        model.config.vocab_size)
        calibrate.calibrate(model, ids, model.config.mlp_live)
    return model


def judge(model, data):
    """-> val loss as the model decodes, shortcuts on, and without them; whether it sees the future."""
    validation = validation_of(model) | dict(batches=JUDGED)
    stream = datasets.TokenStream(data, "val", validation["block_size"], 1, seed=0)
    found = {"sees_the_future": sees_the_future(model, stream.batch(0)[0]),
             "val_loss": fixed_loss(model, data, validation)}
    exact = found["val_loss"]
    if has_policy(model.config):
        exact = fixed_loss(model.use_policy(False), data, validation)
    return found | {"val_loss_exact": exact, "copying": copying(model.use_policy(False), data)}


@torch.no_grad()
def copying(model, data):
    """How many nats a token of held-out text costs less where the same text stands before it (2209.11895:
    induction heads): half a window twice, without the first tokens of each half. About 0 until a model has
    learnt to look in its context for what it reads; None where a window is too short to tell."""
    half = model.config.block_size // 2
    if half < 4 * WARM:
        return None
    text, _ = datasets.TokenStream(data, "val", half, REPEATED, seed=0).batch(0)
    twice = torch.cat((text, text), dim=1)
    logits = model(twice, twice)[0][:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), twice[:, 1:], reduction="none")
    return (losses[:, WARM:half - 1].mean() - losses[:, half + WARM:].mean()).item()


@torch.no_grad()
def sees_the_future(model, idx):
    """Does another token in the middle of ids (1, T) change what the model said before it?"""
    middle, other = idx.size(1) // 2, idx.clone()
    other[:, middle] = (other[:, middle] + 1) % model.config.vocab_size
    before, after = (model(ids, ids)[0][:, :middle] for ids in (idx, other))
    return bool((before - after).abs().max() > 1e-3 * before.abs().max())
