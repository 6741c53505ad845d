"""sample.py --chat: through a pipe, and at a real terminal where the system has pseudo-terminals."""
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from conftest import LIMIT, ONE_THREAD, ROOT, Job, Trainer, one_sentence, words

from configurator import ConfigError
from data import dataset, vocabulary
from data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, load
from viz import chat

ANTHEM = "동해물과 백두산이 마르고 닳도록\n하느님이 보우하사 우리나라 만세\n"
needs_terminal = pytest.mark.skipif(not hasattr(os, "fork") or not find_spec("termios"),
                                    reason="needs pseudo-terminals, which this system does not have")
needs_readline = pytest.mark.skipif(not find_spec("readline"), reason="this Python has no readline")


@pytest.fixture(scope="module")
def korean(tmp_path_factory):
    """A finished run on Korean characters."""
    folder = tmp_path_factory.mktemp("korean")
    tokenizer = CharTokenizer(sorted(set(ANTHEM)))
    ids = tokenizer.encode(ANTHEM * 30)
    dataset.write_dataset(folder / "data", {"train": [ids], "val": [ids]}, tokenizer, "test_chat.py")
    trainer = Trainer(folder, folder / "data")
    trainer(n_layer=2, exits="1", n_embd=32, block_size=32, batch_size=8, max_iters=80, lr_decay_iters=80,
            eval_interval=80)
    return trainer


def keys_of(run, **more):
    return {"out_dir": run.folder / "out", "device": "cpu", "dtype": "float32", "max_new_tokens": 12, **more}


def sampled(run, start, **more):
    """What sample.py writes behind a start."""
    (run.folder / "start.txt").write_text(start, encoding="utf-8", newline="")
    argv = words(**keys_of(run, start=f"FILE:{run.folder / 'start.txt'}", num_samples=1, **more))
    done = Job("sample.py", argv, run.folder, name="sampled").wait()
    assert done.status == 0, done.err
    return done.out.removeprefix(start).removesuffix("\n---------------\n")


def piped(run, typed, *argv, status=0, name="piped", **more):
    """A chat whose input is a file with the lines `typed` -> what went to (stdout, stderr)."""
    (run.folder / "typed.txt").write_bytes(typed if isinstance(typed, bytes) else typed.encode())
    before = (f"import os, sys; os.dup2(os.open({str(run.folder / 'typed.txt')!r}, os.O_RDONLY), 0); "
              "sys.stdin = open(0, encoding='ascii', closefd=False)")
    done = Job("sample.py", [*words(**keys_of(run, **more)), "--chat", *argv], run.folder, before=before,
               name=name).wait()
    assert done.status == status, done.err
    return done


# -------------------------------------------------- the text so far ----------------------------------------

def scripted(answer, tokenizer=None, **keys):
    """A Chat whose model always says `answer`; .prompts: what it was asked to go on with."""
    tokenizer, prompts = tokenizer or ByteTokenizer(), []

    def stream(prompt):
        prompts.append(tokenizer.decode(prompt[0].tolist()))
        yield from tokenizer.encode(answer) if isinstance(answer, str) else answer

    made = chat.Chat(stream, tokenizer, "cpu", 1, **keys)
    made.prompts = prompts
    return made


def test_an_answer_is_read_again_with_the_next_line_and_forgotten_by_a_reset():
    talk = scripted("좋아", start="시작\n")
    assert ["".join(talk.answer(line)) for line in ("안녕", "그래")] == ["좋아", "좋아"]
    assert talk.prompts == ["시작\n안녕\n", "시작\n안녕\n좋아그래\n"]
    talk.reset()
    "".join(talk.answer("다시"))
    assert talk.prompts[-1] == "시작\n다시\n"


def test_hangul_appears_in_whole_characters():
    pieces = list(scripted("대한민국").answer("?"))
    assert [piece for piece in pieces if piece] == list("대한민국") and len(pieces) == 4 * 3 + 1


