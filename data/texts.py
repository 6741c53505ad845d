"""A text as a data set of bytes below data/: `python train.py book.txt`."""
import json
import os
import re
import time
import unicodedata
from pathlib import Path

from configurator import ConfigError, close_match, require
from data import dataset, inputs

VAL_FRACTION, BYTES = 0.1, 256


def data_of(path, looks_only=False):
    """The data set of a text, prepared where there is none yet -> (its name below data/, what to print).

    It is called as the text is; where another data set has that name, NAME-2 and so on. One that was made
    from the same bytes is taken as it is. looks_only: nothing is prepared.
    """
    path = dataset.expanded(path)
    near = [str(entry) for entry in (path.parent.glob("*.txt") if os.path.isdir(path.parent) else ())]
    require(os.path.isfile(path), f"{path} is no file: a word is a config file (.py), a text, or --key=value"
            + close_match(str(path), near))
    kind = inputs.kind_of(path)
    require(kind in (None, "text"), f"{path} holds documents: type python data/prepare.py --input={path} "
            f"--name={name_of(path)}, and --dataset={name_of(path)}")
    wanted, taken = dataset.text_source(path), []
    while True:
        name = name_of(path) + (f"-{len(taken) + 1}" if taken else "")
        folder = dataset.on_disk(dataset.DATA / name)
        if os.path.isdir(folder):
            dataset.wait_for_other(folder)
            made = source_in(folder)
            if made == wanted and not dataset.missing_files(folder):
                return name, f"{path} is data/{name}"
            if any(folder.iterdir()) and made != wanted:
                taken.append(f"data/{name} is {made or 'another data set'}")
                continue
        if looks_only:
            return name, f"{path} becomes data/{name}"
        try:
            clock = time.time()
            meta = dataset.write_text(folder, path, "byte", VAL_FRACTION)
        except ConfigError as error:
            if dataset.BUSY in str(error):                       # another process was faster by a moment
                continue
            raise
        dataset.report(folder, meta, time.time() - clock)
        return name, "; ".join([*taken, f"{path} is data/{name} now"])


def name_of(path):
    """A text's name as that of a folder."""
    stem = Path(path.stem).stem if path.suffix.lower() in inputs.PACKED else path.stem
    return re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", stem)).strip("-.")[:90] or "text"


def source_in(folder):
    """The same of a folder; "" where nothing says it."""
    try:
        said = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(said.get("source", "")) if isinstance(said, dict) else ""
