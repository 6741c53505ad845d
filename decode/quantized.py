"""Weights of whole numbers, for inference: the modules that stand where Linears stood, the bits of each part,
and what makes them."""

import torch
from torch import nn

import sparse_kernels as kernels
from configurator import require
from decode.engine import NotWritten
from kernels import picked
from layers import NeuronMajor, Packed, Settled, TwoOfFour

PARTS = "attn", "mlp", "head"
OWN = 5                                          # a file's 4 bits and their scales, where a matrix has them
BITS = {"int8": (8, 8, 8), "int4": (8, 4, 8), "q4_all": (4, 4, 4)}      # of PARTS
GGML = {"q4_0": kernels.q4_0, "q8_0": kernels.q8_0}     # rounding of llama.cpp's files, for the loss alone
FORMS = {"4": 4, "own": OWN, "8": 8, "16": 16} | {name: name for name in GGML}  # of a part; 16: as it is
KINDS = BITS | {"own": (OWN,) * 3} | {name: (name,) * 3 for name in GGML}


class Quantized(nn.Module):
    """A Linear's weights as whole numbers of 8 or 4 bits (kernels.quantize), for inference. forward rounds
    its inputs as a decode step does: the loss of this model is the loss of what decodes.
    2:4 weights are stored dense; in 8 bits a decode step reads those that are kept, on a card, and where
    kernels/picked.py has a form for it."""

    def __init__(self, linear, bits, empty=False, moments=None):
        """linear: a Linear or a Packed. bits: 8, 4 or OWN. empty: a state dict is loaded next. moments: see
        quantize."""
        super().__init__()
        weight = dense_weight(linear)
        self.out_features, self.in_features = weight.shape
        self.bits, self.bias, self.act = bits, linear.bias, getattr(linear, "act", "none")
        self.fill(weight, empty, moments)
        self.sparse = bits == 8 and isinstance(linear, (TwoOfFour, Packed, Settled))
        self.register_buffer("laid", None, persistent=False)
        self.rewritten()
        # the dtype of the stream, which .to(dtype) moves with the rest of the model
        self.register_buffer("like", weight.new_empty(0), persistent=False)

    def fill(self, rows, empty, moments=None):
        some = rows[:1] if empty else rows       # shapes are those of one row
        laid = kernels.on_levels(some.detach()) if self.bits == OWN and not empty else None
        codes, scale = laid or kernels.quantize(some.detach(), 4 if self.bits == 4 else 8, moments)
        if self.bits == OWN and not empty:
            self.bits = 4 if laid else 8
        if empty:
            codes, scale = (t.new_zeros(t.size(0) * len(rows), t.size(1)) for t in (codes, scale))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def _load_from_state_dict(self, state_dict, prefix, *args, **keys):
        if self.bits == OWN:                     # what is loaded says whether it lies on a file's levels
            self.bits, size = 8, -(-40 * -(-self.in_features // 64) // 64) * 64
            shapes = [getattr(state_dict.get(prefix + name), "shape", None) for name in ("codes", "scale")]
            if shapes == [(self.out_features, size), (0, 1)]:
                self.bits = 4
                self.codes, self.scale = self.codes.new_zeros(shapes[0]), self.scale.new_zeros(shapes[1])
        super()._load_from_state_dict(state_dict, prefix, *args, **keys)
        self.rewritten()

    def rewritten(self):
        """The numbers were written in place: what was made of them is made again."""
        if self.sparse and picked.wanted(self.codes.device, whole=True):
            values, meta = kernels.pack_24(self.codes[:, :self.in_features])
            self.laid = picked.lay(values, meta, self.in_features)

    @property
    def weight(self):
        """The weights (n_out, n_in) that the numbers stand for, in the stream's dtype: a copy."""
        return kernels.dequantize(self.codes, self.scale, self.in_features).to(self.like.dtype)

    def matrix(self):
        return self.weight

    def forward(self, x):
        y = kernels.whole_product(x, self.codes, self.scale)
        return kernels.ACTS[self.act](stored(y, self.bias, x.dtype))

    def emit(self, p, x, act="none", **options):
        return p.linear(x, self.emit_matrix(p), act=act if self.act == "none" else self.act, **options)

    def emit_matrix(self, p, rows=slice(None)):
        """As Linear.emit_matrix."""
        bias = self.bias if self.bias is None else self.bias[rows]
        if self.sparse and p.packs_whole:
            values, meta = kernels.pack_24(self.codes[rows, :self.in_features])
            return p.packed(values, meta, bias, self.in_features, self.scale[rows])
        if self.laid is not None and picked.wanted(self.codes.device, whole=True):
            return p.picked(self.laid[rows].contiguous(), torch.int8, self.in_features, bias,
                            self.scale[rows].contiguous())
        return p.whole(self.codes[rows], self.scale[rows], self.in_features, bias)

    def emit_some(self, p, x, rows):
        return p.linear(x, self.emit_matrix(p, rows), act=self.act)

    def some(self, x, rows):
        bias = self.bias if self.bias is None else self.bias[rows]
        y = kernels.whole_product(x, self.codes[rows], self.scale[rows])
        return kernels.ACTS[self.act](stored(y, bias, x.dtype))

    def rows(self, idx):
        """Rows of the weights by their numbers (...) -> (..., n_in): a tied embedding."""
        scale = self.scale[idx.flatten()] if len(self.scale) else self.scale
        rows = kernels.dequantize(self.codes[idx.flatten()], scale, self.in_features)
        return rows.to(self.like.dtype).view(*idx.shape, -1)

    def sound(self):
        """Are all scales finite? Looked at when a program is written."""
        return kernels.all_finite(kernels.scales_of(self.codes, self.scale, self.in_features))

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class QuantizedByUnit(Quantized):
    """A NeuronMajor's weights as whole numbers, the row of an input unit with scales of its own; inputs are
    not rounded: each is a factor of a row. across (n_out), fp32 as bits: the root mean square of each
    output's weights, by which they are divided first: an output of large weights would set the scales of all
    others, and cost SmolLM2's W_down in 8 bits 0.4% of loss. k: inputs that are read, the largest |x|; None:
    all."""

    def __init__(self, linear, bits, empty=False, moments=None):
        super().__init__(linear, 8 if bits == OWN else bits, empty, moments)     # a file's groups lie across
        self.k = getattr(linear, "k", None)

    def fill(self, weight, empty, moments=None):
        wide = weight.detach().float()
        size = wide.square().mean(dim=1).sqrt()
        size = torch.where(size.isfinite() & (size > 0), size, 1)
        super().fill((wide / size[:, None]).t(), empty)      # a group meets one input, whatever its size
        self.register_buffer("across", size.view(torch.int32))

    def _load_from_state_dict(self, state_dict, prefix, *args, **keys):
        ones = torch.ones_like(self.across, dtype=torch.float32)
        state_dict.setdefault(f"{prefix}across", ones.view(torch.int32))            # of older folders
        super()._load_from_state_dict(state_dict, prefix, *args, **keys)

    @property
    def sizes(self):
        """What `across` stands for."""
        return self.across.view(torch.float32)

    @property
    def weight(self):
        rows = kernels.dequantize(self.codes, self.scale, self.out_features) * self.sizes
        return rows.to(self.like.dtype).t()

    def forward(self, a):
        a = a if self.k is None else kernels.keep_largest(a, self.k)
        y = kernels.whole_rows_sum(a, self.codes, self.scale, self.out_features,
                                   kernels.few_tokens(a) and not self.sound())
        return stored(y * self.sizes, self.bias, a.dtype)

    def emit(self, p, a, onto=None, units=None):
        a = a if self.k is None else p.largest(a, self.in_features, self.k)
        return p.rows_sum(a, self.emit_matrix(p), onto, units, all=not self.sound())

    def emit_matrix(self, p):
        return p.whole(self.codes, self.scale, self.out_features, self.bias, self.sizes)

    def emit_some(self, p, x, rows):
        raise NotWritten("some outputs of whole numbers that lie by unit")

    def some(self, x, rows):
        return self(x)[..., rows]

    def sound(self):
        return kernels.all_finite(kernels.scales_of(self.codes, self.scale, self.out_features))


def stored(y, bias, dtype):
    """Sums (..., n) in fp32 plus a bias, rounded once."""
    return (y if bias is None else y + bias.to(dtype).float()).to(dtype)


def dense_weight(linear):
    """The weights (n_out, n_in) that a Linear multiplies by."""
    if isinstance(linear, Packed):
        return kernels.unpack_24(linear.values, linear.meta, linear.in_features)
    return linear.matrix().detach()


def forms_of(kind):
    """What --quantize says -> the form of the matrices of each of PARTS: 4 or 8 bits, 16 (they stay), OWN,
    or one of GGML. A ConfigError where it says nothing that is known."""
    if kind in [*KINDS]:                         # a list is no key
        return KINDS[kind]
    pairs = [word.partition("=") for word in str(kind).split(",")]
    given = {part: form for part, _, form in pairs}
    require(len(given) == len(pairs) and given.keys() <= {*PARTS} and {*given.values()} <= FORMS.keys(),
            f"quantize='{kind}' must be {', '.join(KINDS)}, or bits by part, such as "
            f"mlp=4,attn=8,head=8: {', '.join(PARTS)}, each once at most, each {', '.join(FORMS)}")
    forms = tuple(FORMS[given.get(part, "16")] for part in PARTS)
    require({*forms} != {16}, f"quantize='{kind}' leaves all weights as they are: give a part 4 or 8 bits, "
            "or leave quantize out")
    return forms


def check_quantize(kind, smaller=False):
    """A ConfigError where --quantize says nothing that is known, or with `smaller` what saves no byte."""
    rounds = {*forms_of(kind)} & {*GGML}
    require(not (smaller and rounds), f"quantize='{kind}': {' and '.join(GGML)} round as ggml does, to tell "
            f"its loss (sample.py --quantize={kind} --val=True), and save nothing: type {' or '.join(BITS)}")


def kinds_in(text):
    """The kinds that a list by commas names. Parts of one kind (mlp=4,attn=8) have commas too: a part that
    comes again begins the next kind."""
    found = []
    for word in filter(None, text.split(",")):
        part, equals, _ = word.partition("=")
        if equals and found and "=" in found[-1] and f",{part}=" not in f",{found[-1]}":
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def whole_parts(model):
    """(part's place in PARTS, module, name of its matrix, name in the model) of all that quantize takes."""
    for n, block in enumerate(model.transformer.h):
        for place, part in enumerate(PARTS[:2]):
            for name in ("c_attn", "c_fc", "c_proj"):
                if getattr(getattr(block, part), name, None) is not None:
                    yield place, getattr(block, part), name, f"transformer.h.{n}.{part}.{name}"
    yield 2, model, "lm_head", "lm_head"


@torch.no_grad()
def quantize(model, kind, empty=False, moments=None):
    """For inference: exchange the matrices of attention, MLP and head for whole numbers, or round them, as
    forms_of(kind) says -> the model; a ConfigError where it keeps a file's 4 bits and there are none. Norms,
    routers, gates, probes, adapters, biases and positions stay. A tied embedding reads the head's rows.
    empty: a state dict is loaded next. moments: of matrices, by name, the mean square of each input
    (calibrate.input_moments), by which scales of 4 bits are chosen; without them all inputs count the
    same."""
    forms = forms_of(kind)
    require(not is_quantized(model), f"quantize='{kind}': the weights are whole numbers already; leave "
            "quantize out")
    require(OWN not in forms or empty or has_levels(model, forms), f"quantize='{kind}' keeps the 4 bits of a "
            "file, and no matrix here lies on 16 levels in each group of 32: take --quantize=int8, or int4")
    for place, module, name, path in [*whole_parts(model)]:
        form, child = forms[place], getattr(module, name)
        if form in GGML:
            rewrite(child, GGML[form](dense_weight(child)))
        elif form != 16:
            of = QuantizedByUnit if isinstance(child, NeuronMajor) else Quantized
            setattr(module, name, of(child, form, empty, (moments or {}).get(path)))
    if model.config.tie_weights and isinstance(model.lm_head, Quantized):
        wte = model.transformer.wte
        wte.weight, wte.tied = None, (model.lm_head,)
    return model


def has_levels(model, forms=KINDS["own"]):
    """Has any matrix of a model, of the parts that are to keep it, a file's own 4 bits, as kernels.on_levels
    finds them?"""
    found = (getattr(module, name) for place, module, name, _ in whole_parts(model) if forms[place] == OWN)
    return any(kernels.on_levels(dense_weight(one)) is not None for one in found
               if not isinstance(one, NeuronMajor))


def kept_levels(model):
    """Of each matrix of whole numbers: has it a file's own 4 bits?"""
    return [kernels.has_offsets(m.scale) for m in model.modules() if isinstance(m, Quantized)]


def is_quantized(model):
    return any(isinstance(module, Quantized) for module in model.modules())


def rewrite(linear, weight):
    """Put other weights (n_out, n_in) into a Linear, or into a Packed: zeros stay where they were."""
    if isinstance(linear, Packed):
        for old, new in zip((linear.values, linear.meta), kernels.pack_24(weight)):
            old.copy_(new)
        linear.rewritten()
    else:
        linear.weight.copy_(weight)


def held_bytes(model):
    """Bytes of a model's weights and buffers, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (*model.parameters(), *model.buffers())}.values())
