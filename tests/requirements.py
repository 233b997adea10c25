"""Prints what the project, generate.py on its own and the tests need, a requirement a line: ``pip install -r`` is
spared building a package of which nothing is installed.

Run as ``python -m tests.requirements``; with ``--without-torch``, only what can be installed before torch is there.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

#: Depend on torch.
LATER = {"accelerate", "peft", "torch"}

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
needed = [*project["dependencies"], *extras["standalone"], *extras["test"]]
if "--without-torch" in sys.argv:
    needed = [one for one in needed if re.match(r"[\w-]+", one)[0] not in LATER]
print(*needed, sep="\n")
