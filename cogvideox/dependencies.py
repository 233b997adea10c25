"""Say in a sentence which package is missing, too old, or at odds with another, before the code that needs it fails
with a stranger error."""

import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module, metadata, util
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .words import reason

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_ROOT = Path(__file__).parent.parent
REQUIREMENTS = _ROOT / "requirements.txt"
#: What is imported, where it is not called as the package is.
_MODULES = {"protobuf": "google.protobuf"}
#: The lowest torch, the first with ``torch.accelerator``. It is ComfyUI's own: ``requirements.txt`` does not name it.
TORCH = "2.6"
#: Libraries that fail where another package's version does not fit, which install.py mends.
_LIBRARIES = ("diffusers", "transformers", "accelerate")
#: What they say where one of their own modules cannot be imported.
_LAZY = re.compile("Failed to import (diffusers|transformers)|Could not import module")


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
    _require_torch()
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


def _require_torch() -> None:
    """Check torch's version, of what is imported if it is, as that is what runs.

    Raises:
        DependencyError: if it is missing or too old.
    """
    found = getattr(sys.modules.get("torch"), "__version__", None) or installed("torch")
    if found is None and importable("torch"):
        return
    if found is None or is_older(str(found), TORCH):
        what = f"PyTorch is {found}, which is too old; CogVideoX-1.5 needs {TORCH} or newer."
        if found is None:
            what = f"PyTorch is not installed; CogVideoX-1.5 needs {TORCH} or newer."
        raise DependencyError(
            f"{what} It is ComfyUI's own, and install.py leaves it as it is: update ComfyUI with its packages "
            "(portable ComfyUI on Windows: update\\update_comfyui_and_python_dependencies.bat), or install torch for "
            "your card from https://pytorch.org/get-started/locally. Then restart the program."
        )


def import_failure(error: BaseException) -> DependencyError | None:
    """Say what to do about a library that could not be imported; None where ``error`` is about something else.

    diffusers and transformers import packages that they can do without (xformers, bitsandbytes, torchvision) wherever
    they are installed. One that was built for another PyTorch then takes the whole library away.
    """
    is_one = isinstance(error, ImportError) or str(error).startswith("Failed to import ")
    if isinstance(error, MemoryError) or not (is_one or _is_while_importing(error)):
        return None
    chain = _chain(error)
    root, seen = chain[-1], {package for link in chain for package in _packages_in(link)}
    places = _packages_in(root)
    blamed = places[-1] if places else (getattr(root, "name", None) or "").partition(".")[0]
    blamed = _package_of(blamed) if blamed else ""
    is_library = bool(seen.intersection(_LIBRARIES)) or _LAZY.match(str(error)) is not None
    if blamed not in _LIBRARIES and blamed and _is_needed(blamed):
        return _unusable(blamed, root)
    if not is_library and blamed not in _LIBRARIES:
        # Code of others, which they import for themselves.
        return None
    if blamed in _LIBRARIES or not blamed or installed(blamed) is None:
        return _error(f"A library that CogVideoX-1.5 needs cannot be imported ({reason(root)}).")
    return DependencyError(
        f"The package {blamed} {installed(blamed)} does not work here ({reason(root)}), and diffusers or transformers, "
        f"which import it because it is installed, cannot be imported for it. Install its build for PyTorch "
        f'{installed("torch")}, or uninstall it, as CogVideoX-1.5 runs without: "{sys.executable}" -m pip uninstall '
        f"{blamed}. Then restart the program."
    )


def unimportable(modules: Iterable[str]) -> DependencyError | None:
    """Say which of some modules cannot be imported, and what to do; None where all can. For where a library has failed
    and said something else of it. Those that a package's version does not have are left out."""
    for name in modules:
        try:
            if "." not in name or importable(name):
                import_module(name)
        # Whatever a package raises.
        except Exception as error:
            package = _package_of(name.partition(".")[0])
            return import_failure(error) or _unusable(package, error)
    return None


