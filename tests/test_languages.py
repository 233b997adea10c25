"""Every sentence that people are shown has its Chinese, and finished texts are said in it."""

import ast
import itertools
import json
import re
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox.black_frames import check_black_frames, enforce
from cogvideox.checkpoint.audit import WeightAudit
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.choices import BACKENDS, DTYPES, TAYLORSEER, check_choice
from cogvideox.geometry import check_frames
from cogvideox.handles import open_handles, with_lora
from cogvideox.languages import ENGLISH, places, preferred, supported, translate
from cogvideox.memory import memory_text
from cogvideox.modules.cache import Cache
from cogvideox.precision.policy import plan_dtypes
from interop.check import check_config
from interop.migrate import migrate_workflow
from tests import fun_workflows, sentences, workflows, wrapper_workflows
from tests.conftest import CPU, ROOT
from tests.helpers import run_generate
from tests.walls import sources

CHINESE = re.compile(r"[\u4e00-\u9fff]")


def chinese(text: str) -> str:
    return translate(text, "zh")


def english_left(text: str) -> list[str]:
    """Three English words or more in a row, outside quotes, paths and brackets that hold what a library said."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|“[^”]*”|[^\s，。；：（）]*[/\\][^\s，。；：（）]*|`[^`]*`", " ", text)
    return re.findall(r"[A-Za-z]*[a-z]+(?:,? [a-z]+){2,}", bare)


def test_a_label_before_a_sentence_is_not_read_as_part_of_a_name_in_it():
    """``{setting} {denoise} of {steps} steps`` may begin with any word, ``error:`` too; Chinese puts it elsewhere."""
    wrong = []
    for template in sentences.read("zh"):
        if template.startswith("{") and template != "{error}":
            numbers = itertools.count()
            said = re.sub(r"\{\w+\}", lambda _, numbers=numbers: f"--x{next(numbers)}", template)
            if chinese(f"error: {said}") != f"错误：{chinese(said)}":
                wrong.append(said)
    assert wrong == []


def test_every_sentence_of_the_code_has_its_chinese_and_nothing_is_left_over():
    """After a change of sentences: ``python -m tests.sentences``, and a translation of each that it prints."""
    catalogue = sentences.read("zh")
    assert [template for template in sentences.templates() if not catalogue.get(template)] == []
    assert [template for template in catalogue if template not in sentences.templates()] == []


def test_the_catalogue_is_as_the_command_writes_it():
    written = sentences.written("zh", sentences.read("zh"), sentences.templates())
    assert sentences.catalogue_file("zh").read_text(encoding="utf-8") == written


def test_a_translation_keeps_every_place():
    for template, said in sentences.read("zh").items():
        assert sorted(places(said)) == sorted(places(template)), template


def test_the_translations_are_chinese():
    for said in sentences.read("zh").values():
        # Names are the same in both.
        assert CHINESE.search(said) or not re.search(r"[a-z]{2,} [a-z]{2,}", re.sub(r"\{\w+\}", "", said)), said
        prose = re.sub(r"\[[^\]]*\]", "", said)
        assert not re.search(r"[\u4e00-\u9fff][,;!?]|[\u4e00-\u9fff]\.(?![\w.])", prose), said


def test_words_that_stand_alone_are_strings_of_the_code():
    said = {
        node.value
        for file, tree in sources().items()
        if file != "cogvideox/languages.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert [word for word in sentences.WORDS if word not in said] == []


def test_the_reader_of_the_code_finds_what_is_said_and_leaves_out_what_is_not():
    source = '''
"""A docstring is no sentence."""
NAMES = {"a key that is a sentence": "a value of it", "tooltip": "The page has this one."}
class Node:
    DESCRIPTION = "The page has this one too."
    def run(self, n, path, words):
        logger.info("Only the log has this: %s", path)
        if path.startswith("not said at all"):
            raise ValueError(f"{n} file{'s' if n > 1 else ''} of {short(path, 400)}{words} cannot" + " be read. Go on.")
        return " and ".join(words)
'''
    reader = sentences._Reader(ast.parse(source))
    assert list(reader.templates()) == [
        "a key that is a sentence",
        "a value of it",
        "{n} files of {path} cannot be read. Go on.",
        "{n} file of {path} cannot be read. Go on.",
    ]


def test_every_finished_text_is_found_again():
    """Whatever stands in the places: each template, filled, is said as its translation, filled."""
    translations = sentences.read("zh")

    def filled(text, given):
        text = re.sub(r"\{(\w+)\}", lambda match: given[match[1]], text.replace("{{", "\0").replace("}}", "\1"))
        return text.replace("\0", "{").replace("\1", "}")

    def plain(text):
        return re.sub(r"[\s，、：:,]", "", text)

    wrong = []
    for template in sentences.templates():
        if "\n" not in template:
            given = {name: f"q{number}x" for number, name in enumerate(places(template))}
            said, expected = chinese(filled(template, given)), filled(translations[template], given)
            if plain(said) != plain(expected):
                wrong.append((template, said, expected))
    assert wrong == []


def refusal(call, *arguments, **more) -> str:
    with pytest.raises((ValueError, RuntimeError)) as refused:
        call(*arguments, **more)
    return str(refused.value)


def said_by_the_engine(tiny, tmp_path):
    """Real sentences by what says them: refusals, reports, verdicts and plans."""
    handles = open_handles(tiny, "auto", CPU)
    black, half = torch.zeros(17, 32, 48, 3), torch.rand(5, 32, 48, 3)
    half[2:] = float("nan")
    report = check_black_frames(black)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\0" * 64)
    config = tmp_path / "inference.yaml"
    config.write_text("args:\n  fp16: True\n  load: CogVideoX1.5-5b-SAT\n", encoding="utf-8")
    old = tmp_path / "old.json"
    old.write_text(json.dumps(wrapper_workflows.text_to_video().page()), encoding="utf-8")
    yield "choice", refusal(check_choice, "dtype", "bf17", DTYPES)
    yield "length", refusal(check_frames, 80, 16)
    yield "file", refusal(open_checkpoint, broken)
    yield "nothing", refusal(open_checkpoint, tmp_path / "none")
    yield "lora", refusal(with_lora, handles.model, broken)
    yield "dtype", refusal(open_handles, tiny, "fp16", CPU, "stop")
    yield "plan", handles.plan.text
    yield "mismatch", plan_dtypes(handles.checkpoint, "fp16", CPU, "warn").text
    yield "memory", memory_text(handles.model)
    yield "verdict", report.text
    yield "black", refusal(enforce, report, "stop")
    yield "nan", refusal(enforce, check_black_frames(half), "stop")
    yield "cache", Cache("pab").text
    yield "check", check_config(config).text
    yield "migration", migrate_workflow(old, tmp_path / "new.json").text


def test_what_the_engine_says_is_said_in_chinese_to_the_last_sentence(tiny, tmp_path):
    for what, text in said_by_the_engine(tiny, tmp_path):
        said = chinese(text)
        assert CHINESE.search(said), (what, said)
        assert english_left(said) == [], (what, said)
        assert said.count("\n") == text.count("\n"), what


def test_figures_and_names_stay_as_they_are(tmp_path):
    path = tmp_path / "my own is not. Good, and: strange (really) [1].safetensors"
    path.write_bytes(b"\x80\x02}q\x00.")
    said = chinese(refusal(open_checkpoint, path))
    assert str(path) in said
    assert CHINESE.search(said)


def test_what_nodes_say_of_their_inputs_is_said_in_chinese(pack):
    node = pack.NODE_CLASS_MAPPINGS["CogVideoX15Sampler"]()
    text = refusal(
        node.run,
        model=1,
        positive=[],
        negative=[],
        latent_image={},
        seed=0,
        steps=1,
        cfg=1.0,
        scheduler="ddim",
        denoise=1.0,
    )
    said = chinese(text)
    assert said.startswith("CogVideoX-1.5 采样器：model 是 1，而那里应是 Transformer（COGVIDEOX_MODEL）。请连接 ")


@pytest.mark.parametrize("path", [*workflows.FILES, *workflows.BLOCKS], ids=lambda path: path.stem)
def test_a_workflow_is_said_in_chinese_and_else_the_same(pack, path):
    english, said = workflows.read(path), workflows.read(path)
    sys.modules[f"{pack.__name__}.nodes.host.language"].workflow_in(said, "zh")
    for text in sentences.workflow_texts(said):
        assert CHINESE.search(text)
        assert english_left(text) == []
    kept = json.dumps(said, ensure_ascii=False)
    for theirs, ours in zip(sentences.workflow_texts(english), sentences.workflow_texts(said), strict=True):
        assert re.findall(r"https://\S+?\)|`[^`]+`", theirs) == re.findall(r"https://\S+?\)|`[^`]+`", ours)
        kept = kept.replace(json.dumps(ours, ensure_ascii=False), json.dumps(theirs, ensure_ascii=False))
    assert json.loads(kept) == english


def test_unknown_text_and_unknown_languages_stay_as_they_are():
    for text in (
        "",
        " ",
        "\n\n",
        "panda.mp4",
        "Traceback (most recent call last):",
        "一句中文。",
        "{a} {b}",
        "%s\0\ud800",
    ):
        assert chinese(text) == text
    assert translate("The video is black, so it is not passed on to be saved.", "de") == (
        "The video is black, so it is not passed on to be saved."
    )
    assert translate("The video is black, so it is not passed on to be saved.", ENGLISH).startswith("The video")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=40),
            st.deferred(lambda: st.sampled_from([*sentences.templates()])),
            st.sampled_from([" is ", ", and ", ". ", ": ", " (", ") ", " of ", "\n"]),
        ),
        max_size=12,
    )
)
def test_nothing_raises_or_loses_a_line(pieces):
    text = "".join(pieces)
    assert chinese(text).count("\n") == text.count("\n") or text.strip() in sentences.templates()


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(
            " ".join(f"There is no x{n} at y{m} (z{n}), so it {n} is a list of {m} and {n}: the." for n in range(250))
            for m in range(5)
        ),
        "\n".join(", and ".join(f"{n} of {m} is {n} (with a {n}): {m} of the" for n in range(450)) for m in range(5)),
        "is a is, a and of: the " * 4400,
        "\n".join(f"{n} of 17 frames are black: 0-{n}" for n in range(2900)),
        "(" * 50_000 + ")" * 50_000,
    ],
    ids=["sentences", "joints", "one", "lines", "brackets"],
)
def test_a_long_text_takes_no_long_time(text):
    """About 100 kB. A report takes some milliseconds; what would take longer stays English."""
    begun = time.process_time()
    chinese(text)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN"}, "zh"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "C.UTF-8", "LANGUAGE": "zh"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "de:zh_CN:en"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en:zh"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zh_TW.UTF-8"}, "en"),
    ],
)
def test_a_terminals_language_is_found_as_gettext_does(environment, language):
    assert preferred(environment) == language


def test_the_languages_are_those_with_a_catalogue():
    assert [supported(tag) for tag in ("zh", "zh-CN", "zh-Hans-CN", "en-GB", "zh-TW", "fr", "", "*")] == [
        "zh",
        "zh",
        "zh",
        "en",
        None,
        None,
        None,
        None,
    ]


def test_the_module_needs_the_standard_library_alone():
    code = (
        "import sys, cogvideox.languages as l; l.translate('x y z', 'zh');"
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def chinese_terminal(monkeypatch):
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv("COLUMNS", "90")


def _columns(line: str) -> int:
    return sum(1 + (letter > "\u2e80") for letter in line)


@pytest.mark.usefixtures("chinese_terminal")
def test_the_help_is_chinese_and_no_line_is_wider_than_the_terminal(capsys):
    with pytest.raises(SystemExit):
        run_generate(capsys, "--help")
    said = capsys.readouterr().out
    usage, _, rest = said.partition("\n\n")
    assert usage.startswith("用法：")
    # The names of caches and kernels are choices.
    choices = {TAYLORSEER, *BACKENDS}
    assert [left for left in english_left(rest.split("示例：")[0]) if not choices & set(left.split(", "))] == []
    wide = [line for line in rest.split("示例：")[0].splitlines() if _columns(line) > 92]
    assert wide == []


@pytest.mark.usefixtures("chinese_terminal")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modl", "x"], "不认识的参数：--modl x"),
        (["--steps", "x"], "参数 --steps：“x”不是整数"),
        (["--steps"], "参数 --steps：需要一个值"),
        (["--download"], "参数 --download：至少需要一个值"),
        (["--convert", "a"], "参数 --convert：需要 2 个值"),
        (["--dtype", "x"], "参数 --dtype：无效的选择：'x'（可选："),
        (["--cfg", "x"], "参数 --cfg：无效的 float 值：'x'"),
        (["--s", "1"], "选项 --s 有歧义，可能是 --s"),
        (["--scan=1"], "参数 --scan：不需要值，却给出了 '1'"),
        (["--prompt", "x"], "生成视频需要 --model"),
        (
            ["--model", "/none", "--prompt", "x"],
            "错误：/none 不存在，所以没有东西可加载。请检查路径。CogVideoX 模型是一个",
        ),
    ],
)
def test_errors_are_chinese_those_of_argparse_too(arguments, said, capfd):
    """What argparse says itself is no sentence of ours: this holds the catalogue to its words."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(__import__("generate").main(arguments))
    assert ended.value.code in (1, 2)
    assert said in capfd.readouterr().err


