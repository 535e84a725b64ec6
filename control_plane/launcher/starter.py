"""Makes the starter model, so that a new installation has something to serve: train, export, install.

Every step's result is a folder that is complete or absent, so each step first asks whether it is already done, and a
killed start goes on where it was.

    LLMOS_HOME/checkpoints/<name>/   ─►   LLMOS_HOME/versions/<name>/1/   ─►   model_repository/<name>/1/
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from control_plane.launcher.console import Screen
from control_plane.launcher.processes import child_environment
from control_plane.registry.model_directory import InstalledModel, install, is_sealed, remove_version
from control_plane.registry.places import Place
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.subprocesses import run_child
from triton_backend.version_folder import digest

FIRST_VERSION = 1


def make_starter(settings: Settings, screen: Screen) -> InstalledModel:
    """Train, export and install the starter, from wherever an earlier start came to. Raises ChildFailed."""
    name = settings.starter_model
    checkpoint = settings.checkpoints_dir / name
    if not (checkpoint / "config.json").is_file():
        train = (sys.executable, "-m", "control_plane.training.recipes.pretrain")
        _run(settings, screen, f"train {name}, a small English model", train, checkpoint)
    version_folder = _exported(settings)
    if not is_sealed(version_folder):
        export = (sys.executable, "-m", "exporters", str(checkpoint))
        _run(settings, screen, f"export {name} to ONNX and prove it equal", export, version_folder)
    with screen.step(f"install {name} version {FIRST_VERSION}"):
        # Whatever lies there was not complete.
        remove_version(settings.model_repository, Place(name, FIRST_VERSION))
        return install(version_folder, settings.model_repository, name, FIRST_VERSION)


def own_digest(settings: Settings) -> str | None:
    """Of the starter that was exported here, if it was."""
    folder = _exported(settings)
    return digest(folder) if is_sealed(folder) else None


def _exported(settings: Settings) -> Path:
    return settings.versions_dir / settings.starter_model / str(FIRST_VERSION)


def _run(settings: Settings, screen: Screen, title: str, command: Sequence[str], out: Path) -> None:
    """Run a child that makes the folder ``out``; both of ours rename it into place when it is complete."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with screen.child(title) as on_event:
        run_child([*command, str(out)], on_event, child_environment(settings), PROJECT_ROOT)
