"""Mutators: damage and malice for bytes, JSON and text. Every mutation follows from its random generator alone."""

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 7, 127, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1),
    *(2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300, float("inf")),
    *(float("-inf"), float("nan"), 1.0, 3.999),
]
TEXTS = [
    *(
        "",
        " ",
        "a",
        "x" * 3000,
        "\ud800",
        "\x00",
        "\x1b[31m",
        "\u202eabc",
        "../../etc/passwd",
        "/dev/stdin",
        "re:(a+)+$",
    ),
    *("re:", "NaN", "null", "true", "1e999", "[UNK]", "<s>", "a/b", "..", ".", "{{ 1 }}", "%s%s%s", "猫", "a\nb", "-1"),
    *("model.safetensors", "Linear", "auto", "\ufeff", "(", "[", "*", "\\", "0x10", "0b_", "2024-99-99", "é" * 300),
]
SIGNS = re.compile(r"[A-Za-z_]+|\d+|\s+|.", re.DOTALL)
WORDS = [
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!binary ",
        "!!timestamp ",
        "? ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "|\n",
        ">\n",
    ),
    *(
        "{%",
        "%}",
        "{{",
        "}}",
        "{% for i in range(9) %}",
        "{% endfor %}",
        "{% set ns = namespace(a=[]) %}",
        "| ",
        "~",
        "**",
    ),
    *(
        "{% set ns.a = [ns.a, ns.a] %}",
        "{{ ns.a }}",
        "|length",
        "|join",
        "|tojson",
        "|center(99999999)",
        "'x' * 99999",
        "loop",
    ),
    *(
        "\t",
        "\r\n",
        ",",
        ";",
        "\\u0000",
        "\\ud800",
        "null",
        "NaN",
        "Infinity",
        "-",
        "0",
        "1e999",
        "#",
        "%",
        "---\n",
        "...\n",
    ),
]


def deep(random_: random.Random) -> Any:
    """Return a value nested deeply."""
    value: Any = 1
    for _ in range(random_.choice([5, 90, 150, 700])):
        value = [value] if random_.random() < 0.5 else {"a": value}
    return value


def value(random_: random.Random) -> Any:
    """Return a value that no reader expects."""
    kind = random_.randrange(8)
    if kind < 3:
        return random_.choice(NUMBERS)
    if kind < 5:
        return random_.choice(TEXTS)
    return random_.choice([None, True, False, [], {}, [[]], [1, "a", None], {"a": 1}, [0] * 2000, deep(random_)])


# --- bytes --------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, random_: random.Random) -> bytes:
    """Return bytes with one kind of damage."""
    if not data:
        return bytes(random_.randrange(256) for _ in range(random_.randrange(64)))
    out = bytearray(data)
    # Headers come first, and say how to read the rest.
    at = random_.randrange(len(out) if random_.random() < 0.5 else min(len(out), 256))
    kind = random_.randrange(8)
    if kind == 0:
        out[at] ^= 1 << random_.randrange(8)
    elif kind == 1:
        out[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)])
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        del out[at : at + random_.choice([1, 2, 4, 8, 64, 1000])]
    elif kind == 4:
        out[at:at] = bytes(
            random_.choice([0, 0xFF, 0x41, random_.randrange(256)]) for _ in range(random_.choice([1, 4, 8, 100]))
        )
    elif kind == 5:
        number = random_.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
        raw = struct.pack("<Q", number)[: random_.choice([2, 4, 8])]
        out[at : at + len(raw)] = raw
    elif kind == 6:
        end = at + random_.choice([1, 8, 64, 512])
        place = random_.randrange(len(out))
        out[place:place] = out[at:end]
    else:
        size = random_.choice([4, 16, 64])
        out[at : at + size] = bytes(random_.randrange(256) for _ in range(size))
    return bytes(out)


# --- JSON ---------------------------------------------------------------------------------------------------------------


