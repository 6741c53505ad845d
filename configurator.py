"""The command line: nanoGPT's grammar, typed by a dataclass.

    python train.py config/train_shakespeare_char.py --batch_size=32

Words are read from left to right: a config file (plain Python that assigns keys) or --key=value; the last one
wins. The keys, their types, defaults and one-line meanings are the fields of a dataclass and the comments
behind them: they live once.
"""
import ast
import dataclasses
import difflib
import glob
import inspect
import os
import re
import sys
import textwrap
import typing
from pathlib import Path


class ConfigError(ValueError):
    """A user's mistake in one sentence: the value, the rule, what to type. Scripts exit with status 2."""


def require(condition, sentence):
    """Raise ConfigError(sentence) unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)


def configure(cls, argv=None, base=None):
    """Read a command line into an instance of the dataclass `cls`.

    argv: the words after the script's name (default: sys.argv[1:]); base: values that replace the defaults of
    `cls` for keys that the command line does not name.
    """
    return cls(**{**(base or {}), **typed_words(cls, argv)})


def typed_words(cls, argv=None):
    """The keys that a script's command line sets -> {key: value}.

    From here on a ConfigError ends the script with its sentence and status 2 instead of a traceback, Ctrl-C
    with 130. --help prints every key and exits with 0.
    """
    sys.excepthook = say_and_exit
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    return parse(cls, argv)


def say_and_exit(kind, error, trace):
    """sys.excepthook of the scripts: a ConfigError or Ctrl-C is one sentence, others keep their traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr, flush=True)
        raise SystemExit(130)
    if not issubclass(kind, ConfigError):
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(cls, argv):
    """The keys that the words of `argv` set, checked against the fields of `cls` -> {key: value}."""
    fields, given = {f.name: f for f in dataclasses.fields(cls)}, {}
    for word in argv:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            require(key in fields, unknown(key, fields, "command line"))
            require(equals or bool in kinds(fields[key]),
                    f"command line: --{key} needs a value: type --{key}=...")
            given[key] = convert(fields[key], literal(text) if equals else True, "command line", text)
        else:
            require("=" not in word and not word.startswith("-"),
                    f"command line: '{word}' is neither a config file nor --key=value: "
                    f"type --{word.lstrip('-')}")
            given |= read_config_file(word, fields, given)
    return given


def read_config_file(path, fields, given):
    """Run a config file (trusted Python, as in nanoGPT; it may read every key) -> the keys it assigned."""
    where = f"config file {path}"
    beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))
    require(os.path.isfile(path), f"{where} does not exist{close_match(path, beside)}")
    scope = {name: f.default for name, f in fields.items()} | given | {"__file__": path}
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
        exec(compile(tree, path, "exec"), scope)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where} does not run: {type(error).__name__}: {error}") from error
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    assigned = [name for name in dict.fromkeys(names) if name in scope and not name.startswith("_")]
    for key in assigned:
        require(key in fields, unknown(key, fields, where) + "; names of your own start with '_'")
    return {key: convert(fields[key], scope[key], where, scope[key]) for key in assigned}


def literal(text):
    """A Python literal if the text is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text, text)


def convert(field, value, where, raw):
    """`value` as the field's type (int serves as float, any text as str) or a ConfigError."""
    wanted = kinds(field)
    if type(value) in wanted:
        return value
    if str in wanted and where == "command line":
        return str(raw)
    if float in wanted and type(value) is int and abs(value) < 1e300:
        return float(value)
    raise ConfigError(f"{where}: {field.name}={value!r} is {type(value).__name__}, expected "
                      f"{' or '.join(kind.__name__ for kind in wanted)}: "
                      f"type --{field.name}={field.default!r}, for example")


def kinds(field):
    """The types that a field takes: (bool, str) for bool | str."""
    return typing.get_args(field.type) or (field.type,)


def unknown(key, fields, where):
    return f"{where}: unknown key '{key}'{close_match(key, fields)}; --help lists all keys"


def close_match(word, names):
    near = difflib.get_close_matches(word, list(names), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def render(config):
    """A config as command-line words; parse(type(config), render(config)) gives the same values back."""
    return [f"--{f.name}={getattr(config, f.name)!r}" for f in dataclasses.fields(config)]


def meanings(cls):
    """One-line meaning of every key: the comment behind its field, in `cls` or the dataclass it extends."""
    found = {}
    for part in reversed(cls.__mro__[:-1]):
        for key, comment in re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(part), re.MULTILINE):
            found[key] = comment
    return found


def help_text(cls):
    """The text behind --help: every key with its default and meaning."""
    about, script = meanings(cls), Path(sys.argv[0]).name
    rows = [f"  --{f.name}={f.default!r}".ljust(40) + " " + about.get(f.name, "")
            for f in dataclasses.fields(cls)]
    doc = textwrap.dedent(inspect.getdoc(cls) or "").strip()
    return f"python {script} [config/file.py ...] [--key=value ...]\n\n{doc}\n\n" + "\n".join(rows)
