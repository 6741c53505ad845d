"""How a run is to decode, behind its name: RUN@int8, RUN@mlp_screen=4, RUN@sparse_decode+mlp=4,attn=8."""
import os
from dataclasses import dataclass, replace

from configurator import ConfigError, close_match, parse, require
from decode.quantized import BITS, GGML, PARTS, check_quantize
from model import GPTConfig

AT_SAMPLING = {"mlp_screen", "mlp_live", "mlp_topk", "gate_first", "attn_topk", "window", "window_pattern",
               "weights", "screen"}              # flags that sample.py switches on by itself
EXAMPLE = "type RUN@int8, RUN@mlp_screen=4 or RUN@sparse_decode+int8, for example"
SHORTCUTS = "mlp_predict", "mlp_screen", "exits"   # what models are trained for
NAMES = "sparse_decode", "quantize", *BITS, "own"

@dataclass(frozen=True)
class Setting:
    """What sample.py would be given of a run. text: as it was typed; flags: fields of GPTConfig, as pairs."""
    text: str = ""
    quantize: str = ""
    sparse_decode: bool = False
    flags: tuple = ()


PLAIN = Setting()


def of_word(word):
    """`RUN@SETTING` -> (RUN, Setting). Parts of a setting stand between `+`: a kind of whole numbers, or a
    key of sample.py that changes how a model decodes, as key=value. A path that exists is a run."""
    run, at, text = word.rpartition("@")
    if not at or os.path.exists(word):
        return word, PLAIN
    require(run and text, f"'{word}' must have a run before the @ and a setting behind it: {EXAMPLE}")
    setting = Setting(text)
    for part in text.split("+"):
        setting = added(setting, part, word)
    return run, setting


def added(setting, part, word):
    """A setting and one more part of it."""
    key, equals, value = part.partition("=")
    if key in (*AT_SAMPLING, "sparse_decode"):
        kind = GPTConfig if key in AT_SAMPLING else Setting
        try:
            [value] = parse(kind, [f"--{part}"]).values()
        except ConfigError as error:
            raise ConfigError(f"'{word}': {error}") from error
        require(key not in dict(setting.flags), f"'{word}' names {key} twice: leave one out")
        return (replace(setting, flags=(*setting.flags, (key, value))) if kind is GPTConfig else
                replace(setting, sparse_decode=value))
    kind = value if key == "quantize" else part
    try:
        check_quantize(kind, smaller=True)
    except ConfigError as error:
        near, known = close_match(key, [*AT_SAMPLING, *NAMES]), equals and key in (*PARTS, "quantize")
        require(known or part in GGML, f"'{word}': '{part}' is no setting{near}; {EXAMPLE}")
        raise ConfigError(f"'{word}': {error}") from error
    require(not setting.quantize, f"'{word}' names two kinds of whole numbers, {setting.quantize} and "
            f"{kind}: leave one out, or name the run twice")
    return replace(setting, quantize=kind)


def check(setting, config, run, stored=""):
    """A ConfigError where a run of this GPTConfig cannot decode so. stored: what its weights are, where these
    are not its numbers: quantised or packed."""
    flags, word = dict(setting.flags), f"'{run}@{setting.text}'"
    require("mlp_screen" not in flags or config.act in ("relu2", "swiglu"), f"{word}: mlp_screen picks among "
            "units that are zero, or whose gate is small, and needs act='relu2' or 'swiglu'; this run has "
            f"act='{config.act}'")
    require("mlp_live" not in flags or "mlp_screen" in flags or config.mlp_screen,
            f"{word}: mlp_live has no effect without mlp_screen: type mlp_screen=4 too")
    others = [key for key in ("weights", "attn_topk", "mlp_topk", "gate_first") if key in flags]
    others += ["quantize"] * bool(setting.quantize and stored == "quantised")
    require(not stored or not others, f"{word}: the run holds {stored} weights, which {''.join(others[:1])} "
            "cannot lay out anew: name the run that they were made from")
    require(not setting.sparse_decode or any(getattr(config, key) for key in SHORTCUTS), f"{word}: this run "
            "was trained for no shortcut (predicted or screened units, early exits): leave sparse_decode out")
    replace(config, **flags)
