"""Packages that come with an extra: which extra brings which, and one sentence where one is missing.

A config or tokenizer that needs such a package names it in an attribute or property ``packages``, a tuple of import names, so
that a run can be refused before hours are spent.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vlaflow.errors import CapabilityError

EXTRAS = {
    "metaworld": "metaworld",
    "mujoco": "metaworld",
    "gymnasium": "metaworld",
    "accelerate": "train",
    "psutil": "train",
    "tensorboard": "train",
    "matplotlib": "viz",
    "jinja2": "viz",
    "transformers": "vlm",
    "huggingface_hub": "hub",
    "peft": "lora",
    "bitsandbytes": "bits",
    "tokenizers": "tokens",
    "websockets": "serve",
    "msgpack": "serve",
    "openvino": "openvino",
}

PAGES = ("jinja2", "matplotlib")
"""What every page with plots needs."""


def missing(package: str, what: str = "This", extra: str | None = None) -> str:
    """The sentence for a package that is not installed; a package of no extra is installed by its own name."""
    extra = extra or EXTRAS.get(package)
    source = f"'vlaflow[{extra}]'" if extra else package
    return f"{what} needs the package '{package}', which is not installed: pip install {source}"


def require(*packages: str, what: str = "This", extra: str | None = None) -> None:
    """Refuse to begin what will need a package that is not installed; nothing is imported.

    Args:
        packages: import names.
        what: what needs them; the sentence begins with it.
        extra: the extra that brings them all; by default each package's own.

    Raises:
        CapabilityError: naming the first that is missing, and the extra that brings it.
    """
    for package in packages:
        if not _installed(package):
            raise CapabilityError(missing(package, what, extra))


def folders(package: str) -> list[Path]:
    """Where an installed package's files are, without importing it; none where it is not installed."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def packages_of(config: object) -> tuple[str, ...]:
    """What a config and every config inside it say they need, each package once."""
    from dataclasses import fields, is_dataclass

    found = [*getattr(config, "packages", ())]
    if is_dataclass(config):
        found += [package for field in fields(config) for package in packages_of(getattr(config, field.name))]
    return tuple(dict.fromkeys(found))


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
    except ValueError:  # a module without a spec is loaded already
        return True
