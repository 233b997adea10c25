"""Say finished English sentences in another language.

The engine speaks English only, and the code is the one source of its sentences. A catalogue (gettext's .po, one a
language in ``locales/<language>/sentences.po``) has them as templates, ``There is no {what} at {path}.``, with a
translation each; ``python -m tests.sentences`` keeps it in step with the code. Here the templates that a finished text
was made from are found again, and what stood in their places is translated in turn where it is made of known sentences
itself. Whatever is not known stays English.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

#: The language that the code is written in.
ENGLISH = "en"
_LOCALES = Path(__file__).parent.parent / "locales"
_CATALOGUE = "sentences.po"
#: Sentences that one template has at most, and places for names within each other.
_MOST_SENTENCES, _DEEPEST = 8, 12
#: Comparisons of a line with a template at most, and of a whole text, so that none takes long; an ordinary line needs
#: a hundred.
_MOST_WORK, _MOST_IN_ALL = 4_000, 60_000
#: Ways to read a line as one template at most: where a place ends is not always plain.
_MOST_WAYS = 8
#: Letters of a line beyond which it is no sentence of ours.
_LONGEST_LINE = 20_000
#: A template with fewer letters of its own says little: what stands in its places has to be known, too.
_FEW_LETTERS = 8
_PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"[-+]?[\d.,/x*%:-]+(?: ?(?:[kKMGTPE]?i?B|s|fps|%))?")
#: A figure or one name: what may stand in any place.
_TOKEN = re.compile(rf"{_NUMBER.pattern}|[\w.+-]*(?: \(\w+\))?|\[[\d, ]*\]")
_WIDE = re.compile(r"[\u2e80-\u9fff\uff00-\uffef\u3000-\u303f“”‘’…]")
_BRACKET = re.compile(r"([^()]+) \((.*)\)")
_SIZED = re.compile(r"([A-Za-z][A-Za-z ]*) ([\d.,]+ [kMGTPE]?B)")
_ARTICLE = re.compile(r"(?:an?|the) (?=\w)", re.IGNORECASE)
#: A letter that is wide (the group), or is not, and no sign.
_LETTER = re.compile(r"([\u3400-\u9fff])|[A-Za-z0-9'\"/\\@%_.~*`-]")
_WIDE_SIGN = frozenset("，。；：、！？（）“”‘’…")
#: What joins pieces that are known one by one, what joins their translations, and whether all have to be known: names
#: that happen to be words of ours stay what they are among others.
_JOINTS = (
    (": ", "：", False),
    ("; ", "；", False),
    (", ", "、", True),
    (" and ", "和", True),
    (" nor for ", "和", True),
    (" or ", "或", True),
)


def preferred(environment: Mapping[str, str] = os.environ) -> str:
    """Find the language of a terminal, as gettext does: by LANGUAGE, LC_ALL, LC_MESSAGES and LANG.

    Returns:
        The first of them that there is a catalogue for, else English.
    """
    named = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    # As gettext has it, LANGUAGE is of no effect where no locale, or C's, is set.
    if named.partition(".")[0] in ("", "C", "POSIX"):
        return ENGLISH
    wanted = environment.get("LANGUAGE") or named
    return next((found for tag in wanted.split(":") if (found := supported(tag)) is not None), ENGLISH)


def supported(tag: str) -> str | None:
    """Find the language of a tag or locale (``zh``, ``zh-CN``, ``zh_CN.UTF-8``) among those there are; None if it is
    none of them. Traditional Chinese is another language than ``zh``, as it is for ComfyUI's page."""
    language, *region = re.split(r"[-_]", tag.strip().lower().partition(".")[0])
    if language == "zh" and region[:1] == ["tw"]:
        return None
    return language if language == ENGLISH or language in _languages() else None


@lru_cache(maxsize=1)
def _languages() -> frozenset[str]:
    return frozenset(path.parent.name for path in _LOCALES.glob(f"*/{_CATALOGUE}"))


def translate(text: str, language: str) -> str:
    """Say a finished English text in another language, as far as its sentences are known.

    Args:
        text: one or more lines of sentences, with names and figures in them.
        language: such as ``zh``. English, and a language without a catalogue, leave the text as it is.

    Returns:
        The text with every known sentence translated. Never raises.
    """
    if language == ENGLISH or not isinstance(text, str):
        return text
    try:
        catalogue = _catalogue(language)
    except (OSError, ValueError):
        return text
    return catalogue.text(text)


