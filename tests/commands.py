"""The commands that pages show, as words: from their fenced blocks and from the spans of their sentences."""
import re
import shlex

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
RUNS = r"(?:python|torchrun)\s"


def commands_of(path):
    """Every command that a page shows, in a block or in a line, as its words."""
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(body for language, body in FENCE.findall(text) if not language or language == "bash")
    lines = blocks.replace("\\\n", " ").splitlines()
    shown = [line.partition("  ")[0] if "=" not in line.partition("  ")[2] else line for line in lines
             if re.match(rf"(\$ )?(\w+=\S+ )*{RUNS}", line)]
    shown += re.findall(rf"`({RUNS}[^`]+)`", FENCE.sub("", text))
    for line in shown:
        for part in line.removeprefix("$ ").split("&&"):
            words = [word for word in shlex.split(part) if word not in ("...", "|")]
            while re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            yield words


def split_command(words):
    """A command's words -> (the script, the words behind it); "" for what is no script of ours."""
    if words[0] == "torchrun":
        at = next((n for n, word in enumerate(words) if word.endswith(".py")), len(words))
        return (words[at], words[at + 1:]) if at < len(words) else ("", [])
    if words[1] == "-m":
        name = words[2].replace(".", "/") + ".py"
        return (name, words[3:]) if "." in words[2] else ("", [])
    return words[1], words[2:]
