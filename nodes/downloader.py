"""CogVideoX-1.5 Downloader: fetches a checkpoint from huggingface.co, but only once it is switched on."""

from ..cogvideox.choices import check_choice
from ..cogvideox.words import short
from . import host
from .base import Node

#: By choice in the graph: what the engine calls it.
CHECKPOINTS = {
    "CogVideoX1.5-5B (text to video, 31 GB)": "t2v",
    "CogVideoX1.5-5B-I2V (image to video, 31 GB)": "i2v",
    "CogVideoX-Fun-V1.5-5b-InP (inpainting, about 31 GB)": "fun-inp",
}


class Downloader(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Downloader"
    DESCRIPTION = (
        "Downloads a CogVideoX-1.5 checkpoint from huggingface.co into models/CogVideo: only the files that are "
        "needed and not there yet, each checked. Looks at the free space first, can be cancelled, and goes on where "
        "it stopped. Does nothing until download is switched on."
    )
    SEARCH_ALIASES = [
        "download cogvideo",
        "cogvideox download",
        "huggingface",
        "get model",
        "checkpoint downloader",
        "下载模型",
    ]
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("model_name", "report")
    OUTPUT_TOOLTIPS = (
        "The name to choose in CogVideoX-1.5 Model Loader.",
        "What was downloaded and where it is, or what would be. Also shown on the node.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "checkpoint": (
                    list(CHECKPOINTS),
                    {
                        "tooltip": (
                            "What to download: the model that makes videos from a prompt, the one that starts from an "
                            "image, or the one that makes parts of a video anew."
                        )
                    },
                ),
                "download": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": (
                            "Off: nothing is downloaded and the network is not touched; the node only says what it "
                            "would do. On: running the graph downloads what is missing. Running it again after a "
                            "cancel goes on where it stopped."
                        ),
                    },
                ),
            }
        }

    @classmethod
    def checks(cls, checkpoint=None):
        return [("checkpoint", check_choice, "checkpoint", checkpoint, CHECKPOINTS)]

    @classmethod
    def IS_CHANGED(cls, checkpoint=None, download=False):
        """Tell whether the checkpoint is there: one that was deleted since is downloaded again, and no other."""
        from ..cogvideox.checkpoint.download import checkpoint_folder
        from ..cogvideox.checkpoint.layout import is_checkpoint

        def look():
            check_choice("checkpoint", checkpoint, CHECKPOINTS)
            return download, is_checkpoint(checkpoint_folder(CHECKPOINTS[checkpoint], host.download_folder()))

        return cls.fingerprint({"checkpoint": checkpoint, "download": download}, look)

    def execute(self, checkpoint, download=False):
        from ..cogvideox.checkpoint.download import REPOSITORIES, checkpoint_folder, download_checkpoint

        check_choice("checkpoint", checkpoint, CHECKPOINTS)
        which, folder = CHECKPOINTS[checkpoint], host.download_folder()
        target = checkpoint_folder(which, folder)
        if download:
            host.show(f"Downloading {REPOSITORIES[which]} into {short(target, 400)} …")
            try:
                download_checkpoint(which, folder, on_progress=host.NodeEvents().counter("downloading", "B"))
            except (ValueError, RuntimeError) as error:
                host.show(f"Not downloaded: {error}")
                raise
            report = (
                f"{REPOSITORIES[which]} is complete in {short(target, 400)}. Press R to refresh, then choose "
                f"{target.name} in CogVideoX-1.5 Model Loader."
            )
        else:
            report = (
                f"Nothing was downloaded, because download is off. Switched on, it would fetch {REPOSITORIES[which]} "
                f"(about 31 GB, less what is there already) from huggingface.co into {short(target, 400)}."
            )
        host.tell(report)
        return target.name, report
