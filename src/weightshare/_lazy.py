"""Lazy exports (PEP 562): a package lists its public names; a name's file loads on first use."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(
    package: str, exports: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for ``package``.

    ``exports`` maps a submodule to the public names it holds. An empty sequence exports the
    submodule itself. Each name is looked up once and then lives in the package's namespace.
    """
    home = {name: module for module, names in exports.items() for name in names}
    public = sorted([*home, *(module for module, names in exports.items() if not names)])

    def __getattr__(name: str) -> Any:
        if name in home:
            value = getattr(import_module(f"{package}.{home[name]}"), name)
        elif name in exports:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import_module(package).__dict__[name] = value
        return value

    return __getattr__, lambda: public, public
