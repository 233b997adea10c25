"""The example workflows as the page queues them, small and short."""

import copy

from tests import workflows

_SMALL = {"width": 160, "height": 96, "length": 17, "steps": 3}


def example(name: str) -> dict:
    """An example workflow in API format, at a size that runs in seconds."""
    prompt = copy.deepcopy(workflows.to_api(workflows.read(next(path for path in workflows.FILES if path.stem == name))))
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in _SMALL.items() if key in node["inputs"]}
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
