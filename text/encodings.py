"""Encodings: which one a text probably has, and what to say where it has another than was thought.

Of each function `file` is what the file is called in messages.
"""

import codecs

from base.configuration import UserError

# encodings that text in the wild has beside UTF-8: Chinese, Japanese, Korean, Cyrillic, Western European, Windows'
ENCODINGS = ["gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252"]
BYTE_ORDER_MARKS = {  # that of UTF-32 begins like that of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
NOT_IN_TEXT = bytes(set(range(32)) - set(b"\t\n\f\r"))  # control characters
NOT_ENCODINGS = {"undefined", "punycode", "idna", "unicode_escape", "raw_unicode_escape", "utf-7"}  # of text files


def wrong_encoding(file: str, encoding: str, error: UnicodeDecodeError, offset: int) -> UserError:
    """What to say of text that cannot be decoded, with the encoding that it probably has."""
    data, at = error.object, error.start
    problem = f"{file}: not {encoding.upper()} text: byte 0x{data[at]:02x} at {offset + at}"
    likely = likely_encodings(data[max(0, at - 2000) :][:20000])
    if encoding != "utf-8":
        command = f"iconv -f {likely[0]} -t utf-8" if likely else "iconv"
        return UserError(f"{problem}; if it has another encoding than the other files, convert it first ({command})")
    for name, marks in BYTE_ORDER_MARKS.items():
        if data.startswith(marks):
            return UserError(f"{problem}; it is {name.upper()}: --encoding {name}")
    if b"\0" in data or data.startswith(b"%PDF"):
        return not_text(file, data)
    decoded = data.decode("utf-8", "replace")
    n_bad = decoded.count("\ufffd")
    if sum(not character.isascii() for character in decoded) > 10 * n_bad:  # some damage rather than another encoding
        return UserError(f"{problem}; it is damaged there")
    if len(likely) > 1:
        start = data.rfind(b"\n", 0, at) + 1
        line, before = data[start:][:200].split(b"\n")[0], data[start:at]
        places = [max(0, len(before.decode(name, "replace")) - 8) for name in likely]
        read = [line.decode(name, "replace")[i : i + 20].strip() for name, i in zip(likely, places, strict=True)]
        shown = ", ".join(f"{name} ({text})" for name, text in zip(likely, read, strict=True))
        return UserError(f"{problem}; --encoding NAME, with the name of what reads right: {shown}")
    return UserError(f"{problem}; it looks like {likely[0]}: --encoding {likely[0]}" if likely else problem)


def without_byte_order(file: str, encoding: str, data: bytes) -> UserError:
    """What to say of a text in UTF-16 or UTF-32 that does not begin with its byte order mark."""
    name = codecs.lookup(encoding).name
    problem = f"{file}: not {name.upper()} text, which begins with a byte order mark"
    if b"\0" not in data and is_text(data, "utf-8"):
        return UserError(f"{problem}; it is UTF-8: leave out --encoding")
    if name == "utf-16" and b"\0" in data:
        return not_text(file, data)  # which says what it looks like
    return UserError(f"{problem}; --encoding {name}-le and {name}-be take one without")


def is_text(data: bytes, encoding: str) -> bool:
    """Whether bytes are text in an encoding, the last character possibly cut."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def not_text(file: str, data: bytes) -> UserError:
    """What to say of a file that is no text, or in which every other byte is zero."""
    if data.startswith(b"%PDF"):
        return UserError(f"{file}: a PDF, not text; convert it first, for example with pdftotext")
    for encoding, zeros, letters in (("utf-16-le", data[1::2], data[0::2]), ("utf-16-be", data[0::2], data[1::2])):
        n_controls = len(letters) - len(letters.translate(None, NOT_IN_TEXT))
        if zeros.count(0) > len(data) / 8 and n_controls < len(data) / 100:
            return UserError(f"{file}: not UTF-8 text; it looks like {encoding}: --encoding {encoding}")
    return UserError(f"{file}: a binary file, not text: it contains NUL bytes")


def likely_encodings(data: bytes) -> list[str]:
    """The encoding that a text probably has, by the `charset-normalizer` library; empty if it knows none.

    Several, of which a person can tell the right one at sight, where most of the text is ASCII: by a few characters of
    another script the library cannot.
    """
    import charset_normalizer

    found = charset_normalizer.from_bytes(data, cp_isolation=ENCODINGS)
    names = [match.encoding.replace("_", "-") for match in found]
    if not names or len(data.translate(None, bytes(range(0x80)))) > len(data) / 2:
        return names[:1]
    return list(dict.fromkeys(names[:3] + ["gb18030"] * is_text(data, "gb18030")))


def check_encoding(name: str) -> None:
    """Raises UserError unless Python knows a text encoding by this name."""
    try:
        "a".encode(name)
        if codecs.lookup(name).name in NOT_ENCODINGS:
            raise LookupError(name)
    except (LookupError, UnicodeError):
        raise UserError(
            f"--encoding {name}: no such encoding; utf-8, gbk, gb18030, big5, latin-1, utf-16, cp1251, ..."
        ) from None
