"""``generate.py --prompts`` makes a video of each line, as a run of its own would, and stops at none that fails."""

import json
from pathlib import Path

import pytest
import torch

import generate
from cogvideox.video import read_video
from commands.many import Line, options_of, read_lines
from tests.helpers import is_same_video
from tests.helpers import run_generate as run
from tests.test_generate import no_weights

__all__ = ["no_weights"]
SMALL = ("--width", 32, "--height", 32, "--frames", 1, "--steps", 1)


@pytest.fixture
def lines(tmp_path, tiny, capsys, monkeypatch):
    """``lines(name, text, *more)``: what comes of a file of that name; videos go to ``tmp_path/videos``."""
    monkeypatch.chdir(tmp_path)

    def get(name, text, *more):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return run(capsys, "--prompts", name, "--model", tiny, *SMALL, "--output", "videos", *more)

    return get


def made(tmp_path):
    return sorted(path.name for path in (tmp_path / "videos").iterdir())


class TestVideos:
    def test_each_is_that_of_a_run_of_its_own(self, lines, tiny, tmp_path, capsys, monkeypatch):
        import cogvideox.weights as module

        loaded, load = [], module.load_module
        monkeypatch.setattr(module, "load_module", lambda part, *rest: loaded.append(part.kind) or load(part, *rest))
        text = '{"prompt": "a panda", "seed": 3}\n\n{"prompt": "a cat", "cfg": 1, "output": "cat.mp4"}\n'
        code, said, error = lines("x.jsonl", text)
        assert code == 0, error
        assert made(tmp_path) == ["00001.mp4", "cat.mp4"]
        assert "2 videos made, 0 there already, 0 failed." in said
        # All prompts first, and each part once: the negative prompt is the same in both lines, too.
        assert loaded == ["text_encoder", "transformer", "vae"]
        assert said.count("transformer: stored") == 1
        for name, more in (("00001", ("--prompt", "a panda", "--seed", 3)), ("cat", ("--prompt", "a cat", "--cfg", 1))):
            code, _, error = run(capsys, "--model", tiny, *SMALL, *more, "--output", f"{name}.mp4")
            assert code == 0, error
            assert is_same_video(tmp_path / "videos" / f"{name}.mp4", tmp_path / f"{name}.mp4")

    def test_each_prompt_is_encoded_once(self, lines, monkeypatch):
        import cogvideox.text as module

        seen, encode = [], module.encode_prompt
        monkeypatch.setattr(
            module, "encode_prompt", lambda encoder, text, **how: seen.append(text) or encode(encoder, text, **how)
        )
        assert lines("x.txt", "@a panda\na cat\na cat\n")[0] == 0
        assert seen == ["@a panda", "", "a cat"]
        # Where nothing is guided, the negative prompt is not read.
        seen.clear()
        assert lines("x.txt", "a panda\na cat\n", "--cfg", 1, "--overwrite")[0] == 0
        assert seen == ["a panda", "a cat"]

    def test_what_is_there_is_not_made_again_and_a_failure_stops_no_other(self, lines, tmp_path, monkeypatch):
        import cogvideox.vae as module

        decode, black = module.decode, [True, False]
        monkeypatch.setattr(
            module,
            "decode",
            lambda *given, **how: decode(*given, **how) * (torch.nan if black and black.pop(0) else 1),
        )
        (tmp_path / "videos").mkdir()
        (tmp_path / "videos" / "00002.mp4").write_text("mine")
        code, said, _ = lines("x.txt", "a panda\na cat\na dog\n")
        assert code == 1
        assert "1 videos made, 1 there already, 1 failed.\nline 1: error: " in said
        assert "verdict: black" in said
        assert (tmp_path / "videos" / "00002.mp4").read_text() == "mine"
        # The second time, the line that failed alone is left to be made.
        code, said, error = lines("x.txt", "a panda\na cat\na dog\n")
        assert code == 0, error
        assert "1 videos made, 2 there already, 0 failed." in said
        assert len(read_video(tmp_path / "videos" / "00001.mp4")) == 1
        assert lines("x.txt", "a panda\na cat\na dog\n", "--overwrite")[0] == 0
        assert len(read_video(tmp_path / "videos" / "00002.mp4")) == 1

    def test_a_prompt_that_cannot_be_encoded_fails_of_its_lines_alone(self, lines, tmp_path, monkeypatch):
        import cogvideox.text as module

        encode = module.encode_prompt

        def fail(encoder, text, **how):
            if text == "a cat":
                raise RuntimeError("no such words.")
            return encode(encoder, text, **how)

        monkeypatch.setattr(module, "encode_prompt", fail)
        code, said, _ = lines("x.txt", "a panda\na cat\na dog\n")
        assert code == 1
        assert said.endswith("2 videos made, 0 there already, 1 failed.\nline 2: error: no such words.\n")
        # When it fails, and at the end.
        assert said.count("line 2: error: no such words.") == 2
        assert made(tmp_path) == ["00001.mp4", "00003.mp4"]

    def test_where_the_transformer_cannot_make_way_all_are_decoded_at_the_end(self, lines, tmp_path, monkeypatch):
        import cogvideox.sampling
        import cogvideox.vae
        import cogvideox.weights

        order = []
        for module, name in ((cogvideox.sampling, "sample"), (cogvideox.vae, "decode")):
            work = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *given, work=work, name=name, **how: order.append(name) or work(*given, **how)
            )
        assert lines("x.txt", "a\nb\n")[0] == 0
        assert order == ["sample", "decode"] * 2
        monkeypatch.setattr(cogvideox.weights.Weights, "is_stuck", True)
        order.clear()
        assert lines("x.txt", "a\nb\n", "--overwrite")[0] == 0
        assert order == ["sample"] * 2 + ["decode"] * 2

        def stop(*_, **__):
            raise KeyboardInterrupt

        # What waits for the VAE is not lost with it.
        monkeypatch.setattr(cogvideox.vae, "decode", stop)
        code, said, _ = lines("x.txt", "a\nb\n", "--overwrite")
        assert code == 130
        assert made(tmp_path) == ["00001.mp4", "00001_00001.latent", "00002.mp4", "00002_00001.latent"]
        assert said.count("--decode makes the video of them") == 2

    def test_the_transformer_is_stuck_where_the_host_has_no_room(self, handles, monkeypatch):
        import cogvideox.weights as module

        weights = module.Weights(
            handles.checkpoint, "transformer", handles.model.weights.precision, handles.model.weights.hardware
        )
        with weights.running():
            assert not weights.is_stuck
            monkeypatch.setattr(module, "_is_host", lambda device: False)
            assert not weights.is_stuck
            monkeypatch.setattr(module, "free_host_bytes", lambda: 1000)
            assert weights.is_stuck


