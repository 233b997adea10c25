"""3b. SAT's inference.yaml: check and fix. Oracle: what ``fix`` writes is finite by the check, and all else in the file
is as it was."""

import shutil

from core import WORK
from mutate import NAMES, mutate_bytes, mutate_text, put, replace_by, short

from . import common

NAME = "sat_yaml"
BASE = """# CogVideoX inference
args:
  image2video: False # True for image2video
  latent_channels: 16
  mode: inference
  load: "transformer"
  batch_size: 1
  input_type: txt
  input_file: configs/test.txt
  sampling_num_frames: 22
  sampling_fps: 16
  {flag}
  output_dir: outputs/
  force_inference: True
model:
  target: x
  params:
    network_config:
      params: {{num_layers: 42, num_attention_heads: 48, in_channels: 16, patch_size: [2, 2, 2]}}
"""
VALUES = [
    "True", "False", "yes", "off", "ON", "", "~", "null", "1", "0", "0x1", "1e3", ".nan", ".inf", "-.inf", "'True'", '"True"', "[True]", "{a: 1}", "|\n    True", ">\n    x", "!!bool True", "!!bool x", "!!int x", "!!str True", "!!python/object/apply:os.system ['touch {pwned}']",
    "!!python/name:os.system", "!!python/object/new:os.system [touch {pwned}]", "!!python/module:os", "!!binary abc", "!!binary 'a'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a]", "!!timestamp 2001-99-99", "2001-02-30", "2020-01-01", "!!float x", "!!null x", "!!merge x", "!foo bar", "&a True", "*a", "*nowhere", "&a [*a]", "&a {a: *a}",
    "9" * 5000, "0b2", "0o9", "1:99:99", "'\\ud800'", '"\\ud800"', '"\\x00"', "\u0085", "\ufeff", "@x", "`x", "%x", "? a", "- a", "<<: *a", "\tTrue", "True\t# x", "a: b: c", "{", "[", "'", '"', "...", "---", "1_000", "190:20:30", "=", "<<",
]  # fmt: skip


def prepare(base):
    state = common.build(base)
    state["pwned"] = str(WORK / "PWNED")
    return state


