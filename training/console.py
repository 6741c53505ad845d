"""What a run says: where it computes, how far it is, what an evaluation found, how it ended. All the numbers
are in metrics.jsonl too, under names of their own."""
import shlex
from pathlib import Path

import torch

from configurator import ConfigError
from decode.context import has_policy
from layers import NeuronMajor


def place_line(place, threads, processes, verbose):
    """Where a run computes, in a line; verbose: and why."""
    said = [str(place), *[f"{threads} thread{'s' * (threads != 1)}"] * (place.device.type == "cpu"),
            *[f"{processes} processes"] * (processes > 1), *[f"({place.reasons}), torch {torch.__version__}"]
            * verbose]
    return ", ".join(said)


def bar_text(loss, extra, rate):
    """The bar's end: the cross-entropy, what mechanisms add to it, tokens/s. loss: all of the loss."""
    return f"loss {loss - extra:.4f}{f' +{extra:.4f} aux' * bool(extra)}, {rate:,.0f} tokens/s"


def evaluation_line(iteration, of, losses, parts=()):
    """`step 250/1000  train 1.5412  val 1.6220 | ...`."""
    found = "  ".join(f"{split} {loss:.4f}" for split, loss in losses.items())
    return " | ".join([f"step {iteration}/{of}  {found}", *parts])


def work_lines(model, row, macs):
    """What the units did and what a step costs, of what a model has. row: counters.summary and depth_used;
    macs: counters.step_macs."""
    c, whole, parts = model.config, macs[1], []
    units = sum(block.mlp.c_proj.in_features for block in model.transformer.h
                if isinstance(getattr(block.mlp, "c_proj", None), NeuronMajor))
    if "zeros" in row:
        parts.append(f"MLP {1 - row['zeros']:.0%} active, {row['dead_units']:,} of {units:,} units dead")
    if "active_groups" in row:
        kind, groups = ("columns", c.columns) if c.columns else ("experts", c.experts)
        parts.append(f"{row['active_groups']:.1f} of {groups} {kind}"
                     + f", {row['dead_groups']:,} dead" * bool(row["dead_groups"]))
    if "recall" in row:
        parts.append(f"the predictor finds {row['recall']:.0%}")
    if "open_branches" in row:
        parts.append(f"{row['open_branches']:.1f} of {c.n_head * c.dendrites} branches open"
                     + f", {row['dead_branches']:,} dead" * bool(row["dead_branches"]))
    if "layers_per_token" in row:
        parts.append(f"{row['layers_per_token']:.2f} of {c.n_layer} layers a token")
    if "ponder_steps" in row:
        parts.append(f"{row['ponder_steps']:.2f} of {c.ponder} runs a token")
    return [", ".join(parts)] * bool(parts) + [macs_text(macs[0], whole)]


def macs_text(macs, whole):
    """Multiply-adds of a token's decode step, and of all the weights where it does not execute them all."""
    unit, name = (1e6, "MMACs") if whole >= 1e5 else (1e3, "kMACs")
    said, all_ = f"{macs / unit:,.3g}", f"{whole / unit:,.3g}"
    return f"{said} of {all_} {name} a token" if macs < whole else f"{said} {name} a token"


def sample_command(model, out_dir):
    """What to type to sample from a run, with the shortcuts that the model was trained for."""
    c = model.config
    sparse = " --sparse_decode=True" * has_policy(c)
    return f"python sample.py --out_dir={shlex.quote(str(out_dir))}{sparse}"


def saved_line(model, out_dir, saved, iteration, began, best, last):
    """The end of a run's last sentence: what its folder holds, what it does not, and what samples from it.

    saved: {file: iteration} of this run; began: the iteration that it began with; best, last: its val losses.
    """
    out_dir, sample = Path(out_dir), f"sample with: {sample_command(model, out_dir)}"
    there = [name for name in ("ckpt.pt", "ckpt_last.pt") if (out_dir / name).is_file()]
    if iteration in saved.values() and "ckpt_last.pt" not in saved:
        found = (f"best val loss {best:.4f}" if last == best else
                 f"val loss {last:.4f} (the best was {best:.4f})")
        return f"{out_dir / 'ckpt.pt'}, {found}; {sample}"
    if saved.get("ckpt_last.pt") == iteration:
        return (f"the last iteration's weights are in {out_dir / 'ckpt_last.pt'}, from which "
                "--init_from=resume goes on; " + ("ckpt.pt holds the best; " * ("ckpt.pt" in there)) + sample)
    why = ("no iteration was trained" if iteration == began else
           f"the weights of iteration {iteration} were not saved")
    return f"{why}; " + (f"{out_dir / there[0]} is an earlier save; {sample}" if there else
                         f"{out_dir} holds no checkpoint")


def start_wandb(cfg, settings):
    """Weights & Biases' module, its run begun; a ConfigError where it does not start."""
    try:
        import wandb
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=settings)
    except ImportError as error:
        raise ConfigError("wandb_log=True needs wandb: pip install wandb, or type "
                          "--wandb_log=False") from error
    except Exception as error:                  # no key, no network, no answer; a folder of that name
        why = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise ConfigError(f"wandb does not start ({why}): type wandb login, or set WANDB_MODE=offline, or "
                          "type --wandb_log=False") from error
    return wandb