def test_half_a_character_at_the_end_is_shown_and_not_read_again():
    talk = scripted("대한".encode()[:-1], enter="")
    assert "".join(talk.answer("a")) == "대\N{REPLACEMENT CHARACTER}" and talk.text == "a대"


@pytest.mark.parametrize("answer, stop, shown, text", [
    ("one\ntwo", "\\n", "one", "one\n"),                       # as a shell hands it on
    ("I am well. You: fine", "You:", "I am well. ", "I am well. You:"),
    ("Yo, You, Yo", "You:", "Yo, You, Yo", "Yo, You, Yo"),     # what only looks like it is said in the end
    ("aaab", "aab", "a", "aaab"),
    ("끝났다. 끝! 더", "끝!", "끝났다. ", "끝났다. 끝!"),
    ("one\ntwo", "", "one\ntwo", "one\ntwo"),
])
def test_an_answer_ends_at_stop(answer, stop, shown, text):
    talk = scripted(answer, stop=stop, enter="")
    assert "".join(talk.answer("?")) == shown and talk.text == "?" + text


def test_an_answer_ends_at_the_end_of_text():
    talk = scripted("ab\0cd", CharTokenizer(list("\0abcd?")), enter="")
    assert "".join(talk.answer("?")) == "ab" and talk.text == "?ab"


def test_an_interrupted_answer_stays_in_the_text():
    talk, calls = scripted("abcdef", enter=""), iter([False, False, True])
    assert "".join(talk.answer("?", lambda: next(calls))) == "ab" and talk.text == "?ab"


def test_a_line_that_the_model_cannot_read_changes_nothing():
    talk = scripted("a", CharTokenizer(list("ab\n")))
    with pytest.raises(ConfigError, match="not among the 3 characters"):
        list(talk.answer("Z"))
    assert talk.text == ""
    with pytest.raises(ConfigError, match="type a line"):
        list(scripted("a", enter="").answer(""))


# -------------------------------------------------- through a pipe -----------------------------------------

