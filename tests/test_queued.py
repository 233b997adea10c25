"""What is wrong with a graph, as ComfyUI asks for it when the graph is queued."""

import inspect
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from interop.migrate import migrate_workflow
from tests import fun_workflows, wrapper_workflows
from tests.conftest import ROOT
from tests.layouts import write_file
from tests.tiny_checkpoint import build_transformer

#: Small enough for any machine.
SIZE = {"width": 160, "height": 96, "length": 17}


@pytest.fixture
def errors(pack, monkeypatch):
    """``errors(graph)``: ``(class, widget, sentence)`` of each error, by ComfyUI's rule: a node is asked if its
    function names one of its widgets, and its answer is repeated for each that is named."""
    queued, host = (sys.modules[f"{pack.__name__}.nodes.{name}"] for name in ("queued", "host"))
    looks = []
    monkeypatch.setattr(
        host.comfyui, "server", lambda: SimpleNamespace(add_on_prompt_handler=lambda handler: looks.append(handler))
    )
    queued.watch(pack.NODE_CLASS_MAPPINGS)

    def ask(graph, **more):
        found = []
        data = {"prompt": graph, **more}
        assert looks[0](data) is data
        for node_id, node in graph.items():
            if node["class_type"] not in pack.NODE_CLASS_MAPPINGS:
                continue
            function = pack.NODE_CLASS_MAPPINGS[node["class_type"]].VALIDATE_INPUTS
            monkeypatch.setattr(host, "running_node", lambda node_id=node_id: node_id)
            named = [name for name in inspect.getfullargspec(function).args if name in node["inputs"]]
            given = {name: node["inputs"][name] for name in named if not isinstance(node["inputs"][name], list)}
            answer = function(**given) if named else True
            found += [
                (node["class_type"].removeprefix("CogVideoX15"), name, answer) for name in given if answer is not True
            ]
        return found

    yield ask
    queued._current = queued.Queued({}, {})


@pytest.fixture
def graph(checkpoints, pack, monkeypatch):
    """``graph(workflow, variant)``: an example, as it is queued, for a tiny checkpoint that is listed."""
    host = sys.modules[f"{pack.__name__}.nodes.host"]
    variants = ("1.5", "1.5-i2v", "5b-i2v")
    monkeypatch.setattr(
        host, "checkpoints", lambda: [SimpleNamespace(label=str(checkpoints(variant)), width=0) for variant in variants]
    )

    def make(name="text_to_video", variant="1.5"):
        nodes = json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
        for node in nodes.values():
            if node["class_type"] == "CogVideoX15ModelLoader":
                node["inputs"]["model"] = str(checkpoints(variant))
            if "width" in node["inputs"]:
                node["inputs"].update(SIZE)
        return nodes

    return make