@lru_cache(maxsize=4)
def _catalogue(language: str) -> "Catalogue":
    path = _LOCALES / language / _CATALOGUE
    return Catalogue(read_catalogue(path.read_text(encoding="utf-8")))


def read_catalogue(text: str) -> dict[str, str]:
    """Read a .po: template -> translation, "" where there is none yet.

    Raises:
        ValueError: for a line that does not belong in one.
    """
    found: dict[str, str] = {}
    entry: dict[str, str] = {}
    field = ""
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r'(?:(msgid|msgstr) )?"((?:[^"\\]|\\.)*)"', line.strip())
        if match is None:
            if line.strip() and not line.startswith("#"):
                raise ValueError(f"Line {number} of the catalogue is none of a .po: {line[:80]}")
            continue
        field = match[1] or field
        if match[1] == "msgid":
            entry = {}
        entry[field] = entry.get(field, "") + _unquoted(match[2])
        if field == "msgstr" and entry["msgid"]:
            found[entry["msgid"]] = entry["msgstr"]
    return found


def _unquoted(text: str) -> str:
    signs = {"n": "\n", "t": "\t"}
    return re.sub(r"\\(.)", lambda match: signs.get(match[1], match[1]), text)


def places(template: str) -> list[str]:
    """List the names of a template's places, ``{name}``, in their order. Braces that are meant are doubled."""
    return _PLACE.findall(re.sub(r"\{\{|\}\}", "", template))


@dataclass(frozen=True)
class _Template:
    """A sentence with places: ``literals[0] {} literals[1] {} …``.

    Attributes:
        said: the translation, in it an index for each place.
        letters: how many letters it has of its own.
        words: those that stand in every text made from it.
    """

    literals: tuple[str, ...]
    said: tuple[str | int, ...]
    letters: int
    words: frozenset[str]

    def places_of(self, text: str) -> Iterator[list[str]]:
        """Find what stands in the places, if the text was made from this: the ways to read it, few of them, that with
        each literal as far left as can be first."""
        first, last = self.literals[0], self.literals[-1]
        if not last and self.literals[-2].endswith(" "):
            # Nothing stands in the last place.
            text += " "
        end = len(text) - len(last)
        if end >= len(first) and text.startswith(first) and text.endswith(last):
            yield from islice(self._places(text, 1, len(first), end), _MOST_WAYS)

    def _places(self, text: str, number: int, at: int, end: int) -> Iterator[list[str]]:
        if number == len(self.literals) - 1:
            yield [text[at:end]]
            return
        literal = self.literals[number]
        # A literal with words stands where it is first found; a space or a comma may stand in a name, too.
        ways, there = (2 if _WORD.search(literal) else _MOST_WAYS), text.find(literal, at, end)
        while there >= 0 and ways:
            for rest in self._places(text, number + 1, there + len(literal), end):
                yield [text[at:there], *rest]
            ways, there = ways - 1, text.find(literal, there + 1, end)


class Catalogue:
    """The sentences of one language, found by their words.

    Args:
        translations: template -> translation. Those without one are left out.
    """

    def __init__(self, translations: Mapping[str, str]):
        self._whole: dict[str, str] = {}
        self._by_start: dict[str, list[_Template]] = {}
        self._by_word: dict[str, list[_Template]] = {}
        read: list[_Template] = []
        for template, said in translations.items():
            if said and not places(template):
                self._whole[_plain(template)] = _plain(said)
            elif said:
                read.append(_read_template(template, said))
        often = Counter(word for each in read for word in each.words)
        for each in read:
            start = _WORD.match(each.literals[0])
            if start is not None and start.end() < len(each.literals[0]):
                self._by_start.setdefault(start[0], []).append(each)
            else:
                rarest = min(sorted(each.words), key=lambda word: often[word], default="")
                self._by_word.setdefault(rarest, []).append(each)

    def text(self, text: str) -> str:
        """Translate a text: the whole of it if it is known, else line by line."""
        whole = self._whole.get(text.strip())
        if whole is not None:
            return text.replace(text.strip(), whole)
        parse = _Parse(self)
        return "\n".join(map(parse.line, text.split("\n")))

    def whole(self, text: str) -> str | None:
        """Return the translation of a sentence without places."""
        return self._whole.get(text)

    def candidates(self, text: str) -> Iterator[list[_Template]]:
        """List the templates that a text may have been made from, those with the most letters of their own first: first
        those that begin with its first word, so that what stands before a colon is not read as part of a name."""
        start, words = _WORD.match(text), frozenset(_WORD.findall(text))
        yield self._fitting([] if start is None else self._by_start.get(start[0], ()), words)
        yield self._fitting([each for word in ("", *words) for each in self._by_word.get(word, ())], words)

    @staticmethod
    def _fitting(templates: Iterable[_Template], words: frozenset[str]) -> list[_Template]:
        return sorted((each for each in templates if each.words <= words), key=lambda each: -each.letters)


