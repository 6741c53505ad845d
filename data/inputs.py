"""Input files: which files of a folder are read, why the others are not, and the rows in them.

Rows come from parquet, JSON lines, JSON, CSV and TSV, each a dict of columns; a text file is one row,
{"text": all of it}. gz and zst are unpacked by their suffix. A row that cannot be used is a BadRow in its
place, so that one broken line costs one document and has a name.
"""
import codecs
import csv
import gzip
import io
import itertools
import json
import os
import shlex
from pathlib import Path

from configurator import ConfigError, require
from data.tokenizer import need

WHOLE_TEXT = 256 << 20          # bytes of the largest file that is read at once: a text, a list in JSON
PARQUET_ROWS = 1000             # rows of a parquet file that are in memory at a time
KINDS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
         ".tsv": "csv", ".txt": "text", ".text": "text", ".md": "text"}
PACKED = (".gz", ".zst")


class BadRow(Exception):
    """A row that cannot be used: kind, what is counted, and a sentence about this one."""

    def __init__(self, kind, sentence):
        super().__init__(sentence)
        self.kind = kind


# ------------------------------------------------------------------------------------------------------------
# which files

def suffixes(path):
    """(suffix, packing) of a file's name in small letters: ('.jsonl', '.gz') of A.JSONL.gz."""
    path = Path(path)
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (Path(path.stem) if packing else path).suffix.lower(), packing


def kind_of(path):
    """'parquet', 'json', 'csv', 'text', or None for a kind that is not read."""
    return KINDS.get(suffixes(path)[0])


def files_of(path):
    """(files in the order of their names, {file: why it is left out}) of a path: itself, or all below it."""
    path = Path(os.path.expanduser(path))
    require(path.exists(), f"input {path} does not exist: type --input=FILE or --input=FOLDER")
    found, left_out = below(path) if path.is_dir() else ([path], {})
    files = []
    for file in found:
        reason = unfit(file)
        files += [file] * (not reason)
        left_out |= {str(file): reason} if reason else {}
    descriptions = [file for file in files if suffixes(file)[0] == ".md"]
    if any(kind_of(file) != "text" for file in files):          # the README of a data set is none of its rows
        left_out |= {str(file): "a description beside data" for file in descriptions}
        files = [file for file in files if file not in descriptions]
    reasons = "; ".join(f"{file}: {reason}" for file, reason in list(left_out.items())[:3])
    require(files or path.is_dir() or path.stat().st_size, f"{path} is empty: expected documents")
    require(files, f"input {path} holds none of {', '.join(KINDS)}{reasons and f' ({reasons})'}: convert it "
                   "to one of these")
    return files, left_out