@pytest.mark.usefixtures("chinese_terminal")
def test_a_check_is_told_in_chinese_and_its_json_is_for_programs(tiny, capsys):
    code, said, _ = run_generate(capsys, "--check", tiny, "--device", "cpu")
    assert code == 0
    assert "Transformer：保存为 bf16" in said
    assert english_left(said) == []
    _, data, _ = run_generate(capsys, "--check", tiny, "--device", "cpu", "--json")
    assert not CHINESE.search(data)
    assert json.loads(data)["verdict"] == "ok"


def test_what_a_cast_loses_is_told_in_chinese():
    counts = dict(values=9, beyond_fp16=1, flushed=2, subnormal=3, overflowed=1, vanished=2, rounding=0.5)
    for few in (counts, {"values": 9, "subnormal": 3}):
        said = chinese(WeightAudit("transformer", torch.float16, **few).text)
        assert english_left(said) == []
        assert not re.search("overflow|flush|subnormal", said)
    said = chinese(
        "VAE: cast from fp32 (2.65 MB) + bf16 (1.00 MB) to fp16 (1.33 MB), in 2 files; from /x (layout: SAT)"
    )
    assert "cast" not in said


@pytest.mark.usefixtures("chinese_terminal")
@pytest.mark.parametrize(
    ("pack", "draw"),
    [
        ("ComfyUI-CogVideoXWrapper", wrapper_workflows.text_to_video),
        *(("VideoX-Fun", draw) for draw in fun_workflows.USES.values()),
    ],
)
def test_a_migrated_workflow_has_its_note_in_chinese(tmp_path, capsys, pack, draw):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(draw().page()), encoding="utf-8")
    code, said, _ = run_generate(capsys, "--migrate", old, new)
    assert code == 0
    assert "个节点" in said
    nodes = json.loads(new.read_text(encoding="utf-8"))["nodes"]
    note = next(node for node in nodes if node.get("title") == f"迁移自 {pack}")
    assert CHINESE.search(note["widgets_values"][0])
    assert english_left(note["widgets_values"][0]) == []
