"""Say in a sentence which package is missing or too old, before the code that needs it fails with a stranger one."""

import re
from functools import cache
from importlib import metadata
from pathlib import Path

_REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


class DependencyError(RuntimeError):
    """A package this pack needs is missing or older than it must be."""


@cache
def requirements() -> dict[str, str]:
    """The packages of ``requirements.txt`` and the lowest version of each: the pack's one list of them."""
    lines = _REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split(">=") for line in (line.split("#")[0].strip() for line in lines) if line)


def require_dependencies() -> None:
    """Check that every required package is installed in a version that works.

    Raises:
        DependencyError: naming package, version found, version needed and the command to install it.
    """
    for name, lowest in requirements().items():
        if not is_at_least(name, lowest):
            found = _installed(name)
            state = "is not installed" if found is None else f"is installed as {found}, which is too old"
            raise DependencyError(
                f"The package {name} {state}; CogVideoX-1.5 needs {name} {lowest} or newer. Install it in ComfyUI's Python environment "
                f'with: python -m pip install "{name}>={lowest}" (portable ComfyUI on Windows: python_embeded\\python.exe -m pip …), '
                "then restart ComfyUI."
            )


def is_at_least(name: str, version: str) -> bool:
    """Whether a package is installed in a version, or a newer one."""
    found = _installed(name)
    return found is not None and _numbers(found) >= _numbers(version)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else (0,)
