"""The command line: nanoGPT's grammar, typed by a dataclass.

    python train.py config/train_shakespeare_char.py --batch_size=32

Words are read from left to right: a config file (plain Python that assigns keys; train.py, sample.py and
bench.py read them) or --key=value; the last one wins. The keys, their types, defaults and one-line meanings
are the fields of a dataclass and the comments behind them: they live once.

Every script is run_script(main), here: what a failure says and its exit status live once too.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import glob
import inspect
import io
import os
import re
import sys
import textwrap
import typing
from pathlib import Path

TEXTS = ("start", "stop", "enter")             # keys whose value is text for a model, and no path


class ConfigError(ValueError):
    """A user's mistake in one sentence: the value, the rule, what to type. Scripts exit with status 2."""


def require(condition, sentence):
    """Raise ConfigError(sentence) unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)


def configure(cls, argv=None, base=None, files=False):
    """Read a command line into an instance of the dataclass `cls`.

    argv: the words after the script's name (default: sys.argv[1:]); base: values that replace the defaults of
    `cls` for keys that the command line does not name; files: config files are read, that is executed.
    """
    return cls(**{**(base or {}), **typed_words(cls, argv, files)})


def typed_words(cls, argv=None, files=False):
    """The keys that a script's command line sets -> {key: value}; --help prints all of them and exits."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, files), flush=True)
        raise SystemExit(0)
    return parse(cls, argv, files)


# ------------------------------------------------------------------------------------------------------------
# scripts: their streams and their ends

def run_script(main, encoding=None):
    """main() as a command. Its exit status: 0; 2 with one sentence for a ConfigError; 130 for Ctrl-C; 141, in
    silence, once nobody reads what it writes (as `| head`); 1 with one sentence where stdout cannot be
    written; 1 with a traceback for a defect of ours. encoding: stdout's; None: as the environment says."""
    begin_script(encoding)
    main()
    sys.stdout.flush()


def begin_script(encoding=None):
    """What run_script does before main(), for a script that is no function. It then ends with a flush of
    sys.stdout."""
    sys.excepthook = say_and_exit
    open_streams(encoding)


class Lost(OSError):
    """A standard output that cannot be written."""


class Stream(io.TextIOWrapper):
    """stdout or stderr. Once a write fails, what is written later goes nowhere: Python flushes both at its
    end, and another error there would be a second message and status 120. On stdout the failure is Lost."""

    def write(self, text):
        with self.watched():
            super().write(text)
        return len(text)

    def flush(self):
        with self.watched():
            super().flush()

    @contextlib.contextmanager
    def watched(self):
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self is sys.stdout:
                raise Lost(error.errno, error.strerror) from error


def open_streams(encoding=None):
    """stdin, stdout and stderr as every script has them. A closed one is /dev/null, and so is its file
    descriptor: the next file to be opened would take that, and with it what libraries print. Characters that
    the encoding lacks are written as \\uXXXX."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if type(old) is io.TextIOWrapper:                          # a notebook has streams of its own
            keys = dict(encoding=(name == "stdout" and encoding) or old.encoding, errors="backslashreplace",
                        line_buffering=old.line_buffering, write_through=old.write_through)
            setattr(sys, name, Stream(old.detach(), **keys))


def say_and_exit(kind, error, trace):
    """sys.excepthook of the scripts: the end of run_script that fits the error."""
    status, sentence = ending(error)
    if status is None:
        return sys.__excepthook__(kind, error, trace)
    with contextlib.suppress(OSError):
        sys.stdout.flush()                                         # what was said before comes first
    if sentence:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def ending(error):
    """-> (exit status, sentence); (None, "") for an error that nobody foresaw."""
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"
    if not isinstance(error, Lost):
        return None, ""
    if error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL):
        return 128 + 13, ""                                        # as a shell counts an end by SIGPIPE
    return 1, f"standard output cannot be written ({error.strerror})"


# ------------------------------------------------------------------------------------------------------------
# words and their values

def parse(cls, argv, files=False):
    """The keys that the words of `argv` set, checked against the fields of `cls` -> {key: value}. A word that
    is no key is a config file where `files` are read, else an error."""
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
                    f"command line: '{word}' is {'neither a config file nor' if files else 'no'} "
                    f"--key=value: type --{word.lstrip('-')}")
            require(files, f"command line: '{word}' is no --key=value, and files are not read here: leave it "
                           "out; --help lists all keys")
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
    if where == "command line" and str in wanted and value == raw:
        value = with_home(field.name, raw)
    if type(value) in wanted:
        return value
    if str in wanted and where == "command line":
        return str(raw)
    if float in wanted and type(value) is int and abs(value) < 1e300:
        return float(value)
    raise ConfigError(f"{where}: {field.name}={value!r} is {type(value).__name__}, expected "
                      f"{' or '.join(kind.__name__ for kind in wanted)}: "
                      f"type --{field.name}={field.default!r}, for example")


def with_home(key, text):
    """A value with the home folder for its ~/, which shells leave alone behind `--key=`; in a list by commas
    each one. Text for a model stays as it is, and so does a value in quotes, which never comes here."""
    def home(found):
        path = os.path.expanduser("~/")
        require(path != "~/", f"command line: {key}={text!r}: the home folder is not known, write it out")
        return found[1] + path
    return re.sub(r"^(FILE:)~/" if key in TEXTS else r"(^|,|^FILE:)~/", home, text)


def kinds(field):
    """The types that a field takes: (bool, str) for bool | str."""
    return typing.get_args(field.type) or (field.type,)


RENAMED = {"policy": "sparse_decode"}            # keys of earlier versions


def unknown(key, fields, where):
    if RENAMED.get(key) in fields:
        return f"{where}: '{key}' is called '{RENAMED[key]}' now: type --{RENAMED[key]}"
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


def groups(cls):
    """{heading: its keys}: what stands below `# --- heading ---` in `cls` and the dataclasses that it
    extends, its own first; a key stays where it was defined first. Keys above the first heading are `keys`,
    and those of a class that it extends below the first line of that one's docstring."""
    found = {}
    for part in (part for part in cls.__mro__[:-1] if dataclasses.is_dataclass(part)):
        doc = inspect.getdoc(part) or part.__name__
        heading = "keys" if part is cls else doc.partition("\n")[0].rstrip(".:")
        inherited = {f.name for base in part.__mro__[1:-1] if dataclasses.is_dataclass(base)
                     for f in dataclasses.fields(base)}
        for title, key in re.findall(r"^    (?:# --- (.+) ---|(\w+): )", inspect.getsource(part), re.M):
            heading = title or heading
            if key in part.__dataclass_fields__ and key not in inherited:
                found.setdefault(heading, []).append(key)
    return found


def examples(cls):
    """The commands in the docstring of a script."""
    doc = sys.modules[cls.__module__].__doc__ or ""
    return re.findall(r"^    (?:python|torchrun) .+$", doc, re.M)


def help_text(cls, files=False):
    """The text behind --help: commands, then every key with its default and meaning, in groups."""
    about, known = meanings(cls), {f.name: f for f in dataclasses.fields(cls)}
    doc = textwrap.dedent(inspect.getdoc(cls) or "").strip()
    usage = f"python {sys.argv[0]} {'[config/file.py ...] ' * files}[--key=value ...]"
    parts = [usage, doc, "\n".join(examples(cls))]
    for heading, keys in groups(cls).items():
        rows = [f"  --{key}={known[key].default!r}".ljust(40) + " " + about.get(key, "") for key in keys]
        parts.append("\n".join([f"{heading}:", *rows]))
    return "\n\n".join(filter(None, parts))