def of(graph, kind):
    """A node's inputs, which may be changed."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] == kind)


def before_the_sampler(graph, *nodes):
    sampler = of(graph, "CogVideoX15Sampler")
    for number, (kind, inputs) in enumerate(nodes, 300):
        graph[str(number)] = {"class_type": f"CogVideoX15{kind}", "inputs": inputs | {"model": sampler["model"]}}
        sampler["model"] = [str(number), 0]


@pytest.mark.parametrize(
    ("name", "variant"), [("text_to_video", "1.5"), ("image_to_video", "1.5-i2v"), ("video_to_video", "1.5")]
)
def test_a_graph_that_can_run_has_no_errors(errors, graph, name, variant):
    assert errors(graph(name, variant)) == []


WIDGETS = [
    ("ModelLoader", "model", "nowhere", "There is no checkpoint at"),
    ("ModelLoader", "dtype", "fp64", "Choose one of auto, bf16, fp16, fp32"),
    ("ModelLoader", "vae_name", "nowhere", "There is no vae at"),
    ("EmptyLatent", "length", 80, "Set it to 65 or 81"),
    ("EmptyLatent", "width", "100", "Set it to 96 or 112"),
    ("EmptyLatent", "batch_size", 0, "there would be no video"),
    ("Sampler", "steps", 0, "steps"),
    ("Sampler", "denoise", 0.01, "leaves no step to run"),
    ("Sampler", "cfg", 0.5, "guidance begins at 1"),
    ("ContextWindows", "length", 160, "Set it to 157 or 161"),
    ("ContextWindows", "overlap", 41, "no window would get any further"),
    ("ContextWindows", "blend", "pyramid", "Choose one of linear"),
    ("Extend", "length", 80, "Set it to 77 or 81"),
    ("Extend", "overlap", 4, "Set it to 1 or 5"),
    ("Extend", "overlap", 81, "nothing new would be made"),
    ("Sampler", "scheduler", "euler", "Choose one of ddim, dpm, ddim_origin"),
    ("BlackFrameCheck", "picture_black_ratio", 98, "it is a share between 0 and 1"),
]


#: What no widget takes, and the nearest that the widget does.
BEYOND = [
    ("EmptyLatent", "width", 99999, "Set it to 16384."),
    ("EmptyLatent", "width", 16383, "Set it to 16368 or 16384."),
    ("EmptyLatent", "length", 99998, "Set it to 16001."),
    ("Extend", "length", 99999, "Set it to 16001."),
    ("ContextWindows", "length", 99998, "Set it to 16001;"),
]


@pytest.mark.parametrize(("kind", "widget", "value", "said"), WIDGETS + BEYOND)
def test_a_bad_widget_is_one_error_at_that_widget(errors, graph, kind, widget, value, said):
    nodes = graph({"ContextWindows": "long_video", "Extend": "extend"}.get(kind, "text_to_video"))
    of(nodes, f"CogVideoX15{kind}")[widget] = value
    ((where, field, sentence),) = errors(nodes)
    assert (where, field) == (kind, widget)
    assert said in sentence


def test_a_dtype_that_does_not_suit_is_told_at_the_dtype(errors, graph):
    nodes = graph()
    of(nodes, "CogVideoX15ModelLoader").update(dtype="fp16", on_mismatch="stop")
    ((where, field, sentence),) = errors(nodes)
    assert (where, field) == ("ModelLoader", "dtype")
    assert "on_mismatch is stop" in sentence


@pytest.mark.parametrize(("kind", "widget"), [("Sampler", "scheduler"), ("ModelLoader", "dtype")])
def test_a_choice_that_a_script_sends_without_a_value_is_refused(errors, graph, kind, widget):
    """ComfyUI passes on null where a node looks at the widget itself."""
    nodes = graph()
    of(nodes, f"CogVideoX15{kind}")[widget] = None
    assert [(where, field) for where, field, said in errors(nodes) if f"nothing comes in at {widget}" in said] == [
        (kind, widget)
    ]


def test_why_a_node_failed_is_on_it_until_it_runs_again(pack, monkeypatch):
    """ComfyUI's page shows where in the code an error came from, and not what it says."""
    page, shown = sys.modules[f"{pack.__name__}.nodes.host.page"], []
    monkeypatch.setattr(page, "running_node", lambda: "5:7")
    monkeypatch.setattr(page, "show", lambda text, node: shown.append((node, text)))
    check = pack.NODE_CLASS_MAPPINGS["CogVideoX15BlackFrameCheck"]()
    with pytest.raises(RuntimeError, match="The video is black") as error:
        check.run(images=torch.zeros(1, 16, 16, 3), action="stop")
    assert shown == [("5:7", str(error.value))]
    for _ in range(2):
        check.run(images=torch.ones(1, 16, 16, 3), action="stop")
        assert shown[1:] == [("5:7", "")]


def test_so_it_is_on_a_node_of_cores_until_it_is_queued_again(pack, monkeypatch):
    """Load LoRA with a strength of 0 asks nothing of ours that could take it off."""
    page, shown, handlers = sys.modules[f"{pack.__name__}.nodes.host.page"], [], []
    monkeypatch.setattr(page, "_failed", {"5"})
    monkeypatch.setattr(page, "show", lambda text, node: shown.append((node, text)))
    monkeypatch.setattr(page.comfyui, "server", lambda: SimpleNamespace(add_on_prompt_handler=handlers.append))
    page.watch_queue(lambda nodes: None)
    for key in ("6", "5", "5"):
        handlers[0]({"prompt": {key: {"class_type": "LoraLoader", "inputs": {}}}})
    assert shown == [("5", "")]


def test_what_is_no_longer_to_be_told_is_a_blank(pack, monkeypatch):
    """ComfyUI's page takes no notice of a text of no letters, so that what was there before would stay."""
    page, sent = sys.modules[f"{pack.__name__}.nodes.host.page"], []
    server = SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    monkeypatch.setattr(page.comfyui, "server", lambda: server)
    page.show("one\ntwo", "5")
    page.show("", "5")
    assert sent == [("one  \ntwo", "5"), (" ", "5")]


class InterruptProcessingException(Exception):
    """What Cancel raises in older versions of ComfyUI."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), ["OSError: [Errno 28] No space left on device"]),
        (KeyError("samples"), ["KeyError: 'samples'"]),
        (MemoryError(), ["MemoryError"]),
        (NotImplementedError(), ["NotImplementedError"]),
        (InterruptProcessingException(), []),
    ],
)
def test_so_is_what_the_system_or_a_library_says_but_not_that_its_user_cancelled(pack, monkeypatch, error, said):
    page, shown = sys.modules[f"{pack.__name__}.nodes.host.page"], []
    monkeypatch.setattr(page, "_failed", set())
    monkeypatch.setattr(page, "running_node", lambda: "5:7")
    monkeypatch.setattr(page, "show", lambda text, node: shown.append(text))
    with pytest.raises(type(error)) as raised, page.failures_shown():
        raise error
    assert raised.value is error
    assert shown == said


def test_the_sentence_is_on_its_node_until_it_is_mended(errors, graph, pack, monkeypatch):
    """ComfyUI's box of errors names the widget alone."""
    host, shown = sys.modules[f"{pack.__name__}.nodes.host"], []
    monkeypatch.setattr(host, "show", lambda text, node=None: shown.append((node, text)))
    nodes = graph()
    latent = next(node for node in nodes if nodes[node]["class_type"] == "CogVideoX15EmptyLatent")
    nodes[latent]["inputs"]["length"] = 80
    ((_, _, sentence),) = errors(nodes)
    assert shown == [(latent, sentence)]
    errors(nodes)
    assert shown == [(latent, sentence)] * 2
    nodes[latent]["inputs"]["length"] = 81
    for end in ([*[(latent, sentence)] * 2, (latent, "")],) * 2:
        assert errors(nodes) == []
        assert [told for told in shown if told[0] == latent] == end