def _plain(template: str) -> str:
    return template.replace("{{", "{").replace("}}", "}")


def _read_template(template: str, said: str) -> _Template:
    names, literals = places(template), _split(template)[::2]
    pieces: list[str | int] = []
    parts = _split(said)
    for number, piece in enumerate(parts):
        # What stands in two places side by side is not to run together, should it stay English.
        between = " " if 0 < number < len(parts) - 1 else ""
        pieces.append(names.index(piece) if number % 2 else piece or between)
    letters = sum(sum(map(str.isalpha, literal)) for literal in literals)
    return _Template(tuple(literals), tuple(pieces), letters, _words_of(literals))


def _split(template: str) -> list[str]:
    """Split a template into literal, name, literal, name, …, literal."""
    hidden = template.replace("{{", "\0").replace("}}", "\1")
    return [piece.replace("\0", "{").replace("\1", "}") for piece in _PLACE.split(hidden)]


def _words_of(literals: list[str]) -> frozenset[str]:
    """List the words that stand in every text made from a template: none that a place could lengthen."""
    found = set()
    for number, literal in enumerate(literals):
        for match in _WORD.finditer(literal):
            open_left = number > 0 and match.start() == 0
            open_right = number < len(literals) - 1 and match.end() == len(literal)
            if not (open_left or open_right):
                found.add(match[0])
    return frozenset(found)


