"""Say in a sentence which package is missing, too old, or at odds with another, before the code that needs it fails
with a stranger error."""

import re
import sys
from functools import cache
from importlib import import_module, metadata, util
from pathlib import Path

from .words import reason

_ROOT = Path(__file__).parent.parent
REQUIREMENTS = _ROOT / "requirements.txt"
#: What is imported, where it is not called as the package is.
_MODULES = {"protobuf": "google.protobuf"}


class DependencyError(RuntimeError):
    """A package this pack needs is missing, older than it must be, or cannot run with the others that are installed."""


@cache
def requirements() -> dict[str, str]:
    """Read the packages of ``requirements.txt`` and the lowest version of each: the pack's one list of them."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split(">=") for line in (line.split("#")[0].strip() for line in lines) if line)


@cache
def require_dependencies() -> None:
    """Check that every required package is installed in a version that works. Once they are, they are not checked
    again.

    Raises:
        DependencyError: naming package, version found, what is needed and the command to install it.
    """
    for name, lowest in requirements().items():
        found = installed(name)
        if found is None:
            raise _error(f"The package {name} is not installed; CogVideoX-1.5 needs {name} {lowest} or newer.")
        if is_older(found, lowest):
            raise _error(
                f"The package {name} is installed as {found}, which is too old; CogVideoX-1.5 needs {name} {lowest} "
                "or newer."
            )
    for name in requirements():
        needs = unmet_needs(name)
        try:
            # What a package asks for is often more than it takes to run, so only the import tells.
            if needs:
                import_module(_MODULES.get(name, name))
        except ImportError as error:
            raise _error(
                f"The package {name} {installed(name)} cannot be imported: it needs {needs[0]} ({error}). Other "
                "packages asked for that version when they were installed after it."
            ) from error


def import_failure(error: BaseException) -> DependencyError | None:
    """Say what to do about a library that could not be imported; None where ``error`` is about something else.

    diffusers and transformers import packages that they can do without (xformers, bitsandbytes, torchvision) wherever
    they are installed. One that was built for another PyTorch then takes the whole library away.
    """
    if not isinstance(error, ImportError) and not str(error).startswith("Failed to import "):
        return None
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    blamed = _raised_in(root)
    if blamed is None or blamed in {_MODULES.get(name, name).partition(".")[0] for name in requirements()}:
        return _error(f"A library that CogVideoX-1.5 needs cannot be imported ({reason(root)}).")
    found = f"{blamed} {installed(blamed) or ''}".rstrip()
    return DependencyError(
        f"The package {found} does not work here ({reason(root)}), and diffusers or transformers, which import it "
        f"because it is installed, cannot be imported for it. Install its build for PyTorch {installed('torch')}"
        f', or uninstall it, as CogVideoX-1.5 runs without: "{sys.executable}" -m pip uninstall {blamed}. Then restart '
        "the program."
    )


def _raised_in(error: BaseException) -> str | None:
    """Return the package in whose code an error arose; Python's own and torch's are passed over."""
    blamed, traceback = None, error.__traceback__
    while traceback is not None:
        package = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in {"torch", "importlib", *sys.stdlib_module_names}:
            blamed = package
        traceback = traceback.tb_next
    return blamed


def unfit() -> list[str]:
    """List the required packages that are missing, too old, or whose own needs the others that are installed do not
    meet."""
    return [name for name, lowest in requirements().items() if not is_at_least(name, lowest) or unmet_needs(name)]


def unmet_needs(name: str) -> list[str]:
    """List what an installed package says that it needs and does not find: ``huggingface-hub<3.0,>=1.32.0, but 0.36.2
    is installed``."""
    if util.find_spec("packaging") is None:
        # transformers and accelerate bring it: without them there is more to tell than this.
        return []
    from packaging.requirements import Requirement

    unmet = []
    for line in metadata.requires(name) or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            found = installed(need.name)
            if found is None or not need.specifier.contains(found, prereleases=True):
                unmet.append(
                    f"{need.name}{need.specifier}, but {'it is not' if found is None else f'{found} is'} installed"
                )
    return unmet


def is_at_least(name: str, version: str) -> bool:
    """Return whether a package is installed in a version, or a newer one."""
    found = installed(name)
    return found is not None and not is_older(found, version)


def installed(name: str) -> str | None:
    """Return the version of a package that is installed, or None."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError):
        return None


def importable(name: str) -> bool:
    """Return whether there is a module of that name. What other programs put in the place of a module, without what
    finds it, is none."""
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def is_older(version: str, lowest: str) -> bool:
    """Compare two versions by their numbers: ``1.9.0`` is older than ``1.10``."""
    return _numbers(version) < _numbers(lowest)


def _error(what: str) -> DependencyError:
    return DependencyError(
        f'{what} Run, with ComfyUI\'s Python: python "{_ROOT / "install.py"}" (portable ComfyUI on Windows: '
        "python_embeded\\python.exe instead of python). It installs what is missing in versions that fit together and "
        "leaves the rest as it is. Then restart ComfyUI."
    )


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else (0,)