def below(folder):
    """(plain files below a folder, links followed, {file or folder: why it is left out})."""
    def refuse(error):
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}): mend that or take it out")
    found, left_out, seen = [], {}, {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        entered = []
        for name in sorted(folders):
            path = Path(place, name)
            reason = "hidden" if name.startswith(".") else linked_again(path, folder, seen)
            left_out |= {f"{path}{os.sep}": reason} if reason else {}
            entered += [name] * (not reason)
        folders[:] = entered
        for path in (Path(place, name) for name in names):
            reason = ("hidden" if path.name.startswith(".") else "a link to nothing" if not path.exists()
                      else "" if path.is_file() else "no plain file")
            left_out |= {str(path): reason} if reason else {}
            found += [path] * (not reason)
    return without_copies(sorted(found), folder, left_out), left_out


def linked_again(path, folder, seen):
    """Why a folder is not entered: a link to one that is read anyway, or to one that holds this one."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    inside = os.path.islink(path) and (real + os.sep).startswith(root + os.sep)
    around = (root + os.sep).startswith(real + os.sep)
    if inside or around or real in seen:
        return f"a link to {real}, which is read by itself"
    seen.add(real)
    return ""


def without_copies(files, folder, left_out):
    """The files, each real file once: under its own name, else under the first of the links to it."""
    names = {}
    for file in files:
        names.setdefault(os.path.realpath(file), []).append(file)
    chosen = {}
    for real, links in names.items():
        own = [file for file in links if not file.is_symlink()]
        chosen[real] = (own or links)[0]
        left_out |= {str(file): f"the same file as {chosen[real]}" for file in links if file != chosen[real]}
    return sorted(chosen.values())


def unfit(file):
    """Why a file is not read, or ''."""
    suffix, packing = suffixes(file)
    if kind_of(file) is None:
        return f"kind '{suffix or file.name}' is not read"
    if kind_of(file) == "parquet" and packing:
        return f"parquet packed as {packing}: unpack it"
    return "" if file.stat().st_size else "empty"


# ------------------------------------------------------------------------------------------------------------
# rows

class LocalRows:
    """The rows of files one after the other: dicts, and a BadRow for each that cannot be read.

    columns: those that are needed (None: all). state_dict() is the position. file, place: where the last row
    came from.
    """

    def __init__(self, files, columns=None, left_out=()):
        self.columns, self.left_out, self.files = columns, dict(left_out), []
        for file in files:
            reason = check(file, columns)
            self.left_out |= {str(file): reason} if reason else {}
            self.files += [file] * (not reason)
        require(self.files, f"{files[0]} and all others are without rows: expected documents")
        self.start = self.at = (0, 0)           # files that are done, rows of the next one that are done
        self.file = self.place = ""

    def __iter__(self):
        first, done = self.start
        for number, file in enumerate(self.files[first:], first):
            text = kind_of(file) == "text"      # a file is a row, and the folder is what has many
            self.file, self.place, count = "the text files" if text else str(file), str(file), done
            try:
                for where, row in READERS[kind_of(file)](file, self.columns, done):
                    count += 1
                    self.at, self.place = (number, count), str(file) if text else f"{file}, {where}"
                    yield row
            except ConfigError:
                raise
            except Exception as error:          # each format has errors of its own
                raise ConfigError(f"{file} cannot be read behind row {count:,} ({first_line(error)}): "
                                  "replace it or take it out") from error
            done = 0
            self.at = (number + 1, 0)

    def state_dict(self):
        return {"file": self.at[0], "row": self.at[1]}

    def load_state_dict(self, state):
        self.start = self.at = (state["file"], state["row"])


def check(file, columns):
    """Refuse a file that cannot be read or lacks a column -> why it has no rows, or ''. Reads little."""
    kind = kind_of(file)
    try:
        if kind == "parquet":
            with need("pyarrow.parquet", "parquet files").ParquetFile(file) as opened_file:
                has_columns(file, opened_file.schema_arrow.names, columns)
                return "" if opened_file.metadata.num_rows else "a table without rows"
        if kind == "csv":
            with table(file) as stream:
                has_columns(file, next(reader(file, stream), []), columns)
        if kind == "text":
            require(file.stat().st_size <= WHOLE_TEXT, too_long(file))
        with opened(file) as stream:
            return "" if stream.read(1) else "empty"
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{file} cannot be read ({first_line(error)}): replace it or take it "
                          "out") from error


def has_columns(file, found, wanted):
    missing = [name for name in wanted or () if name not in found]
    require(not missing, no_column(f"{file} has", missing and missing[0], found))


# the scripts of data sets have no such key, data/prepare.py reads the files of any
OTHER_COLUMN = "type python data/prepare.py --input=... --name=... --column=ANOTHER"


def no_column(subject, name, found):
    return f"{subject} no column '{name}' but {', '.join(map(str, found))[:200]}: {OTHER_COLUMN}"


def too_long(file):
    return (f"{file} is too long to be one document among many: prepare it by itself, "
            "python data/prepare.py --input=FILE")


def parquet_rows(file, columns, done):
    with need("pyarrow.parquet", "parquet files").ParquetFile(file) as opened_file:
        groups, first, count = [], 0, 0                         # whole groups of rows are skipped unread
        for group in range(opened_file.num_row_groups):
            size = opened_file.metadata.row_group(group).num_rows
            if count + size > done:
                groups.append(group)
            else:
                first = count + size
            count += size
        number = first
        for batch in opened_file.iter_batches(PARQUET_ROWS, groups, columns):
            for row in batch_rows(batch):
                number += 1
                if number > done:
                    yield f"row {number:,}", row


def batch_rows(batch):
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:                                  # in one of them: find out in which
        return [row_of(batch.slice(i, 1)) for i in range(len(batch))]


def row_of(batch):
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("broken", f"is not valid UTF-8 ({error.reason})")


def json_rows(file, columns, done):
    listed = json_list(file) if suffixes(file)[0] == ".json" else None
    if listed is None:
        rows = ((f"line {n:,}", line) for n, line in enumerate(lines(file), 1) if line.strip())
        rows = ((where, json_value(line)) for where, line in itertools.islice(rows, done, None))
    else:
        rows = itertools.islice(((f"row {n:,}", row) for n, row in enumerate(listed, 1)), done, None)
    for where, row in rows:
        fits = isinstance(row, dict | BadRow)
        yield where, row if fits else BadRow("broken", f"holds {str(row)[:40]!r}, expected named columns")


def lines(file):
    with opened(file) as stream:
        first = stream.readline()
        yield first.removeprefix(b"\xef\xbb\xbf")
        yield from stream


def json_value(line):
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return BadRow("broken", f"is no JSON ({first_line(error)})")


def json_list(file):
    """The rows of a .json file that is one list or one object, or None for JSON lines."""
    with opened(file) as stream:
        content = stream.read(WHOLE_TEXT + 1).removeprefix(b"\xef\xbb\xbf")
    fits = len(content) <= WHOLE_TEXT
    require(fits or not content.lstrip().startswith(b"["), f"{file} is one list of more than "
            f"{WHOLE_TEXT >> 20} MiB: convert it to JSON lines, a row each (jq -c '.[]' FILE)")
    try:
        value = json.loads(content.decode()) if fits else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None if value is None else [value]


def csv_rows(file, columns, done):
    with table(file) as stream:
        rows = reader(file, stream)
        names = next(rows)
        for number, values in itertools.islice(enumerate(values_of(rows, file), 1), done, None):
            if isinstance(values, list):
                fits = len(values) == len(names)
                values = dict(zip(names, values)) if fits else BadRow(
                    "broken", f"has {len(values)} values, the first line names {len(names)} columns")
            yield f"row {number:,}", values


def values_of(rows, file):
    """The rows of a table, each a list of values or a BadRow; empty lines are none."""
    while True:
        try:
            values = next(rows, None)
        except csv.Error as error:
            require("unexpected end" not in str(error), f"{file} ends inside a quoted value, so that nothing "
                    "says where its rows end: close the quote")
            values = BadRow("broken", f"is no row of a table ({error})")
        if values is None:
            return
        if values:
            yield values


def table(file):
    """A .csv or .tsv as text; a byte that is no UTF-8 becomes half a surrogate, which costs its row alone."""
    return io.TextIOWrapper(opened(file), encoding="utf-8-sig", errors="surrogateescape", newline="")


def reader(file, stream):
    """The rows of a table as lists; strict, so that a broken quote is noticed."""
    csv.field_size_limit(WHOLE_TEXT)
    return csv.reader(stream, "excel-tab" if suffixes(file)[0] == ".tsv" else "excel", strict=True)


def text_rows(file, columns, done):
    if done:
        return
    try:
        with io.TextIOWrapper(opened(file), encoding="utf-8-sig") as stream:
            text = stream.read(WHOLE_TEXT + 1)
    except UnicodeDecodeError as error:
        text, row = "", BadRow("no UTF-8", not_utf8(file, error))
    else:
        row = {"text": text}
    require(len(text) <= WHOLE_TEXT, too_long(file))
    yield "the whole", row


def not_utf8(path, error):
    """What a sentence says of a file that a UnicodeDecodeError has ended, and what to type."""
    byte = error.object[error.start]
    return f"holds byte 0x{byte:02x} where none may be; {converted(path, likely_encoding(path))}"


def converted(path, encoding):
    """The end of a sentence: how a file in another encoding, which may be known, becomes UTF-8."""
    new = Path(path).with_suffix(f".utf8{Path(path).suffix}")
    old, new = map(shlex.quote, map(str, (path, new))) if not suffixes(path)[1] else ("FILE", "NEW")
    what = f"it looks like {encoding}" if encoding else "if it is a text of another encoding, say which"
    return f"{what}: type iconv -f {encoding or 'ENCODING'} -t UTF-8 {old} > {new}, and take the new file"


MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
LOOKED_AT = 2**16                                # bytes that tell an encoding


def likely_encoding(path):
    """The encoding of a text that is not UTF-8: by its byte order mark, by the zeros of UTF-16, or by Hangul
    where it is read as CP949, which Korean Windows writes; "" where nothing tells."""
    with opened(path) as file:
        some = file.read(LOOKED_AT)
    for encoding, marks in MARKS.items():
        if some.startswith(marks):
            return encoding
    zeros = [some[start::2].count(0) / max(1, len(some[start::2])) for start in (0, 1)]
    for encoding, most, least in (("UTF-16BE", *zeros), ("UTF-16LE", *reversed(zeros))):
        if most > 0.1 and most > 4 * least:      # a low byte may be zero too, as in U+AC00
            return encoding
    try:
        beyond = [c for c in codecs.getincrementaldecoder("cp949")().decode(some) if c > "\x7f"]
    except UnicodeDecodeError:
        return ""
    hangul = sum("\uac00" <= c <= "\ud7a3" for c in beyond)
    return "CP949" if hangul > 0.8 * len(beyond) else ""


READERS = {"parquet": parquet_rows, "json": json_rows, "csv": csv_rows, "text": text_rows}


def opened(path):
    """The bytes of a file, unpacked where its suffix says so."""
    packing = suffixes(path)[1]
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing == ".zst":
        return io.BufferedReader(need("pyarrow", "zst files").input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
