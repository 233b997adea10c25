"""Make the packages of ``requirements.txt`` fit together, and change nothing else.

ComfyUI Manager runs this after it has installed the requirements; by hand: ``python install.py`` with ComfyUI's Python.

The Manager hands the lines to pip one by one, so pip sees one package at a time: beside a transformers 4, which wants
an older huggingface-hub, it takes the newest diffusers, which cannot be imported with that. Asked for all lines at
once, with everything else held at its version, pip finds the diffusers that fits. If all fit already, nothing is done
and no network is needed.
"""

import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

# The python_embeded of ComfyUI's Windows portable has a ._pth file, and so does not look beside the script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cogvideox.dependencies import REQUIREMENTS, unfit


def main() -> int:
    """Install what does not fit, and return pip's exit status; 0 if there was nothing to do."""
    wrong = unfit()
    if not wrong:
        return 0
    print(f"CogVideoX-1.5: making {', '.join(wrong)} fit the packages that are installed")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(held(wrong)), encoding="utf-8")
        if install("--constraint", str(constraints)) == 0:
            return 0
    # What is installed leaves no choice, such as a transformers that is too old: then the rest has to follow.
    return install()


def held(free: list[str]) -> list[str]:
    """List a constraint for each installed package that keeps it at its version, except those named."""
    names = {normal(name) for name in free}
    found = {normal(dist.metadata["Name"]): dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in names]


def normal(name: str) -> str:
    """Spell a package's name as pip compares it."""
    return name.lower().replace("_", "-")


def install(*options: str) -> int:
    """Have pip install the requirements, and return its exit status."""
    # ComfyUI Desktop's environment has uv and no pip.
    pip = ["pip"] if util.find_spec("pip") else ["uv", "pip"]
    return subprocess.run([sys.executable, "-m", *pip, "install", "-r", str(REQUIREMENTS), *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
