"""Every node is told in words, in English and in Chinese: what ComfyUI's page shows on it, its help page, and the
README with its chapters in docs/."""

import posixpath
import re
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from PIL import Image

from tests import locales, sentences
from tests.conftest import ROOT

DOCS = ROOT / "web" / "docs"
NODES = [path.stem for path in sorted(DOCS.glob("*.md"))]
#: Where the page looks for a node's help, by language. English is what it falls back to where there is no
#: ``<node>/<language>.md``.
HELP = {"en": "{}.md", "zh": "{}/zh.md"}
#: The README and its chapters, from the root, each with its Chinese twin.
PAGES = {"README.md": "README.zh.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))
}
ENGLISH = {chinese: english for english, chinese in PAGES.items()}
#: Names that Chinese users of ComfyUI write so too.
SAME_IN_CHINESE = {"VAE", "Latent", "CLIP"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def leaves(words: dict, *path) -> dict[tuple, str]:
    """``{("CogVideoX15Sampler", "inputs", "cfg", "tooltip"): text, …}``."""
    found = {}
    for key, value in words.items():
        found |= leaves(value, *path, key) if isinstance(value, dict) else {(*path, key): value}
    return found


def help_page(node_id: str, language: str) -> str:
    return (DOCS / HELP[language].format(node_id)).read_text(encoding="utf-8")


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def leads_to(page: str, target: str) -> str:
    """Return where a link leads: an address as it is, a file from the root, a chapter to its own page."""
    if target.startswith("https://"):
        return target
    file = target.partition("#")[0]
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) if file else page


