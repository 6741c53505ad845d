"""Bits per byte of compress.py beside gzip, xz and zstd."""
import gzip
import lzma
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import Bench
from configurator import require
from data import compress as compressor
from data import tokenizer as tokenizers


@dataclass(frozen=True)
class Compression(Bench):
    """Bits per byte of compress.py, gzip, xz and zstd on files, each file restored and compared."""
    files: str = ""  # files to compress, by commas
    out_dir: str = "out-compress"  # run whose ckpt.pt is the model

    def __post_init__(self):
        super().__post_init__()
        require(self.files, "type --files=FILE,FILE")


def compress(cfg):
    model, sha = compressor.load_model(cfg.out_dir)
    found = {Path(path).name: compressed(model, Path(path)) for path in cfg.files.split(",")}
    size = sum(p.numel() for p in model.parameters())
    return {"files": found, "model": {"sha256": sha, "parameters": size}}


def compressed(model, path):
    content = path.read_bytes()
    zstd = tokenizers.need("zstandard", "comparisons with zstd").ZstdCompressor(level=19)
    sizes = {"gzip -9": len(gzip.compress(content, 9)), "zstd -19": len(zstd.compress(content)),
             "xz -9e": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))}
    clock = time.perf_counter()
    payload = compressor.compress(model, content)
    middle = time.perf_counter()
    require(compressor.decompress(model, payload, len(content)) == content, f"{path} was not restored")
    sizes["compress.py"] = len(payload) + 400                   # and the archive's header and hash
    bits = {name: 8 * size / len(content) for name, size in sizes.items()}
    print(path.name, {name: round(value, 3) for name, value in bits.items()}, flush=True)
    return {"bytes": len(content), "sizes": sizes, "bits_per_byte": bits, "restored": True,
            "seconds": {"compress": middle - clock, "decompress": time.perf_counter() - middle}}
