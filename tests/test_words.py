"""Every node is told in words, in English and in Chinese: what ComfyUI's page shows on it, its help page, and the
README."""

import re
import sys

import pytest
from PIL import Image

from tests import locales
from tests.conftest import ROOT

DOCS = ROOT / "web" / "docs"
NODES = [path.stem for path in sorted(DOCS.glob("*.md"))]
#: Where the page looks for a node's help, by language. English is what it falls back to where there is no
#: ``<node>/<language>.md``.
HELP = {"en": "{}.md", "zh": "{}/zh.md"}
#: Names that Chinese users of ComfyUI write so too.
SAME_IN_CHINESE = {"VAE", "Latent"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def leaves(words: dict, *path) -> dict[tuple, str]:
    """``{("CogVideoX15Sampler", "inputs", "cfg", "tooltip"): text, …}``."""
    found = {}
    for key, value in words.items():
        found |= leaves(value, *path, key) if isinstance(value, dict) else {(*path, key): value}
    return found


def help_page(node_id: str, language: str) -> str:
    return (DOCS / HELP[language].format(node_id)).read_text(encoding="utf-8")


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
        assert text != english[path], path
        assert CHINESE.search(text) or (path[-1] == "name" and text in SAME_IN_CHINESE), path


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


@pytest.mark.parametrize(
    "page", ["README.md", "README.zh.md", *(HELP[language].format(node) for language in HELP for node in NODES)]
)
def test_links_to_files_lead_somewhere(page):
    root = ROOT if page.startswith("README") else DOCS
    for target in re.findall(r"\]\(([^)]+)\)", (root / page).read_text(encoding="utf-8")):
        # Pictures of help pages have a test of their own.
        assert re.match(r"https://|images/", target) or (root / target.partition("#")[0]).exists()


def test_both_readmes_say_the_same():
    """After a change of one: the other too, in the section that is named here."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    english, chinese = map(outline, texts)
    assert [section["heading"] for section in chinese] == [section["heading"] for section in english]
    for title, theirs, ours in zip(re.findall(r"(?m)^#+ (.+)$", texts[0]), english, chinese, strict=True):
        assert ours == theirs, title


def test_the_readmes_lead_to_each_other_and_call_nodes_as_the_page_does():
    for language, name, other in (("en", "README.md", "README.zh.md"), ("zh", "README.zh.md", "README.md")):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f"]({other})" in text.split("\n\n")[1]
        for words in locales.read(language).values():
            assert f"| {words['display_name']} |" in text


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


def outline(text: str) -> list[dict]:
    """By section what does not depend on the language: the heading's level, the shape of its tables, its code without
    comments, the names in `code` and the figures in its text, and where its links lead."""
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
                "links": sorted(
                    target for target in re.findall(r"\]\(([^)]+)\)", prose) if not target.startswith("README")
                ),
            }
        )
    return sections
