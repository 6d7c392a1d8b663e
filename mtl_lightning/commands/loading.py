"""A trained module from the folder of its run, without the script that made it."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path

import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from mtl_lightning.commands.parsing import instantiate, one_line
from mtl_lightning.modules.checkpoint_io import read_checkpoint


def load(run_dir: str | Path, checkpoint: str | Path) -> LightningModule:
    """Return the module of a run of ``mtl-lightning fit`` with the state of a checkpoint, on the CPU, to be evaluated.

    The module is made as ``config.yaml`` in the folder of the run says, so its classes have to be importable. Neither
    data nor trainer are made. The checkpoint is read as tensors and plain values only, which runs no code.

    Args:
        run_dir: The folder of the run.
        checkpoint: The file, relative to ``run_dir`` or absolute.

    Raises:
        FileNotFoundError: If one of the two files is not there.
        ValueError: If the configuration has no model that can be made, or the checkpoint is not one of it.

    Example:
        What a run leaves, made by hand:

        >>> import tempfile, torch
        >>> from mtl_lightning.cli import load
        >>> folder = Path(tempfile.mkdtemp())
        >>> def layer(inputs, outputs):
        ...     return {"class_path": "torch.nn.Linear", "init_args": {"in_features": inputs, "out_features": outputs}}
        >>> network = {"encoder": layer(4, 3), "heads": {"price": layer(3, 1), "risk": layer(3, 1)}}
        >>> arguments = {
        ...     "network": {"class_path": "mtl_lightning.networks.MultiHeadNetwork", "init_args": network},
        ...     "tasks": [{"name": name, "loss": "torch.nn.MSELoss"} for name in ("price", "risk")],
        ...     "preferences": [[0.3, 0.7], [0.7, 0.3]],
        ...     "optimizer": "torch.optim.Adam",
        ... }
        >>> content = {"model": {"class_path": "mtl_lightning.modules.MT2OModule", "init_args": arguments}}
        >>> _ = (folder / "config.yaml").write_text(yaml.safe_dump(content))
        >>> torch.save({"state_dict": make_module(content).state_dict()}, folder / "last.ckpt")
        >>> load(folder, "last.ckpt").select((0.3, 0.7))(torch.ones(2, 4))["risk"].shape
        torch.Size([2, 1])
    """
    config = Path(run_dir) / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(
            f"A run of `mtl-lightning fit` should have left {str(config)!r}. Found none. Make the module as for the "
            "run, and give it the `state_dict` of the checkpoint."
        )
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(config)!r} should be a YAML file. Found: {one_line(str(error))}.") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{str(config)!r} should be the configuration of a run, with a `model`. Found none.")
    state = read_checkpoint(Path(run_dir) / checkpoint)
    module = make_module(content)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])
    return module.eval()


def make_module(content: dict[str, object]) -> LightningModule:
    """Return the module of a configuration of ``mtl-lightning fit``, of which only ``model`` is read.

    Raises:
        ValueError: If a class or an argument does not exist, or a value has the wrong type.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    try:
        made = instantiate(parser, parser.parse_object({"model": content["model"]}))
    except (ArgumentError, TypeError) as error:
        raise ValueError(
            f"The `model` of the configuration should be one that can be made. {one_line(str(error))}"
        ) from error
    module: LightningModule = made.model
    return module