def reinstall(package: str, what: str) -> DependencyError:
    """Make the error for a package that is needed and installed, and does not work; ``what`` says so in a sentence."""
    return DependencyError(
        f"{what} CogVideoX-1.5 cannot do without it. Install the package again: "
        f'"{sys.executable}" -m pip install --force-reinstall --no-deps --only-binary :all: {package}. Then restart '
        "the program."
    )


def _unusable(package: str, error: BaseException) -> DependencyError:
    found = installed(package)
    said = f"{package} {found or ''}".rstrip()
    # Of the version that is here: others were chosen to fit it.
    again = package if found is None or "+" in found else f"{package}=={found}"
    return reinstall(again, f"The package {said} cannot be imported ({reason(error)}).")


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those that it came of, the first one last. What another was only handled beside is not."""
    found = [error]
    while True:
        last = found[-1]
        deeper = last.__cause__
        context = last.__context__
        if deeper is None and context is not None and not last.__suppress_context__:
            deeper = context if isinstance(context, ImportError) or _is_while_importing(context) else None
        if deeper is None or any(deeper is one for one in found):
            return found
        found.append(deeper)


def _is_while_importing(error: BaseException) -> bool:
    """Whether an error arose in a module that was being imported: Python forgets one whose import has failed. What
    torch compiles runs like a module, and is passed over."""
    traceback = error.__traceback__
    while traceback is not None:
        name = _module_of(traceback)
        if traceback.tb_frame.f_code.co_name == "<module>" and name not in sys.modules and _is_others(name):
            return True
        traceback = traceback.tb_next
    return False


def _packages_in(error: BaseException) -> list[str]:
    """Return the packages in whose code an error arose, the innermost last; Python's own, torch's and this pack's are
    passed over."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        name = _module_of(traceback)
        if _is_others(name):
            found.append(name.partition(".")[0])
        traceback = traceback.tb_next
    return found


def _module_of(traceback: TracebackType) -> str:
    return str(traceback.tb_frame.f_globals.get("__name__") or "")


def _is_others(module: str) -> bool:
    """Whether a module is neither Python's own, nor torch's, nor this pack's."""
    own = {"", "__main__", __name__.partition(".")[0], "cogvideox", "commands", "interop", "generate", "nodes"}
    return module.partition(".")[0] not in {"torch", "importlib", *own, *sys.stdlib_module_names}


def _package_of(module: str) -> str:
    """Return the package that a module is installed with: pillow for PIL."""
    known = next((name for name, imported in _MODULES.items() if imported.partition(".")[0] == module), None)
    return known or metadata.packages_distributions().get(module, [module])[0]


def _is_needed(package: str) -> bool:
    """Whether a package is required, or by one that is."""
    needed, left = set[str](), list(map(_canonical, requirements()))
    while left:
        name = left.pop()
        # What torch needs comes with it.
        if name not in needed and name != "torch":
            needed.add(name)
            left += [_canonical(need.name) for need in (_needs(name) if installed(name) else ())]
    return _canonical(package) in needed


def _canonical(name: str) -> str:
    """Return a package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unfit() -> list[str]:
    """List the required packages that are missing, too old, or whose own needs the others that are installed do not
    meet."""
    return [name for name, lowest in requirements().items() if not is_at_least(name, lowest) or unmet_needs(name)]


def unmet_needs(name: str) -> list[str]:
    """List what an installed package says that it needs and does not find: ``huggingface-hub<3.0,>=1.32.0, but 0.36.2
    is installed``."""
    unmet = []
    for need in _needs(name):
        found = installed(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            unmet.append(
                f"{need.name}{need.specifier}, but {'it is not' if found is None else f'{found} is'} installed"
            )
    return unmet


def _needs(name: str) -> "list[Requirement]":
    """List what an installed package says that it needs here, extras left out."""
    if util.find_spec("packaging") is None:
        # transformers and accelerate bring it: without them there is more to tell than this.
        return []
    from packaging.requirements import Requirement

    needs = map(Requirement, metadata.requires(name) or ())
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


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
