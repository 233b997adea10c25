"""Prints what the project, generate.py on its own and the tests need, a requirement a line: ``pip install -r`` is
spared building a package of which nothing is installed.
"""

from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["standalone"], *extras["test"], sep="\n")