class TestLines:
    def test_a_table_has_options_by_name(self, lines, tmp_path):
        text = '\ufeffprompt,seed,--cfg-range,dynamic_cfg,lora\n"a panda, ""big""",7,0 0.5,yes,\n\na cat,,,,\n'
        code, said, error = lines("x.csv", text, "--dry-run")
        assert code == 0, error
        assert 'line 2: videos/00002.mp4, 32x32, 1 frames, seed 7: a panda, "big"' in said
        assert "line 4: videos/00004.mp4, 32x32, 1 frames, seed 0: a cat" in said
        assert said.splitlines()[-1] == "2 videos to make, 0 there already; nothing was made (--dry-run)."
        assert not (tmp_path / "videos").exists()

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("x.txt", "a panda\u2028looks\x0bup\x85\r\na cat\r\n".encode()),
            ("x.txt", "a panda looks up\na cat\n".encode("utf-16")),
            ("x.csv", "prompt,seed\r\na panda looks up,0\r\na cat,0\r\n".encode("utf-16")),
            ("x.csv", b'prompt;seed\na panda looks up;0\n"a cat";\n'),
            ("x.csv", "\ufeffprompt\tseed\na panda, up;\t0\na cat\t\n".encode()),
        ],
    )
    def test_a_file_is_read_as_programs_save_it(self, tmp_path, name, text):
        (tmp_path / name).write_bytes(text)
        panda, cat = read_lines(tmp_path / name)
        assert panda.words["prompt"].startswith("a panda")
        assert "up" in panda.words["prompt"]
        assert cat.words["prompt"] == "a cat"
        assert cat.number == panda.number + 1

    @pytest.mark.parametrize(
        ("value", "found"),
        [(True, "default"), ("true", "default"), (False, None), ("No", None), ("default", "default")],
    )
    def test_a_switch_that_can_have_a_value_is_one(self, value, found):
        parser = generate.build_parser(generate._LineParser)
        common = parser.parse_args(["--prompts", "x.txt", "--compile", "max-autotune-no-cudagraphs"])
        line = Line(1, {"prompt": "a", "compile": value})
        assert options_of(line, common, parser.parse_args, Path("y")).compile == found

    def test_whole_numbers_are_read_as_pandas_writes_those_of_a_column_with_gaps(self):
        parser = generate.build_parser(generate._LineParser)
        common = parser.parse_args(["--prompts", "x.txt"])
        for words in ({"seed": 7.0, "frames": 17.0}, {"seed": "7.0", "frames": "17.0"}):
            found = options_of(Line(1, {"prompt": "a", **words}), common, parser.parse_args, Path("y"))
            assert (found.seed, found.frames) == (7, 17)
        for words in ({"frames": 17.5}, {"seed": "1e3"}, {"seed": 1e20}, {"frames": ".0"}):
            with pytest.raises(ValueError, match="is not a whole number"):
                options_of(Line(1, {"prompt": "a", **words}), common, parser.parse_args, Path("y"))

    def test_a_dry_run_finds_what_the_run_would(self, lines, tmp_path):
        names = ("x", "sub/x.mp4", f"{'x' * 300}.mp4", "a.mp4", "../videos/a.mp4")
        text = "\n".join(json.dumps({"prompt": "a", "output": name}) for name in names)
        said = [lines("x.jsonl", text, *more) for more in (["--dry-run"], [], ["--dry-run"])]
        assert len({error for _, _, error in said}) == 1
        error = said[0][2]
        assert "4 of 5 lines cannot be made" in error
        assert "line 1: error: The output is videos/x, but only mp4" in error
        assert "line 2: error: The output is videos/sub/x.mp4, but the folder" in error
        assert "line 3: error: The output is" in error
        assert "line 5: Its output is" in error
        # What the run made stays.
        assert made(tmp_path) == []

    def test_a_line_takes_the_place_of_the_programs_options(self):
        parser = generate.build_parser(generate._LineParser)
        common = parser.parse_args(["--lora", "a.safetensors", "--prompts", "x.txt", "--keep-audio", "--seed", "4"])

        def parse(words, found):
            return parser.parse_args(words, found)

        words = {
            "prompt": "--not an option",
            "lora": ["b.safetensors:0.5", "c.safetensors"],
            "cache_range": [0, 0.5],
            "keep_audio": False,
            "compile": True,
        }
        found = options_of(Line(3, words), common, parse, Path("y"))
        assert found.lora == [(Path("b.safetensors"), 0.5), (Path("c.safetensors"), 1.0)]
        assert (found.cache_range, found.keep_audio, found.seed) == ([0.0, 0.5], False, 4)
        assert (found.prompt, found.compile, found.output) == ("--not an option", "default", Path("y/00003.mp4"))
        assert common.lora == [(Path("a.safetensors"), 1.0)]
        assert common.keep_audio
        # Options that have two names, as the help shows them.
        several = [action for action in parser._actions if len(action.option_strings) > 1 and action.dest != "help"]
        assert several
        for action in several:
            for name in action.option_strings:
                found = options_of(Line(1, {"prompt": "x", name: "a.png"}), common, parse, Path("y"))
                assert getattr(found, action.dest) == Path("a.png")

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("x.doc", "a", "its ending says nothing of what a line is"),
            ("x.txt", "\n \n", "holds no prompt"),
            ("x.txt", "a\n" * 100_001, "has 100,001 lines with prompts, and at most 100,000 are read"),
            ("x.jsonl", "{", "Line 1 is no JSON"),
            ("x.jsonl", '{"prompt": "a"}\n[1]', "Line 2 holds no JSON object but a list"),
            ("x.jsonl", '{"promt": "a"}', "line 1: 'promt' is no option of a single video; prompt is one"),
            ("x.jsonl", '{"prompt": "a", "model": {}}', "line 1: model is {}, which is no value"),
            ("x.jsonl", '{"prompt": "a", "seed": [1, 2]}', "line 1: seed is a list, and takes one value"),
            ("x.jsonl", '{"prompt": "a", "seed": -1}', "line 1: argument --seed: -1 is outside 0"),
            ("x.jsonl", '{"prompt": "a", "dynamic_cfg": "maybe"}', "'maybe', and it is a switch: give true or false"),
            ("x.jsonl", '{"prompt": "-"}', "line 1: A prompt is -"),
            ("x.jsonl", '{"prompt": "a", "strength": 0.5}', "line 1: --strength goes with --video"),
            ("x.jsonl", '{"seed": 1}', "line 1: --prompt is required"),
            ("x.jsonl", '{"seed": 1}\n' * 20, "20 of 20 lines cannot be read.*(\nline .*){20}$"),
            ("x.jsonl", '{"seed": 1}\n' * 21, "21 of 21 lines cannot be read.*(\nline .*){20}\n…$"),
            ("x.jsonl", '{"prompt": "a", "width": 100}\n' * 21, "21 of 21 lines cannot be made.*(\nline .*){20}\n…$"),
            ("x.jsonl", '{"prompt": "a", "device": "cpu"}', "line 1: 'device' is no option of a single video"),
            ("x.jsonl", '{"prompt": "a", "output": "b.mp4"}\n' * 2, "line 2: Its output is .*b.mp4, as that of line 1"),
            (
                "x.jsonl",
                '{"prompt": "a", "width": 100}\n{"prompt": "b", "frames": 3}',
                "line 1: .*\nline 2: .*Set it to",
            ),
            ("x.csv", "prompt,prompt\na,b", "names that are empty or twice there"),
            ("x.csv", "prompt\na,b", "Line 2 has 2 cells"),
            ("x.csv", "prompt;seed\na, b; c;1", "Put a cell that holds ';', which stands between"),
            ("x.csv", "prompt,cfg_start\na,1", "line 2: 'cfg_start' is no option of a single video"),
            ("x.csv", 'prompt\na\n"b', "Line 3 is no row of a table"),
        ],
    )
    def test_what_is_wrong_is_told_of_all_lines_before_anything_is_read(
        self, lines, tmp_path, no_weights, name, text, said
    ):
        import re

        code, _, error = lines(name, text)
        assert code == 1
        assert re.search(said, error), error
        assert error.startswith("error: ")
        assert not list(tmp_path.glob("videos/*"))

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--prompt", "a"), "--prompts and --prompt"),
            (("--decode", "x.latent"), "--prompts and --decode are two things to do"),
            (("--plan",), "--plan goes with"),
        ],
    )
    def test_options_of_one_video_are_refused(self, tiny, capsys, more, said):
        with pytest.raises(SystemExit):
            run(capsys, "--prompts", "x.txt", "--model", tiny, *more)
        assert said in capsys.readouterr().err

    def test_a_dry_run_is_of_many(self, tiny, capsys):
        with pytest.raises(SystemExit):
            run(capsys, "--prompt", "x", "--model", tiny, "--dry-run")
        assert "--dry-run goes with --prompts" in capsys.readouterr().err

    def test_the_folder_is_named_after_the_file(self, tiny, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "pandas.txt").write_text(json.dumps("a panda"))
        assert run(capsys, "--prompts", "pandas.txt", "--model", tiny, *SMALL)[0] == 0
        assert [path.name for path in (tmp_path / "pandas").iterdir()] == ["00001.mp4"]
        code, _, error = run(capsys, "--prompts", "pandas.txt", "--model", tiny, *SMALL, "--output", "x.mp4")
        assert code == 1
        assert "it is the folder of all videos" in error
