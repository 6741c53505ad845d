"""Lossless compression with a trained byte-level model: the better it predicts, the fewer bits.

    python train.py config/train_pylib.py config/compress_pylib.py
    python -m data.compress c FILE                       writes FILE.ncx
    python -m data.compress d FILE.ncx                   writes FILE, the same to the bit

The file is cut into rows that are predicted side by side, one byte of each at a time, and a range coder
(constriction) writes what each byte costs under its prediction. The reader makes the same predictions from
what it has read. That takes the same floating-point numbers to the last bit: the same model, torch, machine
and number of threads. The archive says which, and nothing is written before the result's hash is right.
"""
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if not __package__:                          # typed as a file: the checkout is where modules are
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from configurator import ConfigError, configure, require, run_script
from data import tokenizer as tokenizers
from decode import sampling
from model import build_model
from training import checkpoint as ckpt

MAGIC, SUFFIX = b"nanoCortex 1\n", ".ncx"
ROW_BYTES, MOST_ROWS = 4096, 256            # a longer row begins cold more rarely, more rows are faster
USAGE = "type python -m data.compress c FILE, or python -m data.compress d FILE.ncx; --help lists the keys"


@dataclass(frozen=True)
class Compress:
    """Compress (c FILE) or decompress (d FILE.ncx) with a model of bytes. On the CPU, in float32."""
    out_dir: str = "out-compress"  # run whose ckpt.pt is the model
    output: str = ""  # file to write, which must not exist; empty: FILE.ncx, or FILE
    threads: int = 0  # CPU threads to compress with; 0: torch's default. Decompressing takes the archive's

    def __post_init__(self):
        require(self.threads >= 0, f"threads={self.threads} must be 1 or more, or 0 for torch's default")


# ------------------------------------------------------------------------------------------------------------
# coding

class Encoder:
    """Stands where sampling.stream expects a sampler: it "draws" each row's next byte and writes it down."""
    vocab_size = None                            # every id may come

    def wants(self):
        """All logits decide."""

    def __init__(self, table, size):
        self.table, self.size, self.step = table, size, 0
        self.coder = need_constriction().stream.queue.RangeEncoder()

    def __call__(self, logits, seen):
        count = rows_alive(self.table.shape, self.step, self.size)
        column = self.table[:, self.step]
        self.code(column, count, chances(logits[:count]))
        self.step += 1
        return torch.from_numpy(column.astype(np.int64))[:, None]

    def code(self, column, count, probabilities):
        self.coder.encode(column[:count].astype(np.int32), family(), probabilities)


class Decoder(Encoder):
    """The same, but the bytes come out of the archive."""

    def __init__(self, shape, size, words):
        self.table, self.size, self.step = np.zeros(shape, np.uint8), size, 0
        self.coder = need_constriction().stream.queue.RangeDecoder(words)

    def code(self, column, count, probabilities):
        column[:count] = self.coder.decode(family(), probabilities)


def rows_alive(shape, step, size):
    """How many rows have a byte at this step; the bytes fill the table row by row."""
    return int(np.count_nonzero(np.arange(shape[0]) * shape[1] + step < size))


def chances(logits):
    """Logits (rows, 256 or more) -> probabilities (rows, 256) in float64, which both ways compute alike."""
    return torch.softmax(logits[:, :256].double(), dim=-1).numpy()


def need_constriction():
    return tokenizers.need("constriction", "archives")


def family():
    return need_constriction().stream.model.Categorical(perfect=False)


