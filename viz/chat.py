"""A conversation with a model at the terminal, or through a pipe: python sample.py --chat.

The model goes on with one text: the start, each line that was typed with what Enter adds, each answer. An
answer depends on that text and the seed alone: sample.py gives the same one when it is the prompt.
"""
import contextlib
import locale
import os
import re
import signal
import sys
from typing import NamedTuple

import torch

from configurator import ConfigError, require
from data.tokenizer import StreamDecoder, begun
from decode.sampling import Damaged

PROMPT = "> "
HELP = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C ends an answer"


class Frame(NamedTuple):
    """What an instruct model has seen around messages: a system's, with {} for its text; before and behind a
    line; what ends an answer, and what follows that."""
    system: str
    before: str
    enter: str
    stop: str
    after: str


FRAMES = {
    "chatml": Frame("<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n",
                    "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "llama3": Frame("<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                    "<|start_header_id|>user<|end_header_id|>\n\n",
                    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
}
SAYS = r"<\|im_start\|>system(?:\n|\\n)([^{}']+?)<\|im_end\|>"     # the text that a template has for a system


def frame_of(template):
    """The name in FRAMES of a model's own template (jinja), None for another -> (it, the system's text)."""
    for name, frame in FRAMES.items():
        if template and frame.stop in template and frame.before.partition("user")[0] in template:
            said = re.search(SAYS, template)
            return name, said[1] if said else ""
    return None, ""


class Chat:
    """The text so far, and what goes on with it.

    stream: a function of a prompt (1, T) that yields token ids; stop: a text that ends an answer, it stays in
    the text but is not shown; enter: what a typed line ends with; special: <|endoftext|> is the one token;
    frame: instead of stop and enter, see Frame; start is its system's text then, empty: none.
    """

    def __init__(self, stream, tokenizer, device, seed, start="", stop="", enter="\n", special=True,
                 frame=None):
        self.stream, self.tokenizer, self.device, self.seed = stream, tokenizer, device, seed
        self.before, self.closes = "", ""
        self.stop, self.enter = newlines(stop), newlines(enter)
        if frame:
            start = start and frame.system.format(start)
            self.before, self.enter, self.stop = frame.before, frame.enter, frame.stop
            self.closes = frame.stop + frame.after
        self.start = self.text = start
        self.special, self.end = special, tokenizer.end_of_text

    def reset(self):
        self.text = self.start

    def answer(self, line, interrupted=lambda: False):
        """Yield the answer to a line piece by piece, whole characters at a time; `interrupted` is asked
        behind each token. ConfigError where the line has characters that the model does not know."""
        line = self.before + line + self.enter
        ids = begun(self.tokenizer, self.text + line, self.special)
        require(ids, "there is no text yet to go on with: type a line")
        self.text += line
        torch.manual_seed(self.seed)
        decoder, waiting = StreamDecoder(self.tokenizer), ""
        for token in self.stream(torch.tensor([ids], device=self.device)):
            if int(token) == self.end or interrupted():
                break
            said, waiting, over = until(self.stop, waiting + decoder.feed(int(token)))
            yield self.say(said)
            if over:
                self.text += self.closes or self.stop
                return
        yield self.say(waiting) + decoder.flush()        # half a character is shown, but not read again
        self.text += self.closes

    def say(self, text):
        self.text += text
        return text


def newlines(text):
    """A shell hands \\n on as two characters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def until(stop, text):
    """-> what of the text is said, what waits because `stop` may begin there, and whether `stop` has come."""
    said, found, _ = text.partition(stop) if stop else (text, "", "")
    if found:
        return said, "", True
    waits = next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
    return text[:len(text) - waits], text[len(text) - waits:], False


class Interrupt:
    """Inside, Ctrl-C asks for an end, a second one ends at once; calling it says whether it was asked."""
    asked = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self):
        return self.asked

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)


def converse(chat):
    """Read lines and answer them until /exit or the end of the input. Answers alone go to stdout."""
    prepare_terminal()
    print(HELP, file=sys.stderr)
    while (line := read_line()) not in (None, "/exit"):
        if line == "/reset":
            chat.reset()
        else:
            reply(chat, line)


def reply(chat, line):
    """Show the answer to a line; a line that has none is one sentence on stderr, and the chat goes on. A
    damaged model, which has none for any line, ends it."""
    try:
        with Interrupt() as interrupted:
            for piece in chat.answer(line, interrupted):
                show(piece)
            show("\n")
    except Damaged:
        raise
    except ConfigError as error:
        print(error, file=sys.stderr)


def prepare_terminal():
    """UTF-8 in and out, and where Python has readline the arrow keys with the lines typed before."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if character_set() in ("C", "POSIX"):
        os.environ["LC_ALL"] = "C.UTF-8"         # readline asks there for what a character is
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def character_set():
    """The C library's, as the environment has it."""
    try:
        return locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:
        return "C"


def read_line():
    """The next line without its end, None at the end of the input. The prompt is on stdout at a terminal
    alone."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            return show("\n")
    print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def show(text):
    sys.stdout.write(text)
    sys.stdout.flush()
