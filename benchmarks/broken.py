"""Two arms that are broken on purpose: a table that does not tell them from good ones is worth nothing.

python benchmarks/broken.py NAME CONFIG... [--key=value ...] is train.py with that arm's model.
"""
import functools
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # before benchmarks/: another train.py
from benchmarks import ROOT
from configurator import require, run_script


def leak(model):
    """Attention without its causal mask: every token of a prompt sees those behind it."""
    from torch.nn import functional as F

    def attend(q, k, v, mask, dropout):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    for block in model.transformer.h:
        block.attn.attention = attend
    return model


def mask(model):
    """Sparse in name: zeros in a vector that meets all weights, so that nothing is saved."""
    from layers import Linear
    for block in model.transformer.h:
        block.mlp.forward = block.mlp.many
        block.mlp.c_proj.forward = functools.partial(Linear.forward, block.mlp.c_proj)
    return model


BREAK = {"leaky": leak, "slow": mask}


def main(name="", *words):
    if name in ("--help", "-h"):
        return print(__doc__)
    require(name in BREAK, f"'{name}' is no broken arm: type python benchmarks/broken.py "
                           f"{' or '.join(BREAK)} CONFIG")
    import model
    whole = model.GPT.__init__

    def broken(self, *args, **keys):
        whole(self, *args, **keys)
        BREAK[name](self)
    model.GPT.__init__ = broken
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:]))
