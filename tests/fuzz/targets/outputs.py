"""Where videos and latents are to be written: folders, links, pipes, long and odd names, what exists, what is
interrupted. Oracle: what was there stays as it was unless it was to be replaced, a refusal leaves nothing behind, and
what is written is whole."""

import os

import numpy as np
import torch

from tests.told import Told

from . import common  # noqa: F401

NAME = "outputs"
NAMES = [
    "x.mp4", "X.MP4", "x.mp4.mp4", ".mp4", "..mp4", "x.avi", "x", "", " ", " .mp4", "-.mp4", "--help.mp4", "a b.mp4", "a:b.mp4", "file:x.mp4", "concat:a|b.mp4",
    "pipe:1.mp4", "http://127.0.0.1/x.mp4", "%d.mp4", "%05d.mp4", "x\n.mp4", "x\x00.mp4", "x\x1b[31m.mp4", "\u202ex.mp4", "übung 日本.mp4", os.fsdecode(b"\xe9\xff.mp4"),
    "x" * 251 + ".mp4", "x" * 252 + ".mp4", "é" * 120 + ".mp4", "é" * 126 + ".mp4", "x" * 5000 + ".mp4", "a/" * 3000 + "x.mp4", "nowhere/x.mp4", "file/x.mp4", "folder",
    "folder/", "folder.mp4", "folder/x.mp4", "link.mp4", "dangling.mp4", "loop.mp4", "loop/x.mp4", "fifo.mp4", "null.mp4", "full.mp4", "zero.mp4", "there.mp4", "there_link.mp4",
    "readonly/x.mp4", "readonly.mp4", "folder/../x.mp4", "nowhere/../x.mp4", "./x.mp4", "~/x.mp4", "/dev/null", "/dev/full/x.mp4", "/proc/x.mp4", "/proc/self/fd/1",
]  # fmt: skip


def prepare(base):
    import av  # noqa: F401

    from cogvideox.video import write_mp4

    place = base / "outputs_warm.mp4"
    place.unlink(missing_ok=True)
    write_mp4(torch.rand(2, 16, 16, 3), place, 16, sound=(np.zeros((2, 4800), np.float32), 48_000))
    return {}


def _world(folder) -> None:
    (folder / "folder").mkdir()
    (folder / "folder.mp4").mkdir()
    (folder / "readonly").mkdir(mode=0o555)
    for name in ("file", "there.mp4", "readonly.mp4", "target.mp4"):
        (folder / name).write_text(f"mine: {name}")
    (folder / "readonly.mp4").chmod(0o444)
    os.mkfifo(folder / "fifo.mp4")
    links = {
        "link.mp4": "target.mp4", "there_link.mp4": "there.mp4", "dangling.mp4": "gone/x.mp4", "loop.mp4": "loop.mp4", "loop": "loop", "null.mp4": "/dev/null",
        "full.mp4": "/dev/full", "zero.mp4": "/dev/zero",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)


def _seen(folder) -> dict:
    found = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(here, name)
            if os.path.islink(path):
                found[path] = ("link", os.readlink(path))
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = ("file", file.read())
            else:
                found[path] = ("other", "")
    return found


def case(state, rng, folder):
    _world(folder)
    name = rng.choice(NAMES)
    kind = rng.choice(("check", "video", "video", "stopped", "latent"))
    overwrite, absolute = rng.random() < 0.4, rng.random() < 0.5
    sound = rng.choice(
        (None, (np.zeros((2, rng.choice((0, 1, 1000, 100_000))), np.float32), rng.choice((44_100, 48_000))))
    )
    frames, fps, made_from = (
        rng.choice((1, 3)),
        rng.choice((8, 16, 24)),
        rng.choice(((), ("there.mp4",), ("folder", "none", "target.mp4"))),
    )
    stem = rng.choice(("out", "x" * 100, "übung", os.fsdecode(b"\xe9"), "a b"))

    def act():
        from pathlib import Path

        from cogvideox.video import check_output, free_name, read_latent, read_video, write_latent, write_mp4

        path = folder / name if absolute and not name.startswith("/") else Path(name)
        before = _seen(folder)
        try:
            if kind == "check":
                check_output(path, overwrite, [folder / other for other in made_from])
                return None if _seen(folder) == before else "trying a place left something"
            if kind == "latent":
                place = folder / rng.choice(("folder", "new", "file", "loop", "."))
                samples = torch.rand(1, 16, 1, 2, 2)
                written = [write_latent(samples, place, stem) for _ in range(2)]
                return (
                    None
                    if len(set(written)) == 2 and torch.equal(read_latent(written[0]), samples)
                    else "the latent is another"
                )

            def stop(done, total):
                if kind == "stopped" and done == total:
                    raise KeyboardInterrupt

            target = free_name(path) if rng.random() < 0.3 else path
            write_mp4(
                torch.full((frames, 16, 16, 3), 0.5), target, fps, Told(progress=stop), overwrite=overwrite, sound=sound
            )
        except KeyboardInterrupt:
            return None if _seen(folder) == before else "an interruption left something"
        except (ValueError, RuntimeError, OSError):
            if kind != "latent" and _seen(folder) != before:
                return "a refusal left something"
            raise
        if len(read_video(target, events=Told())) != frames:
            return "the video is not whole"
        after = _seen(folder)
        new = set(after) - set(before)
        changed = {key for key in before if after.get(key) != before[key]}
        wanted = os.path.join(os.path.realpath(target.absolute().parent), target.name)
        if changed and (
            not overwrite
            or {os.path.realpath(os.path.dirname(key)) + "/" + os.path.basename(key) for key in changed} != {wanted}
        ):
            return f"something else was replaced: {len(changed)}"
        return None if len(new) + len(changed) == 1 else f"{len(new)} new files"

    return f"{kind} {name[:60]!r} overwrite={overwrite} absolute={absolute}", act