def case(state, rng, folder):
    text = BASE.format(flag=rng.choice(("fp16: True", "bf16: True", "fp16: True\n  bf16: False", "zero_stage: 1")))
    kind = rng.choice(("value",) * 5 + ("line", "line", "bomb", "text", "bytes", "place", "place"))
    said = ""
    if kind == "value":
        for _ in range(rng.choice((1, 1, 2, 3))):
            lines = text.split("\n")
            spot = rng.choice([i for i, line in enumerate(lines) if ":" in line])
            key = lines[spot].partition(":")[0]
            key = rng.choice(
                (
                    key,
                    key,
                    "  fp16",
                    "  bf16",
                    "  zero_stage",
                    "  mode",
                    "  load",
                    "  sampling_fps",
                    "  ?",
                    f"  {rng.choice(NAMES)[:50]}",
                    "  <<",
                    "  &b fp16",
                    "  'fp16'",
                    "  !!str fp16",
                    "args",
                )
            )
            value = rng.choice(VALUES).replace("{pwned}", state["pwned"])
            lines[spot] = f"{key}: {value}"
            said += f"{short(lines[spot])} "
            text = "\n".join(lines)
    elif kind == "line":
        lines = text.split("\n")
        for _ in range(rng.choice((1, 2, 4))):
            a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
            what = rng.choice(("swap", "again", "gone", "indent", "tab", "flow", "anchor", "comment"))
            if what == "swap":
                lines[a], lines[b] = lines[b], lines[a]
            elif what == "again":
                lines.insert(b, lines[a])
            elif what == "gone":
                lines[a] = ""
            elif what == "indent":
                lines[a] = " " * rng.randrange(6) + lines[a].strip()
            elif what == "tab":
                lines[a] = "\t" + lines[a].strip()
            elif what == "flow":
                lines = ["args: {fp16: True, bf16: False, fp16: True, load: [1, {a: b}]}", "model: {}"]
            elif what == "anchor":
                lines = [
                    "base: &b {fp16: True}",
                    "args:",
                    "  <<: *b",
                    "  mode: inference",
                    "  bf16: *c" if rng.random() < 0.3 else "  x: 1",
                ]
            else:
                lines[a] += " # fp16: True"
            said += f"{what} "
        text = "\n".join(lines)
    elif kind == "bomb":
        bomb = rng.choice(("deep", "long key", "many", "documents", "anchors"))
        if rng.random() < 0.15:
            bomb = rng.choice(("laughs", "deep flow", "merge"))
        said = bomb
        if bomb == "laughs":
            text = (
                "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
                + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
                + rng.choice(
                    (
                        "args: {fp16: True, x: *a11}\n",
                        "args:\n  fp16: True\n",
                        "args:\n  fp16: *a11\n",
                        "args:\n  load: *a11\n  bf16: True\n",
                    )
                )
            )
        elif bomb == "deep":
            text += "".join("  " * i + f"k{i}:\n" for i in range(rng.choice((100, 3000))))
        elif bomb == "deep flow":
            text += "x: " + "[" * rng.choice((100, 5000, 100_000))
        elif bomb == "long key":
            text = text.replace("mode", "m" * rng.choice((1025, 200_000)))
        elif bomb == "merge":
            text = (
                "m0: &m0 {a: 1, b: 2}\n"
                + "".join(
                    f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n"
                    for i in range(1, rng.choice((5, 14)))
                )
                + "args:\n  <<: *m4\n  fp16: True\n"
            )
            text = text.replace("*m4\n", f"*m{text.count('&m') - 1}\n")
        elif bomb == "many":
            text += "".join(f"  k{i}: {i}\n" for i in range(5000))
        elif bomb == "documents":
            text = text + "\n---\n" + text
        else:
            text = text.replace("inference\n", "&a inference\n  b: *a\n  c: &c {fp16: True}\n  <<: *c\n", 1)
    content = text.encode("utf-8", "surrogatepass")
    if kind == "text":
        content, said = mutate_text(rng, content)
    elif kind == "bytes":
        content, said = mutate_bytes(rng, content)
    file = folder / rng.choice(("inference.yaml", "configs/inference.yaml", "sat/configs/inference.yaml"))
    file.parent.mkdir(parents=True, exist_ok=True)
    put(file, content)
    # Others beside it, which are read too.
    if rng.random() < 0.5:
        put(
            file.parent / "cogvideox.yaml",
            content
            if rng.random() < 0.5
            else b"model: {network_config: {params: {num_layers: x, num_attention_heads: [1], in_channels: {}, patch_size: [2,2,2], modules: {pos_embed_config: {target: Rotary3D}}}}}",
        )
    if kind == "place":
        said = replace_by(rng, rng.choice((file, file.parent / "other.yaml", file.parent / "cogvideox.yaml")))
    if rng.random() < 0.2:
        shutil.copytree(state["base"] / "sat" / "transformer", file.parent / "transformer")

    def act():
        from interop.check import check_config, fix_config, is_config

        is_config(folder), is_config(file)
        import json

        report = check_config(folder if rng.random() < 0.5 else file)
        report.text, json.dumps(report.as_dict())
        before = file.read_bytes()
        fixed, backup = fix_config(file)
        if backup is None:
            return None if file.read_bytes() == before else "the file changed, and no copy was kept"
        if backup.read_bytes() != before:
            return "the copy is not what the file was"
        if fixed.verdict == "mismatch":
            return f"fixed, and still a mismatch: {fixed.text[:200]}"
        import yaml

        # The slow loader would take most of a large case's time.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if len(before) > 10_000 else yaml.SafeLoader
        old, new = (yaml.compose(text.decode("utf-8-sig"), Loader=loader) for text in (before, file.read_bytes()))
        if [k.value for k, _ in old.value if k.value != "args"] != [k.value for k, _ in new.value if k.value != "args"]:
            return "other settings changed"
        return None

    return f"{kind} {said}", act
