"""What several test modules call."""

import generate

CLASSES = {
    "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLCogVideoX"),
}


def run_generate(capsys, *arguments):
    code = generate.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def inputs(node):
    types = node.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def call(pack, node_id, **values):
    node = pack.NODE_CLASS_MAPPINGS[node_id]()
    return getattr(node, node.FUNCTION)(**values)


def inside(module):
    """All that hooks of torch and diffusers can change on a module, and its weights."""
    kept = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            kept[name, key] = (
                list(value) if key.startswith("_") and "hook" in key and hasattr(value, "__iter__") else id(value)
            )
    return kept
