"""CogVideoX-1.5 for ComfyUI: registers the nodes, nothing else."""

# A test runner that imports this file by itself, outside its package, has no nodes to register.
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    #: Help pages, in web/docs, and what the pack adds to the page.
    WEB_DIRECTORY = "./web"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
