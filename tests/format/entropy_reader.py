"""A second reader of entropy-coded codes: a plain loop, written from the text of `format/entropy.py` alone.

Nothing of the package is used, and no arithmetic but Python's whole numbers.
"""

from math import isqrt

SLOTS = 4096


def number(data: list[int], place: int, size: int, signed: bool = False) -> int:
    return int.from_bytes(bytes(data[place : place + size]), "little", signed=signed)


def bit_string(data: list[int]) -> int:
    """All bits as one number, the first bit lowest."""
    return int.from_bytes(bytes(data), "little")


def weight(entry: int) -> int:
    """floor(16 * 2^((entry - 1) / 8)), the eighth root of 2^(31 + entry)."""
    return isqrt(isqrt(isqrt(2 ** (31 + entry)))) if entry else 0


def table_of(largest: int, has_escape: bool, entries: list[int]) -> list[tuple[object, int]]:
    """Symbols and their slots, in the order of the slots."""
    symbols: list[object] = [*range(-largest, largest + 1)]
    weights = [weight(entries[abs(h)]) if entries else 0 for h in range(-largest, largest + 1)]
    if has_escape:
        symbols.append("escape")
        weights.append(weight(entries[largest + 1]))
    n, total = len(symbols), sum(weights)
    slots = [1 + (w * (SLOTS - n) // total if total else 0) for w in weights]
    left = SLOTS - sum(slots)
    for magnitude in range(1, largest + 1):
        if left < 2:
            break
        slots[largest - magnitude] += 1
        slots[largest + magnitude] += 1
        left -= 2
    slots[largest] += left
    assert min(slots) > 0
    assert sum(slots) == SLOTS
    return list(zip(symbols, slots, strict=True))


def read_tables(data: list[int]) -> tuple[dict[str, int], list[tuple[int, list]]]:
    header = {
        "lanes": number(data, 0, 4), "lowest": data[4], "highest": data[5], "breadth": data[6],
        "base": number(data, 7, 2, signed=True), "row_bits": data[9], "column_bits": data[10], "escape_bits": data[11],
    }  # fmt: skip
    tables, place = [], 12
    for _ in range((header["highest"] - header["lowest"]) // header["breadth"] + 1):
        largest, has_escape = data[place] % 128, data[place] >= 128
        count = largest + 1 + has_escape if data[place] else 0
        tables.append((largest, table_of(largest, has_escape, data[place + 1 : place + 1 + count])))
        place += 1 + count
    assert place == len(data)
    return header, tables


def read_symbols(words: list[int], lanes: int, tables: list[list], steps: int) -> tuple[list[object], int]:
    """Decode one stream, from its first word on; returns its symbols and the words that it takes."""
    states = [words[2 * lane] + words[2 * lane + 1] * 2**16 for lane in range(lanes)]
    place, symbols = 2 * lanes, []
    for step in range(steps):
        active = range(min(lanes, len(tables) - step * lanes))
        for lane in active:
            slot, first = states[lane] % SLOTS, 0
            for symbol, slots in tables[step * lanes + lane]:
                if slot < first + slots:
                    symbols.append(symbol)
                    break
                first += slots
            states[lane] = slots * (states[lane] >> 12) + slot - first
        for lane in active:
            if states[lane] < 2**16:
                states[lane] = states[lane] * 2**16 + words[place]
                place += 1
    assert states == [2**16] * lanes
    return symbols, place


def read_codes(tensors: dict[str, list[int]], shape: tuple[int, int]) -> list[list[int]]:
    """Decode lists of the tensors' numbers into rows of codes."""
    rows, columns = shape
    if not rows * columns:
        assert not tensors
        return [[] for _ in range(rows)]
    header, tables = read_tables(tensors["tables"])
    levels = {}
    for name, bits, count in (("rows", header["row_bits"], rows), ("columns", header["column_bits"], columns)):
        string = bit_string(tensors.get(name, []))
        levels[name] = [(string >> (bits * i)) % 2**bits for i in range(count)]
    chosen = []
    for row in levels["rows"]:
        for column in levels["columns"]:
            level = min(max(header["base"] + row + column, header["lowest"]), header["highest"])
            chosen.append((level - header["lowest"]) // header["breadth"])
    streams = 1 if header["lanes"] <= 64 else header["lanes"] // 64
    lanes, steps = header["lanes"] // streams, -(-rows * columns // header["lanes"])
    starts = [0, *tensors.get("offsets", []), len(tensors["stream"])]
    assert len(starts) == streams + 1
    symbols: list[object] = []
    for stream in range(streams):
        part = chosen[stream * steps * lanes : (stream + 1) * steps * lanes]
        found, used = read_symbols(tensors["stream"][starts[stream] :], lanes, [tables[t][1] for t in part], steps)
        symbols += found
        assert used + starts[stream] == starts[stream + 1] or stream == streams - 1
        assert not any(tensors["stream"][starts[stream] + used : starts[stream + 1]])
    extra, codes = bit_string(tensors.get("extra", [])), []
    for symbol, t in zip(symbols, chosen, strict=True):
        s = max((header["lowest"] + t * header["breadth"]) // 4 - 11, 0)
        low, extra = extra % 2**s, extra >> s
        if symbol == "escape":
            over, extra = extra % 2 ** header["escape_bits"], extra >> header["escape_bits"]
            symbol = (tables[t][0] + 1 + over // 2) * (-1 if over % 2 else 1)
        codes.append(symbol * 2**s + low - (2**s >> 1))
    assert extra == 0
    return [codes[row * columns : (row + 1) * columns] for row in range(rows)]
