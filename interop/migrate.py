"""Workflows of ComfyUI-CogVideoXWrapper and of VideoX-Fun, of all their ages, made into workflows of this pack.

Every node of those packs becomes the one of ours that does the same, under its id and in its place, or is left out and
named in the report; all other nodes stay as they are. What would make another video if it were left out is refused.
``tables`` has the facts, ``loaders`` and ``samplers`` the steps, and ``videox_fun`` those of VideoX-Fun.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cogvideox.files import write_whole
from cogvideox.languages import ENGLISH, translate
from cogvideox.words import listed, reason, short

from . import tables
from .api import Api
from .conversion import as_number, is_inpaint, is_old
from .graph import Changes, Node
from .kinds import KINDS
from .page import Page
from .tables import FUN_PACK, PACK
from .videox_fun import VideoXFun
from .workflow import is_page, read_workflow


@dataclass(frozen=True)
class MigrationReport:
    """What became of a workflow.

    Attributes:
        source, target: the two files.
        replaced: how many nodes have one of this pack in their place.
        kept: how many are in the new workflow as they were.
        differs: what could not be carried over or should be looked at, a sentence each, with the node it is about.
        not_needed: settings that were left out because this pack does the same without being told.
    """

    source: Path
    target: Path
    replaced: int
    kept: int
    differs: tuple[str, ...]
    not_needed: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.target}: {self.replaced} nodes were replaced, {self.kept} others stay as they are.\n{self.notes}"

    @property
    def notes(self) -> str:
        """The sentences, as the note in the new workflow has them."""
        lines = (
            ["To look at:", *(f"- {line}" for line in self.differs)]
            if self.differs
            else ["Everything was carried over."]
        )
        if self.not_needed:
            lines += ["Left out, because this pack sees to it itself:", *(f"- {line}" for line in self.not_needed)]
        return "\n".join(lines)


def migrate_workflow(source: Path | str, target: Path | str, language: str = ENGLISH) -> MigrationReport:
    """Read a workflow of ComfyUI-CogVideoXWrapper or VideoX-Fun and write it with the nodes of this pack, in the format
    it came in: the page's or the API's.

    ``source`` is only read. ``target`` appears whole or not at all.

    Args:
        language: of the note in the new workflow.

    Raises:
        ValueError: if ``source`` is no such workflow, or is for something that this pack cannot do; if ``target``
            exists or cannot be written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not os.path.exists(source):
        raise ValueError(f"There is no file {short(source, 400)}, so there is no workflow to migrate. Check the path.")
    _check_target(target)
    old = read_workflow(source)
    graph = (Page if is_page(old) else Api)(old)
    migration = _Migration(graph, source)
    migration.convert()
    changes = Changes(migration.made, migration.old.keys(), migration.resolve, migration.say)
    data = graph.write(changes)
    # Said once of a node, however many others it was asked for.
    differs, not_needed = (tuple(dict.fromkeys(lines)) for lines in (migration.differs, migration.not_needed))
    report = MigrationReport(
        source, target, len(graph.nodes.keys() & migration.made.keys()), len(migration.others), differs, not_needed
    )
    pack = PACK if migration.samplers else FUN_PACK
    graph.add_note(data, translate(f"Migrated from {pack}", language), translate(report.notes, language))
    # A lone surrogate, as JavaScript leaves where it cuts a text, becomes the JSON escape that it came as.
    _write(target, json.dumps(data, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace"))
    return report


def _check_target(target: Path) -> None:
    name = short(target, 400)
    if target.suffix.lower() != ".json":
        raise ValueError(
            f"The new workflow is to be {name}, but ComfyUI opens workflows that end in .json. Give it such a name."
        )
    if os.path.lexists(target):
        raise ValueError(
            f"{name} exists, and a migration never writes over a file. Choose another name, or delete that file first."
        )
    if not os.path.isdir(target.absolute().parent):
        folder = short(target.absolute().parent, 400)
        raise ValueError(
            f"The new workflow is to be {name}, but the folder {folder} does not exist. Create it or choose another."
        )


def _write(target: Path, content: bytes) -> None:
    try:
        write_whole(target, content)
    except OSError as error:
        raise ValueError(
            f"{short(target, 400)} cannot be written ({reason(error)}), so nothing was. Choose a folder you can write "
            "to."
        ) from error


class _Migration(VideoXFun):
    """The conversion of one graph, in order."""

    def convert(self) -> None:
        self.refuse()
        for kinds, convert in (
            (tables.MODEL_LOADERS.keys() - tables.FUN_LOADERS, self.loader),
            (("CogVideoXVAELoader",), self.vae_loader),
            (("CogVideoTextEncode",), self.text_encode),
            (("CogVideoEncodePrompt",), self.encode_prompt),
            (("CogVideoTextEncodeCombine",), self.combine),
            (("CogVideoSampler",), self.sampler),
            (tables.ENCODERS, self.spare_encode),
            (("CogVideoDecode",), self.decode),
            (tables.FUN_LOADERS, self.fun_loader),
            (tables.FUN_LORAS, self.fun_lora),
            (("FunCompile", "FunAttention"), self.fun_faster),
            (tables.VIDEOX_FUN_SAMPLERS, self.fun_sampler),
        ):
            for node in self.old.values():
                if node.kind in kinds:
                    convert(node)
        self.say_kept()
        for node in self.old.values():
            self.account_for(node)
        for node in self.made.values():
            for entry in KINDS[node.kind].inputs:
                if entry.default is None and not entry.optional and entry.name not in node.wires:
                    self.say(node, f"nothing is connected to {entry.name}. Connect it.")

    def account_for(self, node: Node) -> None:
        """Name what of an old node is no more: the node, its widgets' links, and what is not known of it."""
        for name, source in self.unknown(node):
            self.say(node, f"{name} is connected to {source.where}, which is not known here and was left out.")
        widgets = tables.known_widgets(node.kind)
        if node.kind in tables.SOCKETS:
            for name in sorted(node.values.keys() - widgets - set(tables.SOCKETS[node.kind])):
                self.say(node, f"{short(name)} {short(node.values[name])} is not known here and was left out.")
        if node.id in self.made:
            for name in sorted(widgets):
                if name in node.wires and (node.id, name) not in self.settled:
                    self.say(
                        node,
                        f"{name} came over a link, which is no more: {short(node.values.get(name, 'the default'))} "
                        "was taken.",
                    )
        elif node.kind in tables.ENCODERS:
            self.say(node, "left out: it is switched off.")
        elif node.kind in tables.LORAS:
            self.say(node, "left out: it was connected to no loader.")
        elif node.kind in (*tables.SPEED, *tables.FUN_SHARED):
            if node.id not in self.told:
                self.say(node, "left out: nothing that is switched on ran with it.")
        elif node.kind != "CogVideoXVAELoader":
            self.say(node, f"left out. {tables.LEFT_OUT.get(node.kind, 'It has no counterpart here.')}")

    # --- What is refused ---

    def refuse(self) -> None:
        """Stop where the new workflow would not make the video that the old one made."""
        file = short(self.source, 400)
        hidden = next((kind for kind in self.graph.hidden() if kind in tables.OLD), None)
        if hidden is not None:
            pack = FUN_PACK if hidden in tables.FUN_KINDS else PACK
            raise ValueError(
                f"{file} has nodes of {pack} in a subgraph or group node, which are not migrated. Open it in ComfyUI, "
                "unpack those (right click: Unpack Subgraph, or Convert to Nodes), save it and migrate that."
            )
        fun = [node for node in self.old.values() if node.kind in tables.FUN_SAMPLERS]
        running = [node for node in fun if not node.is_off]
        samplers = [*self.samplers, *self.fun_samplers]
        if running or (fun and not samplers):
            node = (running or fun)[0]
            raise ValueError(
                f"{node.where} in {file} is a sampler of CogVideoX-Fun 1.0 and V1.1, whose workflows are not carried "
                "over, so nothing was written. Build it anew from inpaint in example_workflows: CogVideoX-1.5 Inpaint "
                "has its start and end images, video and mask, for CogVideoX-Fun-V1.5-5b-InP. Older models stay with "
                f"{PACK}."
            )
        if not samplers:
            ours = any(node.kind.startswith("CogVideoX15") for node in self.nodes.values())
            have = (
                "It is a workflow of this pack already."
                if ours
                else "Choose one that makes a video with one of those packs."
            )
            raise ValueError(
                f"{file} holds no CogVideoSampler of {PACK} and no CogVideoX-Fun sampler of {FUN_PACK}, the nodes that "
                f"make the video there, so there is nothing to migrate. {have}"
            )
        looked_at: set = set()
        for sampler in samplers:
            missing = self.not_here if sampler.kind == "CogVideoSampler" else self.fun_not_here
            for what, node, remedy in missing(sampler):
                if not sampler.is_off:
                    raise ValueError(
                        f"{sampler.where} in {file} uses {what} ({node.where}), which is not carried over: "
                        f"without it the video would be another one, so nothing was written. {remedy}, save the "
                        "workflow and migrate it again to have the rest."
                    )
                self.say(
                    sampler,
                    f"it uses {what} ({node.where}), which is not carried over. It is switched off; switched on "
                    "it would not work.",
                )
            if not sampler.is_off:
                self.refuse_unknown(sampler, looked_at)

    def not_here(self, sampler: Node) -> Iterator[tuple[str, Node, str]]:
        """What a sampler uses that is not in this pack, and cannot be left out: what, the node, what to do."""
        source, model = self.graph.trace(self.model_wire(sampler)), self.loader_of(sampler)
        if source is not None and model is None:
            yield (
                f"a model from a loader that is not known here, {short(source.kind)}",
                source,
                "Put one of that pack's loaders in its place",
            )
        for pattern, what in tables.OTHER_MODELS.items():
            if model is None or (pattern == tables.FUN and is_inpaint(self.asked(model))):
                continue
            if re.search(pattern, name := self.asked(model), re.IGNORECASE):
                yield f"{what}, {short(name)}", model, "Choose another model there"
        for name, what in tables.OTHER_VIDEO.items():
            node = self.graph.trace(sampler.wires.get(name))
            if node is not None:
                yield what, node, "Delete or mute it"
        image = self.graph.trace(sampler.wires.get("image_cond_latents"))
        start = self.graph.trace(sampler.wires.get("samples"))
        yield from self.other_images(sampler, image, start)
        for node in (image, start):
            mask = None if node is None else self.graph.trace(node.wires.get("mask"))
            if node is not None and mask is not None and node.kind in tables.ENCODERS:
                yield "an inpainting mask", mask, "Delete or mute it"
        known = (*tables.ENCODERS, tables.FUN_ENCODER, "CogVideoSampler", *tables.EMPTY_LATENTS)
        strength = as_number(sampler.values.get("denoise_strength", 1.0), float)
        if start is not None and start.kind not in known and strength == 1.0:
            yield (
                "noise that another node makes",
                start,
                "Delete or mute it (afterwards it can be connected to noise of the new sampler)",
            )
        for name in ("positive", "negative"):
            text = self.graph.trace(sampler.wires.get(name))
            if text is not None and text.kind == "CogVideoDualTextEncode_311":
                yield "a prompt that two text encoders read", text, "Put CogVideoTextEncode in its place"

    def other_images(self, sampler: Node, image: Node | None, start: Node | None) -> Iterator[tuple[str, Node, str]]:
        """As ``not_here``: of what a sampler is given as images and as a clip."""
        if image is not None and image.kind not in self.encoders(sampler):
            if is_inpaint(self.model_of(sampler)):
                yield "image latents without a mask", image, "Put CogVideoImageEncodeFunInP in its place"
            else:
                yield (
                    "image latents of another kind than CogVideoImageEncode's",
                    image,
                    "Put CogVideoImageEncode in its place",
                )
        if start is None:
            return
        if start.kind == tables.FUN_ENCODER:
            yield "latents of images as the clip to start from", start, "Connect it to image_cond_latents"
        elif image is not None and image.kind == tables.FUN_ENCODER and start.kind not in tables.EMPTY_LATENTS:
            yield "a clip to start from beside start and end images", start, "Delete or mute it"

    def refuse_unknown(self, sampler: Node, looked_at: set) -> None:
        """Refuse what is connected to a sampler, or to what of that pack stands before it, and is not known.

        Raises:
            ValueError: naming both nodes and the input.
        """
        todo = [sampler]
        while todo:
            node = todo.pop()
            if node.id in looked_at:
                continue
            looked_at.add(node.id)
            for name, source in self.unknown(node):
                raise ValueError(
                    f"{node.where} in {short(self.source, 400)} is given {name} by {source.where}, and what that does "
                    "is not known here: without it the video may be another one, so nothing was written. Known are: "
                    f"{listed(tables.SOCKETS[node.kind], 20)}. Take that link away, save the workflow and migrate it "
                    "again to have the rest."
                )
            before = (self.graph.trace(wire) for wire in node.wires.values())
            todo += [other for other in before if other is not None and is_old(other)]

    def unknown(self, node: Node) -> Iterator[tuple[str, Node]]:
        """What is connected to an old node and not known: the input's name, and the node that gives it."""
        if node.kind not in tables.SOCKETS:
            return
        known = {*tables.SOCKETS[node.kind], *tables.known_widgets(node.kind)}
        for name, wire in node.wires.items():
            source = self.graph.trace(wire)
            if source is not None and (name not in known or tables.EXPECTED.get(name, source.kind) != source.kind):
                yield short(name) or "an input without a name", source
