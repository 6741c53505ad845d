"""Text for models of others, which name no data of their own: a text file, or the source of Python's library,
in the tokens of the model's own vocabulary."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from configurator import require
from data import dataset as datasets
from data import tokenizer as tokenizers

CONTEXT = 1024                                   # tokens of a window of text, where a model takes more
PLACE = Path("out-bench")                        # where encoded texts are kept, beside the records
LIBRARY = 2**22                                  # bytes of Python's library in each split, at the most
HELD_OUT = 0.1                                   # of a text file


def is_text(name):
    """Does --dataset name a file of text?"""
    return bool(name) and os.path.isfile(datasets.expanded(name))


def data_of(name, about):
    """The folder of a text in the tokens of a model, made unless it is there. name: of the text file; empty:
    the built-in text. about: what is known of the model; its `tokenizer` is a description."""
    said = about.get("tokenizer")
    require(isinstance(said, dict) and said, "the model's tokenizer is not known, so no text is encoded for "
            "it: type --dataset=FOLDER of data in its tokens")
    path = datasets.expanded(name) if name else datasets.prepare_if_missing("pylib").resolve()
    source = datasets.text_source(path) if name else datasets.meta_of(path)["source"]
    key = hashlib.sha256(json.dumps([said, source, LIBRARY, HELD_OUT], sort_keys=True).encode()).hexdigest()
    folder = PLACE / f"{path.stem}-{key[:8]}"
    if datasets.missing_files(folder):
        print(f"{folder}: {source}, in the model's tokens", flush=True)
        tokenizer = tokenizers.from_meta(said)
        if name:
            length = datasets.survey(path)[0]
            datasets.write_encoded(folder, path, tokenizer, length, int(length * (1 - HELD_OUT)))
        else:
            splits = {split: encoded(path / f"{split}.bin", tokenizer) for split in datasets.SPLITS}
            datasets.write_dataset(folder, splits, tokenizer, source)
    return folder


def encoded(path, tokenizer):
    """Ids of the files in a .bin of the built-in data, where a 0 byte ends each, file by file."""
    text = np.fromfile(path, datasets.DTYPES["uint16"], LIBRARY).astype(np.uint8).tobytes()
    for document in text.split(b"\0")[:-1]:      # behind the last end, a part of a file
        yield tokenizer.encode(document.decode("utf-8"))
