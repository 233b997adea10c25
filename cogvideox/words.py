"""Names and numbers in sentences: what comes from files or people is printable and short wherever it is quoted."""

#: Letters of a name that comes from a file or a person.
LIMIT = 80


def short(value: object, limit: int = LIMIT) -> str:
    """Quote a value in a sentence: one line, printable, at most ``limit`` letters, cut in the middle.

    >>> short("a\\nb")
    'a\\\\nb'
    """
    try:
        text = str(value)
    except Exception as error:
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    if len(text) > 4 * limit:
        # Only the ends are looked at: what is quoted may be megabytes.
        text = f"{text[: 2 * limit]}{text[-2 * limit :]}"
        text = "".join(map(_printable, text))
        return f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"
    text = "".join(map(_printable, text))
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"


def listed(names, most: int = 3) -> str:
    """The first names of a list, quoted one by one: ``a, b, c, …``."""
    names = list(names)
    return ", ".join(map(short, names[:most])) + (", …" if len(names) > most else "")


def reason(error: BaseException, limit: int = 160) -> str:
    """What a library said, for the brackets of a sentence: one line, printable, cut; its type where it said nothing. Of the system's errors no number
    and no file, which the sentence names."""
    said = error.strerror if isinstance(error, OSError) and isinstance(error.strerror, str) else str(error)
    return short(" ".join(said.split()), limit) or type(error).__name__


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def size_text(count: int) -> str:
    """``11.14 GB``, or ``3.40 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