def test_a_name_that_is_known_but_not_listed_is_asked_for(errors, graph, pack, monkeypatch):
    """ComfyUI would refuse it as not in the list."""
    host = sys.modules[f"{pack.__name__}.nodes.host"]
    nodes = graph()
    monkeypatch.setattr(host, "checkpoints", lambda: [SimpleNamespace(label="listed otherwise here", width=0)])
    assert errors(nodes) == []
    assert inspect.getfullargspec(pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"].VALIDATE_INPUTS).args == ["model"]


def test_two_mistakes_are_each_at_their_widget(errors, graph):
    nodes = graph()
    of(nodes, "CogVideoX15EmptyLatent")["length"] = 80
    of(nodes, "CogVideoX15Sampler")["cfg"] = 0.5
    assert [error[:2] for error in errors(nodes)] == [("EmptyLatent", "length"), ("Sampler", "cfg")]


class TestAsAWhole:
    """What each node alone could run with, but not together: one error, before anything runs."""

    def only(self, errors, nodes):
        (error,) = errors(nodes)
        return error

    @pytest.mark.parametrize(
        ("variant", "node", "said"),
        [
            ("fun-inp", "Inpaint", None),
            ("void", "Void", None),
            ("void", "Inpaint", "only CogVideoX-Fun-V1.5-InP checkpoints do"),
            ("1.5", "Inpaint", "only CogVideoX-Fun-V1.5-InP checkpoints do"),
            ("fun-inp", "Void", "only VOID's checkpoints do"),
            ("1.5", "Void", "only VOID's checkpoints do"),
            ("fun-inp", "ImageToVideo", "Put CogVideoX-1.5 Inpaint in its place"),
        ],
    )
    def test_a_node_of_another_model(self, errors, graph, variant, node, said):
        nodes = graph("text_to_video", variant)
        picture = {"300": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}}
        sampler = of(nodes, "CogVideoX15Sampler")
        given = {name: sampler[name] for name in ("positive", "negative")} | SIZE
        given["vae"] = of(nodes, "CogVideoX15VAEDecode")["vae"]
        own = {
            "Inpaint": {"batch_size": 1, "length": 13},
            "Void": {"video": ["300", 0], "quadmask": ["300", 1], "stage": "first", "length": 13},
            "ImageToVideo": {"start_image": ["300", 0], "batch_size": 1},
        }[node]
        nodes |= picture | {"301": {"class_type": f"CogVideoX15{node}", "inputs": given | own}}
        sampler |= {"positive": ["301", 0], "negative": ["301", 1], "latent_image": ["301", 2]}
        if said is None:
            assert errors(nodes) == []
        else:
            assert said in self.only(errors, nodes)[2]

    def test_a_length_that_is_not_in_pairs(self, errors, graph):
        nodes = graph("text_to_video", "fun-inp")
        of(nodes, "CogVideoX15EmptyLatent")["length"] = 33
        assert "8N+5" in self.only(errors, nodes)[2]

    def runs_in_pairs(self, errors, old, checkpoint, folder):
        """A workflow, migrated, has no error with that checkpoint, and one with a length that is not whole pairs."""
        (folder / "old.json").write_text(json.dumps(old.api()))
        migrate_workflow(folder / "old.json", folder / "new.json")
        nodes = json.loads((folder / "new.json").read_text())
        of(nodes, "CogVideoX15ModelLoader")["model"] = str(checkpoint)
        assert errors(nodes) == []
        of(nodes, "CogVideoX15Inpaint")["length"] = 17
        assert "8N+5" in self.only(errors, nodes)[2]

    @pytest.mark.parametrize("use", ["images", "text"])
    def test_a_migrated_graph_of_fun_can_run(self, errors, graph, checkpoints, tmp_path, use):
        graph()
        w = wrapper_workflows.inpaint() if use == "images" else wrapper_workflows.text_to_video()
        w.change("loader", model="alibaba-pai/CogVideoX-Fun-V1.5-5b-InP")
        w.change("sampler", num_frames=9)
        w.change("resize" if use == "images" else "size", width=160, height=96)
        self.runs_in_pairs(errors, w, checkpoints("fun-inp"), tmp_path)

    def test_a_migrated_graph_of_videox_fun_can_run(self, errors, graph, checkpoints, tmp_path):
        graph()
        w = fun_workflows.image_to_video()
        w.add("ImageScale", "scale", image=("picture", 0), width=160, height=96)
        w.change("sampler", start_img=("scale", 0), base_resolution=128, video_length=9)
        self.runs_in_pairs(errors, w, checkpoints("fun-inp"), tmp_path)

    def test_a_mask_without_a_video(self, errors, graph):
        nodes = graph("text_to_video", "fun-inp")
        sampler = of(nodes, "CogVideoX15Sampler")
        given = {name: sampler[name] for name in ("positive", "negative")} | SIZE | {"length": 13, "batch_size": 1}
        given |= {"vae": of(nodes, "CogVideoX15VAEDecode")["vae"], "mask": ["300", 1]}
        nodes["300"] = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
        nodes["301"] = {"class_type": "CogVideoX15Inpaint", "inputs": given}
        sampler |= {"positive": ["301", 0], "negative": ["301", 1], "latent_image": ["301", 2]}
        assert "no video, so there is nothing" in self.only(errors, nodes)[2]

    def test_an_image_to_video_checkpoint_without_an_image(self, errors, graph):
        kind, field, said = self.only(errors, graph("text_to_video", "1.5-i2v"))
        assert (kind, field) == ("ModelLoader", "model")
        assert "no start image is connected" in said
        # core's own text encoder gives none either.
        nodes = graph("text_to_video", "1.5-i2v")
        for node in nodes.values():
            if node["class_type"] == "CogVideoX15TextEncode":
                node["class_type"] = "CLIPTextEncode"
        assert "no start image is connected" in self.only(errors, nodes)[2]
        # Another pack's node may.
        of(nodes, "CogVideoX15Sampler")["positive"] = ["400", 0]
        nodes["400"] = {"class_type": "Another", "inputs": {}}
        assert errors(nodes) == []

    def test_a_text_to_video_checkpoint_with_one(self, errors, graph):
        kind, field, said = self.only(errors, graph("image_to_video", "1.5"))
        assert (kind, field) == ("ModelLoader", "model")
        assert "is a text-to-video model and a start image is connected" in said

    def test_with_a_video_to_start_from_too(self, errors, graph):
        kind, field, said = self.only(errors, graph("video_to_video", "1.5-i2v"))
        assert (kind, field) == ("ModelLoader", "model")
        assert "no start image is connected" in said

    def test_a_checkpoint_without_text_encoder(self, errors, graph, checkpoints, tmp_path):
        folder = tmp_path / "CogVideoX1.5"
        folder.mkdir()
        for part in checkpoints("1.5").iterdir():
            if part.name not in ("text_encoder", "tokenizer"):
                (folder / part.name).symlink_to(part)
        nodes = graph()
        of(nodes, "CogVideoX15ModelLoader")["model"] = str(folder)
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("ModelLoader", "model")
        assert "text encoder" in said or "text_encoder" in said
        # Nothing asks for it where the prompt is another node's.
        of(nodes, "CogVideoX15TextEncode")
        for node in nodes.values():
            if node["class_type"] == "CogVideoX15TextEncode":
                node["inputs"]["text_encoder"] = ["400", 0]
        nodes["400"] = {"class_type": "CLIPLoader", "inputs": {}}
        assert errors(nodes) == []

    def test_a_lora_of_another_model(self, errors, graph, tmp_path):
        other = build_transformer(num_attention_heads=4).state_dict()
        width = other["transformer_blocks.0.attn1.to_q.weight"].shape[0]
        lora = write_file(
            tmp_path / "lora.safetensors",
            {
                f"transformer.transformer_blocks.0.attn1.to_q.lora_{which}.weight": torch.zeros(shape)
                for which, shape in (("A", (4, width)), ("B", (width, 4)))
            },
        )
        nodes = graph()
        before_the_sampler(nodes, ("LoraLoader", {"lora_name": str(lora), "strength": 1.0}))
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("LoraLoader", "lora_name")
        assert "lora.safetensors" in said

    def test_a_length_or_size_that_the_model_does_not_make(self, errors, graph):
        nodes = graph()
        of(nodes, "CogVideoX15EmptyLatent")["length"] = 9
        # 8N+1 is what the 1.0 models make; which it is the sampler knows.
        assert errors(nodes) == [] or "length" in str(errors(nodes))
        nodes = graph("image_to_video", "5b-i2v")
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("ImageToVideo", "width")
        assert "has learned positions for" in said
        nodes = graph("image_to_video", "1.5-i2v")
        of(nodes, "CogVideoX15ImageToVideo")["length"] = 25
        assert self.only(errors, nodes)[:2] == ("ImageToVideo", "length")
        of(nodes, "CogVideoX15ImageToVideo")["length"] = 1
        assert errors(nodes) == []
        of(nodes, "CogVideoX15ImageToVideo")["end_image"] = of(nodes, "CogVideoX15ImageToVideo")["start_image"]
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("ImageToVideo", "length")
        assert "it would end where it starts" in said

    def test_what_only_the_sampler_knows_is_said_where_it_can_be_changed(self, errors, graph):
        nodes = graph("long_video")
        of(nodes, "CogVideoX15EmptyLatent")["length"] = 321
        of(nodes, "CogVideoX15Sampler")["scheduler"] = "dpm"
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("Sampler", "scheduler")
        assert "Set scheduler to ddim" in said
        nodes = graph("image_to_video", "1.5-i2v")
        nodes["90"] = {
            "class_type": "CogVideoX15EmptyLatent",
            "inputs": {"width": 64, "height": 64, "length": 17, "batch_size": 1},
        }
        of(nodes, "CogVideoX15Sampler")["latent_image"] = ["90", 0]
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("EmptyLatent", "width")
        assert "The conditioning was made for" in said

    @pytest.mark.parametrize(
        ("kind", "inputs", "said"),
        [
            ("ConditioningSetTimestepRange", {"start": 0.0, "end": 0.5}, "(end_percent)"),
            ("ConditioningSetTimestepRange", {"start": 0.0, "end": 1.0}, None),
            ("ConditioningSetTimestepRange", {"start": "0.0", "end": 1}, None),
            ("ConditioningSetTimestepRange", {"start": ["70", 0], "end": 1.0}, None),
            ("ConditioningSetMask", {"mask": ["70", 0], "strength": 1.0, "set_cond_area": "default"}, "(mask)"),
            ("ConditioningSetAreaPercentageVideo", {"width": 0.5, "height": 1.0, "temporal": 1.0}, "(area)"),
        ],
    )
    def test_a_prompt_for_a_part_is_no_prompt_of_this_sampler(self, errors, graph, kind, inputs, said):
        nodes = graph()
        sampler = of(nodes, "CogVideoX15Sampler")
        nodes["80"] = {"class_type": kind, "inputs": inputs | {"conditioning": sampler["negative"]}}
        sampler["negative"] = ["80", 0]
        found = errors(nodes)
        assert [entry[0] for entry in found] == ([] if said is None else ["Sampler"])
        assert said is None or (said in found[0][2] and "KSampler behind CogVideoX-1.5 to ComfyUI" in found[0][2])

    def test_prompts_are_seen_through_cores_nodes(self, errors, graph):
        def through(kind, nodes, **inputs):
            sampler = of(nodes, "CogVideoX15Sampler")
            nodes["80"] = {"class_type": kind, "inputs": inputs}
            sampler["negative"] = ["80", 0]
            return nodes

        nodes = graph()
        one, other = (of(nodes, "CogVideoX15Sampler")[side] for side in ("positive", "negative"))
        for second in (other, ["70", 0]):
            combined = through("ConditioningCombine", graph(), conditioning_1=one, conditioning_2=second)
            assert "holds 2 prompts side by side" in self.only(errors, combined)[2]
        control = {"positive": one, "negative": other, "control_net": ["70", 0], "image": ["71", 0], "strength": 1.0}
        said = self.only(errors, through("ControlNetApplyAdvanced", graph(), **control))[2]
        assert "(control)" in said
        assert not errors(through("ControlNetApplyAdvanced", graph(), **control | {"strength": "0.0"}))
        mixed = {"conditioning_to": one, "conditioning_from": ["70", 0]}
        for kind, inputs in {
            "ConditioningZeroOut": {"conditioning": one},
            "ConditioningAverage": mixed | {"conditioning_to_strength": 0.5},
            "ConditioningConcat": mixed,
        }.items():
            assert not errors(through(kind, graph(), **inputs))
            said = self.only(errors, through(kind, graph("text_to_video", "1.5-i2v"), **inputs))[2]
            assert "no start image is connected" in said

    def test_a_second_pass_is_seen_through_the_first_and_through_cores_scaling(self, errors, graph):
        """22 cells and a half more are 33, which is no even number."""
        nodes = graph()
        of(nodes, "CogVideoX15EmptyLatent")["width"] = 176
        (first,) = [name for name, node in nodes.items() if node["class_type"] == "CogVideoX15Sampler"]
        scaled = {"samples": [first, 0], "upscale_method": "bilinear", "scale_by": 1.5}
        nodes["80"] = {"class_type": "LatentUpscaleBy", "inputs": scaled}
        nodes["81"] = {
            "class_type": "CogVideoX15Sampler",
            "inputs": nodes[first]["inputs"] | {"latent_image": ["80", 0], "denoise": 0.5},
        }
        kind, _, said = self.only(errors, nodes)
        assert kind == "Sampler"
        assert "33x18 cells" in said
        for kind, inputs, wrong in (
            ("LatentUpscaleBy", scaled | {"scale_by": 2.0}, 0),
            ("LatentUpscale", scaled | {"width": 264, "height": 192, "crop": "disabled"}, 1),
            ("LatentUpscale", scaled | {"width": 352, "height": 192, "crop": "disabled"}, 0),
            ("LatentUpscale", scaled | {"width": 352, "height": 200, "crop": "disabled"}, 1),
            ("LatentUpscale", scaled | {"width": 24, "height": 192, "crop": "disabled"}, 0),
            # What core works out itself is not known.
            ("LatentUpscale", scaled | {"width": 0, "height": 200, "crop": "disabled"}, 0),
        ):
            nodes["80"] = {"class_type": kind, "inputs": inputs}
            assert len(errors(nodes)) == wrong

    @pytest.mark.parametrize(
        ("kind", "value", "widget", "said"),
        [
            ("PrimitiveInt", 0, ("CogVideoX15Sampler", "steps"), "steps is 0"),
            ("PrimitiveInt", 100, ("CogVideoX15EmptyLatent", "width"), "Set it to 96 or 112"),
            ("PrimitiveFloat", float("nan"), ("CogVideoX15Sampler", "denoise"), "denoise"),
            ("PrimitiveString", "euler", ("CogVideoX15Sampler", "scheduler"), "Choose one of ddim"),
            ("PrimitiveInt", 20, ("CogVideoX15Sampler", "steps"), None),
            ("PrimitiveInt", "20", ("CogVideoX15Sampler", "steps"), None),
        ],
    )
    def test_a_value_of_a_primitive_node_is_looked_at_too(self, errors, graph, kind, value, widget, said):
        nodes = graph()
        nodes["80"] = {"class_type": kind, "inputs": {"value": value}}
        of(nodes, widget[0])[widget[1]] = ["80", 0]
        found = errors(nodes)
        assert [entry[0] for entry in found] == ([] if said is None else [widget[0].removeprefix("CogVideoX15")])
        assert said is None or said in found[0][2]

    def test_it_hides_nothing_else(self, errors, graph):
        nodes = graph("long_video")
        nodes["80"] = {"class_type": "PrimitiveInt", "inputs": {"value": 321}}
        of(nodes, "CogVideoX15EmptyLatent")["length"] = ["80", 0]
        of(nodes, "CogVideoX15Sampler")["scheduler"] = "dpm"
        assert "Set scheduler to ddim" in self.only(errors, nodes)[2]

    def test_an_output_of_the_bridge_without_its_input(self, errors, graph):
        nodes = graph("native_nodes")
        assert errors(nodes) == []
        for name, output in (("vae", "VAE"), ("text_encoder", "CLIP")):
            nodes = graph("native_nodes")
            del of(nodes, "CogVideoX15ToComfyUI")[name]
            ((_, _, said),) = errors(nodes)
            assert f"{output} of CogVideoX-1.5 to ComfyUI is connected and its input {name} is not" in said

    def test_nor_is_what_is_connected_to_such_a_leftover(self, errors, graph, pack, monkeypatch):
        page = sys.modules[f"{pack.__name__}.nodes.host.page"]
        saves = SimpleNamespace(OUTPUT_NODE=True)
        monkeypatch.setattr(page.comfyui, "node_classes", lambda: {"SaveVideo": saves} | pack.NODE_CLASS_MAPPINGS)
        nodes = {
            "1": {"class_type": "CogVideoX15ToComfyUI", "inputs": {}},
            "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "x"}},
            "3": {"class_type": "SaveVideo", "inputs": {"video": ["1", 2]}},
        }
        assert not page.is_connected(nodes, "1", 1)
        assert page.is_connected(nodes, "1", 2)
        assert not page.is_connected(None, "1", 2)

    def test_what_leads_to_no_output_is_not_looked_at(self, errors, graph, pack, monkeypatch):
        """Nor what was not asked for: ComfyUI runs neither."""
        host = sys.modules[f"{pack.__name__}.nodes.host.comfyui"]
        saves = SimpleNamespace(OUTPUT_NODE=True)
        monkeypatch.setattr(host, "node_classes", lambda: {"SaveVideo": saves} | pack.NODE_CLASS_MAPPINGS)
        nodes = graph("image_to_video", "1.5-i2v")
        (sampler,) = [name for name, node in nodes.items() if node["class_type"] == "CogVideoX15Sampler"]
        nodes["90"] = {"class_type": "CogVideoX15Sampler", "inputs": nodes[sampler]["inputs"] | {"steps": 0}}
        assert errors(nodes) == []
        nodes["91"] = {"class_type": "SaveVideo", "inputs": {"video": ["90", 0]}}
        assert "steps is 0" in self.only(errors, nodes)[2]
        (asked,) = [name for name, node in nodes.items() if node["class_type"] == "SaveVideo" and name != "91"]
        assert errors(nodes, partial_execution_targets=[asked]) == []
        assert len(errors(nodes, partial_execution_targets=["91"])) == 1

    CACHE, COMPILE = {"strength": 0.5, "start": 0.0, "end": 1.0}, {"mode": "default", "dynamic": False}

    @pytest.mark.parametrize(
        ("nodes", "where", "said"),
        [
            (
                [("Cache", CACHE | {"method": "pab"}), ("Compile", COMPILE)],
                ("Compile", "mode"),
                "The cache pab and compiling do not work together",
            ),
            (
                [("Compile", COMPILE), ("Cache", CACHE | {"method": "faster_cache"})],
                ("Cache", "method"),
                "The cache faster_cache and compiling do not work together",
            ),
            (
                [("Cache", CACHE | {"method": "taylorseer"})] * 2,
                ("Cache", "method"),
                "The model has a cache already (taylorseer)",
            ),
            (
                [("Cache", CACHE | {"method": "first_block", "start": 0.9, "end": 0.1})],
                ("Cache", "method"),
                "it would never act",
            ),
            (
                [("Quantize", {"method": "int8_weight_only"})] * 2,
                ("Quantize", "method"),
                "The transformer is quantized already (int8_weight_only)",
            ),
        ],
    )
    def test_what_does_not_work_together(self, errors, graph, nodes, where, said):
        given = graph()
        before_the_sampler(given, *nodes)
        *found, sentence = self.only(errors, given)
        assert tuple(found) == where
        assert said in sentence

    WINDOWS = {"length": 21, "overlap": 2, "blend": "linear"}

    def test_a_long_clip_in_windows_says_so_and_nothing_of_what_was_trained(self, errors, graph, pack, monkeypatch):
        shown: list[str] = []
        monkeypatch.setattr(sys.modules[f"{pack.__name__}.nodes.host"], "show", lambda text, _: shown.append(text))
        nodes = graph()
        of(nodes, "CogVideoX15Sampler")["scheduler"] = "ddim"
        of(nodes, "CogVideoX15EmptyLatent")["length"] = 313
        assert errors(nodes) == []
        assert "313 frames (the model card goes up to 161)" in " ".join(shown)
        shown.clear()
        before_the_sampler(nodes, ("ContextWindows", self.WINDOWS | {"length": 161, "overlap": 4}))
        assert errors(nodes) == []
        assert "The clip of 313 frames is made in 2 windows of 161 frames" in " ".join(shown)
        assert "the model card goes up to" not in " ".join(shown)

    def test_windows_that_the_sampler_cannot_run(self, errors, graph):
        nodes = graph()
        of(nodes, "CogVideoX15Sampler")["scheduler"] = "dpm"
        before_the_sampler(nodes, ("ContextWindows", self.WINDOWS))
        assert errors(nodes) == []
        of(nodes, "CogVideoX15EmptyLatent")["length"] = 33
        assert "Set scheduler to ddim" in self.only(errors, nodes)[2]
        of(nodes, "CogVideoX15Sampler")["scheduler"] = "ddim_origin"
        assert errors(nodes) == []
        of(nodes, "CogVideoX15Sampler")["scheduler"] = "ddim"
        of(nodes, "CogVideoX15ContextWindows")["overlap"] = 3
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("ContextWindows", "overlap")
        assert "in groups of 2" in said

    def test_windows_that_core_would_not_run(self, errors, graph):
        nodes = graph()
        before_the_sampler(nodes, ("ContextWindows", self.WINDOWS))
        nodes["600"] = {"class_type": "CogVideoX15ToComfyUI", "inputs": {"model": ["300", 0]}}
        assert "put ComfyUI's Context Windows (Manual) behind" in self.only(errors, nodes)[2]

    def test_a_part_of_a_length_that_the_model_does_not_make(self, errors, graph):
        nodes = graph("extend", "1.5-i2v")
        assert errors(nodes) == []
        of(nodes, "CogVideoX15Extend")["length"] = 25
        assert self.only(errors, nodes)[:2] == ("Extend", "length")
        # With the VAE of CogVideoX-Fun, whose latent frames come in pairs.
        nodes = graph("extend", "fun-inp")
        of(nodes, "CogVideoX15Extend")["length"] = 81
        assert ("Extend", "length") in [error[:2] for error in errors(nodes)]
        of(nodes, "CogVideoX15Extend")["length"] = 85
        assert "Extend" not in [error[0] for error in errors(nodes)]

    def test_a_second_card_that_is_not_there_or_that_does_not_go_with_the_rest(self, errors, graph):
        nodes = graph()
        before_the_sampler(nodes, ("SecondGPU", {"device": "cuda:7"}))
        kind, field, said = self.only(errors, nodes)
        assert (kind, field) == ("SecondGPU", "device")
        assert "The second device is cuda:7" in said
        nodes = graph()
        before_the_sampler(nodes, ("SecondGPU", {"device": "none"}), ("Compile", self.COMPILE))
        assert errors(nodes) == []
        # A second copy on the CPU is for tests: no list has it.
        nodes = graph()
        before_the_sampler(nodes, ("SecondGPU", {"device": "cpu"}), ("Compile", self.COMPILE))
        said = self.only(errors, nodes)[2]
        assert "Compiling and a second GPU do not work together" in said
        nodes = graph()
        before_the_sampler(nodes, ("SecondGPU", {"device": "cpu"}))
        model = of(nodes, "CogVideoX15Sampler")["model"]
        nodes["400"] = {"class_type": "CogVideoX15ToComfyUI", "inputs": {"model": model}}
        assert "which only CogVideoX-1.5 Sampler gives half of the work" in self.only(errors, nodes)[2]

    def test_a_cache_that_skips_nothing_goes_with_everything(self, errors, graph):
        nodes = graph()
        cache = {"method": "pab", "strength": 0, "start": 0.0, "end": 1.0}
        before_the_sampler(nodes, ("Cache", cache), ("Compile", self.COMPILE))
        assert errors(nodes) == []

    def test_two_samplers_of_one_model_say_it_once(self, errors, graph):
        nodes = graph("text_to_video", "1.5-i2v")
        sampler = next(node for node in nodes.values() if node["class_type"] == "CogVideoX15Sampler")
        nodes["500"] = {**sampler, "inputs": dict(sampler["inputs"])}
        assert self.only(errors, nodes)[2].count("no start image is connected") == 1


