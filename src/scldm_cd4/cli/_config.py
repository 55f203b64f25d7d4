"""Training configs in the style of the reference: composed by Hydra, read as data."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scldm_cd4._errors import DataError
from scldm_cd4.checkpoint.job import Job, refuse_resolvers

PACKAGED = Path(__file__).parents[1] / "configs"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")


def compose(name: str, config_dir: Path | None, overrides: Sequence[str]) -> Job:
    """Compose a config from its list of defaults and changes; nothing in it is instantiated or resolved.

    Parameters
    ----------
    name
        Of the config, without ending.
    config_dir
        Folder of the configs; None for the packaged ones.
    overrides
        Changes in Hydra's grammar, such as ``model.batch_size=16``.

    Raises
    ------
    DataError
        Hydra is not installed, or there is no such config or key.
    CheckpointError
        A config or a change asks for a resolver that could read from outside, such as ``oc.env``.
    """
    folder = (config_dir or PACKAGED).expanduser().resolve()
    if _NAME.fullmatch(name) is None or ".." in name:
        raise DataError(f"--config-name {name!r} is no name of a config")
    if not folder.is_dir():
        raise DataError(f"--config-dir {folder} is no folder")
    files = sorted(folder.rglob("*.yaml"))
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise DataError(f"there is no config {name!r} in {folder}; there are: {known}")
    for path in files:
        refuse_resolvers(path.read_text(encoding="utf-8", errors="replace"), str(path))
    for text in overrides:
        refuse_resolvers(text, "a change of the config")
    try:
        import hydra
        from omegaconf import OmegaConf
    except ImportError as error:
        raise DataError("--config-name needs Hydra: pip install 'scldm_cd4[hydra]'; or take --preset cd4") from error
    with _explained(name), hydra.initialize_config_dir(str(folder), version_base="1.3"):
        config = hydra.compose(name, overrides=list(overrides))
        values: Any = OmegaConf.to_container(config, resolve=False)
    return Job(values, name)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise DataError(f"the config {name!r} cannot be composed: {' '.join(str(error).split())}") from error