def test_a_real_pipe_gets_the_answer_of_one_sample_and_no_prompt(korean):
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *words(**keys_of(korean)), "--chat"],
                          cwd=korean.folder, input="우리나라\n".encode(), capture_output=True, timeout=LIMIT,
                          env={**os.environ, **ONE_THREAD, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().replace("\r\n", "\n") == sampled(korean, "\n우리나라\n") + "\n"
    assert b"> " in done.stderr


def test_the_history_is_the_prompt_of_the_next_answer_until_a_reset(korean):
    first = sampled(korean, "\n우리\n")
    second = sampled(korean, f"\n우리\n{first}나라\n")
    done = piped(korean, "우리\n나라\n/reset\n우리\n/exit\n만세\n")
    assert done.out == f"{first}\n{second}\n{first}\n" and first != second


@pytest.mark.parametrize("more", [dict(sparse_decode=True, exit_threshold=0.5), dict(speculate=2),
                                  dict(temperature=0.0, overflow="slide"), dict(seed=7, start="")], ids=str)
def test_every_way_to_sample_answers_as_one_sample_does(korean, more):
    start = more.get("start", "\n")
    expected = sampled(korean, start + "우리\n", **{k: v for k, v in more.items() if k != "start"})
    assert piped(korean, "우리", **more).out == expected + "\n"


def test_bytes_that_are_no_utf8_are_one_strange_line_and_the_next_one_is_answered(korean):
    done = piped(korean, b"\xff\xfe\r\n" + "우리\n".encode())
    assert done.out == sampled(korean, "\n우리\n") + "\n"
    assert "U+FFFD" in done.err and "Traceback" not in done.err


def test_enter_and_stop_can_be_chosen(korean):
    done = piped(korean, "동해", "--enter=", "--stop=\\n", max_new_tokens=200, temperature=0.0)
    assert done.out == sampled(korean, "\n동해", max_new_tokens=200, temperature=0.0).split("\n")[0] + "\n"


@pytest.mark.parametrize("argv, part", [(["--stop=x"], "without chat"), (["--enter="], "without chat"),
                                        (["--chat", "--num_samples=2"], "num_samples=2 and chat")], ids=str)
def test_keys_that_do_nothing_are_refused(korean, argv, part):
    one_sentence(Job("sample.py", [*words(**keys_of(korean)), *argv], korean.folder, name="bad").wait(),
                 "sample.py", part)


# -------------------------------------------------- at a terminal ------------------------------------------

class Terminal:
    """A chat in a pseudo-terminal of its own; its stderr is a file."""
    BEFORE = ("import fcntl, os, sys, termios; os.setsid(); t = os.open({!r}, os.O_RDWR); "
              "fcntl.ioctl(t, termios.TIOCSCTTY, 0); os.dup2(t, 0); os.dup2(t, 1); "
              "sys.stdin = open(0, encoding='utf-8', closefd=False); "
              "sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)")

    def __init__(self, run, env=None, **more):
        import pty
        self.ours, self.theirs = pty.openpty()
        self.job = Job("sample.py", [*words(**keys_of(run, **more)), "--chat"], run.folder,
                       {"TERM": "dumb", **(env or {})}, self.BEFORE.format(os.ttyname(self.theirs)), "tty")
        self.unread = b""
        self.until("> ")

    def type(self, text):
        os.write(self.ours, text.encode())

    def until(self, mark, interrupted=False):
        """What the terminal shows up to `mark`, which must come. interrupted: behind a Ctrl-C, at which a
        terminal throws away what nobody has read yet (NOFLSH is off), half a character too."""
        deadline = time.monotonic() + 30
        while mark.encode() not in self.unread:
            assert select.select([self.ours], [], [], max(0, deadline - time.monotonic()))[0], self.unread
            self.unread += os.read(self.ours, 4096)
        shown, _, self.unread = self.unread.partition(mark.encode())
        errors = "replace" if interrupted else "strict"
        return re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", shown.decode(errors=errors)).replace("\r", "")

    def end(self):
        """-> exit status, stderr."""
        done = self.job.wait()
        os.close(self.ours)
        os.close(self.theirs)
        return done.status, done.err


@needs_terminal
def test_korean_is_typed_and_answered_at_a_terminal_and_ctrl_d_ends(korean):
    terminal = Terminal(korean)
    terminal.type("우리\n")
    assert terminal.until("\n> ").endswith("우리\n" + sampled(korean, "\n우리\n"))
    terminal.type("\x04")
    status, err = terminal.end()
    assert status == 0 and "Traceback" not in err


@needs_terminal
@needs_readline
@pytest.mark.parametrize("place", ["C.UTF-8", "C"])
def test_a_character_is_taken_back_whole_and_an_arrow_brings_a_line_back(korean, place):
    first = sampled(korean, "\n우나\n")
    terminal = Terminal(korean, {"LC_ALL": place})
    terminal.type("우리\x7f나\n")
    assert terminal.until("\n> ").endswith("\n" + first)
    terminal.type("/reset\n")
    terminal.until("\n> ")
    terminal.type("\x1b[A\x1b[A\n")
    shown = terminal.until("\n> ")
    assert "우나" in shown and shown.endswith("\n" + first)
    terminal.type("/exit\n")
    assert terminal.end()[0] == 0


@needs_terminal
def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(korean):
    terminal = Terminal(korean, max_new_tokens=1_000_000)
    terminal.type("우리\n")
    terminal.until("우리\n".replace("\n", "\r\n"))
    shown = sampled(korean, "\n우리\n")[:3]
    terminal.until(shown.replace("\n", "\r\n"))
    terminal.type("\x03")
    terminal.until("\n> ", interrupted=True)
    for _ in range(20):                             # readline is deaf for a moment behind its prompt
        time.sleep(0.3)
        if "stopped" in terminal.job.err.read_text():
            break
        terminal.type("\x03")
    status, err = terminal.end()
    assert status == 130 and err.strip().endswith("stopped") and "Traceback" not in err


# -------------------------------------------------- special tokens -----------------------------------------

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A finished run on byte pairs, whose end of text is one token."""
    folder = tmp_path_factory.mktemp("pairs")
    made = vocabulary.learn(vocabulary.count_words([ANTHEM]), 300)
    ids = [*made.encode(ANTHEM * 20), made.end_of_text]
    dataset.write_dataset(folder / "data", {"train": [ids], "val": [ids]}, made, "test_chat.py")
    trainer = Trainer(folder, folder / "data")
    trainer(max_iters=2)
    return trainer


PROMPT = """
from decode import sampling
stream = sampling.stream
def told(model, prompt, *words, **keys):
    print('ids', prompt.tolist())
    return stream(model, prompt, *words, **keys)
sampling.stream = told
"""


def prompt_ids(run, *argv, **keys):
    """The ids that sample.py goes on with."""
    done = Job("sample.py", [*words(**keys_of(run, **keys)), *argv], run.folder, before=PROMPT).wait()
    assert done.status == 0, done.err
    return json.loads(re.search(r"ids \[(.*)\]", done.out)[1])


def test_the_end_of_text_in_a_start_is_the_one_token_as_in_nanogpt(pairs):
    made = load(pairs.folder / "data")
    start = f"국{END_OF_TEXT}마"
    one = [*made.encode("국"), made.end_of_text, *made.encode("마")]
    assert prompt_ids(pairs, start=start, num_samples=1) == one
    assert prompt_ids(pairs, start=start, num_samples=1, special=False) == made.encode(start) != one


def test_a_chat_reads_the_end_of_text_as_sample_does(pairs):
    typed = pairs.folder / "typed.txt"
    typed.write_text(END_OF_TEXT + "국\n", encoding="utf-8")
    before = f"{PROMPT}\nimport os, sys; os.dup2(os.open({str(typed)!r}, os.O_RDONLY), 0)\n" \
             "sys.stdin = open(0, closefd=False)"
    made, found = load(pairs.folder / "data"), {}
    for special in (True, False):
        argv = ["--chat", *words(**keys_of(pairs, start="", special=special))]
        done = Job("sample.py", argv, pairs.folder, before=before).wait()
        assert done.status == 0, done.err
        found[special] = json.loads(re.search(r"ids \[(.*)\]", done.out)[1])
    assert found[True] == [made.end_of_text, *made.encode("국\n")]
    assert found[False] == made.encode(END_OF_TEXT + "국\n")


@pytest.mark.parametrize("special", [True, False])
def test_bytes_and_characters_have_no_special_tokens(finished, special):
    found = prompt_ids(finished, start=END_OF_TEXT, num_samples=1, special=special)
    assert found == list(END_OF_TEXT.encode())


@pytest.mark.parametrize("chat_too", [False, True])
def test_a_damaged_model_ends_with_a_sentence(korean, tmp_path, chat_too):
    """NaN in one weight: status 2, no traceback, no text that means nothing; with --chat too."""
    folder = tmp_path / "out"
    shutil.copytree(korean.folder / "out", folder)
    (folder / "manifest.json").unlink()          # as if it had been saved so
    for path in folder.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        saved["model"]["transformer.h.0.mlp.c_fc.weight"][3, 3] = torch.nan
        torch.save(saved, path)
    if chat_too:
        done = piped(korean, "동해\n", status=2, name="damaged", out_dir=folder)
    else:
        done = Job("sample.py", words(**keys_of(korean, out_dir=folder, start="동해")), korean.folder,
                   name="damaged").wait()
    assert done.status == 2 and "Traceback" not in done.err and "not finite" in done.err.splitlines()[-1]