def places(obj: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in a JSON value."""
    found = [] if found is None else found
    items = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else ()
    for key, part in list(items)[:400]:  # a vocabulary must not drown the rest
        found.append((obj, key))
        places(part, found)
    return found


def changed(obj: Any, random_: random.Random) -> Any:
    """Change one place of a JSON value, in place where it can."""
    spots = places(obj)
    if not spots or random_.random() < 0.02:
        return value(random_)
    # Half of all changes near the top, where settings are, not among a thousand tokens.
    holder, key = random_.choice(spots[:60] if random_.random() < 0.5 else spots)
    kind = random_.randrange(10)
    if kind < 4:
        holder[key] = value(random_)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        other, name = random_.choice(spots)
        try:
            holder[key] = json.loads(json.dumps(other[name]))
        except (LookupError, ValueError, RecursionError):
            holder[key] = None
    elif kind == 6:
        holder[key] = [holder[key]]
    elif kind == 7 and isinstance(holder, dict):
        holder[random_.choice([*TEXTS, str(random_.choice(spots)[1])])] = holder.pop(key)
    elif kind == 8 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = random_.choice(
            [
                holder[key] + 1,
                holder[key] - 1,
                -holder[key],
                holder[key] * 2,
                holder[key] / 3.0 if abs(holder[key]) < 1e300 else 0,
            ]
        )
    elif isinstance(holder, list):
        holder[key:key] = [holder[key]] * random_.choice(
            [1, 3, 500 if not isinstance(holder[key], (dict, list)) else 2]
        )
    else:
        holder[random_.choice(TEXTS)] = value(random_)
    return obj


def json_text(text: str | bytes, random_: random.Random) -> bytes:
    """Return a JSON text with one change of its structure, or of its characters if it has none."""
    try:
        obj = json.loads(text)
    except (ValueError, RecursionError):
        return damaged(text.encode(errors="surrogatepass") if isinstance(text, str) else text, random_)
    try:
        return json.dumps(changed(obj, random_)).encode()
    except (ValueError, RecursionError, TypeError):
        return b"[" * 100_000


def nested_json(text: str | bytes, keys: tuple[str, ...], random_: random.Random) -> bytes:
    """Change the JSON text that lies in a JSON object under one of these keys."""
    try:
        obj = json.loads(text)
        holder = obj["__metadata__"]
        key = random_.choice([key for key in keys if key in holder])
        holder[key] = json_text(holder[key], random_).decode()
        return json.dumps(obj).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return json_text(text, random_)


def lines_of_json(data: bytes, random_: random.Random) -> bytes:
    """Change one line of JSON lines."""
    lines = data.split(b"\n")
    at = random_.randrange(len(lines))
    lines[at] = json_text(lines[at], random_)
    if random_.random() < 0.2:
        lines.insert(at, random_.choice(lines))
    return b"\n".join(lines)


# --- text ---------------------------------------------------------------------------------------------------------------


def text(data: bytes, random_: random.Random) -> bytes:
    """Move, repeat, replace or insert words of a text."""
    words = SIGNS.findall(data.decode(errors="surrogateescape")) or [""]
    at = random_.randrange(len(words))
    kind = random_.randrange(7)
    if kind == 0:
        words[at] = random_.choice(WORDS)
    elif kind == 1:
        words.insert(at, random_.choice(WORDS) * random_.choice([1, 1, 1, 3, 300]))
    elif kind == 2:
        del words[at : at + random_.choice([1, 2, 10])]
    elif kind == 3:
        words[at] = random_.choice([*map(str, NUMBERS), *TEXTS])
    elif kind == 4:
        other = random_.randrange(len(words))
        words[at], words[other] = words[other], words[at]
    elif kind == 5:
        words[at:at] = words[at : at + random_.choice([1, 5, 40])]
    else:
        words[at] = words[at] * random_.choice([2, 50, 2000])
    return "".join(words).encode(errors="replace")


def safetensors(data: bytes, random_: random.Random, keys: tuple[str, ...] = ()) -> bytes:
    """Change the JSON header of a safetensors file, or its bytes."""
    if len(data) < 8 or random_.random() < 0.2:
        return damaged(data, random_)
    (size,) = struct.unpack("<Q", data[:8])
    if size > len(data):
        return damaged(data, random_)
    header, rest = data[8 : 8 + size], data[8 + size :]
    header = nested_json(header, keys, random_) if keys and random_.random() < 0.7 else json_text(header, random_)
    return struct.pack("<Q", len(header)) + header + rest


Mutator = Callable[[bytes, random.Random], bytes]