class _Parse:
    """The translation of a text: of all ways to read a line of it, the one with the most letters known."""

    def __init__(self, catalogue: Catalogue):
        self._catalogue = catalogue
        self._known: dict[str, tuple[int, str]] = {}
        self._work = self._most = 0

    def line(self, line: str) -> str:
        """Translate one line."""
        if len(line) > _LONGEST_LINE or self._work > _MOST_IN_ALL or _WORD.search(line) is None:
            return line
        self._most = self._work + _MOST_WORK
        start = re.match(r"\s*(?:[-*•] )?", line)
        lead = start[0] if start is not None else ""
        letters, said = self.best(line[len(lead) :].rstrip())
        return lead + said if letters else line

    def best(self, text: str, depth: int = 0) -> tuple[int, str]:
        """Return how many letters of a text are known, and its translation."""
        core = text.strip()
        if core not in self._known:
            # What is being read has no other reading within itself.
            self._known[core] = (0, core)
            self._known[core] = max(self._readings(core, depth), key=lambda reading: reading[0])
        letters, said = self._known[core]
        return letters, said

    def _readings(self, text: str, depth: int) -> Iterator[tuple[int, str]]:
        yield 0, text
        if depth > _DEEPEST or self._work > self._most or _WORD.search(text) is None:
            return
        whole = self._one(text, depth)
        yield whole
        if 8 * whole[0] > 7 * sum(map(str.isalpha, text)):
            return
        ends = [match.span() for match in _SENTENCE_END.finditer(text)]
        if ends:
            yield self._sentences(text, ends, depth)
        yield from self._joined(text, depth, _JOINTS[:1] if ends else _JOINTS)
        if depth and text[0].isupper():
            # It may begin with a part of a sentence.
            yield self._one(text[0].lower() + text[1:], depth)
        article = _ARTICLE.match(text) if depth else None
        if article is not None:
            letters, said = self.best(text[article.end() :], depth + 1)
            # Of a name alone the article can go, too: Chinese has none.
            yield (letters, said) if letters or " " in said else (1, said)

    def _one(self, text: str, depth: int) -> tuple[int, str]:
        """Read a text as made from one template."""
        said = self._catalogue.whole(text)
        if said is not None:
            return sum(map(str.isalpha, text)), said
        found, letters = (0, text), sum(map(str.isalpha, text))
        self._work += 2 + len(text) // 100
        for templates in self._catalogue.candidates(text):
            for template in templates:
                self._work += 1
                for given in template.places_of(text):
                    self._work += 1
                    found = max(found, self._filled(template, given, depth), key=lambda reading: reading[0])
                if 2 * found[0] > letters and 2 * found[0] > 3 * template.letters:
                    # Those that follow say less of their own.
                    break
        return found

    def _filled(self, template: _Template, given: list[str], depth: int) -> tuple[int, str]:
        read = [self.best(value, depth + 1) for value in given]
        if (
            template.letters < _FEW_LETTERS
            and not template.literals[0]
            and not all(
                letters or _TOKEN.fullmatch(value.strip()) for value, (letters, _) in zip(given, read, strict=True)
            )
        ):
            return 0, ""
        said = _spaced(piece if isinstance(piece, str) else read[piece][1] for piece in template.said)
        # Of readings that know as much, that which cuts no brackets apart.
        cut = sum(not _is_balanced(value) for value in given)
        return template.letters + sum(letters for letters, _ in read) - cut, said

    def _sentences(self, text: str, ends: list[tuple[int, int]], depth: int) -> tuple[int, str]:
        """Read a text as several templates, one after the other."""
        starts, stops = [0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text)]
        count = len(starts)
        rest: list[tuple[int, str]] = [(0, "")] * (count + 1)
        for first in reversed(range(count)):
            readings = []
            for last in range(first, min(count, first + _MOST_SENTENCES)):
                part = text[starts[first] : stops[last]]
                whole = last == count - 1 and first == 0
                letters, said = (
                    (0, part) if whole else self.best(part, depth + 1) if last == first else self._one(part, depth + 1)
                )
                if letters or last == first:
                    readings.append((letters + rest[last + 1][0], _join(said, rest[last + 1][1])))
            rest[first] = max(readings, key=lambda reading: reading[0])
            if self._work > self._most:
                break
        return rest[0]

    def _joined(self, text: str, depth: int, joints: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[int, str]]:
        """Read a text as a list, as a name and what is said of it, or as one with more in brackets behind it."""
        bracket = _BRACKET.fullmatch(text)
        if bracket is not None and _is_balanced(bracket[2]):
            # The brackets belong to what is in them, or are put around it.
            for inner, form in ((f"({bracket[2]})", "{}{}"), (bracket[2], "{}（{}）")):
                read = [self.best(piece, depth + 1) for piece in (bracket[1], inner)]
                if any(letters for letters, _ in read):
                    yield sum(letters for letters, _ in read), form.format(*(piece for _, piece in read))
        sized = _SIZED.fullmatch(text)
        if sized is not None:
            letters, said = self.best(sized[1], depth + 1)
            yield letters, f"{said} {sized[2]}"
        for joint, said, every in joints:
            pieces = text.split(joint, -1 if every else 1)
            if len(pieces) > 1:
                read = [self.best(piece, depth + 1) for piece in pieces]
                known = [
                    letters > 0 or (every and bool(_NUMBER.fullmatch(piece)))
                    for piece, (letters, _) in zip(pieces, read, strict=True)
                ]
                if all(known) if every else any(known):
                    yield sum(letters for letters, _ in read), _spaced(_between(said, (piece for _, piece in read)))


def _is_balanced(text: str) -> bool:
    """Whether every bracket that is closed in a text was opened in it."""
    is_open = 0
    for letter in text:
        is_open += (letter == "(") - (letter == ")")
        if is_open < 0:
            return False
    return is_open == 0


def _between(joint: str, pieces: Iterable[str]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if number:
            yield joint
        yield piece


def _spaced(pieces: Iterable[str]) -> str:
    """Join the pieces of a sentence, with a space just where a wide letter and another stand side by side."""
    text = ""
    for piece in pieces:
        left, right = text.rstrip(" "), piece.lstrip(" ")
        if left and right and (_WIDE.match(left[-1]) or _WIDE.match(right[0])):
            one, other = _LETTER.match(left[-1]), _LETTER.match(right[0])
            if one and other:
                space = bool(one[1]) != bool(other[1])
            else:
                # Beside a bracket the translator decides; a wide sign brings its own space.
                space = (left, right) != (text, piece) and _WIDE_SIGN.isdisjoint((left[-1], right[0]))
            text = left + " " * space + right
        else:
            text += piece
    return text


def _join(first: str, second: str) -> str:
    """Join two sentences: without a space behind a wide letter or sign."""
    space = "" if not first or not second or _WIDE.match(first[-1]) else " "
    return first + space + second