def test_the_english_words_are_those_that_the_nodes_declare(pack):
    """After a change of a node: ``python -m tests.locales``."""
    assert locales.read("en") == locales.declared(pack.NODE_CLASS_MAPPINGS, pack.NODE_DISPLAY_NAME_MAPPINGS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_input_and_output_has_a_name_and_a_tooltip_and_nothing_is_left_over(pack, language):
    expected = set()
    for node_id, node in pack.NODE_CLASS_MAPPINGS.items():
        sockets = [("inputs", name) for name in locales.inputs(node)] + [
            ("outputs", str(index)) for index in range(len(node.RETURN_TYPES))
        ]
        expected |= {(node_id, "display_name"), (node_id, "description")}
        expected |= {(node_id, *socket, word) for socket in sockets for word in ("name", "tooltip")}
    words = leaves(locales.read(language))
    assert set(words) == expected
    assert all(text.strip() == text and text for text in words.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_the_page_would_read_as_a_formula(language):
    """The page's vue-i18n reads braces as parameters, | as a choice of plurals and @ as a link to another text."""
    assert [path for path, text in leaves(locales.read(language)).items() if re.search(r"[{}|@]", text)] == []


def test_what_names_a_node_input_or_output_holds_no_dot(pack):
    """The page cuts the keys of its texts at dots."""
    assert not any("." in part for path in leaves(locales.read("en")) for part in path)


def test_the_chinese_words_are_chinese():
    english = leaves(locales.read("en"))
    for path, text in leaves(locales.read("zh")).items():
        if not (path[-1] == "name" and text in SAME_IN_CHINESE):
            assert text != english[path], path
            assert CHINESE.search(text), path


def test_the_chinese_words_name_the_same_choices_files_and_figures():
    """A tooltip that was changed in one language only."""
    named = re.compile(
        r"\d+(?:\.\d+)?|\b(?:auto|gpu|cpu|offload_\w+|fix|warn|stop|pass|heal|ddim|dpm|bf16|fp16|models/[\w/]+)\b",
        re.ASCII,
    )
    chinese = leaves(locales.read("zh"))
    for path, text in leaves(locales.read("en")).items():
        if path[-1] in ("tooltip", "description"):
            assert set(named.findall(chinese[path])) == set(named.findall(text)), path


def test_there_is_a_help_page_for_every_node_and_for_nothing_else(pack):
    assert set(NODES) == set(pack.NODE_CLASS_MAPPINGS)
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} == {
        HELP[language].format(node) for language in HELP for node in NODES
    }
    assert (ROOT / pack.WEB_DIRECTORY / "docs").samefile(DOCS)


@pytest.mark.parametrize("language", HELP)
@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_names_its_node_every_input_choice_and_output(pack, node_id, language):
    node, text = pack.NODE_CLASS_MAPPINGS[node_id], help_page(node_id, language)
    assert text.startswith(f"# {locales.read(language)[node_id]['display_name']}\n")
    for name, (kind, *_) in locales.inputs(node).items():
        assert f"`{name}`" in text
        for choice in kind if isinstance(kind, list) and name != "model" else ():
            assert f"`{choice}`" in text or f"= {choice}`" in text
    for name in node.RETURN_NAMES:
        assert f"`{name}`" in text
    for heading in {"en": ("Inputs", "Outputs", "Common errors"), "zh": ("输入", "输出", "常见错误")}[language]:
        assert f"\n## {heading}\n" in text


@pytest.mark.parametrize("node_id", NODES)
def test_both_languages_of_a_help_page_say_the_same(node_id):
    english, chinese = (outline(help_page(node_id, language)) for language in HELP)
    assert chinese == english


@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_has_a_picture(node_id):
    """The page puts relative addresses of pictures behind docs/, for ``<node>/zh.md`` too."""
    for language in HELP:
        assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", help_page(node_id, language)) == [f"images/{node_id}.png"]
    with Image.open(DOCS / "images" / f"{node_id}.png") as picture:
        picture.load()
        assert min(picture.size) >= 100


@pytest.mark.parametrize("language", HELP)
@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_quotes_errors_as_the_page_shows_them(node_id, language):
    """On a page in Chinese they are Chinese."""
    _, _, errors = help_page(node_id, language).partition({"en": "## Common errors", "zh": "## 常见错误"}[language])
    assert [quote for quote in re.findall(r"\*([^*\n]+)\*", errors) if not is_said(quote, language)] == []


@pytest.mark.parametrize("page", [page for page in (*PAGES, *ENGLISH) if "README" in page or "troubleshooting" in page])
def test_a_table_of_problems_quotes_errors_as_the_page_shows_them(page):
    seen = "\n".join(line.split("|")[1] for line in read_page(page).splitlines() if line.startswith("| "))
    quotes = re.findall(r"[\"“]([^\"“”]+)[\"”]", seen)
    assert quotes
    assert [quote for quote in quotes if not is_said(quote, "zh" if page in ENGLISH else "en")] == []


@pytest.mark.parametrize("page", [HELP[language].format(node) for language in HELP for node in NODES])
def test_links_of_a_help_page_lead_somewhere(page):
    for target in links((DOCS / page).read_text(encoding="utf-8")):
        # Pictures of help pages have a test of their own.
        assert re.match(r"https://|images/", target) or (DOCS / target.partition("#")[0]).exists()


@pytest.mark.parametrize("page", [*PAGES, *ENGLISH])
def test_links_to_files_lead_somewhere(page):
    for target in links(read_page(page)):
        assert target.startswith("https://") or (ROOT / leads_to(page, target)).exists(), target


def test_what_github_shows_for_an_issue_leads_to_pages_that_exist():
    text = read_page(".github/ISSUE_TEMPLATE/config.yml")
    pages = re.findall(r"https://github\.com/cogvideox15-pack/cogvideox15-pack/blob/main/(\S+)", text)
    assert pages == ["docs/troubleshooting.md"]
    assert all(page in PAGES for page in pages)


def test_every_chapter_is_there_in_both_languages_and_the_readme_leads_to_it():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert files == {*PAGES, *ENGLISH} - {"README.md", "README.zh.md"}
    for readme, pages in (("README.md", PAGES), ("README.zh.md", ENGLISH)):
        assert {leads_to(readme, target) for target in links(read_page(readme))} >= set(pages) - {readme}


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_a_readme_is_short(readme):
    """What does not fit belongs in a chapter."""
    assert len(read_page(readme).encode()) <= 7000


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_of_a_page_say_the_same(page):
    """After a change of one: the other too, in the section that is named here."""

    def twin_or_self(path):
        return ENGLISH.get(path, path)

    english = outline(read_page(page), lambda target: twin_or_self(leads_to(page, target)))
    chinese = outline(read_page(PAGES[page]), lambda target: twin_or_self(leads_to(PAGES[page], target)))
    assert [section["heading"] for section in chinese] == [section["heading"] for section in english]
    for title, theirs, ours in zip(re.findall(r"(?m)^#+ (.+)$", read_page(page)), english, chinese, strict=True):
        assert ours == theirs, title


@pytest.mark.parametrize("page", [*PAGES, *ENGLISH])
def test_a_page_leads_to_its_twin_and_the_readme_first_and_then_stays_in_its_language(page):
    twin, own, readme = (PAGES[page], PAGES, "README.md") if page in PAGES else (ENGLISH[page], ENGLISH, "README.zh.md")
    title, first, *rest = read_page(page).split("\n\n")
    assert title.startswith("# ")
    assert {leads_to(page, target) for target in links(first)} == {twin, readme} - {page}
    lead = {leads_to(page, target) for text in rest for target in links(text)}
    assert lead & {*PAGES, *ENGLISH} <= set(own)


def test_the_chapter_on_nodes_calls_them_as_the_page_does():
    for language, page in (("en", "docs/nodes.md"), ("zh", "docs/zh/nodes.md")):
        for words in locales.read(language).values():
            assert f"| {words['display_name']} |" in read_page(page)


@pytest.mark.parametrize(
    ("folder", "asked"),
    [
        ("cogvideox15-pack", {"cogvideox15-pack"}),
        ("cogvideox-1.5", {"cogvideox-1.5", "cogvideox-1"}),
        ("a pack with spaces", {"a pack with spaces"}),
        ("视频 {1.5} (new)", {"视频 {1.5} (new)", "视频 {1"}),
    ],
)
def test_the_page_finds_help_whatever_the_folder_is_called(pack, folder, asked):
    """ComfyUI's page takes the folder's name from that of the module, ``custom_nodes.<folder>``, cut at dots."""
    pattern = sys.modules[f"{pack.__name__}.nodes.host"].names_in_urls(folder)
    assert all(re.fullmatch(pattern, name) for name in asked)
    assert not any(re.fullmatch(pattern, name) for name in ("", "another", f"{folder}x", f"x{folder}"))
    assert not set("{}") & set(pattern), "aiohttp takes braces for the ends of the pattern"


def is_said(quote: str, language: str) -> bool:
    """Whether a sentence of the code holds a quote's pieces, between …; a name may stand in a piece."""
    pieces = [piece for piece in re.split(r"\s*…\s*|[.。]$", quote) if piece]
    said = [english if language == "en" else chinese for english, chinese in sentences.read("zh").items()]
    return any(all(_holds(template, piece) for piece in pieces) for template in said)


def _holds(template: str, piece: str) -> bool:
    literals = re.split(r"\{\w+\}", template)
    return (
        any(piece in literal for literal in literals)
        or any(
            before.endswith(piece[:cut]) and any(after.startswith(piece[rest:]) for rest in range(cut, len(piece) + 1))
            for before, after in pairwise(literals)
            for cut in range(3, len(piece) + 1)
        )
        or _holds_after_a_name(literals, piece)
    )


def _holds_after_a_name(literals: list[str], piece: str) -> bool:
    """Whether a sentence that begins with the name of a setting begins so."""
    name = re.match(r"[a-z]+_[a-z_]+(?=.)", piece)
    return name is not None and literals[0] == "" and literals[1].startswith(piece[name.end() :])


def outline(text: str, leads: Callable[[str], str] = str) -> list[dict]:
    """By section what does not depend on the language: the heading's level, the shape of its tables, its code without
    comments, the names in `code` and the figures in its text, and where its links lead, as ``leads`` says."""
    sections = []
    for heading, body in zip(*[iter(re.split(r"(?m)^(#+) ", text)[1:])] * 2, strict=True):
        blocks = re.findall(r"(?ms)^ *```\n(.*?)^ *```$", body)
        prose = re.sub(r"(?ms)^ *```\n.*?^ *```$", "", body)
        sections.append(
            {
                "heading": len(heading),
                "tables": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
                "items": len(re.findall(r"(?m)^(?:-|\d+\.) ", prose)),
                "code": [re.sub(r" +#.*", "", block) for block in blocks],
                "names": set(re.findall(r"`([^`]+)`", prose)),
                "figures": set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"\]\([^)]+\)", "", prose))),
                "links": sorted(map(leads, links(prose))),
            }
        )
    return sections
