"""Packages that only some methods need, imported when they are used."""

from importlib import import_module
from types import ModuleType


class MissingPackageError(ImportError):
    """A package that only some methods need is not installed; the message is one line with the remedy."""


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """A module of a package that an extra of ours installs.

    Args:
        module: what to import, for example "torch_geometric.nn".
        package: what it is called on PyPI.
        extra: of ours, for example "graph".

    Raises:
        MissingPackageError: in one line that says how to install it, where it is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"This needs {package}, which is not installed: pip install 'hf-masked[{extra}]' or {package}."
        ) from error


def torch_geometric(module: str) -> ModuleType:
    """A module of torch-geometric, for example "utils"; see `import_extra`."""
    return import_extra(f"torch_geometric.{module}", "torch-geometric", "graph")