def shape_of(size):
    """(rows, bytes in a row) for a file."""
    rows = min(MOST_ROWS, max(1, size // ROW_BYTES))
    return rows, -(-size // rows)


def run(model, coder, quiet):
    """Lead every row of the coder's table past the model, which knows a 0 byte, the end of a document, before
    it. quiet: without a bar."""
    rows, length = coder.table.shape
    prompt = torch.zeros(rows, 1, dtype=torch.int64)
    steps = sampling.stream(model, prompt, length, coder, overflow="slide")
    with tqdm(total=coder.size, unit="B", unit_scale=True, dynamic_ncols=True, disable=quiet,
              mininterval=0.2 if sys.stderr.isatty() else 20) as bar:
        for step, _ in enumerate(steps):
            bar.update(rows_alive(coder.table.shape, step, coder.size))


def compress(model, content, quiet=True):
    """bytes -> the bytes of the range coder. quiet: without a bar."""
    rows, length = shape_of(len(content))
    table = np.zeros(rows * length, np.uint8)
    table[:len(content)] = np.frombuffer(content, np.uint8)
    coder = Encoder(table.reshape(rows, length), len(content))
    run(model, coder, quiet)
    return coder.coder.get_compressed().astype("<u4").tobytes()


def decompress(model, payload, size, quiet=True):
    coder = Decoder(shape_of(size), size, np.frombuffer(payload, "<u4").astype(np.uint32))
    try:
        run(model, coder, quiet)
    except AssertionError:                      # constriction's: these bytes cannot follow from these chances
        return b""
    return coder.table.tobytes()[:size]


# ------------------------------------------------------------------------------------------------------------
# archives: MAGIC, a line of JSON, the range coder's bytes, the sha256 of all that

def pack(header, payload):
    body = MAGIC + json.dumps(header).encode() + b"\n" + payload
    return body + hashlib.sha256(body).digest()


def unpack(archive, path):
    """The bytes of an archive -> (header, payload); anything else is a ConfigError."""
    require(archive.startswith(MAGIC), f"{path} is no archive of compress.py: it starts {archive[:12]!r}")
    body, sha = archive[:-32], archive[-32:]
    require(hashlib.sha256(body).digest() == sha, f"{path} is damaged or cut short: its hash is not what its "
                                                  "end says; get it again")
    line, _, payload = body[len(MAGIC):].partition(b"\n")
    return json.loads(line), payload


def where():
    """What must be the same for the same floating-point numbers."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability()}


def load_model(out_dir):
    """A run's model and the hash of its weights; it must be one of bytes."""
    loaded, path = ckpt.read(out_dir)
    kind = (loaded.get("tokenizer") or {}).get("tokenizer")
    require(kind == "byte", f"{path} is a model of '{kind}' tokens, expected bytes: type python train.py "
                            "config/train_pylib.py config/compress_pylib.py")
    sha = hashlib.sha256(json.dumps(loaded["model_args"], sort_keys=True, default=str).encode())
    for name in sorted(loaded["model"]):
        sha.update(name.encode() + loaded["model"][name].contiguous().view(torch.uint8).numpy().tobytes())
    return build_model(loaded, path).float().eval(), sha.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# the two commands

def compress_file(path, cfg):
    content, target = read(path), target_of(cfg, path.with_name(path.name + SUFFIX))
    require(content, f"{path} is empty: there is nothing to compress")
    set_threads(cfg.threads)
    model, sha = load_model(cfg.out_dir)
    payload = compress(model, content, quiet=False)
    header = {"model": sha, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **where()}
    archive = pack(header, payload)
    write(target, archive)
    bits = 8 * len(archive) / len(content)
    return f"{target}: {len(archive):,} bytes of {len(content):,}, {bits:.3f} bits a byte"


def decompress_file(path, cfg):
    header, payload = unpack(read(path), path)
    target = target_of(cfg, path.with_name(path.name.removesuffix(SUFFIX)))
    model, sha = load_model(cfg.out_dir)
    require(sha == header["model"], f"{path} was made with the model {header['model'][:12]}, {cfg.out_dir} "
                                    f"holds {sha[:12]}: type --out_dir=THE_RUN_IT_WAS_MADE_WITH")
    set_threads(header["threads"])
    content = decompress(model, payload, header["size"], quiet=False)
    made = {key: header[key] for key in where()}
    require(hashlib.sha256(content).hexdigest() == header["sha256"],
            f"{path} does not come out right: it was made with {made}, here is {where()}, and other "
            "floating-point numbers decode other bytes; decompress it where it was made")
    write(target, content)
    return f"{target}: {len(content):,} bytes, the same to the bit"


def read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def target_of(cfg, default):
    """The file to write. It must be a new one: nothing is overwritten."""
    target = Path(cfg.output) if cfg.output else default
    require(not target.exists(), f"{target} exists and is not overwritten: type --output=ANOTHER_FILE")
    return target


def write(target, content):
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(f"{target} could not be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def set_threads(count):
    if count:
        torch.set_num_threads(count)


COMMANDS = {"c": compress_file, "d": decompress_file}


def main(words):
    keys = [word for word in words if word.startswith("-")]
    cfg, (command, *files) = configure(Compress, keys), [word for word in words if word not in keys] or [""]
    require(command in COMMANDS and files, f"a command and a file are missing: {USAGE}")
    require(len(files) == 1, f"'{files[-1]}' is one word too many, one file at a time: {USAGE}")
    clock = time.perf_counter()
    print(f"{COMMANDS[command](Path(files[0]), cfg)}, {time.perf_counter() - clock:.1f} s")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
