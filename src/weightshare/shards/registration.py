"""Make PEFT know the method: a member of its enum, and its four tables."""

from importlib.metadata import version

from weightshare.errors import UserError

NAME = "MOS"
SUPPORTED = ((0, 20), (0, 22))
"""PEFT releases from the first up to, but without, the second."""


def register() -> None:
    """Register Mixture of Shards with PEFT; a second call changes nothing.

    PEFT has no public way to bring a method from outside: its registration asks for a member of
    the ``PeftType`` enum, which is added here.

    Raises:
        UserError: PEFT is of a release this was not tried with, or has its own method of that name.
    """
    check_release(version("peft"))
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType, register_peft_method

    from weightshare.shards.model import MosModel
    from weightshare.shards.mos_config import MosConfig

    if NAME in PeftType.__members__:
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME]) is MosConfig:
            return
        raise UserError(
            f"The installed PEFT already has a method called {NAME}; use a release below 0.22."
        )
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    # From Python 3.12 on members are class attributes, before they are found in the maps.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    register_peft_method(name=NAME.lower(), config_cls=MosConfig, model_cls=MosModel)


def check_release(installed: str) -> None:
    """Raise ``UserError`` for a PEFT release outside the supported range."""
    major, minor = (int(part) for part in installed.split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) < SUPPORTED[1]:
        raise UserError(
            f"PEFT {installed} is installed, but Mixture of Shards works with 0.20 and 0.21; "
            "install it with: pip install 'peft>=0.20,<0.22'."
        )
