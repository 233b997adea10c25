"""Quote names, errors and sizes in sentences: whatever comes from a file or a person is printable and short."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

#: Letters of a name that comes from a file or a person.
LIMIT = 80
#: Units of bytes, and the number of bytes from which each is used.
_UNITS = (
    ("EB", 10**18, 10**18),
    ("PB", 10**15, 10**15),
    ("TB", 10**12, 10**12),
    ("GB", 10**9, 10**8),
    ("MB", 10**6, 0),
)
#: From here on a size is damage or a joke, and its digits would fill the sentence.
_BEYOND = 10**24
#: What a caller calls settings otherwise than the engine, which names them as its nodes do.
_called: Mapping[str, str] = {}


@contextmanager
def settings_called(names: Mapping[str, str]) -> Iterator[None]:
    """Have sentences name settings as in ``names`` for the length of a ``with`` block: a command line's are options."""
    global _called
    before, _called = _called, names
    try:
        yield
    finally:
        _called = before


def setting(name: str) -> str:
    """Name a setting in a sentence as who set it knows it.

    >>> with settings_called({"denoise": "--strength"}):
    ...     setting("denoise"), setting("steps")
    ('--strength', 'steps')
    """
    return _called.get(name, name)


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
        return _cut("".join(map(_printable, text)), limit)
    text = "".join(map(_printable, text))
    return text if len(text) <= limit else _cut(text, limit)


def listed(names: Iterable[object], most: int = 3) -> str:
    """Quote the first names of a list one by one: ``a, b, c, …``."""
    names = list(names)
    return ", ".join(map(short, names[:most])) + (", …" if len(names) > most else "")


def reason(error: BaseException, limit: int = 160) -> str:
    """Quote what a library said, for the brackets of a sentence: one line, printable, cut; the error's type where it
    said nothing. An error of the system gives neither its number nor its file, which the sentence names."""
    said = error.strerror if isinstance(error, OSError) and isinstance(error.strerror, str) else str(error)
    return short(" ".join(said.split()), limit) or type(error).__name__


def size_text(nbytes: int, digits: int = 2) -> str:
    """Write a number of bytes with its unit: ``11.14 GB``, or ``3.40 MB``."""
    if nbytes >= _BEYOND:
        return f"more than {10**6:,} EB"
    unit, size = next((unit, size) for unit, size, least in _UNITS if nbytes >= least)
    return f"{nbytes / size:,.{digits}f} {unit}"


def _cut(text: str, limit: int) -> str:
    return f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