@pytest.mark.parametrize(
    ("variant", "change", "said"),
    [
        ("1.5", {}, None),
        ("1.5", {"scale": 9}, ("scale", "1 to 8 times")),
        ("1.5", {"reference_frames": "0, 2"}, ("reference_frames", "4 or more apart")),
        ("1.5", {"kind": "sparkvsr"}, ("kind", "kind is sparkvsr")),
        ("1.5", {"references": ["13", 0], "reference_frames": "0"}, ("kind", "which reads none")),
        ("1.5-i2v", {}, ("kind", "set kind to sparkvsr")),
        ("1.5-i2v", {"kind": "sparkvsr", "references": ["13", 0]}, ("kind", "does not say which frames")),
        ("1.5-i2v", {"kind": "sparkvsr", "references": ["13", 0], "reference_frames": "0"}, None),
        ("5b-i2v", {}, ("kind", "not of a kind")),
        ("1.5", {"text_encoder": None}, ("kind", "Connect the text_encoder of the model loader once")),
    ],
)
def test_super_resolution_that_cannot_run(errors, graph, variant, change, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes = graph("super_resolution", variant)
    inputs = of(nodes, "CogVideoX15SuperResolution")
    inputs.update(change)
    if inputs["text_encoder"] is None:
        del inputs["text_encoder"]
    found = errors(nodes)
    if said is None:
        assert found == []
    else:
        ((kind, field, sentence),) = found
        assert (kind, field) == ("SuperResolution", said[0])
        assert said[1] in sentence


def test_an_end_image_that_the_model_was_not_trained_for_is_said_on_the_sampler(errors, graph, pack, monkeypatch):
    shown = []
    host = sys.modules[f"{pack.__name__}.nodes.host"]
    monkeypatch.setattr(host, "show", lambda text, node=None: shown.append((node, text)))
    nodes = graph("image_to_video", "1.5-i2v")
    of(nodes, "CogVideoX15ImageToVideo")["end_image"] = of(nodes, "CogVideoX15ImageToVideo")["start_image"]
    assert errors(nodes) == []
    sampler = next(key for key, node in nodes.items() if node["class_type"] == "CogVideoX15Sampler")
    assert any(node == sampler and "unless this is a fine-tune for interpolation" in text for node, text in shown)


def test_a_card_that_torch_was_not_built_for_is_said_on_the_loader_and_the_nodes_are_listed(
    errors, graph, pack, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA GeForce GTX 1080",
        "get_device_capability": (6, 1),
        "get_arch_list": ["sm_75", "sm_120", "compute_120"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "hip", None)
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert node.INPUT_TYPES()
    nodes = graph()
    before_the_sampler(nodes, ("Quantize", {"method": "int8_dynamic"}), ("Attention", {"attention": "sdpa"}))
    found = errors(nodes)
    assert {kind for kind, _, _ in found} == {"ModelLoader", "Quantize"}
    assert all("GTX 1080 has compute capability 6.1" in said for _, _, said in found)
    # On the CPU it can run.
    nodes = graph()
    of(nodes, "CogVideoX15ModelLoader")["memory"] = "cpu"
    assert errors(nodes) == []


def test_what_only_the_run_knows_is_left_to_it(errors, graph):
    nodes = graph()
    for kind, widget in (
        ("ModelLoader", "model"),
        ("EmptyLatent", "length"),
        ("Sampler", "scheduler"),
        ("BlackFrameCheck", "action"),
    ):
        of(nodes, f"CogVideoX15{kind}")[widget] = ["80", 0]
    nodes["80"] = {"class_type": "Another", "inputs": {}}
    assert errors(nodes) == []


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        "x",
        [1],
        {"1": None},
        {"1": {"inputs": 3}},
        {"1": {"inputs": {"model": [["1"], 0]}}},
        {"1": {"class_type": ["x"], "inputs": {"model": ["1", 0]}}},
        {"1": {"class_type": "CogVideoX15Sampler", "inputs": {"model": ["1", 0], "latent_image": ["1", "x"]}}},
        {"1": {"class_type": "CogVideoX15Compile", "inputs": {"model": ["2", 0, 3], "mode": {"__value__": []}}}},
        {"1": {"class_type": "CogVideoX15EmptyLatent", "inputs": {"width": "x", "height": None, "length": 1e400}}},
    ],
)
def test_a_graph_that_is_none_is_passed_over(pack, prompt):
    page, queued = (sys.modules[f"{pack.__name__}.nodes.{name}"] for name in ("host.page", "queued"))
    data = {"prompt": prompt}
    seen = []
    server = SimpleNamespace(add_on_prompt_handler=seen.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.comfyui, "server", lambda: server)
        queued.watch(pack.NODE_CLASS_MAPPINGS)
        for given in (data, prompt):
            assert seen[0](given) is given
        seen[0](None)


def test_what_is_left_out_of_a_graph_is_as_the_node_has_it(errors, graph):
    nodes = graph()
    sampler = of(nodes, "CogVideoX15Sampler")
    sampler.pop("cfg_start", None)
    sampler["cfg_end"] = 0.0
    ((kind, field, said),) = errors(nodes)
    assert (kind, field) == ("Sampler", "cfg_end")
    assert "no step would be guided" in said
    # What another node gives is not taken for that.
    nodes["80"] = {"class_type": "Another", "inputs": {}}
    sampler["cfg_start"] = ["80", 0]
    assert errors(nodes) == []
