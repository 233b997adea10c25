"""The example workflows as the page queues them, small and short."""

from tests import workflows

#: A size that a tiny checkpoint is quick with, and the tests' files where an example leaves the choice to its user.
_SMALL = {
    "width": 160,
    "height": 96,
    "length": 17,
    "steps": 3,
    "file": "input.mp4",
    "lora_name": "my_cogvideox_lora.safetensors",
}
#: What CogVideoX-Fun and VOID make, and the checkpoint of VOID, which an example has as a single file.
_IN_PAIRS, _VOID = {"length": 13}, "void_pass1.safetensors · bf16 · diffusers"


def example(name: str) -> dict:
    """An example's twin for scripts, which is what the page queues (test_workflows.py), at a size that runs in
    seconds."""
    return small(workflows.read(workflows.twin(next(path for path in workflows.FILES if path.stem == name))))


def small(prompt: dict) -> dict:
    """The same prompt at that size, with those files."""
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in _SMALL.items() if key in node["inputs"]}
        if node["class_type"] in ("CogVideoX15Inpaint", "CogVideoX15Void"):
            node["inputs"] |= _IN_PAIRS
        if str(node["inputs"].get("model")).startswith("void_pass1"):
            node["inputs"]["model"] = _VOID
    return prompt


def id_of(prompt: dict, kind: str) -> str:
    """The id of the first node of a class."""
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def node_of(prompt: dict, kind: str) -> dict:
    """The inputs of the first node of a class."""
    return prompt[id_of(prompt, kind)]["inputs"]


def error_of(history: dict) -> dict:
    """The error that a prompt ended with."""
    assert history["status"]["status_str"] == "error"
    return next(message[1] for message in history["status"]["messages"] if message[0] == "execution_error")
