"""Files of rows, as programs write them, and what is read of them."""

import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq

from phi3_plugin.data.sources import Filtered, SourceOptions, read_sources

A, B = {"question": "007", "answer": "x, y\r\n\u2028z"}, {"question": "é", "answer": ""}
C = {"question": "c\x85", "answer": "d"}


def write(file, rows):
    """Write rows as the file's suffix says."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    if file.suffix == ".arrow":
        return write_arrow(file, rows)
    out = io.StringIO(newline="")
    if ".csv" in file.name or ".tsv" in file.name:
        writer = csv.DictWriter(out, rows[0], delimiter="\t" if ".tsv" in file.name else ",")
        writer.writeheader()
        writer.writerows(rows)
    elif ".json" in file.name and ".jsonl" not in file.name:
        out.write(json.dumps(rows))
    else:
        out.write("\n".join(map(json.dumps, rows)))
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}.get(file.suffix, bytes)
    file.write_bytes(pack(out.getvalue().encode()))
    return file


def zstd(content):
    """Compress bytes."""
    return pa.Codec("zstd").compress(content, asbytes=True)


def write_arrow(file, rows, form=pa.ipc.new_stream):
    """The stream form is what `datasets` writes."""
    table = pa.Table.from_pylist(rows)
    with form(file, table.schema) as out:
        out.write_table(table, max_chunksize=100)
    return file


def read(source, **options):
    sources = read_sources(source, SourceOptions(**options))
    found = [row for one in sources for row in one.rows()]
    return [row for row in found if not isinstance(row.value, Filtered)]


def values(source, **options):
    return [row.value for row in read(source, **options)]


def places(rows):
    return [row.where.rsplit(":")[-1] for row in rows]
